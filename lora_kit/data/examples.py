"""Examples on disk, between reading and encoding: an Arrow stream, one record batch per batch.

Text is stored as it is; the turns of a conversation as JSON, since a chat template may read any
field of them. Hashes of the text, of the prompt and of the group are what the split works on.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lora_kit.data.duplicates import Signatures, clusters
from lora_kit.data.formats import FORMATS, Example
from lora_kit.data.rows import Rows

_SCHEMA = pa.schema(
    [
        ("file", pa.int32()),
        ("number", pa.uint32()),
        ("joins", pa.bool_()),
        ("label", pa.string()),
        ("text", pa.string()),
        ("turns", pa.string()),  # JSON of [messages, rejected, tools, joiner], or null
        ("key", pa.uint64()),  # hashes; of the prompt and the group 0 where they are not needed
        ("question", pa.uint64()),
        ("group", pa.uint64()),
    ]
)


class ReadFile(NamedTuple):
    """A file that was read.

    Attributes:
        style: format of the place of a row, such as `{}:{}`.
        use: of its rows: train, eval or general. source: index of its source over all uses.
        format: row format, a key of FORMATS.
    """

    name: str
    style: str
    use: str
    source: int
    format: str

    def place(self, number: int) -> str:
        return self.style.format(self.name, number)


def to_batch(
    file: int,
    numbers: Sequence[int],
    examples: Sequence[Example],
    keys: np.ndarray,
    questions: np.ndarray,
    groups: np.ndarray,
) -> pa.RecordBatch:
    """Examples of one file as a record batch.

    Args:
        file: index of the file. numbers: line or list index of each example.
        keys, questions, groups: uint64 hashes, (examples,).
    """
    return pa.RecordBatch.from_pydict(
        {
            "file": np.full(len(examples), file, np.int32),
            "number": list(numbers),
            "joins": [example.joins for example in examples],
            "label": [example.label for example in examples],
            "text": [example.text for example in examples],
            "turns": [_turns(example) for example in examples],
            "key": keys,
            "question": questions,
            "group": groups,
        },
        schema=_SCHEMA,
    )


def _turns(example: Example) -> str | None:
    if not example.messages:
        return None
    stored = [example.messages, example.rejected, example.tools, example.joiner]
    return json.dumps(stored, default=str)  # for instance a date in a tool call's arguments


def from_batch(batch: pa.RecordBatch, files: Sequence[ReadFile]) -> list[Example]:
    """The examples of a record batch, without their groups."""
    columns = [
        batch.column(name).to_pylist()
        for name in ("file", "number", "joins", "label", "text", "turns")
    ]
    examples = []
    for file, number, joins, label, text, turns in zip(*columns, strict=True):
        messages, rejected, tools, joiner = json.loads(turns) if turns else ((), (), (), "")
        examples.append(
            Example(
                place=files[file].place(number),
                text=text,
                messages=tuple(messages),
                rejected=tuple(rejected),
                joiner=joiner,
                tools=tuple(tools),
                label=label,
                joins=joins,
            )
        )
    return examples


@dataclass(frozen=True)
class Examples:
    """The examples of one use of the data, in reading order.

    Attributes:
        rows: all stored examples, with the columns of `to_batch`; memory-mapped.
        files: all files that were read.
        chosen: bool (examples,): the examples that iteration yields.
        dropped: which rows were dropped and why, for messages; "" if none were.

    Iteration and length are over the chosen examples; `place` and `classes` over all.
    """

    rows: Rows
    files: list[ReadFile]
    chosen: np.ndarray
    dropped: str = ""

    def __iter__(self) -> Iterator[Example]:
        start = 0
        for batch in self.rows.table.to_batches():
            some = self.chosen[start : start + batch.num_rows]
            start += batch.num_rows
            if some.any():
                yield from from_batch(batch.filter(pa.array(some)), self.files)

    def __len__(self) -> int:
        return int(self.chosen.sum())

    def place(self, row: int) -> str:
        """file:line of an example, by its index among all of them, not only the chosen ones."""
        return self.files[self.rows.cell("file", row)].place(self.rows.cell("number", row))

    @property
    def labels(self) -> dict[str, int]:
        """{label: number of examples}, sorted by name."""
        labels = self.rows.table.column("label").filter(pa.array(self.chosen)).drop_null()
        return dict(sorted(Counter(labels.to_pylist()).items()))

    def classes(self) -> tuple[list[str], np.ndarray]:
        """The names of classes, and int32 (examples,): the index of each example's, or -1. The
        score of a sentence pair is no class."""
        has_label = np.array(["label" in FORMATS[file.format].needed for file in self.files])
        has_class = pa.array(has_label[self.rows.column("file")])
        labels = pc.if_else(
            has_class, self.rows.table.column("label"), pa.scalar(None, pa.string())
        )
        codes = labels.combine_chunks().dictionary_encode()
        return codes.dictionary.to_pylist(), codes.indices.fill_null(-1).to_numpy()


@dataclass(frozen=True)
class SignedExamples:
    """All examples of one use, and the signatures of a sample of them."""

    examples: Examples
    signed: Signatures

    @property
    def keys(self) -> np.ndarray:
        """uint64 (examples,): a hash of each text."""
        return self.examples.rows.column("key")

    def clusters(self) -> np.ndarray:
        """int64 (examples,): see `duplicates.clusters`."""
        return clusters(self.keys, self.signed.texts, self.signed.rows)
