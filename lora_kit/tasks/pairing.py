"""Do the answers depend on the prompts? A model that learned from shuffled labels knows which
answers occur, and not which of them belongs to a prompt: its loss falls all the same."""

from __future__ import annotations

from typing import Any

from lora_kit.data.rows import Row, Rows
from lora_kit.tasks.batches import IGNORED
from lora_kit.tasks.bootstrap import FEWEST_UNITS, interval
from lora_kit.tasks.measure import measure

KEPT = 0.75  # share of what prompts were worth to the base that has to be left
Question = tuple[list[int], list[int]]  # tokens of a prompt, and of its answer


def prompt_use(
    model: Any, pad_id: int, questions: list[Question], seed: int
) -> dict[str, Any] | None:
    """What its own prompt is worth to an answer: the loss after a prompt with another answer, minus
    the loss after its own.

    Args:
        model: a PEFT model; its adapter is switched off to measure the base.

    Returns:
        {"rows", "base", "adapted", "ci95" of the adapted one, "blind"}, nats per token. Blind: it
        may be nothing, or (95% sure) it is less than KEPT of what it was to the base, which
        learning from true pairs does not bring about. None where fewer than 20 answers have a
        different one beside them.
    """
    own, other = pairs(questions)
    if len(own) < FEWEST_UNITS:
        return None
    adapted = measure(model, other, pad_id).nats - measure(model, own, pad_id).nats
    with model.disable_adapter():
        right = measure(model, own, pad_id)
        base = measure(model, other, pad_id).nats - right.nats
    low, high = interval(adapted, right.tokens, seed)
    lost = interval(adapted - KEPT * base, right.tokens, seed)[1] < 0
    worth = {
        name: x.sum() / right.tokens.sum() for name, x in (("base", base), ("adapted", adapted))
    }
    return {
        "rows": len(own),
        **{name: round(float(value), 4) for name, value in worth.items()},
        "ci95": [round(low, 4), round(high, 4)],
        "blind": low <= 0 or lost,
    }


def pairs(questions: list[Question]) -> tuple[Rows, Rows]:
    """Every answer after its own prompt, and after the next one that has another answer and is not
    too long: no row becomes longer than the longest.

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
        before = next(fitting, None)
        if before:
            own.append(_after(prompt, answer, len(own)))
            other.append(_after(before, answer, len(other)))
    return Rows.of(own), Rows.of(other)


def _after(prompt: list[int], answer: list[int], unit: int) -> Row:
    labels = [IGNORED] * len(prompt) + answer
    return {"input_ids": prompt + answer, "labels": labels, "bytes": 0, "unit": unit}
