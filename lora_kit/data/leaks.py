"""Contamination: held-out or benchmark rows that are exact or near duplicates of training rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from lora_kit.data.census import Leak
from lora_kit.data.duplicates import hashed, near_any, sign
from lora_kit.data.examples import SignedExamples
from lora_kit.data.formats import normalised
from lora_kit.data.json_rows import leaves
from lora_kit.data.readers import INDEX, OpenedSource
from lora_kit.schema import Json

# Words from which a text field of a benchmark row is also matched on its own.
FEWEST_WORDS = 6


@dataclass(frozen=True)
class _Texts:
    """Hashes of texts and the row of each; for some texts signatures and their rows."""

    keys: np.ndarray
    rows: np.ndarray
    signed: np.ndarray
    signed_rows: np.ndarray
    place: Callable[[int], str]  # of a row


def train_against_eval(train: SignedExamples, other: SignedExamples) -> tuple[np.ndarray, Leak]:
    """Look for evaluation rows among the training rows.

    Returns:
        bool (rows of `other`,): exact duplicates, which are not evaluated on; and the counts.
    """
    return _leak(_all_texts(other), _all_texts(train), len(other.keys))


def _all_texts(some: SignedExamples) -> _Texts:
    rows = np.arange(len(some.keys))
    return _Texts(some.keys, rows, some.signed.texts, some.signed.rows, some.examples.place)


def train_against_files(
    benchmarks: list[OpenedSource], train: SignedExamples, trained_on: np.ndarray
) -> Iterator[tuple[str, Leak]]:
    """(source, counts) for each benchmark: its rows that occur in the training rows.

    A benchmark row is matched as a whole, and each of its longer texts on its own, such as its
    question, both against whole training rows and against their prompts.

    Args:
        benchmarks: sources of any columns.
        trained_on: bool (rows of `train`,): the others are held out and not matched.
    """
    rows = np.flatnonzero(trained_on)
    questions = train.examples.rows.column("question")
    signed = train.signed
    sampled = np.flatnonzero(trained_on[signed.rows])
    known = _Texts(
        keys=np.concatenate([train.keys[rows], questions[rows]]),
        rows=np.tile(rows, 2),
        signed=np.concatenate([signed.texts[sampled], signed.questions[sampled]]),
        signed_rows=np.tile(signed.rows[sampled], 2),
        place=train.examples.place,
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
        keys = np.array([hashed(text) for text in texts], np.uint64)
        rows_of_texts = np.array(row_of, np.int64)
        looked_for = _Texts(keys, rows_of_texts, sign(texts), rows_of_texts, places.__getitem__)
        yield source.name, _leak(looked_for, known, len(places))[1]


def _leak(looked_for: _Texts, known: _Texts, count: int) -> tuple[np.ndarray, Leak]:
    """bool (count,): rows with a text that equals a known one; and the counts of leaking rows.

    `count`: the rows that `looked_for` is about, also those without any text.
    """
    same = np.flatnonzero(np.isin(looked_for.keys, known.keys))
    exact = np.zeros(count, dtype=bool)
    exact[looked_for.rows[same]] = True
    match = near_any(looked_for.signed, known.signed)
    near = np.flatnonzero((match >= 0) & ~exact[looked_for.signed_rows])
    rows = looked_for.signed_rows[near]
    leak: Leak = {
        "rows": count,
        "exact": int(exact.sum()),
        "near": len(np.unique(rows)),
        "first_exact": "",
        "first_near": "",
    }
    if len(same):
        twin = known.rows[(known.keys == looked_for.keys[same[0]]).argmax()]
        place = looked_for.place(int(looked_for.rows[same[0]]))
        leak["first_exact"] = f"{place} is {known.place(int(twin))}"
    if len(near):
        twin = known.signed_rows[match[near[0]]]
        leak["first_near"] = f"{looked_for.place(int(rows[0]))} is {known.place(int(twin))}"
    return exact, leak


def _texts(columns: Json) -> list[str]:
    """The normalised texts of a benchmark row: all of it, and each longer text."""
    named = {name: value for name, value in columns.items() if not INDEX.fullmatch(name)}
    parts = [part for part in leaves(named) if isinstance(part, str) and part.strip()]
    if not parts:
        return []  # only numbers
    longer = {text for text in map(normalised, parts) if len(text.split()) >= FEWEST_WORDS}
    return sorted({normalised("\0".join(parts))} | longer)
