"""One batch of raw rows -> examples, their hashes and signatures, in this process or in several.

A batch is processed on its own, so the result is the same for any number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from lora_kit.data.census import Count
from lora_kit.data.duplicates import UNSIGNED, Signatures, hashed, ranks, sign
from lora_kit.data.examples import to_batch
from lora_kit.data.formats import Columns, Example, normalised, to_example
from lora_kit.data.readers import Row, RowBatch
from lora_kit.errors import NotUsable

BLOCK_BYTES = 2048


class DataTask(Protocol):
    """The part of `tasks.task.Task` that reading rows needs."""

    @property
    def formats(self) -> tuple[str, ...]: ...

    def key(self, example: Example) -> str: ...

    def group(self, example: Example) -> str | None: ...


@dataclass(frozen=True)
class ReadSettings:
    """How rows are read. `questions`: also hash the prompts, to match them against the files of
    `data.decontaminate`."""

    columns: Columns
    seed: int
    questions: bool


class ReadJob(NamedTuple):
    """A batch to read, its format, and the rank below which its rows get a signature."""

    file: int
    batch: RowBatch
    format: str
    sampled_below: int


@dataclass(frozen=True)
class ReadBatch:
    """A batch after reading: its examples as Arrow, and signatures of those in the sample."""

    file: int
    examples: pa.RecordBatch
    signatures: Signatures
    count: Count


class Reader:
    """Reads batches of raw rows."""

    def __init__(self, task: DataTask, settings: ReadSettings) -> None:
        self.task = task
        self.settings = settings

    def __call__(self, work: ReadJob) -> ReadBatch:
        count = Count()
        if work.batch.whole:
            found = list(_blocks(work.batch))
            count.rows_read = len(found)
        else:
            found = list(self._examples(work.batch, work.format, count))
        return self._hashed(work, [n for n, _ in found], [e for _, e in found], count)

    def _examples(
        self, batch: RowBatch, format_name: str, count: Count
    ) -> Iterator[tuple[int, Example]]:
        columns = Columns() if batch.plain else self.settings.columns
        for number, row in zip(batch.numbers, batch.parsed(), strict=True):
            count.rows_read += 1
            try:
                yield number, to_example(row, format_name, columns)
            except NotUsable as error:
                detail = f"{row.place}: {error.detail}" if error.detail else row.place
                count.count_lost(error.reason, detail)

    def _hashed(
        self, work: ReadJob, numbers: list[int], examples: list[Example], count: Count
    ) -> ReadBatch:
        """Examples with the hashes and signatures that deduplication and splitting need."""
        plain = work.batch.plain
        texts = [example.key if plain else self.task.key(example) for example in examples]
        groups = [self._group(example, plain) for example in examples]
        keys = _hashes(texts)
        order = ranks(keys, self.settings.seed)
        sampled = np.flatnonzero(order < np.uint64(work.sampled_below))
        questions, signed_questions = np.zeros(len(keys), np.uint64), UNSIGNED
        if self.settings.questions:
            asked = [normalised(example.question) for example in examples]
            questions = _hashes(asked)
            signed_questions = sign([asked[n] for n in sampled])
        return ReadBatch(
            file=work.file,
            examples=to_batch(work.file, numbers, examples, keys, questions, _hashes(groups)),
            signatures=Signatures(
                rows=sampled,
                ranks=order[sampled],
                texts=sign([texts[n] for n in sampled]),
                questions=signed_questions,
            ),
            count=count,
        )

    def _group(self, example: Example, plain: bool) -> str | None:
        """Examples of one group stay in one split; None: no group."""
        if example.group is None and not plain:
            return self.task.group(example)
        return example.group


def _hashes(texts: Sequence[str | None]) -> np.ndarray:
    """uint64 (texts,): the hash of each; 0 for None."""
    return np.array([0 if text is None else hashed(text) for text in texts], dtype=np.uint64)


def _blocks(batch: RowBatch) -> Iterator[tuple[int, Example]]:
    """Cut a long text into blocks of about 2 KiB, at line ends."""
    row: Row = next(batch.parsed())
    text, line, start = row.columns["text"], batch.numbers[0], 0
    for end in _block_ends(text):
        joins = start > 0 or not batch.starts
        yield line, Example(batch.place(line), text=text[start:end], joins=joins)
        line += text.count("\n", start, end)
        start = end


def _block_ends(text: str) -> Iterator[int]:
    """Offsets where blocks end: the first line end after BLOCK_BYTES bytes; in a longer line at a
    space, else between two characters; and the end of the text."""
    raw = text.encode()
    start = characters = 0
    while start < len(raw):
        least, most = start + BLOCK_BYTES, start + 2 * BLOCK_BYTES
        end = raw.find(b"\n", least - 1, most) + 1 or raw.find(b" ", least, most)
        if end < least:
            end = least
            while end < len(raw) and raw[end] & 0xC0 == 0x80:  # inside a character
                end += 1
        characters += len(raw[start:end].decode())
        start = end
        yield characters
