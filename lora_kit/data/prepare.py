"""Sources -> examples: read, checked, deduplicated and split into training and held-out rows.

    sources -> batches (readers) -> examples, hashes (reading) -> duplicates, contamination (splits)

This is the same for every task and needs no tokenizer. The result is cached under a key of
everything that it depends on (`lora_kit.cache`).
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from lora_kit import cache
from lora_kit.data.census import Census, Count
from lora_kit.data.duplicates import SignatureSample
from lora_kit.data.examples import Examples, ReadFile, SignedExamples
from lora_kit.data.formats import WITHOUT_PROMPT, Columns, format_of, unread
from lora_kit.data.marks import is_flag
from lora_kit.data.readers import OpenedSource, RowBatch
from lora_kit.data.reading import DataTask, Reader, ReadJob
from lora_kit.data.rows import Rows, RowsWriter
from lora_kit.data.sources import check_apart, open_sources
from lora_kit.data.splits import divide
from lora_kit.data.workers import in_order, stop
from lora_kit.errors import UserError
from lora_kit.schema import Data, Json

USES = ("train", "eval", "general")
_SECONDS_BETWEEN_LINES = 15
# Other versions of these can read other examples from the same files.
_LIBRARIES = ("lora-kit", "rensa", "trafilatura", "pypdf")
_TEXT: tuple[str, ...] = ("text",)  # what data.general holds


@dataclass
class Split:
    """Examples, divided into training and held-out ones.

    Attributes:
        key: the cache key, a hash of everything that the split depends on.
        examples: {use that was read: all of its examples}.
        masks: {(use that was read, use that it is for): bool (examples,)}. With a held-out share,
            the examples of `train` serve `train` and `eval`; those of `general` serve `general`,
            and `replay` where some of them may be trained on.
        files: all files that were read.
        fractions: of data.train's sources; empty if none are set.
        hashes: {source: sha256} of everything that was read. commits: {Hub data set: commit}.
        uses: {sha256: use} of the sources; `train` if any of its rows is trained on.
    """

    key: str
    examples: dict[str, Examples]
    masks: dict[tuple[str, str], np.ndarray]
    files: list[ReadFile]
    fractions: list[float]
    hashes: dict[str, str]
    census: Census
    commits: dict[str, str]
    uses: dict[str, str]

    @property
    def train(self) -> Examples:
        """The examples that may be trained on."""
        chosen, dropped = self.masks["train", "train"], self.census.train.dropped_text()
        return replace(self.examples["train"], chosen=chosen, dropped=dropped)


def prepare(data: Data, task: DataTask, seed: int, lock: Json | None = None) -> Split:
    """Read, check and split the sources, or load the cached result.

    Args:
        task: gives the row formats it reads, and the key by which two examples are duplicates.
        seed: of the held-out selection.
        lock: the lock file of a run that used the data; Hub data sets are read at the commits
            recorded there, unless they name a revision of their own.

    Raises:
        UserError: a source is unusable or has an unsupported format, or no training or held-out
            rows are left.
    """
    opened = _opened(data, (lock or {}).get("commits", {}))
    columns = Columns(
        {str(ours): theirs for ours, theirs in data.columns.items()},
        label_names(data.labels),
        data.group,
        tuple(data.ignore),
    )
    reader = Reader(task, columns, seed, questions="decontaminate" in opened)
    # Keys of `data:` that the split depends on besides its sources and `columns`.
    decisive = {"eval", "replay", "decontaminate"}
    key = cache.key_of(
        {  # the same content under another file name can be another format
            use: [(s.name, s.fraction, s.digest, *map(str, s.files)) for s in found]
            for use, found in opened.items()
        },
        data.model_dump(mode="json", include=decisive),
        asdict(columns),
        seed,
        task.formats,
        cache.code_of(task),
        libraries=_LIBRARIES,
    )
    try:
        folder = cache.prepared(key, partial(_build, data, opened, reader))
    except BaseException:
        stop()
        raise
    sources = list(chain.from_iterable(opened.values()))
    files, masks, census = _load(folder)
    examples = {
        file.stem: _all_examples(Rows.open(file), files) for file in folder.glob("*.examples")
    }
    return Split(
        key=key,
        examples=examples,
        masks=masks,
        files=files,
        fractions=[source.fraction for source in opened["train"] if source.fraction],
        hashes={source.name: source.digest for source in sources},
        census=census,
        commits={source.name: source.commit for source in sources if source.commit},
        uses=_uses(opened, trained=("train", "general") if data.replay else ("train",)),
    )


def _uses(opened: dict[str, list[OpenedSource]], trained: tuple[str, ...]) -> dict[str, str]:
    """`uses` of a `Split`."""
    found: dict[str, str] = {}
    for use, sources in opened.items():
        for source in sources:
            found.setdefault(source.digest, "train" if use in trained else use)
    return found


def _opened(data: Data, commits: dict[str, str]) -> dict[str, list[OpenedSource]]:
    """{use: its sources}, of the uses that the run file names."""
    named = {
        "train": data.train,
        "eval": None if isinstance(data.eval, float) else data.eval,
        "general": data.general,
        "decontaminate": data.decontaminate,
    }
    opened = {
        use: open_sources(some, commits, use) for use, some in named.items() if some is not None
    }
    for use in opened.keys() - {"train"}:
        for source in opened[use]:
            if source.fraction is not None:
                raise UserError(
                    f"data.{use}: {source.name}: only sources of data.train take a fraction"
                )
    for use in ("eval", "decontaminate"):
        check_apart(opened["train"], opened.get(use, []), use)
    return opened


def _build(data: Data, opened: dict[str, list[OpenedSource]], reader: Reader, folder: Path) -> None:
    """Read and split everything into the files of a cache entry, which `_load` reads."""
    files: list[ReadFile] = []
    census = Census()
    found = _read(folder, opened, reader, files, census, worker_count(data))
    for source in chain.from_iterable(opened.values()):
        if source.note:
            census.notes.append(f"{source.name}: {source.note}")
    masks = divide(data, opened, reader.seed, found, census)
    # Rows held out of data.train are counted as read for data.eval.
    if census.held_out:
        census.eval.rows_read = int(masks["train", "eval"].sum())
        census.train.rows_read -= census.eval.rows_read
    arrays: dict[str, Any] = {f"{read}/{use}": mask for (read, use), mask in masks.items()}
    np.savez(folder / "masks.npz", **arrays)
    meta = {"files": files, "census": census.to_json()}
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def _load(folder: Path) -> tuple[list[ReadFile], dict[tuple[str, str], np.ndarray], Census]:
    """The files that were read, the masks of the split, and the census."""
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    masks: dict[tuple[str, str], np.ndarray] = {}
    with np.load(folder / "masks.npz") as stored:
        for name in stored:
            read, use = name.split("/")
            masks[read, use] = stored[name]
    files = [ReadFile(*values) for values in meta["files"]]
    return files, masks, Census.from_json(meta["census"])


def _all_examples(rows: Rows, files: list[ReadFile]) -> Examples:
    return Examples(rows, files, chosen=np.ones(len(rows), dtype=bool))


def label_names(labels: str | list[str] | None) -> tuple[str, ...]:
    """The names of `data.labels`: a list, or a file with a JSON list or one name per line."""
    if labels is None or isinstance(labels, list):
        return tuple(labels or ())
    try:
        text = Path(labels).read_text(encoding="utf-8-sig")
        lines = list(filter(None, map(str.strip, text.splitlines())))
        names = json.loads(text) if labels.endswith(".json") else lines
    except (OSError, ValueError) as error:
        raise UserError(f"data.labels: {labels}: cannot be read ({error})") from None
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise UserError(f"data.labels: {labels}: expected a list of names")
    return tuple(names)


def _read(
    folder: Path,
    opened: dict[str, list[OpenedSource]],
    reader: Reader,
    files: list[ReadFile],
    census: Census,
    workers: int,
) -> dict[str, SignedExamples]:
    """{use: its examples}, of every row of every source; also written to USE.examples in `folder`.

    Extends `files` by every file that is read, and sets the counts of `census`.
    """
    uses = [use for use in USES if use in opened]
    writers = {use: RowsWriter(folder / f"{use}.examples") for use in uses}
    samples = {use: SignatureSample() for use in uses}
    counts = {use: Count() for use in uses}
    reported, total = time.monotonic(), 0
    jobs = _jobs(opened, reader, files, census, samples)
    for part in in_order(reader, jobs, workers):
        use = files[part.file].use
        samples[use].add(part.signatures, first=writers[use].count)
        writers[use].write(part.examples)
        counts[use] += part.count
        total += part.count.rows_read
        if time.monotonic() - reported > _SECONDS_BETWEEN_LINES:
            reported = time.monotonic()
            print(f"data: {total:,} rows read", file=sys.stderr, flush=True)
    read: dict[str, SignedExamples] = {}
    for use in uses:
        setattr(census, use, counts[use])
        examples = _all_examples(writers[use].close(), files)
        if not len(examples):
            raise UserError(f"data.{use}: no rows left; dropped: {counts[use].dropped_text()}")
        read[use] = SignedExamples(examples, samples[use].collected())
    return read


def _jobs(
    opened: dict[str, list[OpenedSource]],
    reader: Reader,
    files: list[ReadFile],
    census: Census,
    samples: dict[str, SignatureSample],
) -> Iterator[ReadJob]:
    """The batches of all sources; a file's format is detected from its first row.

    Extends `files` and the notes of `census`; `samples` give the rank below which rows are signed.
    """
    number = 0
    for use, sample in samples.items():
        for source in opened[use]:
            known: dict[str, int] = {}
            for batch in source.batches():
                if batch.name not in known:
                    found = _format(batch, use == "general", reader, census)
                    known[batch.name] = len(files)
                    files.append(ReadFile(batch.name, batch.style, use, number, found))
                file = known[batch.name]
                yield ReadJob(file, batch, files[file].format, use, sample.below)
            if not known:
                raise UserError(f"{source.name}: empty: there is nothing to train on")
            number += 1


def _format(batch: RowBatch, plain: bool, reader: Reader, census: Census) -> str:
    """The format of a file by its first row; columns that it ignores become a note."""
    row = next(batch.parsed())
    if plain:
        columns, formats = Columns(), _TEXT
        if "text" not in row.columns:
            raise UserError("data.general: expected text (txt, md, or a `text` column)")
    else:
        columns, formats = reader.columns, reader.task.formats
    name = format_of(row, columns, formats)
    prompted = name not in WITHOUT_PROMPT
    ignored = [
        other
        for other in unread(row, name, columns)
        if plain or not is_flag(other, row.columns[other], prompted)
    ]
    note = f"unused columns: {', '.join(ignored)[:200]}"
    if ignored and not any(known.startswith(note) for known in census.notes):
        census.notes.append(f"{note} (first: {batch.name})")
    return name


def worker_count(data: Data) -> int:
    """How many processes prepare the data."""
    return data.workers or min(8, len(os.sched_getaffinity(0)))
