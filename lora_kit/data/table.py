"""All examples of one use of the data: text on disk, hashes and signatures in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lora_kit.data.census import Count
from lora_kit.data.duplicates import UNSIGNED, ranks
from lora_kit.data.examples import ExamplesWriter
from lora_kit.data.reading import ReadBatch

# Most rows with a signature (512 bytes each); beyond, the rows of lowest rank are a sample.
LARGEST_SAMPLE = 150_000
# Columns with one value per example, and their types.
_COLUMNS = {
    "numbers": np.uint32,
    "files": np.int32,
    "keys": np.uint64,
    "questions": np.uint64,
    "groups": np.uint64,
    "joins": np.bool_,
    "labels": np.int32,
}


class Table:
    """Collects read batches, in order. Rows whose rank is under `below` keep a signature."""

    def __init__(self, path: Path, seed: int) -> None:
        self.path = path
        self.seed = seed
        self.below = 2**64 - 1
        self.count = Count()
        self.label_names: dict[str, int] = {}
        self.examples = ExamplesWriter(path)
        self._batches: dict[str, list[np.ndarray]] = {name: [] for name in _COLUMNS}
        self._signed: list[list[np.ndarray]] = []  # rows, signatures, questions
        self._rows = self._sampled = 0

    def __getattr__(self, name: str) -> np.ndarray:
        """A column, set by `finish`."""
        raise AttributeError(name)

    def add(self, part: ReadBatch) -> None:
        """Add the examples of a batch."""
        self.examples.write(part.file, part.examples)
        known, count = self.label_names, len(part.columns["keys"])
        codes = [known.setdefault(n, len(known)) if n else -1 for n in part.columns["labels"]]
        values = part.columns | {"files": [part.file] * count, "labels": codes}
        for name, kind in _COLUMNS.items():
            self._batches[name].append(np.array(values[name], dtype=kind))
        # A worker may have started before `below` was lowered.
        order = ranks(self._batches["keys"][-1][part.signed_rows], self.seed)
        rows = part.signed_rows + self._rows
        self._signed.append(self._below(order, rows, part.signed, part.signed_questions))
        self._sampled += len(self._signed[-1][0])
        if self._sampled > LARGEST_SAMPLE:
            self._sample_fewer()
        self.count += part.count
        self._rows += count

    def __len__(self) -> int:
        return self._rows

    def finish(self) -> Table:
        """Close the file and concatenate the columns."""
        self.examples.close()
        for name, kind in _COLUMNS.items():
            setattr(self, name, np.concatenate([np.zeros(0, kind), *self._batches.pop(name)]))
        for name in ("groups", "questions"):  # mostly unused: broadcast one zero
            if not getattr(self, name).any():
                setattr(self, name, np.broadcast_to(np.uint64(0), len(self)))
        none = [np.zeros(0, np.int64), UNSIGNED, UNSIGNED]
        self.signed_rows, self.signed, self.signed_questions = map(
            np.concatenate, zip(none, *self._signed, strict=True)
        )
        self._signed.clear()
        return self

    @property
    def ranks(self) -> np.ndarray:
        """uint64 (examples,): the order in which rows are chosen."""
        return ranks(self.keys, self.seed)

    def forget_signatures(self) -> None:
        """Free about 100 MB, once near duplicates are known."""
        self.signed = self.signed_questions = UNSIGNED

    def place(self, row: int) -> tuple[int, int]:
        return int(self.files[row]), int(self.numbers[row])

    def _below(self, order: np.ndarray, *signed: np.ndarray) -> list[np.ndarray]:
        """Filter rows, their signatures and questions to those whose rank is sampled."""
        low = order < np.uint64(self.below)
        return [part[low] if len(part) else part for part in signed]

    def _sample_fewer(self) -> None:
        """Halve the sample. The remaining rows do not depend on when this happens."""
        self.below //= 2
        keys = np.concatenate(self._batches["keys"])
        self._signed = [
            self._below(ranks(keys[signed[0]], self.seed), *signed) for signed in self._signed
        ]
        self._sampled = sum(len(signed[0]) for signed in self._signed)
