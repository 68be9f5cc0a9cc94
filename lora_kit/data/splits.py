"""Sources -> train, evaluation and general examples that never meet."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Literal

from lora_kit.data.formats import Dropped, Example, to_examples
from lora_kit.data.sources import read_sources
from lora_kit.errors import UserError
from lora_kit.run import Data

# Fewer held-out documents are measured, but not judged.
FEWEST_TO_JUDGE = 20
Wanted = Literal["text", "chat"]


@dataclass
class Splits:
    """Examples of one kind by use; `hashes` are {source: sha256} of everything that was read."""

    kind: Wanted
    train: list[Example]
    eval: list[Example]
    general: list[Example]
    hashes: dict[str, str] = field(default_factory=dict)
    dropped: Dropped = field(default_factory=Dropped)

    def summary(self) -> str:
        line = f"{len(self.train)} examples to train on, {len(self.eval)} held out"
        line += f", {len(self.general)} general" if self.general else ""
        line += f"; left out: {self.dropped}" if self.dropped.counts else ""
        if len(self.eval) < FEWEST_TO_JUDGE:
            line += f"; {FEWEST_TO_JUDGE} are needed for a verdict: raise data.eval, or add data"
        return line


def load_splits(data: Data, wanted: Wanted | None, seed: int) -> Splits:
    """Read all sources and split them.

    Args:
        wanted: what the recipe learns from: `text` (cpt) or `chat` (sft); None: what is there.
        seed: decides which documents are held out, nothing else does.

    Raises:
        UserError: a source is unusable, of the other kind, or leaves nothing to train or judge on;
            or an evaluation row is a training row too.
    """
    dropped = Dropped()
    train, hashes = _examples(data.train, data, dropped)
    _check_any("train", train, dropped)
    if wanted is None:
        wanted = "chat" if train and train[0].text is None else "text"
    _check_kind(train, wanted)
    if isinstance(data.eval, float):
        train, held_out = hold_out(train, data.eval, seed)
    else:
        held_out, more = _examples(data.eval, data, dropped)
        _check_any("eval", held_out, dropped)
        _check_kind(held_out, wanted)
        hashes |= more
        _check_leaks(train, held_out)
    general: list[Example] = []
    if data.general is not None:
        general, more = _examples(data.general, data, dropped)
        hashes |= more
        if any(example.text is None for example in general):
            raise UserError("data.general: text is expected (txt, md, or a `text` column)")
        _check_any("general", general, dropped)
        known = {example.key for example in chain(train, held_out)}
        for example in general:
            if example.key in known:
                dropped.add("general rows that stand in the domain's data too", example.place)
        general = [example for example in general if example.key not in known]
        _check_any("general", general, dropped)
    return Splits(wanted, train, held_out, general, hashes, dropped)


def hold_out(
    examples: list[Example], share: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Hold out a share of the examples, equal ones always together; the order is kept.

    Examples are ranked by sha256(seed, text), so that the choice depends on the seed and the texts
    alone, not on the order of files; a text that is added moves at most one other to its side.
    """
    ranked = sorted({_rank(example, seed) for example in examples})
    count = max(1, round(share * len(ranked)))
    if len(ranked) < 2:
        raise UserError(
            f"data.eval: {len(ranked)} different document(s) cannot be split: "
            "name a source of its own in data.eval"
        )
    limit = ranked[min(count, len(ranked) - 1) - 1]
    sides: tuple[list[Example], list[Example]] = ([], [])
    previous: Example | None = None
    previous_side = -1
    for example in examples:
        side = int(_rank(example, seed) <= limit)
        # A block goes on where the one before it stopped only if that one is on the same side.
        joins = example.joins and previous is not None and side == previous_side
        sides[side].append(replace(example, joins=joins))
        previous, previous_side = example, side
    return sides


def _rank(example: Example, seed: int) -> str:
    return hashlib.sha256(f"{seed}\0{example.key}".encode("utf-8", "surrogatepass")).hexdigest()


def _examples(
    sources: str | list[str], data: Data, dropped: Dropped
) -> tuple[list[Example], dict[str, str]]:
    rows, hashes = read_sources(sources)
    columns = {str(ours): theirs for ours, theirs in data.columns.items()}
    # Text has no columns to rename, the embedded one and that of files alike.
    tables = [row.columns.keys() != {"text"} for row in rows]
    examples = [
        example
        for row, table in zip(rows, tables, strict=True)
        for example in to_examples([row], columns if table else {}, dropped)
    ]
    return examples, hashes


def _check_any(name: str, examples: list[Example], dropped: Dropped) -> None:
    if not examples:
        raise UserError(f"data.{name}: no rows left; left out: {dropped}")


def _check_kind(examples: list[Example], wanted: Wanted) -> None:
    for example in examples:
        if wanted == "text" and example.text is None:
            raise UserError(f"{example.place}: a question and answer, not text: use `recipe: sft`")
        if wanted == "chat" and example.text is not None:
            raise UserError(f"{example.place}: text without an answer: use `recipe: cpt`")


def _check_leaks(train: list[Example], held_out: list[Example]) -> None:
    known = {example.key: example.place for example in train}
    leaks = [(known[e.key], e.place) for e in held_out if e.key in known]
    if leaks:
        raise UserError(
            f"data.eval: {len(leaks)} of {len(held_out)} rows are training rows too "
            f"(first: {leaks[0][1]} is {leaks[0][0]}): remove them from one side"
        )
