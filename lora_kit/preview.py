"""What a run would train on, for people to look at: in the terminal, and as one page.

Nothing here decides anything: it shows the rows that were prepared, before a model is loaded.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from lora_kit.data.prepare import USES
from lora_kit.errors import UserError, harmless
from lora_kit.folders import write_whole
from lora_kit.pages import render
from lora_kit.schema import Run
from lora_kit.tasks.encode import Prepared
from lora_kit.tasks.task import Processor, Shown, Task

SAMPLES_OF_A_PAGE = 50  # of each split
TOKENS_OF_A_PAGE = 800  # of each sample: 120,000 tokens are a page of about 5 MB
TOKENS_OF_A_TERMINAL = 512
# A page begins with this; a file that does not is somebody else's, and is not overwritten.
MARK = "<!doctype html>\n<!-- lora-kit preview -->\n"
_TEMPLATE = Path(__file__).with_name("preview.html.jinja")
_CHARACTERS = 6  # of text for a token, where text is shown that is no tokens
_LONGEST_CHARACTER = 8  # tokens; four for its bytes, and a token may end one and begin another
_BROKEN = "\ufffd"
# Styles of a terminal.
_LEARNED, _CONTEXT, _SPECIAL = "bold green", "dim", "dim magenta"


@dataclass(frozen=True)
class Piece:
    """The text of a token, or of the tokens that spell one character together. Without `ids`: what
    is said of tokens that are not shown."""

    text: str
    ids: tuple[int, ...]
    learned: bool = False
    special: bool = False


@dataclass(frozen=True)
class Sample:
    """A row that the model sees; `number` counts from 1, `learned` of its `tokens` are learned."""

    use: str
    number: int
    place: str
    tokens: int
    learned: int
    pieces: list[Piece]


def pieces(
    tokenizer: Any, ids: list[int], learned: list[bool], start: int, stop: int
) -> Iterator[Piece]:
    """The tokens ids[start:stop] of a row, each with its own text; one that spells nothing, and a
    marker, with its name."""
    marks = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    before = max(0, start - 1)
    while start < stop:
        special = ids[start] in marks
        if special:
            end, text = start + 1, tokenizer.convert_ids_to_tokens(ids[start])
        else:
            end, text = _next(tokenizer, ids, before, start)
            text = text or tokenizer.convert_ids_to_tokens(ids[start])
        yield Piece(harmless(text), tuple(ids[start:end]), any(learned[start:end]), special)
        before, start = start, end


def _next(tokenizer: Any, ids: list[int], before: int, start: int) -> tuple[int, str]:
    """The text that begins with a token, and where it ends: at the next token, unless it takes more
    of them to spell a character."""

    def decode(first: int, last: int) -> str:
        return tokenizer.backend_tokenizer.decode(ids[first:last], skip_special_tokens=False)

    def text(end: int) -> str:
        # Decoded after the token before it: some decoders strip the space that begins a text.
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
    """Rows from the first to the last, evenly apart; of a long one its beginning and its end.

    Raises:
        UserError: there are no rows of this use.
    """
    rows = prepared.rows(use)
    if rows is None or not len(rows):
        raise UserError(f"--split {use}: the run file names no data.{use}")
    shower = (task.general if use == "general" else task) or task
    found = []
    for number in np.unique(np.linspace(0, len(rows) - 1, count).round().astype(int)).tolist():
        sequences = shower.show(rows[number], processor, prepared.facts)
        shown: list[Piece] = []
        for sequence in sequences:
            if sequence.name:
                shown.append(Piece(f"{chr(10) if shown else ''}{sequence.name}: ", ()))
            shown += _shown(processor, sequence, most_tokens)
        found.append(
            Sample(
                use,
                number + 1,
                " ".join(harmless(prepared.place(rows, number)).split()),
                sum(len(sequence.ids) for sequence in sequences),
                sum(map(sum, (sequence.trained for sequence in sequences))),
                shown,
            )
        )
    return found


def _shown(processor: Processor, sequence: Shown, most_tokens: int) -> list[Piece]:
    """The pieces of a sequence."""
    if not len(sequence.ids):
        text = harmless(sequence.text)
        most = most_tokens * _CHARACTERS
        return [Piece(text if len(text) <= most else f"{text[:most]} … and more", ())]
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


def packing(task: Task, run: Run, prepared: Prepared) -> dict[str, Any]:
    """How rows are made of documents, how many there are, and the share of them that is tokens;
    null where each is padded to the longest of its batch."""
    rows, mode = prepared.train, task.packing(run)
    tokens = int(task.tokens(prepared.rows("train")).sum())
    fill = None if mode == "none" else round(tokens / (len(rows) * run.train.max_length), 4)
    return {"mode": mode, "rows": len(rows), "fill": fill}


def to_json(task: Task, run: Run, prepared: Prepared, problems: list[str]) -> dict[str, Any]:
    """The census, and what else `preview --json` prints."""
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
    """Print the census, the lengths of rows, and samples: in colours on a terminal that has some,
    elsewhere what is trained on stands in ⟦ ⟧."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    coloured = console.color_system is not None and not console.no_color
    found = samples(task, prepared, processor, use, count, TOKENS_OF_A_TERMINAL)
    for line in prepared.summary():
        console.print(harmless(line))
    console.print(f"\nlengths of {use} rows, in tokens:")
    counted = getattr(prepared.census, use)
    lengths = counted.lengths
    most = max(rows for _, rows in lengths)
    for up_to, rows in lengths:
        bar = "█" * round(40 * rows / max(1, most)) or ("▏" if rows else "")
        console.print(f"{'≤ ' + format(up_to, ','):>9} {bar} {rows:,}")
    verb = "trained on" if use == "train" else "evaluated on"
    if not counted.labels_are_tokens:
        verb = ""
    if found and coloured and verb:
        legend = Text("\n").append(verb, _LEARNED).append(" and ").append(f"not {verb}", _CONTEXT)
        console.print(legend)
    elif found and verb:
        console.print(f"\n⟦{verb}⟧ and not {verb}")
    for sample in found:
        head = f"{sample.use} row {sample.number:,}, {sample.place}: {sample.tokens:,} tokens"
        head += f", {sample.learned:,} of them {verb}" if verb else ""
        console.print(Text(f"\n{head}", "bold"))
        console.print(_drawn(sample, coloured))


def _drawn(sample: Sample, coloured: bool) -> Any:
    """A sample for a terminal: what is trained on in colour, or else in ⟦ ⟧; line ends are seen,
    and end lines."""
    from rich.text import Text

    text = Text()
    for learned, run in groupby(sample.pieces, attrgetter("learned")):
        text.append("⟦" * (learned and not coloured))
        for piece in run:
            style = _LEARNED if learned else _SPECIAL if piece.special else _CONTEXT
            style += " underline" * piece.special
            text.append(piece.text.replace("\n", "↵\n"), style if coloured else "")
        text.append("⟧" * (learned and not coloured))
    return text


def check_page(file: Path) -> None:
    """Raises UserError if a page cannot be written there, or would replace what is no such page."""
    if not file.parent.is_dir():
        raise UserError(f"--html {file}: there is no folder {file.parent}")
    ours = False
    with contextlib.suppress(OSError):
        ours = file.is_file() and file.read_bytes().startswith(MARK.encode())
    if os.path.lexists(file) and not ours:
        raise UserError(f"--html {file}: exists and is no page of preview: name another file")


def write_page(
    file: Path,
    task: Task,
    run: Run,
    prepared: Prepared,
    processor: Processor,
    problems: list[str],
) -> None:
    """Write one self-contained page: it loads nothing, and all text from data is escaped."""
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
    return render(
        _TEMPLATE,
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
