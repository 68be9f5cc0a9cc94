"""Tokenized rows -> the rows that the model sees: running text, documents, conversations."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lora_kit.base.templates import context_token
from lora_kit.data.table import Table
from lora_kit.errors import UserError
from lora_kit.tasks.batches import Labelled, LabelledWriter

Chosen = tuple[Table, np.ndarray]  # a table, and which of its rows: bool


def write_train(
    path: Path,
    chosen: Chosen,
    replayed: Chosen | None,
    kind: str,
    packing: str,
    tokenizer: Any,
    max_length: int,
) -> Labelled:
    """What is learned from. Text is closed by the end-of-text token, which is learned as well.

    running: all texts one after the other, cut into rows of `max_length` tokens. none, documents:
    each for itself, a longer one in windows. Replayed text comes last; the trainer shuffles rows.

    Raises:
        UserError: there is nothing to learn from.
    """
    writer = LabelledWriter(path)
    if packing == "running":
        _running(writer, [chosen, *([replayed] if replayed else [])], tokenizer, max_length)
    else:
        if kind == "chat":
            _conversations(writer, chosen)
        else:
            _closed(writer, chosen, tokenizer, max_length)
        if replayed:
            _closed(writer, replayed, tokenizer, max_length)
    if not writer:
        raise UserError("data.train: less than two tokens of text: there is nothing to learn from")
    return writer.finish()


def write_judged(
    path: Path, chosen: Chosen, kind: str, tokenizer: Any, max_length: int
) -> Labelled:
    """What a model is judged by: conversations as they are learned; each document for itself, in
    windows of `max_length` tokens, every token scored once.

    The first window begins with the beginning-of-text token where the tokenizer has one, else with
    the end-of-text token; each later one with the last token of the window before it, as context.
    """
    writer = LabelledWriter(path)
    if kind == "chat":
        _conversations(writer, chosen)
        return writer.finish()
    table, rows = chosen
    begin = context_token(tokenizer)
    for row in np.flatnonzero(rows).tolist():
        stream = np.concatenate([begin, table.tokens(row)]).astype(np.int32)
        _windows(writer, stream, max_length, int(table.sizes[row]), table.place(row))
    return writer.finish()


def _conversations(writer: LabelledWriter, chosen: Chosen) -> None:
    table, rows = chosen
    for row in np.flatnonzero(rows).tolist():
        size, place = int(table.sizes[row]), table.place(row)
        writer.add(table.tokens(row), table.learned(row).tolist(), size, place)


def _windows(
    writer: LabelledWriter, stream: np.ndarray, length: int, size: int, place: tuple[int, int]
) -> None:
    """Every token but the first is learned from once; a window begins with the one before."""
    for start in range(0, max(1, len(stream) - 1), length - 1):
        window = stream[start : start + length]
        writer.add(window, [(1, len(window))], size, place, same_unit=start > 0)


def _closed(writer: LabelledWriter, chosen: Chosen, tokenizer: Any, max_length: int) -> None:
    for stream, place in _documents(chosen, tokenizer):
        if len(stream) > 1:  # one token alone predicts nothing
            _windows(writer, stream, max_length, 0, place)


def _running(writer: LabelledWriter, chosen: list[Chosen], tokenizer: Any, max_length: int) -> None:
    left, left_place = np.zeros(0, np.int32), (0, 0)
    for some in chosen:
        for stream, place in _documents(some, tokenizer):
            left_place = left_place if len(left) else place
            left = np.concatenate([left, stream])
            while len(left) >= max_length:
                writer.add(left[:max_length], [(0, max_length)], 0, left_place)
                left, left_place = left[max_length:], place
    if len(left) > 1:
        writer.add(left, [(0, len(left))], 0, left_place)


def count_texts(chosen: Chosen) -> int:
    """How many texts are learned from, each closed once: blocks that go on are one."""
    table, rows = chosen
    numbers = np.flatnonzero(rows)
    return len(numbers) - int((table.joins[numbers[1:]] & (np.diff(numbers) == 1)).sum())


def _documents(chosen: Chosen, tokenizer: Any) -> Iterator[tuple[np.ndarray, tuple[int, int]]]:
    """Each text with the tokens that begin and end it, and its place. Blocks that go on where the
    chosen one before them ended are one text."""
    table, rows = chosen
    begin = context_token(tokenizer)
    begin = begin if begin == [tokenizer.bos_token_id] else []
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    parts: list[np.ndarray] = []
    place = (0, 0)
    before = -1
    for row in np.flatnonzero(rows).tolist():
        if parts and not (table.joins[row] and row == before + 1):
            yield np.concatenate([begin, *parts, end]).astype(np.int32), place
            parts = []
        place = place if parts else table.place(row)
        parts.append(table.tokens(row))
        before = row
    if parts:
        yield np.concatenate([begin, *parts, end]).astype(np.int32), place
