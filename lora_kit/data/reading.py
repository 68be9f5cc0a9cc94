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
from lora_kit.data.marks import Unseen
from lora_kit.data.readers import RowBatch
from lora_kit.errors import NotUsable, UserError

BLOCK_BYTES = 2048


class DataTask(Protocol):
    """The part of `tasks.task.Task` that reading rows needs."""

    @property
    def formats(self) -> tuple[str, ...]: ...

    def key(self, example: Example) -> str:
        """The text by which duplicates and leaks are found."""

    def group(self, example: Example) -> str | None:
        """Examples of one group stay in one split; None: no group."""


class ReadJob(NamedTuple):
    """A batch to read, its format, its use (`train`, `eval`, `general`), and the rank below which
    its rows get a signature."""

    file: int
    batch: RowBatch
    format: str
    use: str
    sampled_below: int

    @property
    def plain(self) -> bool:
        """General text, to which `data.columns`, `data.group` and the task do not apply."""
        return self.use == "general"


@dataclass(frozen=True)
class ReadBatch:
    """A batch after reading: its examples as Arrow, and signatures of those in the sample."""

    file: int
    examples: pa.RecordBatch
    signatures: Signatures
    count: Count


@dataclass(frozen=True)
class Reader:
    """Reads batches of raw rows; callable, so that it can be sent to worker processes.

    Attributes:
        seed: of the ranks by which examples are sampled for signatures.
        questions: also hash the prompts, to match them against the files of data.decontaminate.
    """

    task: DataTask
    columns: Columns
    seed: int
    questions: bool

    def __call__(self, job: ReadJob) -> ReadBatch:
        count = Count()
        if job.batch.whole:
            found = list(_blocks(job.batch))
            count.rows_read = len(found)
        else:
            found = list(self._examples(job, count))
        return self._hashed(job, [n for n, _ in found], [e for _, e in found], count)

    def _examples(self, job: ReadJob, count: Count) -> Iterator[tuple[int, Example]]:
        columns = Columns() if job.plain else self.columns
        for number, row in zip(job.batch.numbers, job.batch.parsed(), strict=True):
            count.rows_read += 1
            try:
                yield number, to_example(row, job.format, columns, job.use)
            except Unseen as error:
                raise UserError(
                    f"{row.place}: {error.reason}: a text model cannot read images, audio or "
                    "video: remove these rows, or add a column that is not needed to data.ignore"
                ) from None
            except NotUsable as error:
                detail = f"{row.place}: {error.detail}" if error.detail else row.place
                count.count_lost(error.reason, detail)

    def _hashed(
        self, job: ReadJob, numbers: list[int], examples: list[Example], count: Count
    ) -> ReadBatch:
        """Examples with the hashes and signatures that deduplication and splitting need."""
        texts = [example.key if job.plain else self.task.key(example) for example in examples]
        groups = [self._group(example, job.plain) for example in examples]
        keys = _hashes(texts)
        order = ranks(keys, self.seed)
        sampled = np.flatnonzero(order < np.uint64(job.sampled_below))
        questions, signed_questions = np.zeros(len(keys), np.uint64), UNSIGNED
        if self.questions:
            asked = [normalised(example.question) for example in examples]
            questions = _hashes(asked)
            signed_questions = sign([asked[n] for n in sampled])
        return ReadBatch(
            file=job.file,
            examples=to_batch(job.file, numbers, examples, keys, questions, _hashes(groups)),
            signatures=Signatures(
                rows=sampled,
                ranks=order[sampled],
                texts=sign([texts[n] for n in sampled]),
                questions=signed_questions,
            ),
            count=count,
        )

    def _group(self, example: Example, plain: bool) -> str | None:
        """The group that data.group names, else the task's."""
        if example.group is None and not plain:
            return self.task.group(example)
        return example.group


def _hashes(texts: Sequence[str | None]) -> np.ndarray:
    """uint64 (texts,): the hash of each; 0 for None."""
    return np.array([0 if text is None else hashed(text) for text in texts], dtype=np.uint64)


def _blocks(batch: RowBatch) -> Iterator[tuple[int, Example]]:
    """(line, example) of the blocks of about 2 KiB into which a long text is cut, at line ends."""
    row = next(batch.parsed())
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
        end = raw.find(b"\n", least - 1, most) + 1  # after the line end; 0: none
        if end == 0:
            end = raw.find(b" ", least, most)
        if end < least:
            end = least
            while end < len(raw) and raw[end] & 0xC0 == 0x80:  # inside a character
                end += 1
        characters += len(raw[start:end].decode())  # `end` may be beyond the last byte
        start = end
        yield characters
