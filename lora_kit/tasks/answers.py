"""What a language model generates for held-out rows: scores of its completions, and samples."""

from __future__ import annotations

from typing import Any

import numpy as np

from lora_kit.data.rows import Row, Rows
from lora_kit.tasks import metrics
from lora_kit.tasks.batches import IGNORED
from lora_kit.tasks.measure import generate
from lora_kit.tasks.task import Processor, Score

Question = tuple[list[int], list[int]]  # tokens of a prompt, and of the completion expected
_SHOWN_EACH = 2  # samples of a kind: the first, the largest gain, the largest loss
_SHOWN_TOKENS = 48
_LONGEST = 512  # tokens of a completion
_LONGER = 8  # tokens more than the longest one expected


def question(row: Row, chat: bool) -> Question:
    """The prompt of a row and the completion that was held out; of a text the first half, 32 tokens
    at most, and what follows. chat: rows are conversations."""
    ids = row["input_ids"].tolist()
    trained = np.flatnonzero(row["labels"] != IGNORED)
    # The last run of labels: a completion after others, in a longer conversation.
    first = trained[np.r_[True, np.diff(trained) > 1]][-1] if len(trained) else 0
    if chat and first > 0:
        return ids[:first], ids[first : trained[-1] + 1]
    cut = min(32, (len(ids) + 1) // 2)
    return ids[:cut], ids[cut : cut + _SHOWN_TOKENS]


def drawn(rows: Rows, most: int, seed: int) -> list[int]:
    """The rows that completions are generated for, at most so many."""
    chosen = np.random.default_rng(seed).permutation(len(rows))[:most]
    return sorted(chosen.tolist())


def expected(rows: Rows, numbers: list[int], chat: bool, processor: Processor) -> list[str]:
    return [text_of(processor, question(rows[n], chat)[1]) for n in numbers]


def completion_scores(
    model: Any, rows: Rows, chat: bool, processor: Processor, names: list[str], numbers: list[int]
) -> list[Score]:
    """The score of each metric on greedy completions of these rows.

    Raises:
        UserError: a metric's script does not take a completion.
    """
    asked = [question(rows[n], chat) for n in numbers]
    wanted = [text_of(processor, answer) for _, answer in asked]
    # A completion that is longer than every right one is not made right by its rest.
    length = min(_LONGEST, max(len(answer) for _, answer in asked) + _LONGER)
    found = generate(model, processor, [prompt for prompt, _ in asked], length)
    scores = []
    for name in names:
        each = metrics.score(name, found, wanted)
        sums = np.stack([each, np.ones(len(each))], 1)
        scores.append(Score(name, sums, units=rows.column("unit")[numbers]))
    return scores


def room_for_completion(names: list[str]) -> int:
    """Tokens beyond the longest row that generating may take."""
    return _LONGER if names else 0


def samples(
    model: Any, rows: Rows, chat: bool, processor: Processor, base: Score, adapted: Score
) -> list[dict[str, Any]]:
    """What base and adapted generate, greedily: for the first held-out units, and for those on
    which the adapter gained and lost most.

    Args:
        model: a PEFT model; its adapter is switched off for the base.
        base, adapted: the losses of both, on the same units.
    """
    assert base.units is not None
    before, after = (score.sums[:, 0] / score.sums[:, 1] for score in (base, adapted))
    by_gain = np.argsort(after - before, kind="stable").tolist()
    ways = {
        "first": list(range(len(before))),
        "largest gain": by_gain,
        "largest loss": by_gain[::-1],
    }
    chosen: dict[int, str] = {}
    for why, ordered in ways.items():
        fresh = [n for n in ordered if n not in chosen]
        chosen |= dict.fromkeys(fresh[:_SHOWN_EACH], why)
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
    """What tokens spell; a character that was cut apart at an end is left out."""
    text: str = processor.decode(ids, skip_special_tokens=True)
    return text.strip("\N{REPLACEMENT CHARACTER}")
