"""Examples on disk, between reading and encoding: an Arrow stream, one record batch per batch.

Text is stored as it is; the turns of a conversation as JSON, since a chat template may read any
field of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from lora_kit.data.formats import Example

_SCHEMA = pa.schema(
    [
        ("number", pa.uint32()),
        ("joins", pa.bool_()),
        ("label", pa.string()),
        ("text", pa.string()),
        ("turns", pa.string()),  # JSON of [messages, rejected, tools, joiner], or null
    ]
)


def to_batch(numbers: Sequence[int], examples: Sequence[Example]) -> pa.RecordBatch:
    """Examples as a record batch, without groups, which only the split needs."""
    return pa.RecordBatch.from_pydict(
        {
            "number": list(numbers),
            "joins": [example.joins for example in examples],
            "label": [example.label for example in examples],
            "text": [example.text for example in examples],
            "turns": [_turns(example) for example in examples],
        },
        schema=_SCHEMA,
    )


def _turns(example: Example) -> str | None:
    if not example.messages:
        return None
    stored = [example.messages, example.rejected, example.tools, example.joiner]
    return json.dumps(stored, default=str)  # for instance a date in a tool call's arguments


def from_batch(batch: pa.RecordBatch, place: tuple[str, str]) -> list[Example]:
    """The examples of a record batch.

    Args:
        place: the file's name and place format, such as `{}:{}`.
    """
    name, style = place
    examples = []
    for number, joins, label, text, turns in zip(
        *(column.to_pylist() for column in batch.columns), strict=True
    ):
        messages, rejected, tools, joiner = json.loads(turns) if turns else ((), (), (), "")
        examples.append(
            Example(
                place=style.format(name, number),
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


class ExamplesWriter:
    """Writes record batches of examples and records the file of each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: list[int] = []  # index of the file of each record batch
        self._sink = pa.OSFile(str(path), "wb")
        self._stream = pa.ipc.new_stream(self._sink, _SCHEMA)

    def write(self, file: int, batch: pa.RecordBatch) -> None:
        self.files.append(file)
        self._stream.write_batch(batch)

    def close(self) -> None:
        self._stream.close()
        self._sink.close()


@dataclass(frozen=True)
class Examples:
    """The examples of one use of the data, in reading order.

    Attributes:
        path: of the Arrow stream. files: index of the file of each record batch.
        places: name and place format of each file.
        chosen: bool (examples,): the examples that iteration yields.
        dropped: which rows were dropped and why, for messages; "" if none were.
    """

    path: Path
    files: list[int]
    places: list[tuple[str, str]]
    chosen: np.ndarray
    dropped: str = ""

    def __iter__(self) -> Iterator[Example]:
        start = 0
        for file, batch in self.batches():
            some = self.chosen[start : start + batch.num_rows]
            start += batch.num_rows
            if some.any():
                yield from from_batch(batch.filter(pa.array(some)), self.places[file])

    def __len__(self) -> int:
        return int(self.chosen.sum())

    @property
    def labels(self) -> dict[str, int]:
        """{label: number of examples}, sorted by name."""
        counts: dict[str, int] = {}
        start = 0
        for _, batch in self.batches():
            some = self.chosen[start : start + batch.num_rows]
            start += batch.num_rows
            for label in batch.column("label").filter(pa.array(some)).to_pylist():
                if label is not None:
                    counts[label] = counts.get(label, 0) + 1
        return dict(sorted(counts.items()))

    def batches(self) -> Iterator[tuple[int, pa.RecordBatch]]:
        """(index of the file, record batch) of all examples, chosen or not."""
        with pa.memory_map(str(self.path)) as source:
            yield from zip(self.files, pa.ipc.open_stream(source), strict=True)
