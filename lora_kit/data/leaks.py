"""Rows to judge by that are rows to learn from: exactly, or nearly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import numpy as np

from lora_kit.data.census import LEAKED, Census
from lora_kit.data.duplicates import Signed, hashed, near_any, sign
from lora_kit.data.formats import normalised
from lora_kit.data.sources import Opened
from lora_kit.data.table import Table

Place = Callable[[Table, int], str]
# A text of a benchmark's row is looked for on its own if it has so many words.
FEWEST_WORDS = 6


def train_against_eval(
    train: Table, other: Table, place: Place, census: Census, sources: Any
) -> np.ndarray:
    """Count the rows of `other` that leak into `train`; returns which are exactly there, and so
    not judged: bool."""
    exact = np.isin(other.keys, train.keys)
    match = near_any(other.signed, train.signed)
    near = np.zeros(len(other), dtype=bool)
    near[other.signed_rows[match >= 0]] = True

    def pair(row: int, twin: int) -> str:
        return f"{place(other, row)} is {place(train, twin)}"

    first_exact = first_near = ""
    if exact.any():
        row = int(exact.argmax())
        first_exact = pair(row, int((train.keys == other.keys[row]).argmax()))
        census.eval.dropped[LEAKED] = int(exact.sum())
        census.eval.first[LEAKED] = place(other, row)
    alone = np.flatnonzero((match >= 0) & ~exact[other.signed_rows])
    if len(alone):
        n = alone[0]
        first_near = pair(int(other.signed_rows[n]), int(train.signed_rows[match[n]]))
    listed = sources if isinstance(sources, list) else [sources]
    name = (
        "data.eval" if len(listed) > 1 else f"data.eval: {getattr(listed[0], 'source', listed[0])}"
    )
    census.leaks[name] = _count(exact, near, first_exact, first_near)
    return exact


def against(
    benchmarks: list[Opened], train: Table, learned: np.ndarray, place: Place, census: Census
) -> None:
    """Count the rows of benchmark files, of any columns, that stand in the training rows.

    A row is looked for as a whole, and each of its longer texts on its own, such as its question;
    both among whole training rows and among what those ask.
    """
    rows = np.flatnonzero(learned)
    sampled = np.flatnonzero(learned[train.signed_rows])
    known = np.concatenate([train.keys[rows], train.questions[rows]])
    signed = Signed.join([train.signed[sampled], train.signed_questions[sampled]])
    owners = np.concatenate([train.signed_rows[sampled]] * 2)
    for source in benchmarks:
        places: list[str] = []
        texts: list[str] = []
        row_of: list[int] = []
        for batch in source.batches():
            for row in batch.parsed():
                for text in _texts(row.columns):
                    texts.append(text)
                    row_of.append(len(places))
                places.append(row.place)
        keys = np.array([hashed(text) for text in texts], dtype=np.uint64)
        is_there = np.isin(keys, known)
        match = near_any(sign(texts), signed)
        owner = np.array(row_of, dtype=np.int64)
        exact, near = np.zeros(len(places), dtype=bool), np.zeros(len(places), dtype=bool)
        exact[owner[is_there]] = near[owner[match >= 0]] = True
        first_exact = first_near = ""
        if exact.any():
            n = int(is_there.argmax())
            twin = int(rows[int((known == keys[n]).argmax()) % len(rows)])
            first_exact = f"{places[owner[n]]} is {place(train, twin)}"
        alone = np.flatnonzero((match >= 0) & ~exact[owner])
        if len(alone):
            n = int(alone[0])
            first_near = f"{places[owner[n]]} is {place(train, int(owners[match[n]]))}"
        name = f"data.against: {source.name}"
        census.leaks[name] = _count(exact, near, first_exact, first_near)


def _texts(columns: dict[str, Any]) -> Iterator[str]:
    """What a benchmark's row says, normalised: all of it, and its longer texts."""
    parts = [part for part in chain.from_iterable(map(_strings, columns.values())) if part.strip()]
    if not parts:
        return  # numbers alone
    whole = normalised("\0".join(parts))
    found = {whole} | {
        text for part in parts if len((text := normalised(part)).split()) >= FEWEST_WORDS
    }
    yield from sorted(found)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)


def _count(
    exact: np.ndarray, near: np.ndarray, first_exact: str, first_near: str
) -> dict[str, Any]:
    """How many rows leak, each counted once: `near` without the exact ones."""
    return {
        "rows": len(exact),
        "exact": int(exact.sum()),
        "near": int((near & ~exact).sum()),
        "first_exact": first_exact,
        "first_near": first_near,
    }


def general_apart(tables: dict[str, Table], place: Place, census: Census) -> np.ndarray:
    """Which general rows stand nowhere in the domain's data: bool; the others are counted."""
    general = tables["general"]
    known = np.concatenate([table.keys for use, table in tables.items() if use != "general"])
    there = np.isin(general.keys, known)
    if there.any():
        reason = "that stand in the domain's data too"
        census.general.dropped[reason] = int(there.sum())
        census.general.first[reason] = place(general, int(there.argmax()))
    return ~there
