"""Generated completions for held-out rows: their scores, and samples for the report."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from lora_kit.data.rows import Row, Rows
from lora_kit.schema import Json
from lora_kit.tasks import metrics
from lora_kit.tasks.batches import IGNORED
from lora_kit.tasks.measure import generate
from lora_kit.tasks.task import Processor, Score, mean_score

if TYPE_CHECKING:
    from lora_kit.adapter.load import PeftModel

Question = tuple[list[int], list[int]]  # tokens of a prompt and of its reference completion
_SHOWN_EACH = 2  # samples of each kind: first, largest gain, largest loss
_SHOWN_TOKENS = 48
_LONGEST = 512  # tokens of a completion at most
BEYOND_REFERENCE = 8  # tokens generated beyond the longest reference completion


def question(row: Row, chat: bool) -> Question:
    """The prompt of a row and its reference completion: the last completion of a conversation.

    For a text, or a conversation with a supervised prompt: the first half, at most 32 tokens, and
    up to 48 tokens after it. chat: rows are conversations.
    """
    ids = row["input_ids"].tolist()
    trained = np.flatnonzero(row["labels"] != IGNORED)
    starts = trained[np.diff(trained, prepend=-2) > 1]  # the first token of each completion
    if chat and len(starts) and starts[-1] > 0:
        return ids[: starts[-1]], ids[starts[-1] : trained[-1] + 1]
    cut = min(32, (len(ids) + 1) // 2)
    return ids[:cut], ids[cut : cut + _SHOWN_TOKENS]


def drawn(rows: Rows, most: int, seed: int) -> list[int]:
    """A random sample of at most `most` rows to generate completions for."""
    chosen = np.random.default_rng(seed).permutation(len(rows))[:most]
    return sorted(chosen.tolist())


def completion_scores(
    model: PeftModel,
    rows: Rows,
    chat: bool,
    processor: Processor,
    names: list[str],
    numbers: list[int],
) -> list[Score]:
    """The score of each metric on greedy completions of these rows.

    Returns:
        Scores whose `about` has the completions: `generated`, and the `expected` ones.

    Raises:
        UserError: a metric's script does not accept a completion.
    """
    asked = [question(rows[n], chat) for n in numbers]
    wanted = [text_of(processor, answer) for _, answer in asked]
    # Tokens beyond the longest reference cannot make a completion right.
    length = min(_LONGEST, max(len(answer) for _, answer in asked) + BEYOND_REFERENCE)
    found = generate(model, processor, [prompt for prompt, _ in asked], length)
    scores = []
    units, about = rows.column("unit")[numbers], {"generated": found, "expected": wanted}
    for name in names:
        score = mean_score(name, metrics.score(name, found, wanted), units=units)
        scores.append(replace(score, about=about))
    return scores


def answers_of(rows: Rows, chat: bool, processor: Processor) -> Counter[str]:
    """{reference completion: rows that have it}. Replayed text has none: all but its first token
    is supervised."""
    asked = (question(row, chat) for row in rows)
    by_tokens = Counter(tuple(answer) for prompt, answer in asked if len(prompt) > 1)
    found = Counter[str]()
    for tokens, times in by_tokens.items():
        found[text_of(processor, list(tokens))] += times
    return found


def samples(
    model: PeftModel, rows: Rows, chat: bool, processor: Processor, base: Score, adapted: Score
) -> list[Json]:
    """Greedy generations of base and adapted model for the first held-out units, and for those with
    the largest gain and the largest loss.

    Args:
        model: a PEFT model; its adapter is disabled for the base.
        base, adapted: the losses of both, on the same units.
    """
    assert base.units is not None
    before, after = (score.sums[:, 0] / score.sums[:, 1] for score in (base, adapted))
    by_gain = np.argsort(after - before, kind="stable").tolist()
    orders = {
        "first": list(range(len(before))),
        "largest gain": by_gain,
        "largest loss": by_gain[::-1],
    }
    chosen: dict[int, str] = {}  # index among the scored units -> why it is shown
    for why, order in orders.items():
        others = [n for n in order if n not in chosen]
        chosen |= dict.fromkeys(others[:_SHOWN_EACH], why)
    units = rows.column("unit")
    first_row = {int(unit): row for row, unit in reversed(list(enumerate(units.tolist())))}
    asked = [question(rows[first_row[int(base.units[n])]], chat) for n in chosen]
    prompts = [prompt for prompt, _ in asked]
    found = generate(model, processor, prompts, _SHOWN_TOKENS)
    with model.disable_adapter():
        found_before = generate(model, processor, prompts, _SHOWN_TOKENS)
    return [
        {
            "chosen": why,
            "prompt": text_of(processor, asked[number][0]),
            "expected": text_of(processor, asked[number][1]),
            "base": found_before[number],
            "adapted": found[number],
            "loss": {"base": round(float(before[n]), 4), "adapted": round(float(after[n]), 4)},
        }
        for number, (n, why) in enumerate(chosen.items())
    ]


def text_of(processor: Processor, ids: list[int]) -> str:
    """The text of tokens, without characters that are cut off at an end."""
    text: str = processor.decode(ids, skip_special_tokens=True)
    return text.strip("\N{REPLACEMENT CHARACTER}")
