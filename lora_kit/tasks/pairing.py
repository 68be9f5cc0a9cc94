"""Prompt use: do completions depend on their prompts? This control catches shuffled labels: a model
trained on them learns how frequent each completion is, so its loss still falls."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_kit.data.rows import Row, Rows
from lora_kit.data.splits import FEWEST_TO_EVALUATE
from lora_kit.schema import Json
from lora_kit.tasks.answers import Question
from lora_kit.tasks.batches import IGNORED
from lora_kit.tasks.bootstrap import interval
from lora_kit.tasks.measure import measure

if TYPE_CHECKING:
    from lora_kit.adapter.load import PeftModel

KEPT = 0.75  # smallest share of the base's prompt use that must remain


def prompt_use(model: PeftModel, pad_id: int, questions: list[Question], seed: int) -> Json | None:
    """How much a completion's own prompt lowers its loss: the loss after another completion's
    prompt, minus the loss after its own.

    Args:
        model: a PEFT model; its adapter is disabled to measure the base.

    Returns:
        {"rows", "base", "adapted", "ci95" of the adapted one, "blind"}, nats per token. Blind: the
        interval is not above 0, or the adapted model's prompt use is below KEPT times the base's
        (with 95% confidence), which does not happen when training on true pairs. None if fewer than
        20 completions can be paired with another prompt.
    """
    own, other = pairs(questions)
    if len(own) < FEWEST_TO_EVALUATE:
        return None
    adapted = measure(model, other, pad_id).nats - measure(model, own, pad_id).nats
    with model.disable_adapter():
        base_own = measure(model, own, pad_id)
        base = measure(model, other, pad_id).nats - base_own.nats
    low, high = interval(adapted, base_own.tokens, seed)
    lost = interval(adapted - KEPT * base, base_own.tokens, seed)[1] < 0
    tokens = base_own.tokens.sum()
    return {
        "rows": len(own),
        "base": round(float(base.sum() / tokens), 4),
        "adapted": round(float(adapted.sum() / tokens), 4),
        "ci95": [round(low, 4), round(high, 4)],
        "blind": low <= 0 or lost,
    }


def pairs(questions: list[Question]) -> tuple[Rows, Rows]:
    """Every completion after its own prompt, and after the next prompt with another completion; no
    row becomes longer than the longest one.

    >>> own, other = pairs([([1, 2], [9]), ([3], [9]), ([4], [8])])
    >>> [row["input_ids"].tolist() for row in other]
    [[4, 9], [4, 9], [1, 2, 8]]
    """
    own: list[Row] = []
    other: list[Row] = []
    longest = max(len(prompt + answer) for prompt, answer in questions)
    for n, (prompt, answer) in enumerate(questions):
        following = [*questions[n + 1 :], *questions[:n]]
        fitting = (p for p, a in following if a != answer and len(p + answer) <= longest)
        other_prompt = next(fitting, None)
        if other_prompt:
            own.append(_row(prompt, answer, len(own)))
            other.append(_row(other_prompt, answer, len(other)))
    return Rows.of(own), Rows.of(other)


def _row(prompt: list[int], answer: list[int], unit: int) -> Row:
    labels = [IGNORED] * len(prompt) + answer
    return {"input_ids": prompt + answer, "labels": labels, "bytes": 0, "unit": unit}
