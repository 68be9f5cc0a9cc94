"""Do the answers depend on the prompts? A model that learned from shuffled labels knows which
answers occur, and not which of them belongs to a prompt: its loss falls all the same."""

from __future__ import annotations

from typing import Any

from lora_kit.data.labelled import Labelled, LabelledWriter
from lora_kit.prove.bootstrap import FEWEST_UNITS, interval
from lora_kit.prove.measure import measure

Question = tuple[list[int], list[int]]  # tokens of a prompt, and of its answer


def prompt_use(
    model: Any, pad_id: int, questions: list[Question], seed: int
) -> dict[str, Any] | None:
    """The loss of answers after their own prompts, and after prompts with another answer.

    Returns:
        {"rows", "own", "other", "difference", "ci95"}, nats per token, difference = other - own:
        what the prompts are worth; None where fewer than 20 answers have a different one beside
        them.
    """
    own, other = pairs(questions)
    if len(own) < FEWEST_UNITS:
        return None
    right, wrong = measure(model, own, pad_id), measure(model, other, pad_id)
    tokens = right.tokens.sum()
    low, high = interval(wrong.nats - right.nats, right.tokens, seed)
    figures = {
        "own": right.nats.sum() / tokens,
        "other": wrong.nats.sum() / tokens,
        "difference": (wrong.nats - right.nats).sum() / tokens,
    }
    rounded = {name: round(float(value), 4) for name, value in figures.items()}
    return {"rows": len(own), **rounded, "ci95": [round(low, 4), round(high, 4)]}


def pairs(questions: list[Question]) -> tuple[Labelled, Labelled]:
    """Every answer after its own prompt, and after the next one that has another answer.

    >>> own, other = pairs([([1, 2], [9]), ([3], [9]), ([4], [8])])
    >>> [row["input_ids"].tolist() for row in other]
    [[4, 9], [4, 9], [1, 2, 8]]
    """
    own, other = LabelledWriter(), LabelledWriter()
    for n, (prompt, answer) in enumerate(questions):
        following = [*questions[n + 1 :], *questions[:n]]
        before = next((p for p, a in following if a != answer), None)
        if before is not None:
            own.add(prompt + answer, [(len(prompt), len(prompt + answer))])
            other.add(before + answer, [(len(before), len(before + answer))])
    return own.finish(), other.finish()
