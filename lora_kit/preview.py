"""Preview of a run's training data: in the terminal and as an HTML page.

It shows the prepared rows, before a model is loaded.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lora_kit.data.prepare import USES
from lora_kit.errors import UserError, harmless
from lora_kit.folders import write_whole
from lora_kit.pages import render_page
from lora_kit.schema import Run
from lora_kit.tasks.encode import Prepared
from lora_kit.tasks.task import Processor, Shown, Task

if TYPE_CHECKING:
    from rich.text import Text

SAMPLES_OF_A_PAGE = 50  # per split
TOKENS_OF_A_PAGE = 800  # per sample: 120,000 tokens are a page of about 5 MB
TOKENS_OF_A_TERMINAL = 512
# Pages begin with this; other files are not overwritten.
MARK = "<!doctype html>\n<!-- lora-kit preview -->\n"
_CHARACTERS = 6  # per token, to limit a text that has no tokens
_LONGEST_CHARACTER = 8  # tokens; a character has up to four bytes
_BROKEN = "\ufffd"  # what an incomplete character is decoded as
# Terminal styles.
_SUPERVISED, _CONTEXT, _SPECIAL = "bold green", "dim", "dim magenta"


@dataclass(frozen=True)
class Piece:
    """The text of a token, or of tokens that form one character. Without `ids`: a note about tokens
    that are not shown."""

    text: str
    ids: tuple[int, ...]
    supervised: bool = False
    special: bool = False


@dataclass(frozen=True)
class Sample:
    """A row as the model gets it: `number` counts from 1, `place` is where it is in the data, and
    `supervised` of its `tokens` are trained on."""

    use: str
    number: int
    place: str
    tokens: int
    supervised: int
    pieces: list[Piece]


def pieces(
    tokenizer: Processor, ids: list[int], supervised: list[bool], start: int, stop: int
) -> Iterator[Piece]:
    """The tokens ids[start:stop] of a row with their texts; tokens without text and special tokens
    with their names."""
    marks = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    before = max(0, start - 1)
    while start < stop:
        special = ids[start] in marks
        if special:
            end, text = start + 1, tokenizer.convert_ids_to_tokens(ids[start])
        else:
            end, text = _next(tokenizer, ids, before, start)
            text = text or tokenizer.convert_ids_to_tokens(ids[start])
        yield Piece(harmless(text), tuple(ids[start:end]), any(supervised[start:end]), special)
        before, start = start, end


def _next(tokenizer: Processor, ids: list[int], before: int, start: int) -> tuple[int, str]:
    """The end and text of the piece that begins with a token: one token, or more if they form one
    character."""

    def decode(first: int, last: int) -> str:
        return tokenizer.backend_tokenizer.decode(ids[first:last], skip_special_tokens=False)

    def text(end: int) -> str:
        # Decoded with the previous token, since some decoders strip leading spaces.
        whole = decode(before, end)
        return whole[len(known) :] if whole.startswith(known) else decode(start, end)

    known = decode(before, start)
    for end in range(start + 1, min(start + _LONGEST_CHARACTER, len(ids)) + 1):
        if _BROKEN not in (found := text(end)):
            return end, found
    return start + 1, text(start + 1)


def samples(
    task: Task, prepared: Prepared, processor: Processor, use: str, count: int, most_tokens: int
) -> list[Sample]:
    """Evenly spaced rows; of long ones the beginning and the end.

    Raises:
        UserError: there are no rows in this split.
    """
    rows = prepared.rows(use)
    if rows is None or not len(rows):
        raise UserError(f"--split {use}: data.{use} is not set")
    shower = (task.general if use == "general" else task) or task
    found = []
    for number in np.unique(np.linspace(0, len(rows) - 1, count).round().astype(int)).tolist():
        sequences = shower.show(rows[number], processor, prepared.facts)
        shown: list[Piece] = []
        for sequence in sequences:
            if sequence.name:
                line_end = "\n" if shown else ""
                shown.append(Piece(f"{line_end}{sequence.name}: ", ()))
            shown += _shown(processor, sequence, most_tokens)
        found.append(
            Sample(
                use,
                number + 1,
                " ".join(harmless(prepared.place(rows, number)).split()),
                sum(len(sequence.ids) for sequence in sequences),
                sum(sum(sequence.trained) for sequence in sequences),
                shown,
            )
        )
    return found


def _shown(processor: Processor, sequence: Shown, most_tokens: int) -> list[Piece]:
    """The pieces of a sequence; of a long one the beginning and the end."""
    if not len(sequence.ids):
        text = harmless(sequence.text)
        most = most_tokens * _CHARACTERS
        return [Piece(text if len(text) <= most else f"{text[:most]} …", ())]
    tokenizer = getattr(processor, "tokenizer", processor)
    ids = np.asarray(sequence.ids).tolist()
    trained = list(sequence.trained) or [False] * len(ids)
    length, half = len(ids), most_tokens // 2
    if length <= most_tokens:
        return list(pieces(tokenizer, ids, trained, 0, length))
    return [
        *pieces(tokenizer, ids, trained, 0, half),
        Piece(f" … {length - 2 * half:,} tokens not shown … ", ()),
        *pieces(tokenizer, ids, trained, length - half, length),
    ]


def packing(task: Task, run: Run, prepared: Prepared) -> dict[str, object]:
    """`mode`, number of `rows`, and `fill`, the share of their positions that are tokens; None if
    rows are padded to the longest in the batch."""
    rows, mode = prepared.train, task.packing(run.data)
    tokens = int(task.tokens(prepared.rows("train")).sum())
    fill = None if mode == "none" else round(tokens / (len(rows) * run.train.max_length), 4)
    return {"mode": mode, "rows": len(rows), "fill": fill}


def to_json(task: Task, run: Run, prepared: Prepared, problems: list[str]) -> dict[str, object]:
    """The output of `preview --json`: the census and more."""
    return {
        "recipe": run.recipe,
        "kind": prepared.facts.get("kind"),
        "facts": prepared.facts,
        "max_length": run.train.max_length,
        "packing": packing(task, run, prepared),
        "problems": problems,
        **prepared.census.to_json(),
    }


def show(task: Task, prepared: Prepared, processor: Processor, use: str, count: int) -> None:
    """Print the census, row lengths and samples; supervised tokens are coloured, or in ⟦ ⟧ without
    colours."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    coloured = console.color_system is not None and not console.no_color
    found = samples(task, prepared, processor, use, count, TOKENS_OF_A_TERMINAL)
    for line in prepared.summary():
        console.print(harmless(line))
    counted = getattr(prepared.census, use)
    lengths = counted.lengths
    also = ", with those that are too long" if lengths[-1][0] > counted.longest else ""
    console.print(f"\nlengths of {use} rows, in tokens{also}:")
    most = max(rows for _, rows in lengths)
    for up_to, rows in lengths:
        bar = "█" * round(40 * rows / max(1, most)) or ("▏" if rows else "")
        console.print(f"{'≤ ' + format(up_to, ','):>9} {bar} {rows:,}")
    verb = "trained on" if use == "train" else "evaluated on"
    if not counted.labels_are_tokens:
        verb = ""
    if found and coloured and verb:
        legend = Text.assemble("\n", (verb, _SUPERVISED), " and ", (f"not {verb}", _CONTEXT))
        console.print(legend)
    elif found and verb:
        console.print(f"\n⟦{verb}⟧ and not {verb}")
    for sample in found:
        head = f"{sample.use} row {sample.number:,}, {sample.place}: {sample.tokens:,} tokens"
        head += f", {sample.supervised:,} of them {verb}" if verb else ""
        console.print(Text(f"\n{head}", "bold"))
        console.print(_drawn(sample, coloured))


def _drawn(sample: Sample, coloured: bool) -> Text:
    """A sample for the terminal, supervised tokens in colour or in ⟦ ⟧, with visible line ends."""
    from rich.text import Text

    text = Text()
    for supervised, run in groupby(sample.pieces, attrgetter("supervised")):
        opening, closing = ("⟦", "⟧") if supervised and not coloured else ("", "")
        text.append(opening)
        for piece in run:
            style = _SUPERVISED if supervised else _SPECIAL if piece.special else _CONTEXT
            if piece.special:
                style += " underline"
            text.append(piece.text.replace("\n", "↵\n"), style if coloured else "")
        text.append(closing)
    return text


def check_page(file: Path) -> None:
    """Raises UserError if the page cannot be written, or would overwrite another file."""
    if not file.parent.is_dir():
        raise UserError(f"--html {file}: no such folder: {file.parent}")
    ours = False
    with contextlib.suppress(OSError):
        ours = file.is_file() and file.read_bytes().startswith(MARK.encode())
    if os.path.lexists(file) and not ours:
        raise UserError(f"--html {file}: exists and is not a preview page: name another file")


def write_page(
    file: Path, task: Task, run: Run, prepared: Prepared, processor: Processor, problems: list[str]
) -> None:
    """Write a self-contained page; all text from data is escaped."""
    check_page(file)
    text = page(task, run, prepared, processor, problems)
    try:
        write_whole(file, text)
    except OSError as error:
        raise UserError(f"--html {file}: cannot be written ({error.strerror})") from None


def page(
    task: Task, run: Run, prepared: Prepared, processor: Processor, problems: list[str]
) -> str:
    """The page of `write_page`."""
    census = prepared.census
    uses = [use for use in USES if getattr(census, use).samples]
    notes = [line.removeprefix("note: ") for line in prepared.summary() if line[:6] == "note: "]
    return render_page(
        "preview.html.jinja",
        run=run,
        prepared=prepared,
        packing=packing(task, run, prepared),
        template=run.data.chat_template
        or ("the base's own" if getattr(processor, "chat_template", None) else "none"),
        census=census,
        counts={use: getattr(census, use) for use in uses},
        problems=problems,
        notes=notes,
        samples={
            use: samples(task, prepared, processor, use, SAMPLES_OF_A_PAGE, TOKENS_OF_A_PAGE)
            for use in uses
        },
        most_tokens=TOKENS_OF_A_PAGE,
    )
