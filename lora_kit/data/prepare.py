"""Sources -> labelled tokens to learn from and to judge by, with a census of every row.

    sources -> batches -> tokens, hashes (encode, table) -> sides, shares (splits) -> rows -> census

It is done once: the result is kept under a key of everything that decides it (cache).
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
from typing import Any, Literal, NamedTuple

import numpy as np

from lora_kit import cache
from lora_kit.base.templates import context_token
from lora_kit.data.census import Census
from lora_kit.data.duplicates import clusters, joined, parted, repeated
from lora_kit.data.encode import Settings, Work, encode_all
from lora_kit.data.formats import FORMATS, Columns, format_of, unread
from lora_kit.data.leaks import against, general_apart, train_against_eval
from lora_kit.data.readers import Batch, Opened
from lora_kit.data.sources import check_apart, open_sources
from lora_kit.data.splits import FEWEST_TO_JUDGE, hold_out, mix, take
from lora_kit.data.table import Table
from lora_kit.errors import UserError
from lora_kit.run import nearest
from lora_kit.schema import Data
from lora_kit.tasks.arrange import Chosen, count_texts, write_judged, write_train
from lora_kit.tasks.batches import Labelled
from lora_kit.tasks.packing import Packed

Kind = Literal["text", "chat"]
USES = ("train", "eval", "general")
_SECONDS_BETWEEN_LINES = 15


@dataclass
class Prepared:
    """What a run learns from and is judged by.

    `hashes` are {source: sha256} of everything that was read, `commits` {Hub set: commit}, `names`
    (file, style) of the places in `train` and the others; `joiner` stands between prompt and answer
    without a template; `cached`: nothing had to be prepared.
    """

    kind: Kind
    train: Labelled | Packed
    eval: Labelled
    general: Labelled | None
    hashes: dict[str, str]
    census: Census
    joiner: str
    names: list[list[str]]
    cached: bool
    commits: dict[str, str] = field(default_factory=dict)

    def rows(self, use: str) -> Labelled:
        """The rows of a use, not packed."""
        rows = getattr(self, use)
        return rows.rows if isinstance(rows, Packed) else rows

    def place(self, rows: Labelled, row: int) -> str:
        """file:line of a row."""
        name, style = self.names[rows.files[row]]
        return style.format(name, rows.numbers[row])

    def summary(self) -> list[str]:
        lines = self.census.lines()
        if isinstance(self.train, Packed):
            lines.append(f"packing: {len(self.train):,} rows, {self.train.fill:.1%} full")
        if len(self.eval.unit_bytes) < FEWEST_TO_JUDGE:
            lines.append(
                f"note: {FEWEST_TO_JUDGE} held-out documents are needed for a verdict: raise "
                "data.eval, or add data"
            )
        return lines


def prepare(
    data: Data,
    kind: Kind | None,
    tokenizer: Any,
    max_length: int,
    seed: int,
    limits: bool = True,
    lock: dict[str, Any] | None = None,
) -> Prepared:
    """Read, check, split, tokenize and label; or map what an earlier run prepared from the same.

    Args:
        kind: what the recipe learns from: `text` (cpt) or `chat` (sft); None: what is there.
        tokenizer: with its chat template set.
        max_length: tokens of a row at most.
        seed: decides what is held out and what fractions leave over, nothing else does.
        limits: stop where `data.limits` are exceeded.
        lock: the lock file of a run that used it; sets of the Hub are taken at the commits named
            there, unless they name their own.

    Raises:
        UserError: a source is unusable, of the other kind, or leaves nothing to train or judge on;
            or a limit is exceeded.
    """
    asked: dict[str, Any] = {"train": data.train, "general": data.general, "against": data.against}
    asked["eval"] = None if isinstance(data.eval, float) else data.eval
    known = (lock or {}).get("commits", {})
    opened = {use: open_sources(named, known) for use, named in asked.items() if named is not None}
    for use in opened.keys() - {"train"}:
        for source in opened[use]:
            if source.fraction is not None:
                raise UserError(f"data.{use}: {source.name}: only data.train is mixed by fractions")
    for use in ("eval", "against"):
        check_apart(opened["train"], opened.get(use, []), use)
    columns = Columns(
        {str(o): t for o, t in data.columns.items()}, _labels(data.labels), data.group
    )
    settings = Settings(columns, data.supervise, max_length, seed, "against" in opened)
    key = cache.key_of(
        {  # a file of the same content and another name can be of another kind
            use: [(s.name, s.fraction, s.digest, *map(str, s.files)) for s in found]
            for use, found in opened.items()
        },
        data.model_dump(mode="json", exclude={"train", "limits", "workers"}),
        asdict(settings),
        kind,
        tokenizer,
    )
    preparation = _Preparation(data, opened, settings, kind, tokenizer)
    folder = cache.prepared(key, preparation.run)
    found = _load(folder, data, max_length, cached=not preparation.files)
    found.commits = {s.name: s.commit for used in opened.values() for s in used if s.commit}
    if limits:
        found.census.check(data.limits)
    return found


def _load(folder: Path, data: Data, max_length: int, cached: bool) -> Prepared:
    values = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    values["census"] = Census.from_json(values["census"])
    rows: dict[str, Any] = {use: Labelled.open(folder / use) for use in values.pop("uses")}
    if packing_of(data, values["kind"]) == "documents":
        rows["train"] = Packed(rows["train"], max_length)
    return Prepared(**{"general": None, **rows, **values}, cached=cached)


def kind_of(recipe: str) -> Kind | None:
    """What a recipe learns from, by its name or file: a copied one keeps its name, and one of the
    user's own (None) learns from what is there."""
    kinds: dict[str, Kind] = {"sft": "chat", "cpt": "text"}
    return kinds.get(Path(recipe).stem)


def packing_of(data: Data, kind: Kind) -> str:
    """`data.packing`, or what is usual for texts and for conversations."""
    if data.packing == "running" and kind == "chat":
        raise UserError("data.packing: running: for text; conversations: none or documents")
    return data.packing or ("running" if kind == "text" else "none")


def _labels(labels: str | list[str] | None) -> tuple[str, ...]:
    """The names of `data.labels`: listed, or in a file, a JSON list or a name a line."""
    if labels is None or isinstance(labels, list):
        return tuple(labels or ())
    try:
        text = Path(labels).read_text(encoding="utf-8-sig")
        lines = list(filter(None, map(str.strip, text.splitlines())))
        names = json.loads(text) if labels.endswith(".json") else lines
    except (OSError, ValueError) as error:
        raise UserError(f"data.labels: {labels}: cannot be read ({error})") from None
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise UserError(f"data.labels: {labels}: a list of names is expected")
    return tuple(names)


class _File(NamedTuple):
    """A file that is read: `source` counts the sources of all uses; `style` is of its places."""

    name: str
    style: str
    use: str
    source: int
    format: str


@dataclass
class _Preparation:
    """One preparation, from the sources to the files of its folder."""

    data: Data
    opened: dict[str, list[Opened]]
    settings: Settings
    kind: Kind | None
    tokenizer: Any
    folder: Path = field(init=False)
    census: Census = field(default_factory=Census)
    files: list[_File] = field(default_factory=list)
    below: int = 2**64 - 1  # of the table that the batch in hand goes to

    def run(self, folder: Path) -> None:
        self.folder = folder
        tables = self._read()
        train, judged, replayed = self._divide(tables)
        for table in tables.values():
            table.forget_signatures()
        self._count_rows(train, judged, replayed)
        kind = self.kind or "text"
        packing = packing_of(self.data, kind)
        args = (self.tokenizer, self.settings.max_length)
        rows = {"train": write_train(self.folder / "train", train, replayed, kind, packing, *args)}
        for use, chosen in judged.items():
            written = kind if use == "eval" else "text"
            rows[use] = write_judged(self.folder / use, chosen, written, *args)
        for use, labelled in rows.items():
            getattr(self.census, use).measure(labelled)
        meta = {
            "kind": kind,
            "joiner": FORMATS[self.files[tables["train"].sources[0]].format].joiner,
            "uses": list(rows),
            "hashes": {s.name: s.digest for s in chain.from_iterable(self.opened.values())},
            "names": [(file.name, file.style) for file in self.files],
            "census": self.census.to_json(),
        }
        for name in USES:
            (self.folder / f"{name}.table").unlink(missing_ok=True)
        (self.folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")

    def _read(self) -> dict[str, Table]:
        """Every row of every source, tokenized."""
        tables = {
            use: Table(self.folder / f"{use}.table", self.settings.seed)
            for use in USES
            if use in self.opened
        }
        workers = self.data.workers or min(8, len(os.sched_getaffinity(0)))
        said, count = time.monotonic(), 0
        for file, part in encode_all(
            self._work(tables), self.tokenizer, self.settings, self, workers
        ):
            tables[self.files[file].use].add(file, part)
            count += part.count.rows_read
            if time.monotonic() - said > _SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                print(f"data: {count:,} rows prepared", file=sys.stderr, flush=True)
        for use, table in tables.items():
            table.finish()
            setattr(self.census, use, table.count)
            if not len(table):
                raise UserError(f"data.{use}: no rows left; left out: {table.count.left_out()}")
        return tables

    def _work(self, tables: dict[str, Table]) -> Iterator[Work]:
        """The batches of all sources; each file's format is found by its first row."""
        number = 0
        for use in USES:
            for source in self.opened.get(use, []):
                known: dict[str, int] = {}
                for batch in source.batches():
                    batch = replace(batch, plain=use == "general")
                    if batch.name not in known:
                        found = self._format(batch, use)
                        known[batch.name] = len(self.files)
                        self.files.append(_File(batch.name, batch.style, use, number, found))
                    file = known[batch.name]
                    self.below = tables[use].below
                    yield file, batch, self.files[file].format
                if not known:
                    raise UserError(f"{source.name}: empty: there is nothing to learn from")
                number += 1

    def _format(self, batch: Batch, use: str) -> str:
        row = next(batch.parsed())
        columns = Columns() if batch.plain else self.settings.columns
        name = format_of(row, columns)
        kind: Any = FORMATS[name].kind
        if use == "general" and kind != "text":
            raise UserError("data.general: text is expected (txt, md, or a `text` column)")
        if use != "general" and self.kind is None:
            self.kind = kind
            packing_of(self.data, kind)  # refused now, not after all the work
        if use != "general" and kind != self.kind:
            if self.kind == "text":
                raise UserError(f"{row.place}: a question and answer, not text: use `recipe: sft`")
            raise UserError(
                f"{row.place}: text without an answer (columns: {', '.join(row.columns)}): use "
                "`recipe: cpt`, or name the column of the answer, as in data.columns: "
                "{label: YOURS}"
            )
        left = f"columns not read: {', '.join(unread(row, name, columns))[:200]}"
        said = any(note.startswith(left) for note in self.census.notes)
        if not left.endswith(": ") and not said:
            self.census.notes.append(f"{left} (first: {batch.name})")
        return name

    def _divide(self, tables: dict[str, Table]) -> tuple[Chosen, dict[str, Chosen], Chosen | None]:
        """Which rows are learned from, judged, and replayed."""
        train, census = tables["train"], self.census
        census.held_out = isinstance(self.data.eval, float)
        roots = clusters(train.keys, train.signed, train.signed_rows)
        self._count_duplicates(train, roots)
        learned = np.ones(len(train), dtype=bool)
        if isinstance(self.data.eval, float):
            if "against" not in self.opened:
                train.forget_signatures()
            before, roots = roots, parted(roots, train.keys)
            if apart := int((before != roots).sum()):
                census.notes.append(
                    f"{apart:,} rows are near many others, by what they all share: only equal ones "
                    "of them stay on one side of the split"
                )
            labels = train.labels if train.label_names else None
            if self.data.group and not train.groups.any():
                raise UserError(
                    f"data.group: no row of data.train has a column `{self.data.group}`"
                )
            # Clusters whose rows share a group become one; documents of text files have none.
            rows = np.flatnonzero(train.groups)
            first, inverse = np.unique(train.groups[rows], return_index=True, return_inverse=True)[
                1:
            ]
            units = joined(roots, rows, rows[first][inverse])
            held = hold_out(units, train.keys, self.data.eval, self.settings.seed, labels)
            learned &= ~held
            judged = {"eval": (train, held)}
        else:
            exact = train_against_eval(train, tables["eval"], self._place, census, self.data.eval)
            self._check_labels(train, tables["eval"])
            judged = {"eval": (tables["eval"], ~exact)}
            if exact.all():
                raise UserError("data.eval: every row is a row of data.train too: name others")
        if "against" in self.opened:
            against(self.opened["against"], train, learned, self._place, census)
        fractions = [source.fraction for source in self.opened["train"] if source.fraction]
        if fractions:
            sources = np.array([file.source for file in self.files])[train.sources][learned]
            tokens = self._tokens(train, "train")[learned]
            for number, source in enumerate(self.opened["train"]):
                if not tokens[sources == number].any():
                    raise UserError(
                        f"{source.name}: no rows left to learn from, but it has a fraction"
                    )
            used = mix(tokens, sources, train.ranks[learned], dict(enumerate(fractions)))
            census.train.unused = int((~used).sum())
            learned[np.flatnonzero(learned)[~used]] = False
        replayed = None
        if "general" in tables:
            general, kept = tables["general"], general_apart(tables, self._place, census)
            if not kept.any():
                why = census.general.left_out()
                raise UserError(f"data.general: no rows left; left out: {why}")
            if self.data.replay is not None:
                learned_from = int(self._tokens(train, "train")[learned].sum())
                pool, chosen = self._replay(general, kept, learned_from)
                kept &= ~pool
                census.general.unused = int((pool & ~chosen).sum())
                replayed = (general, chosen)
            judged["general"] = (general, kept)
        elif self.data.replay is not None:
            raise UserError("data.replay: is a share of general text: name some in data.general")
        return (train, learned), judged, replayed

    def _replay(
        self, general: Table, kept: np.ndarray, tokens: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """General rows that are not judged, and those of them that are learned from."""
        rows = np.flatnonzero(kept)
        roots = clusters(general.keys, general.signed, general.signed_rows)
        roots = parted(roots, general.keys)[rows]
        units = len(np.unique(roots))
        share = max(0.1, min(0.5, FEWEST_TO_JUDGE / units))
        seed = self.settings.seed
        held = hold_out(roots, general.keys[rows], share, seed, key="data.general")
        pool = np.zeros(len(general), dtype=bool)
        pool[rows[~held]] = True
        replay = self.data.replay or 0.0
        wanted = replay / (1 - replay) * tokens
        lengths = self._tokens(general, "general")
        there = int(lengths[pool].sum())
        if there < 0.99 * wanted:
            raise UserError(
                f"data.replay: {replay:g} of the tokens trained on are {wanted:,.0f}; data.general "
                f"has {there:,} besides what is judged: lower it to "
                f"{there / (there + tokens):.3f}, or name more text"
            )
        chosen = np.zeros(len(general), dtype=bool)
        members = np.flatnonzero(pool)
        chosen[members[take(lengths[members], general.ranks[members], wanted)]] = True
        return pool, chosen

    def _tokens(self, table: Table, use: str) -> np.ndarray:
        """Tokens that each row adds to what is trained on: a text is closed, and may be begun."""
        if use == "train" and self.kind == "chat":
            return table.lengths
        begins = context_token(self.tokenizer) == [self.tokenizer.bos_token_id]
        return table.lengths + (2 if begins else 1) * ~table.joins

    def _count_duplicates(self, train: Table, roots: np.ndarray) -> None:
        census = self.census
        exact = repeated(train.keys)
        census.compared = len(train.signed_rows)
        near = (roots != np.arange(len(roots))) & ~exact
        census.duplicates = {"exact": int(exact.sum()), "near": int(near.sum())}
        if census.compared < len(train):
            census.notes.append(
                f"near duplicates and near leaks were looked for among {census.compared:,} of "
                f"{len(train):,} rows, a random sample"
            )
        for source in chain.from_iterable(self.opened.values()):
            if others := source.passed_over:
                census.notes.append(f"{source.name}: {others:,} file(s) of other kinds passed over")

    def _count_rows(
        self, train: Chosen, judged: dict[str, Chosen], replayed: Chosen | None
    ) -> None:
        census = self.census
        for use, (table, chosen) in [("train", train), *judged.items()]:
            count = getattr(census, use)
            count.rows_kept = int(chosen.sum())
            if use != "general" and self.kind == "chat":
                count.end_markers_supervised = int(table.answers[chosen].sum())
        # Documents that are judged are not closed by the end-of-text token.
        closed = [train] if self.kind == "text" else []
        closed += [replayed] if replayed is not None else []
        if self.tokenizer.eos_token_id is not None:
            census.train.end_markers_supervised += sum(map(count_texts, closed))
        if census.held_out:
            census.eval.rows_read = census.eval.rows_kept
            census.train.rows_read -= census.eval.rows_read
        if replayed is not None:
            table, chosen = replayed
            number, tokens = int(chosen.sum()), int(table.lengths[chosen].sum())
            census.general.rows_kept += number
            census.notes.append(
                f"replay: {number:,} general rows ({tokens:,} tokens) are learned from as well"
            )
        if any(file.format == "preference" for file in self.files):
            census.notes.append("preference rows: the chosen answers are learned from alone")

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
