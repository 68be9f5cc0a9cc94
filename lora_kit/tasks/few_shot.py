"""What a few examples in the prompt buy the base: the rival an adapter has to beat."""

from __future__ import annotations

from typing import Any

import numpy as np

from lora_kit.base.templates import render
from lora_kit.data.rows import Rows
from lora_kit.errors import NotUsable
from lora_kit.tasks.batches import IGNORED

_MOST_TRIED = 1000  # rows looked at for examples that are short enough


def choose(
    train: Rows, longest: int, room: int, shots: int, chat: bool, seed: int
) -> list[list[int]]:
    """Training rows as examples, drawn with the seed: lists of token ids, as many as fit; none
    where there is no room.

    Each may take its share of the room that the longest row leaves. A text is cut to it; of
    conversations, longer ones are passed over.

    Args:
        longest: tokens of the longest row that is evaluated. room: positions that the base has.
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
    """Held-out rows, each after the same examples, with the same labels, units and bytes.

    Args:
        opening: what a conversation begins with and what is there only once in front of several.
    """
    longer = []
    for row in rows:
        ids = joined([*examples, row["input_ids"].tolist()], opening)
        moved = len(ids) - len(row["input_ids"])
        labels = np.full(len(ids), IGNORED)
        labels[moved:] = row["labels"]
        # The first token of a row is not predicted from anything, here no more than there.
        labels[moved] = IGNORED
        longer.append({**row, "input_ids": np.array(ids), "labels": labels})
    return Rows.of(longer)


def opening(tokenizer: Any) -> list[int]:
    """What the chat template writes once, before the first turn: beginning-of-text, a default
    system prompt. Found by rendering one exchange, and two."""
    if not tokenizer.chat_template:
        return []
    turns = [
        {"role": role, "content": f"sentinel{mark}"}
        for role, mark in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    ]
    try:
        one, two = render(tokenizer, turns[:2]), render(tokenizer, turns)
    except NotUsable:  # a template may refuse whatever it likes
        return []
    head, end = one.split("sentinela")[0], one.split("sentinelb")[-1]
    between = two.split("sentinelb")[-1].split("sentinelc")[0]
    if not between.startswith(end) or not head.endswith(between[len(end) :]):
        return []
    text = head.removesuffix(between[len(end) :])
    return tokenizer(text, add_special_tokens=False).input_ids


def joined(rows: list[list[int]], opening: list[int]) -> list[int]:
    """Rows one after the other, the opening only in front of the first."""
    ids = list(rows[0])
    for row in rows[1:]:
        ids += row[len(opening) :] if row[: len(opening)] == opening else row
    return ids
