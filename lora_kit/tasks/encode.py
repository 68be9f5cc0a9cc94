"""Examples -> rows in Arrow files, encoded by a task; mixtures are sampled by token counts.

A use is `train`, `eval`, `general` or `replay`. Examples that were read for one use can serve two:
those of `train` also `eval`, those of `general` also `replay` (see `data.prepare.Split`). They are
encoded once. The result is cached under a key of everything that it depends on (`lora_kit.cache`).
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from lora_kit import cache
from lora_kit.base.load import positions
from lora_kit.base.pin import Pinned
from lora_kit.data.census import NO_SUPERVISION, Census
from lora_kit.data.duplicates import ranks
from lora_kit.data.examples import ReadFile, from_batch
from lora_kit.data.formats import Example
from lora_kit.data.prepare import Split, prepare, worker_count
from lora_kit.data.rows import Row, Rows, RowsWriter, record_batch, record_batches
from lora_kit.data.sources import source_list
from lora_kit.data.splits import FEWEST_TO_EVALUATE, mix, take
from lora_kit.data.workers import in_order, stop
from lora_kit.errors import UserError, in_a_line, is_panic
from lora_kit.run import run_class, section_fields
from lora_kit.schema import Json, Run
from lora_kit.tasks.packing import Packed
from lora_kit.tasks.task import Dropped, Facts, Processor, Task

_SECONDS_BETWEEN_LINES = 15
_LIBRARIES = ("tokenizers", "transformers")
_COUNTED = ("length", "truncated", "cut_from")  # columns that are read here and not stored


@dataclass
class Prepared:
    """The training and evaluation rows of a run.

    Attributes:
        train: packed if `Task.packing` is `documents`; `rows("train")` are not packed.
        files: all files that were read, for the columns `file` and `number` of rows.
        hashes: {source: sha256} of everything that was read. commits: {Hub data set: commit}.
        uses: {sha256: use} of the sources; `train` if any of its rows is trained on.
        cached: the result was in the cache.
    """

    train: Rows | Packed
    eval: Rows
    general: Rows | None
    facts: Facts
    census: Census
    hashes: dict[str, str]
    files: list[ReadFile]
    cached: bool
    commits: dict[str, str] = field(default_factory=dict)
    uses: dict[str, str] = field(default_factory=dict)

    def rows(self, use: str) -> Rows:
        """The rows of a use, not packed."""
        if use == "train":
            return self.train.rows if isinstance(self.train, Packed) else self.train
        found: Rows = getattr(self, use)
        return found

    def place(self, rows: Rows, row: int) -> str:
        """file:line of a row."""
        return self.files[rows.cell("file", row)].place(rows.cell("number", row))

    def summary(self) -> list[str]:
        """The census as lines, and notes before the start."""
        lines = self.census.lines()
        if isinstance(self.train, Packed):
            lines.append(f"packing: {len(self.train):,} rows, {self.train.fill:.1%} full")
        if self.eval.units < FEWEST_TO_EVALUATE:
            lines.append(
                f"note: a verdict needs {FEWEST_TO_EVALUATE} held-out documents: raise "
                "data.eval, or add data"
            )
        return lines


def encode(
    task: Task, split: Split, processor: Processor, facts: Facts, run: Run, limits: bool = True
) -> Prepared:
    """Encode examples, or load the cached result.

    Args:
        limits: whether to check `data.limits`.

    Raises:
        UserError: no training or held-out rows are left; a fraction or `data.replay` cannot be met;
            or a limit is exceeded.
    """
    own = {
        section: getattr(run, section).model_dump(mode="json", include=names)
        for section, names in section_fields(task).items()
    }
    data = run.data.model_dump(mode="json", exclude={"train", "eval", "limits", "workers"})
    key = cache.key_of(
        split.key,
        cache.code_of(task),
        cache.code_of(task.general),
        facts,
        own,
        data,
        run.train.max_length,
        identity(processor),
        base_positions(processor),
        libraries=_LIBRARIES,
    )
    encoding = _Encoding(task, split, processor, facts, run)
    try:
        folder = cache.prepared(key, encoding.run)
    finally:
        stop()
    census = json.loads((folder / "census.json").read_text(encoding="utf-8"))
    found = {file.stem: Rows.open(file) for file in folder.glob("*.arrow")}
    documents = task.packing(run.data) == "documents"
    prepared = Prepared(
        train=Packed(found["train"], run.train.max_length) if documents else found["train"],
        eval=found["eval"],
        general=found.get("general"),
        facts=facts,
        census=Census.from_json(census),
        hashes=split.hashes,
        files=split.files,
        cached=not encoding.started,
        commits=split.commits,
        uses=split.uses,
    )
    if limits:
        prepared.census.check(run.data.limits)
    return prepared


def rows_of(
    task: Task, run: Run, pinned: Pinned, lock: Json | None = None, limits: bool = True
) -> tuple[Processor, Prepared]:
    """Processor and rows of a run, for verbs; recipes call the steps themselves.

    Args:
        lock: see `data.prepare.prepare`. limits: see `encode`.
    """
    processor = task.processor(pinned, run.data)
    split = prepare(run.data, task, run.seed, lock)
    facts = task.facts(split.train, run.data)
    return processor, encode(task, split, processor, facts, run, limits)


def identity(processor: Processor) -> str | list[object]:
    """The settings of a tokenizer or processor that its output depends on, for the cache key."""
    backend = getattr(processor, "backend_tokenizer", None)
    if backend is None:
        return str(processor.to_json_string())
    # Padding and truncation are set on use and have no effect here.
    model = json.loads(backend.to_str()) | {"padding": 0, "truncation": 0}
    special = [processor.bos_token_id, processor.eos_token_id]
    return [special, processor.chat_template, model]


def base_positions(processor: Processor) -> int:
    """The most tokens that the base of a tokenizer takes; 0: unknown."""
    folder = Path(getattr(processor, "name_or_path", ""))
    return positions(folder) if (folder / "config.json").is_file() else 0


class _EncodeJob(NamedTuple):
    """A batch of examples to encode: the use that they were read for, and the first one's index."""

    use: str
    first: int
    examples: pa.RecordBatch


class _EncodedBatch(NamedTuple):
    """An encoded batch. `use` and `first`: of its job; `counts`: rows per example; `lengths`:
    training tokens per example; `cut`: bool per row, whether it was truncated; `dropped`,
    `truncated`: (index in the batch, reason, place, train.max_length that would keep it)."""

    use: str
    first: int
    rows: pa.RecordBatch | None
    counts: np.ndarray
    lengths: np.ndarray
    cut: np.ndarray
    dropped: list[tuple[int, str, str, int]]
    truncated: list[tuple[int, str, str, int]]


class Encoder:
    """Encodes batches of examples; picklable for worker processes."""

    def __init__(
        self, task: Task, processor: Processor, facts: Facts, run: Run, files: list[ReadFile]
    ) -> None:
        self.task, self.processor, self.facts = task, processor, facts
        self.files = files
        self._settings = run.model_dump(mode="json")

    @cached_property
    def _run(self) -> Run:
        # The run class with a task's own keys is created in each process.
        return run_class(self.task).model_validate(self._settings)

    def __call__(self, job: _EncodeJob) -> _EncodedBatch:
        task = _task_of(self.task, job.use)
        examples = from_batch(job.examples, self.files)
        files = job.examples.column("file").to_pylist()
        numbers = job.examples.column("number").to_pylist()
        rows: list[Row] = []
        counts = np.zeros(len(examples), np.int32)
        own_lengths: list[int] = []
        cut: list[bool] = []
        dropped, truncated = [], []
        for n, found in enumerate(self._encoded(task, examples)):
            place = examples[n].place
            if isinstance(found, Dropped):
                where = f"{place}: {found.detail}" if found.detail else place
                dropped.append((n, found.reason, where, found.length))
                continue
            counts[n] = len(found)
            for row in found:
                cut.append(bool(row.get("truncated")))
                if cut[-1]:
                    truncated.append((n, row["truncated"], place, row.get("cut_from", 0)))
                if "length" in row:
                    own_lengths.append(row["length"])
                kept = {name: value for name, value in row.items() if name not in _COUNTED}
                kept |= {"example": job.first + n, "file": files[n], "number": numbers[n]}
                rows.append(kept)
        uneven = own_lengths and len(own_lengths) < len(rows)
        if uneven or any(row.keys() != rows[0].keys() for row in rows):
            raise UserError("TASK.encode: rows must all have the same columns")
        lengths = np.zeros(len(examples), np.int64)
        batch: pa.RecordBatch | None = None
        try:
            if rows:
                batch = record_batch(rows)
                each = own_lengths or task.tokens(Rows(pa.Table.from_batches([batch])))
                np.add.at(lengths, np.repeat(np.arange(len(examples)), counts), each)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            why = in_a_line(error)
            raise UserError(f"TASK.encode: TASK.tokens failed on its rows ({why})") from error
        return _EncodedBatch(
            job.use, job.first, batch, counts, lengths, np.array(cut, bool), dropped, truncated
        )

    def _encoded(self, task: Task, examples: list[Example]) -> list[list[Row] | Dropped]:
        """The rows of each example. Raises UserError if the task's results are no rows."""
        try:
            encoded = list(task.encode(examples, self.processor, self.facts, self._run))
        except BaseException as error:
            if not is_panic(error):
                raise
            raise UserError(
                f"{examples[0].place}, or soon after it: the tokenizer cannot encode a row "
                f"({in_a_line(error)}): use another base"
            ) from None
        if len(encoded) != len(examples):
            raise UserError(f"TASK.encode: {len(encoded)} results for {len(examples)} examples")
        for example, found in zip(examples, encoded, strict=True):
            if isinstance(found, Dropped):
                continue
            if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
                raise UserError(
                    f"TASK.encode: {example.place}: expected a list of rows, not "
                    f"{type(found).__name__}"
                )
        return encoded


def _task_of(task: Task, use: str) -> Task:
    """The task that encodes a use: general text is encoded by the task's `general`."""
    if use not in ("general", "replay"):
        return task
    assert task.general is not None
    return task.general


class _UseWriter:
    """Writes the rows of one use; numbers its units, the examples with rows, from 0."""

    def __init__(self, file: Path, chosen: np.ndarray) -> None:
        self.writer = RowsWriter(file)
        self.chosen = chosen  # bool (examples,)
        self.examples: list[np.ndarray] = []  # indices of examples with rows: the units
        self.lengths: list[np.ndarray] = []
        self.cut: list[np.ndarray] = []  # of rows
        self.units = 0

    def add(self, part: _EncodedBatch) -> None:
        mine = self.chosen[part.first : part.first + len(part.counts)]
        kept = mine & (part.counts > 0)
        if part.rows is None or not kept.any():
            return
        example = np.repeat(np.arange(len(part.counts)), part.counts)  # of each row
        units = self.units + np.cumsum(kept) - 1
        wanted = mine[example]
        rows = part.rows if wanted.all() else part.rows.filter(pa.array(wanted))
        unit = pa.array(units[example][wanted].astype(np.int32))
        self.writer.write(rows.append_column("unit", unit))
        self.examples.append(part.first + np.flatnonzero(kept))
        self.lengths.append(part.lengths[kept])
        self.cut.append(part.cut[wanted])
        self.units += int(kept.sum())


@dataclass
class _Encoding:
    """Builds one cache entry: the examples of a split -> the files of its folder."""

    task: Task
    split: Split
    processor: Processor
    facts: Facts
    run_file: Run
    started: bool = False

    def run(self, folder: Path) -> None:
        self.started = True
        self.census = copy.deepcopy(self.split.census)
        self.census.positions = base_positions(self.processor)
        self.census.notes += self.task.notes({file.format for file in self.split.files}, self.facts)
        writers = self._encode(folder)
        rows = {use: writer.writer.close() for use, writer in writers.items()}
        for use in ("train", "eval", "general"):
            if use in writers and not len(rows[use]):
                count = getattr(self.census, use)
                fix = ""
                if count.too_long:
                    fix = f": raise train.max_length ({count.fitting(self.census.positions)})"
                raise UserError(f"data.{use}: no rows left; dropped: {count.dropped_text()}{fix}")
        chosen, tokens = self._mix(writers["train"])
        replayed = None
        if "replay" in writers:
            replayed = self._replay(writers["replay"], rows["replay"], tokens)
        train = rows["train"]
        if not chosen.all():
            train = train.select(np.flatnonzero(chosen[train.column("unit")]))
        arranged = self.task.arrange(train, replayed, self.processor, self.facts, self.run_file)
        if arranged is not None or train is not rows["train"]:
            train = _write_rows(folder / "arranged", train if arranged is None else arranged)
            (folder / "arranged").replace(folder / "train.arrow")
        if not len(train):
            raise UserError(
                "data.train: fewer than two tokens of text: there is nothing to train on"
            )
        (folder / "replay.arrow").unlink(missing_ok=True)
        self._count("train", train, writers["train"])
        for use, writer in writers.items():
            if use in ("eval", "general"):
                self._count(use, rows[use], writer)
                getattr(self.census, use).rows_kept += writer.units
        self.census.train.rows_kept = int(chosen.sum())
        text = json.dumps(self.census.to_json())
        (folder / "census.json").write_text(text, encoding="utf-8")

    def _encode(self, folder: Path) -> dict[str, _UseWriter]:
        """Encode all examples and write the rows of every use."""
        writers = {
            use: _UseWriter(folder / f"{use}.arrow", chosen)
            for (_, use), chosen in self.split.masks.items()
        }
        serves: dict[str, list[str]] = {}  # use that was read -> uses that it is for
        for read, use in self.split.masks:
            serves.setdefault(read, []).append(use)
        encoder = Encoder(self.task, self.processor, self.facts, self.run_file, self.split.files)
        reported, count = time.monotonic(), 0
        for part in in_order(encoder, self._jobs(), worker_count(self.run_file.data)):
            for use in serves[part.use]:
                writers[use].add(part)
            self._count_lost(part, serves[part.use])
            count += len(part.counts)
            if time.monotonic() - reported > _SECONDS_BETWEEN_LINES:
                reported = time.monotonic()
                print(f"data: {count:,} rows encoded", file=sys.stderr, flush=True)
        return writers

    def _jobs(self) -> Iterator[_EncodeJob]:
        for use, examples in self.split.examples.items():
            first = 0
            for batch in examples.rows.table.to_batches():
                yield _EncodeJob(use, first, batch)
                first += batch.num_rows

    def _count_lost(self, part: _EncodedBatch, uses: Sequence[str]) -> None:
        for what, lost in (("dropped", part.dropped), ("truncated", part.truncated)):
            for n, reason, place, length in lost:
                use = next((u for u in uses if self.split.masks[part.use, u][part.first + n]), None)
                if use is None:  # removed as a leak, which `data.prepare` counts
                    continue
                count = getattr(self.census, "general" if use == "replay" else use)
                count.count_lost(reason, place, what=what, length=length)
                if reason == NO_SUPERVISION:
                    count.samples_without_supervision += 1

    def _mix(self, writer: _UseWriter) -> tuple[np.ndarray, int]:
        """Choose units so that each source of `data.train` contributes its fraction of the tokens.

        Returns bool (units,), those that are trained on, and the number of their tokens.
        """
        examples, lengths = np.concatenate(writer.examples), np.concatenate(writer.lengths)
        fractions = self.split.fractions
        if not fractions:
            return np.ones(writer.units, dtype=bool), int(lengths.sum())
        train = self.split.examples["train"].rows
        source_of_file = np.array([file.source for file in self.split.files])
        sources = source_of_file[train.column("file")[examples]]
        for number, source in enumerate(source_list(self.run_file.data.train)):
            if not lengths[sources == number].any():
                raise UserError(f"{source.source}: has a fraction, but no rows left to train on")
        order = ranks(train.column("key")[examples], self.run_file.seed)
        chosen = mix(lengths, sources, order, dict(enumerate(fractions)))
        self.census.train.unused = int((~chosen).sum())
        return chosen, int(lengths[chosen].sum())

    def _replay(self, writer: _UseWriter, rows: Rows, tokens: int) -> Rows:
        """General rows to train on: a share `data.replay` of all tokens."""
        replay = self.run_file.data.replay or 0.0
        wanted = replay / (1 - replay) * tokens
        examples, lengths = np.concatenate(writer.examples), np.concatenate(writer.lengths)
        available = int(lengths.sum())
        if available < 0.99 * wanted:
            raise UserError(
                f"data.replay: {replay:g} needs {wanted:,.0f} tokens of general text; data.general "
                f"has {available:,} that are not held out: lower it to "
                f"{available / (available + tokens):.3f}, or add text"
            )
        keys = self.split.examples["general"].rows.column("key")[examples]
        chosen = take(lengths, ranks(keys, self.run_file.seed), wanted)
        used = rows.select(np.flatnonzero(np.isin(rows.column("unit"), chosen)))
        self.census.general.unused = writer.units - len(chosen)
        self.census.general.rows_kept += len(chosen)
        supervised = _task_of(self.task, "replay").supervised(used)
        self.census.notes.append(
            f"replay: also training on {len(chosen):,} general rows ({supervised:,} tokens)"
        )
        return used

    def _count(self, use: str, rows: Rows, writer: _UseWriter) -> None:
        task, count = _task_of(self.task, use), getattr(self.census, use)
        cut = np.concatenate(writer.cut)
        # Chunks and pairs are no rows whose length can be compared.
        comparable = len(cut) == len(rows) and "input_ids" in rows.columns
        count.measure(task.tokens(rows), task.supervised(rows), cut if comparable else None)
        if "end_markers" in rows.columns:
            count.end_markers_supervised = int(rows.column("end_markers").sum())


def _write_rows(file: Path, rows: Iterable[Row]) -> Rows:
    """Write rows to a file; rows without a unit get one each."""
    writer = RowsWriter(file)
    count = 0
    for batch in record_batches(rows):
        if "unit" not in batch.schema.names:
            units = np.arange(count, count + batch.num_rows, dtype=np.int32)
            batch = batch.append_column("unit", pa.array(units))
        writer.write(batch)
        count += batch.num_rows
    return writer.close()
