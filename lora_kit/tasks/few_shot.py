"""What a few examples in the prompt buy the base: the rival an adapter has to beat."""

from __future__ import annotations

from typing import Any

import numpy as np

from lora_kit.base.templates import render
from lora_kit.errors import NotUsable
from lora_kit.tasks.batches import Labelled, LabelledWriter

_MOST_TRIED = 1000  # rows looked at for examples that are short enough


def choose(train: Labelled, longest: int, room: int, shots: int, chat: bool, seed: int) -> list:
    """Training rows as examples, drawn with the seed: lists of token ids, as many as fit; none
    where there is no room.

    Each may take its share of the room that the longest row leaves. A text is cut to it; of
    conversations, longer ones are passed over.

    Args:
        longest: tokens of the longest row that is judged. room: positions that the base has.
    """
    share = (room - longest) // max(1, shots)
    chosen: list[list[int]] = []
    order = np.random.default_rng(seed).permutation(len(train))[:_MOST_TRIED]
    for row in order.tolist():
        if len(chosen) == shots or share < 2:
            break
        if not chat or train.lengths[row] <= share:
            chosen.append(train[row]["input_ids"][:share].tolist())
    return chosen


def after_examples(judged: Labelled, examples: list[list[int]], opening: list[int]) -> Labelled:
    """The rows judged, each after the same examples, with the same labels, units and bytes.

    Args:
        opening: what a conversation begins with and what stands only once in front of several.
    """
    writer = LabelledWriter()
    for row in range(len(judged)):
        ids = judged.ids[judged.offsets[row] : judged.offsets[row + 1]].tolist()
        longer = joined([*examples, ids], opening)
        moved = len(longer) - len(ids)
        spans = judged.spans[judged.span_offsets[row] : judged.span_offsets[row + 1]]
        # The first token of a row is not predicted from anything, here no more than there.
        writer.add(longer, [(max(a, 1) + moved, b + moved) for a, b in spans if b > 1])
    made = writer.finish()
    made.units, made.unit_bytes = judged.units, judged.unit_bytes
    return made


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
