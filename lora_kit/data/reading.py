"""One batch of raw rows -> examples, their hashes and signatures, in this process or in several.

Nothing here knows of other batches, so the result is the same for any number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from lora_kit.data.census import Count
from lora_kit.data.duplicates import UNSIGNED, hashed, ranks, sign
from lora_kit.data.examples import to_batch
from lora_kit.data.formats import FORMATS, Columns, Example, normalised, to_example
from lora_kit.data.readers import Batch, Row
from lora_kit.errors import NotUsable

BLOCK_BYTES = 2048


class Reads(Protocol):
    """What a task tells about the rows that it reads (see `tasks.task.Task`)."""

    @property
    def formats(self) -> tuple[str, ...]: ...

    def key(self, example: Example) -> str: ...

    def group(self, example: Example) -> str | None: ...


@dataclass(frozen=True)
class Settings:
    """What decides how a row is read. `questions`: prompts are hashed apart, to be looked for in
    the files of `data.decontaminate`."""

    columns: Columns
    seed: int
    questions: bool


class Work(NamedTuple):
    """A batch, its format, and the rank below which its rows get a signature."""

    file: int
    batch: Batch
    format: str
    sampled_below: int


@dataclass(frozen=True)
class Part:
    """What became of a batch: its examples as Arrow, and by name, of each of them: numbers; labels;
    keys, questions, groups: hashes; joins. `signed` are those below the sample's rank."""

    file: int
    examples: pa.RecordBatch
    columns: dict[str, list[Any]]
    signed_rows: np.ndarray
    signed: np.ndarray
    signed_questions: np.ndarray
    count: Count


class Reader:
    """Turns batches into parts."""

    def __init__(self, task: Reads, settings: Settings) -> None:
        self.task = task
        self.settings = settings

    def __call__(self, work: Work) -> Part:
        count = Count()
        if work.batch.whole:
            found = list(_blocks(work.batch))
            count.rows_read = len(found)
        else:
            found = list(self._examples(work.batch, work.format, count))
        return self._part(work, [n for n, _ in found], [e for _, e in found], count)

    def _examples(
        self, batch: Batch, format_name: str, count: Count
    ) -> Iterator[tuple[int, Example]]:
        columns = Columns() if batch.plain else self.settings.columns
        for number, row in zip(batch.numbers, batch.parsed(), strict=True):
            count.rows_read += 1
            try:
                yield number, to_example(row, format_name, columns)
            except NotUsable as error:
                detail = f"{row.place}: {error.detail}" if error.detail else row.place
                count.lose(error.reason, detail)

    def _part(self, work: Work, numbers: list[int], examples: list[Example], count: Count) -> Part:
        """Examples with the hashes and signatures by which they are split, and found again."""
        plain = work.batch.plain
        texts = [example.key if plain else self.task.key(example) for example in examples]
        keys = [hashed(text) for text in texts]
        order = ranks(np.array(keys, dtype=np.uint64), self.settings.seed)
        signed_rows = np.flatnonzero(order < np.uint64(work.sampled_below))
        questions, signed_questions = [0] * len(keys), UNSIGNED
        classes = "label" in FORMATS[work.format].needed  # a score of a pair of sentences is none
        if self.settings.questions:
            asked = [normalised(example.question) for example in examples]
            questions = [hashed(text) for text in asked]
            signed_questions = sign([asked[n] for n in signed_rows])
        return Part(
            file=work.file,
            examples=to_batch(numbers, examples),
            columns={
                "numbers": numbers,
                "keys": keys,
                "questions": questions,
                "groups": [self._group(example, plain) for example in examples],
                "labels": [example.label if classes else None for example in examples],
                "joins": [example.joins for example in examples],
            },
            signed_rows=signed_rows,
            signed=sign([texts[n] for n in signed_rows]),
            signed_questions=signed_questions,
            count=count,
        )

    def _group(self, example: Example, plain: bool) -> int:
        """The hash of what examples have in common that stay in the same split; 0: nothing."""
        group = example.group
        if group is None and not plain:
            group = self.task.group(example)
        return 0 if group is None else hashed(group)


def _blocks(batch: Batch) -> Iterator[tuple[int, Example]]:
    """Cut a long text at line ends into blocks of about 2 KiB."""
    row: Row = next(batch.parsed())
    text, line, start = row.columns["text"], batch.numbers[0], 0
    for end in _block_ends(text):
        joins = start > 0 or not batch.starts
        yield line, Example(batch.place(line), text=text[start:end], joins=joins)
        line += text.count("\n", start, end)
        start = end


def _block_ends(text: str) -> Iterator[int]:
    """Where blocks end: at the first line end after BLOCK_BYTES bytes; in a longer line at a space,
    or where there is none, between two characters; and at the end."""
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
