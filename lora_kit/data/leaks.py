"""Contamination: held-out or benchmark rows that are exact or near duplicates of training rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from lora_kit.data.census import LEAKED, Census
from lora_kit.data.duplicates import hashed, near_any, sign
from lora_kit.data.formats import normalised
from lora_kit.data.json_rows import leaves
from lora_kit.data.readers import OpenedSource
from lora_kit.data.table import Table

Place = Callable[[Table, int], str]
# Words from which a text field of a benchmark row is also matched on its own.
FEWEST_WORDS = 6


class _Texts(NamedTuple):
    """Hashes of texts and the row of each; for some texts signatures and their rows."""

    keys: np.ndarray
    rows: np.ndarray
    signed: np.ndarray
    signed_rows: np.ndarray


def train_against_eval(
    train: Table, other: Table, place: Place, census: Census, sources: Any
) -> np.ndarray:
    """Count the rows of `other` that are in `train`; returns bool (rows,): exact duplicates, which
    are not evaluated on."""
    looked_for, known = (
        _Texts(table.keys, np.arange(len(table)), table.signed, table.signed_rows)
        for table in (other, train)
    )
    exact, leak = _leak(looked_for, known, len(other), partial(place, other), partial(place, train))
    if exact.any():
        census.eval.count_lost(LEAKED, place(other, int(exact.argmax())), leak["exact"])
    listed = sources if isinstance(sources, list) else [sources]
    only = f": {getattr(listed[0], 'source', listed[0])}" if len(listed) == 1 else ""
    census.leaks[f"data.eval{only}"] = leak
    return exact


def train_against_files(
    benchmarks: list[OpenedSource],
    train: Table,
    trained_on: np.ndarray,
    place: Place,
    census: Census,
) -> None:
    """Count the rows of benchmark files, with any columns, that are in the training rows.

    A row is matched as a whole, and each of its longer texts on its own, such as its question, both
    against whole training rows and against their prompts.
    """
    rows = np.flatnonzero(trained_on)
    sampled = np.flatnonzero(trained_on[train.signed_rows])
    known = _Texts(
        np.concatenate([train.keys[rows], train.questions[rows]]),
        np.tile(rows, 2),
        np.concatenate([train.signed[sampled], train.signed_questions[sampled]]),
        np.tile(train.signed_rows[sampled], 2),
    )
    for source in benchmarks:
        places: list[str] = []
        texts: list[str] = []
        row_of: list[int] = []
        for batch in source.batches():
            for row in batch.parsed():
                found = _texts(row.columns)
                texts += found
                row_of += [len(places)] * len(found)
                places.append(row.place)
        keys, owners = np.array([hashed(t) for t in texts], np.uint64), np.array(row_of, np.int64)
        looked_for = _Texts(keys, owners, sign(texts), owners)
        _, census.leaks[f"data.decontaminate: {source.name}"] = _leak(
            looked_for, known, len(places), places.__getitem__, partial(place, train)
        )


def _leak(
    looked_for: _Texts,
    known: _Texts,
    count: int,
    place: Callable[[int], str],
    place_known: Callable[[int], str],
) -> tuple[np.ndarray, dict[str, Any]]:
    """bool (count,): rows with a text that equals a known one; and the counts of leaking rows,
    where `near` excludes the exact ones."""
    same = np.flatnonzero(np.isin(looked_for.keys, known.keys))
    exact = np.zeros(count, dtype=bool)
    exact[looked_for.rows[same]] = True
    match = near_any(looked_for.signed, known.signed)
    near = np.flatnonzero((match >= 0) & ~exact[looked_for.signed_rows])
    rows = looked_for.signed_rows[near]
    leak: dict[str, Any] = {"rows": count, "exact": int(exact.sum()), "near": len(np.unique(rows))}
    leak |= {"first_exact": "", "first_near": ""}
    if len(same):
        twin = known.rows[(known.keys == looked_for.keys[same[0]]).argmax()]
        leak["first_exact"] = f"{place(looked_for.rows[same[0]])} is {place_known(twin)}"
    if len(near):
        twin = known.signed_rows[match[near[0]]]
        leak["first_near"] = f"{place(rows[0])} is {place_known(twin)}"
    return exact, leak


def _texts(columns: dict[str, Any]) -> list[str]:
    """The normalised texts of a benchmark row: all of it, and each longer text."""
    parts = [part for part in leaves(columns) if isinstance(part, str) and part.strip()]
    if not parts:
        return []  # only numbers
    longer = {text for text in map(normalised, parts) if len(text.split()) >= FEWEST_WORDS}
    return sorted({normalised("\0".join(parts))} | longer)


def general_apart(tables: dict[str, Table], place: Place, census: Census) -> np.ndarray:
    """bool (rows,): general rows that are not in the domain data; the others are counted."""
    general = tables["general"]
    known = np.concatenate([table.keys for use, table in tables.items() if use != "general"])
    there = np.isin(general.keys, known)
    if there.any():
        first = place(general, int(there.argmax()))
        census.general.count_lost("that are also in the domain data", first, int(there.sum()))
    return ~there
