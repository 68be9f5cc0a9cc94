"""The few-shot baseline: the base with training examples in its prompt."""

from __future__ import annotations

import numpy as np

from lora_kit.data.rows import Rows
from lora_kit.errors import NotUsable
from lora_kit.tasks.batches import IGNORED
from lora_kit.tasks.chat import template_pieces
from lora_kit.tasks.task import Processor

_MOST_TRIED = 1000  # rows searched for short enough examples


def choose_examples(
    train: Rows, longest: int, room: int, shots: int, chat: bool, seed: int
) -> list[list[int]]:
    """Draw training rows as few-shot examples: lists of token ids; none if they do not fit.

    Each example may use an equal share of the context that the longest row leaves. Texts are
    truncated to it; longer conversations are skipped.

    Args:
        longest: tokens of the longest evaluated row. room: context length of the base.
    """
    share = (room - longest) // max(1, shots)
    chosen: list[list[int]] = []
    order = np.random.default_rng(seed).permutation(len(train))[:_MOST_TRIED]
    for row in order.tolist():
        if len(chosen) == shots or share < 2:
            break
        ids = train.cell("input_ids", row)
        if not chat or len(ids) <= share:
            chosen.append(ids[:share].tolist())
    return chosen


def after_examples(rows: Rows, examples: list[list[int]], opening: list[int]) -> Rows:
    """Held-out rows with the examples prepended; labels, units and bytes stay the same.

    Args:
        opening: tokens that are written once per conversation, at its start (see `opening`).
    """
    longer = []
    for row in rows:
        own = row["input_ids"].tolist()
        ids = concatenated([*examples, own], opening)
        kept = len(own) - len(opening) if own[: len(opening)] == opening else len(own)
        labels = np.full(len(ids), IGNORED)
        start = len(ids) - kept
        labels[start:] = row["labels"][len(own) - kept :]
        if kept == len(own):  # its first token has no label without examples, so it gets none here
            labels[start] = IGNORED
        longer.append({**row, "input_ids": np.array(ids), "labels": labels})
    return Rows.of(longer)


def opening(tokenizer: Processor) -> list[int]:
    """Tokens that the chat template writes once, before the first turn: beginning-of-text, a
    default system prompt. Found by rendering one and two exchanges."""
    if not tokenizer.chat_template:
        return []
    try:
        head, _, end = template_pieces(tokenizer, ("user", "assistant"))
        exchanges = template_pieces(tokenizer, ("user", "assistant", "user", "assistant"))
    except NotUsable:  # the template rejects these turns
        return []
    between = exchanges[2]
    if not between.startswith(end) or not head.endswith(between[len(end) :]):
        return []
    text = head.removesuffix(between[len(end) :])
    return tokenizer(text, add_special_tokens=False).input_ids


def concatenated(rows: list[list[int]], opening: list[int]) -> list[int]:
    """Concatenate rows, with the opening only before the first."""
    ids = list(rows[0])
    for row in rows[1:]:
        ids += row[len(opening) :] if row[: len(opening)] == opening else row
    return ids
