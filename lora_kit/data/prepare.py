"""Sources -> examples: read, checked, deduplicated and split into training and held-out rows.

    sources -> batches -> examples, hashes (reading, table) -> duplicates, split, contamination

This is the same for every task and needs no tokenizer. The result is cached under a key of
everything that it depends on (`lora_kit.cache`).
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_kit import cache
from lora_kit.data.census import Census
from lora_kit.data.duplicates import clusters, repeated, split_large_clusters, union_clusters
from lora_kit.data.examples import Examples
from lora_kit.data.formats import Columns, format_of, unread
from lora_kit.data.leaks import general_apart, train_against_eval, train_against_files
from lora_kit.data.readers import OpenedSource, RowBatch
from lora_kit.data.reading import DataTask, Reader, ReadJob, ReadSettings
from lora_kit.data.sources import check_apart, open_sources
from lora_kit.data.splits import FEWEST_TO_EVALUATE, hold_out
from lora_kit.data.table import Table
from lora_kit.data.workers import in_order, stop
from lora_kit.errors import UserError
from lora_kit.run import nearest
from lora_kit.schema import Data

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
        tables: {use that was read: all of its examples}.
        masks: {(use that was read, use that it is for): bool (examples,)}. With a held-out share,
            the table of `train` serves `train` and `eval`; that of `general` serves `general`, and
            `replay` where some of it may be trained on.
        ranks: {use: uint64 (examples,)}: the pseudorandom order in which examples are chosen.
        sources: int32 (examples of train,): the index of each example's source in data.train.
        fractions: of data.train's sources; empty if none are set.
        names: (name, place format) of each file, such as ("a.jsonl", "{}:{}").
        formats: row format of each file.
        hashes: {source: sha256} of everything that was read. commits: {Hub data set: commit}.
    """

    key: str
    tables: dict[str, Examples]
    masks: dict[tuple[str, str], np.ndarray]
    ranks: dict[str, np.ndarray]
    sources: np.ndarray
    fractions: list[float]
    names: list[tuple[str, str]]
    formats: list[str]
    hashes: dict[str, str]
    census: Census
    commits: dict[str, str] = field(default_factory=dict)

    @property
    def train(self) -> Examples:
        """The examples that may be trained on."""
        chosen, dropped = self.masks["train", "train"], self.census.train.dropped_text()
        return replace(self.tables["train"], chosen=chosen, dropped=dropped)


def prepare(data: Data, task: DataTask, seed: int, lock: dict[str, Any] | None = None) -> Split:
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
    named = {
        "train": data.train,
        "eval": None if isinstance(data.eval, float) else data.eval,
        "general": data.general,
        "decontaminate": data.decontaminate,
    }
    known = (lock or {}).get("commits", {})
    opened = {use: open_sources(some, known) for use, some in named.items() if some is not None}
    for use in opened.keys() - {"train"}:
        for source in opened[use]:
            if source.fraction is not None:
                raise UserError(
                    f"data.{use}: {source.name}: only sources of data.train take a fraction"
                )
    for use in ("eval", "decontaminate"):
        check_apart(opened["train"], opened.get(use, []), use)
    columns = Columns(
        {str(ours): theirs for ours, theirs in data.columns.items()},
        label_names(data.labels),
        data.group,
    )
    settings = ReadSettings(columns, seed, questions="decontaminate" in opened)
    decisive = {"eval", "replay", "decontaminate", "columns", "labels", "group"}
    key = cache.key_of(
        {  # the same content under another file name can be another format
            use: [(s.name, s.fraction, s.digest, *map(str, s.files)) for s in found]
            for use, found in opened.items()
        },
        data.model_dump(mode="json", include=decisive),
        asdict(settings),
        task.formats,
        cache.code_of(task),
        libraries=_LIBRARIES,
    )
    preparation = _Preparation(data, opened, settings, task)
    try:
        found = _load(cache.prepared(key, preparation.run), key)
    except BaseException:
        stop()
        raise
    found.commits = {s.name: s.commit for used in opened.values() for s in used if s.commit}
    return found


def _load(folder: Path, key: str) -> Split:
    values = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    names = [(name, style) for name, style in values["names"]]
    with np.load(folder / "split.npz") as stored:
        arrays = {name: stored[name] for name in stored}
    masks = {
        (read, use): array
        for name, array in arrays.items()
        for kind, _, rest in [name.partition("/")]
        if kind == "side"
        for read, use in [rest.split("/")]
    }
    tables = {
        use: Examples(folder / f"{use}.examples", files, names, np.ones(count, dtype=bool))
        for use, (files, count) in values["tables"].items()
    }
    return Split(
        key=key,
        tables=tables,
        masks=masks,
        ranks={name[6:]: array for name, array in arrays.items() if name.startswith("ranks/")},
        sources=arrays["sources"],
        fractions=values["fractions"],
        names=names,
        formats=values["formats"],
        hashes=values["hashes"],
        census=Census.from_json(values["census"]),
    )


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


class _File(NamedTuple):
    """A file that is read. `source`: index over the sources of all uses. `style`: place format."""

    name: str
    style: str
    use: str
    source: int
    format: str


@dataclass
class _Preparation:
    """Builds one cache entry: sources -> the files of its folder."""

    data: Data
    opened: dict[str, list[OpenedSource]]
    settings: ReadSettings
    task: DataTask
    folder: Path = field(init=False)
    census: Census = field(default_factory=Census)
    files: list[_File] = field(default_factory=list)

    def run(self, folder: Path) -> None:
        self.folder = folder
        tables = self._read()
        masks = self._divide(tables)
        for table in tables.values():
            table.forget_signatures()
        self._count_rows(masks)
        sources = np.array([file.source for file in self.files], np.int32)
        arrays = {f"side/{read}/{use}": side for (read, use), side in masks.items()}
        arrays |= {f"ranks/{use}": table.ranks for use, table in tables.items()}
        arrays["sources"] = sources[tables["train"].files]
        np.savez(folder / "split.npz", **arrays)  # type: ignore[arg-type]
        meta = {
            "tables": {use: (t.examples.files, len(t)) for use, t in tables.items()},
            "fractions": [s.fraction for s in self.opened["train"] if s.fraction],
            "hashes": {s.name: s.digest for s in chain.from_iterable(self.opened.values())},
            "names": [(file.name, file.style) for file in self.files],
            "formats": [file.format for file in self.files],
            "census": self.census.to_json(),
        }
        (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")

    def _read(self) -> dict[str, Table]:
        """Every row of every source."""
        tables = {
            use: Table(self.folder / f"{use}.examples", self.settings.seed)
            for use in USES
            if use in self.opened
        }
        reported, count = time.monotonic(), 0
        reader = Reader(self.task, self.settings)
        for part in in_order(reader, self._work(tables), worker_count(self.data)):
            tables[self.files[part.file].use].add(part)
            count += part.count.rows_read
            if time.monotonic() - reported > _SECONDS_BETWEEN_LINES:
                reported = time.monotonic()
                print(f"data: {count:,} rows read", file=sys.stderr, flush=True)
        for use, table in tables.items():
            table.finish()
            setattr(self.census, use, table.count)
            if not len(table):
                dropped = table.count.dropped_text()
                raise UserError(f"data.{use}: no rows left; dropped: {dropped}")
        return tables

    def _work(self, tables: dict[str, Table]) -> Iterator[ReadJob]:
        """The batches of all sources; a file's format is detected from its first row."""
        number = 0
        for use in USES:
            for source in self.opened.get(use, []):
                known: dict[str, int] = {}
                for batch in source.batches():
                    batch = replace(batch, plain=use == "general")
                    if batch.name not in known:
                        found = self._format(batch)
                        known[batch.name] = len(self.files)
                        self.files.append(_File(batch.name, batch.style, use, number, found))
                    file = known[batch.name]
                    yield ReadJob(file, batch, self.files[file].format, tables[use].below)
                if not known:
                    raise UserError(f"{source.name}: empty: there is nothing to train on")
                number += 1

    def _format(self, batch: RowBatch) -> str:
        row = next(batch.parsed())
        if batch.plain:
            columns, formats = Columns(), _TEXT
            if "text" not in row.columns:
                raise UserError("data.general: expected text (txt, md, or a `text` column)")
        else:
            columns, formats = self.settings.columns, self.task.formats
        name = format_of(row, columns, formats)
        unused = f"unused columns: {', '.join(unread(row, name, columns))[:200]}"
        noted = any(note.startswith(unused) for note in self.census.notes)
        if not unused.endswith(": ") and not noted:
            self.census.notes.append(f"{unused} (first: {batch.name})")
        return name

    def _divide(self, tables: dict[str, Table]) -> dict[tuple[str, str], np.ndarray]:
        """Assign examples to uses: see `Split.masks`."""
        train, census = tables["train"], self.census
        census.held_out = isinstance(self.data.eval, float)
        roots = clusters(train.keys, train.signed, train.signed_rows)
        self._count_duplicates(train, roots)
        chosen = np.ones(len(train), dtype=bool)
        masks: dict[tuple[str, str], np.ndarray] = {}
        if isinstance(self.data.eval, float):
            if "decontaminate" not in self.opened:
                train.forget_signatures()
            held = self._hold_out(train, roots, self.data.eval)
            chosen &= ~held
            masks["train", "eval"] = held
        else:
            exact = train_against_eval(train, tables["eval"], self._place, census, self.data.eval)
            self._check_labels(train, tables["eval"])
            masks["eval", "eval"] = ~exact
            if exact.all():
                raise UserError("data.eval: every row is also in data.train: name a held-out set")
        if "decontaminate" in self.opened:
            files = self.opened["decontaminate"]
            train_against_files(files, train, chosen, self._place, census)
        masks["train", "train"] = chosen
        if "general" in tables:
            general, kept = tables["general"], general_apart(tables, self._place, census)
            if not kept.any():
                why = census.general.dropped_text()
                raise UserError(f"data.general: no rows left; dropped: {why}")
            if self.data.replay is not None:
                pool = self._replay_pool(general, kept)
                kept &= ~pool
                masks["general", "replay"] = pool
            masks["general", "general"] = kept
        elif self.data.replay is not None:
            raise UserError("data.replay is a share of general text: set data.general")
        return masks

    def _hold_out(self, train: Table, roots: np.ndarray, share: float) -> np.ndarray:
        """bool (examples,): held out. Duplicates, and examples of one group, stay together."""
        before = roots
        roots = split_large_clusters(before, train.keys)
        apart = int((before != roots).sum())
        if apart:
            self.census.notes.append(
                f"{apart:,} rows share long text with many others: of them only exact duplicates "
                "are kept in the same split"
            )
        labels = train.labels if train.label_names else None
        if self.data.group and not train.groups.any():
            raise UserError(f"data.group: no row of data.train has a column `{self.data.group}`")
        # Clusters that share a group are merged; documents of text files have no group.
        rows = np.flatnonzero(train.groups)
        first, inverse = np.unique(train.groups[rows], return_index=True, return_inverse=True)[1:]
        units = union_clusters(roots, rows, rows[first][inverse])
        return hold_out(units, train.keys, share, self.settings.seed, labels)

    def _replay_pool(self, general: Table, kept: np.ndarray) -> np.ndarray:
        """General examples that are not evaluated on, so they may be trained on."""
        rows = np.flatnonzero(kept)
        roots = clusters(general.keys, general.signed, general.signed_rows)
        roots = split_large_clusters(roots, general.keys)[rows]
        share = max(0.1, min(0.5, FEWEST_TO_EVALUATE / len(np.unique(roots))))
        seed = self.settings.seed
        held = hold_out(roots, general.keys[rows], share, seed, key="data.general")
        pool = np.zeros(len(general), dtype=bool)
        pool[rows[~held]] = True
        return pool

    def _count_duplicates(self, train: Table, roots: np.ndarray) -> None:
        census = self.census
        exact = repeated(train.keys)
        census.compared = len(train.signed_rows)
        near = (roots != np.arange(len(roots))) & ~exact
        census.duplicates = {"exact": int(exact.sum()), "near": int(near.sum())}
        if census.compared < len(train):
            census.notes.append(
                f"near duplicates and near leaks were searched among a random sample of "
                f"{census.compared:,} of {len(train):,} rows"
            )
        for source in chain.from_iterable(self.opened.values()):
            if source.skipped:
                note = f"{source.name}: skipped {source.skipped:,} file(s) of unsupported types"
                census.notes.append(note)

    def _count_rows(self, masks: dict[tuple[str, str], np.ndarray]) -> None:
        """Rows held out of data.train are counted as read for data.eval."""
        census = self.census
        if census.held_out:
            census.eval.rows_read = int(masks["train", "eval"].sum())
            census.train.rows_read -= census.eval.rows_read

    def _check_labels(self, train: Table, held_out: Table) -> None:
        unknown = [name for name in held_out.label_names if name not in train.label_names]
        if unknown and train.label_names:
            row = int(np.flatnonzero(held_out.labels == held_out.label_names[unknown[0]])[0])
            raise UserError(
                f"data.eval: {self._place(held_out, row)}: the label {unknown[0]!r:.60} is in no "
                f"row of data.train{nearest(unknown[0], list(train.label_names))}"
            )

    def _place(self, table: Table, row: int) -> str:
        number, line = table.place(row)
        file = self.files[number]
        return file.style.format(file.name, line)


def worker_count(data: Data) -> int:
    """How many processes prepare the data."""
    return data.workers or min(8, len(os.sched_getaffinity(0)))
