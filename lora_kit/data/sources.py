"""Sources -> rows. A row is a document of text, or a mapping of columns, with its place.

A document is a file, or a part of a file between end-of-text markers. A source with fewer than 20
documents is cut into blocks of 2 KiB at line ends: a share of it can be held out and judged.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_kit import nano
from lora_kit.errors import UserError
from lora_kit.run import EMBEDDED

END_OF_TEXT = "<|endoftext|>"
BLOCK_BYTES = 2048
FEWEST_DOCUMENTS = 20
TEXT_SUFFIXES = {
    *(".txt", ".md", ".rst", ".py", ".c", ".h", ".cpp", ".js", ".ts", ".java", ".go", ".rs"),
    *(".sh", ".sql", ".tex"),
}
TABLE_SUFFIXES = {".jsonl", ".json", ".csv", ".tsv"}


@dataclass(frozen=True)
class Row:
    """One row as it was read. `place` is file:line, or file for a whole file."""

    place: str
    columns: dict[str, Any]
    joins: bool = False  # goes on right where the row before it stopped: one text, cut in blocks


def read_sources(sources: str | list[str]) -> tuple[list[Row], dict[str, str]]:
    """Read every source; returns the rows in order and {source: sha256 of its content}.

    Raises:
        UserError: a source is missing, empty, of an unknown kind, or broken, with file and line.
    """
    rows: list[Row] = []
    hashes: dict[str, str] = {}
    for source in [sources] if isinstance(sources, str) else sources:
        if source in hashes:
            raise UserError(f"{source}: named twice in one list: leave one out")
        found, digest = _read_nano(source) if source.startswith("nano:") else _read_path(source)
        if not found:
            raise UserError(f"{source}: empty: there is nothing to learn from")
        rows += found
        hashes[source] = digest
    return rows, hashes


def _read_nano(source: str) -> tuple[list[Row], str]:
    name = source.removeprefix("nano:")
    if name == "topics":
        rows = [Row(f"{source}/{key}", {"text": text}) for key, text in nano.topics()]
    elif name == "docstrings":
        rows = [Row(f"{source}/{key}", {"text": text}) for key, text in nano.general()]
    elif name == "instructions":
        rows = [Row(f"{source}/{n}", dict(row)) for n, row in enumerate(nano.instructions(), 1)]
    else:
        raise UserError(f"{source}: no such embedded text: {', '.join(EMBEDDED)}")
    digest = hashlib.sha256(json.dumps([r.columns for r in rows]).encode()).hexdigest()
    return rows, digest


def _read_path(source: str) -> tuple[list[Row], str]:
    root = Path(source)
    if os.path.isdir(source):
        known = TEXT_SUFFIXES | TABLE_SUFFIXES
        inside = sorted(p for p in root.rglob("*") if p.is_file())
        files = [p for p in inside if p.suffix.lower() in known and not _hidden(p, root)]
        if not files:
            raise UserError(
                f"{source}: no file of a known kind ({' '.join(sorted(known))}) among {len(inside)}"
            )
    elif os.path.isfile(source):
        if root.suffix.lower() in (".pdf", ".docx", ".doc", ".odt", ".epub"):
            raise UserError(f"{source}: not text: extract it first, for example with pdftotext")
        files = [root]
    else:
        raise UserError(f"{source}: no such file or folder")
    digest = hashlib.sha256()
    documents: list[Row] = []
    table: list[Row] = []
    for file in files:
        content = _read_bytes(file)
        digest.update(hashlib.sha256(content).digest())
        text = _decode(content, file)
        if file.suffix.lower() in TABLE_SUFFIXES:
            table += _read_table(file, text)
        else:
            documents += _documents(file, text)
    if 0 < len(documents) < FEWEST_DOCUMENTS:
        documents = [block for document in documents for block in _blocks(document)]
    return documents + table, digest.hexdigest()


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _read_bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None


def _decode(content: bytes, file: Path) -> str:
    """UTF-8, with or without a byte-order mark; line ends become \\n."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(
            f"{file}:{line}: not UTF-8 (byte {error.start}): convert it, for example with iconv"
        ) from None
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise UserError(f"{file}:{line}: holds a zero byte: this is no text file")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _documents(file: Path, text: str) -> list[Row]:
    documents, line = [], 1
    for part in text.split(END_OF_TEXT):
        stripped = part.strip()
        if stripped:
            first = line + part[: len(part) - len(part.lstrip())].count("\n")
            documents.append(Row(f"{file}:{first}", {"text": stripped}))
        line += part.count("\n")
    return documents


def _blocks(document: Row) -> list[Row]:
    """Cut a long document at line ends into blocks of about 2 KiB; joined they are the document.

    A line longer than that is cut at a space, or where there is none, between two characters.
    """
    name, _, first = document.place.rpartition(":")
    blocks: list[Row] = []
    lines: list[str] = []
    size, start, number = 0, int(first), int(first)
    for piece in _pieces(document.columns["text"]):
        lines.append(piece)
        size += len(piece.encode("utf-8"))
        number += piece.count("\n")
        if size >= BLOCK_BYTES:
            blocks.append(Row(f"{name}:{start}", {"text": "".join(lines)}, joins=bool(blocks)))
            lines, size, start = [], 0, number
    if lines:
        blocks.append(Row(f"{name}:{start}", {"text": "".join(lines)}, joins=bool(blocks)))
    return blocks


def _pieces(text: str) -> Iterator[str]:
    """Lines with their ends; the long ones in pieces of 2,048 characters and on to a space."""
    for line in io.StringIO(text, newline="\n"):
        start = 0
        while len(line) - start > BLOCK_BYTES:
            space = line.find(" ", start + BLOCK_BYTES, start + 2 * BLOCK_BYTES)
            end = start + BLOCK_BYTES if space < 0 else space
            yield line[start:end]
            start = end
        yield line[start:]


def _read_table(file: Path, text: str) -> list[Row]:
    suffix = file.suffix.lower()
    if suffix == ".jsonl":
        return [_checked(f"{file}:{n}", value) for n, value in _json_lines(file, text)]
    if suffix == ".json":
        return _read_json(file, text)
    return list(_read_csv(file, text, "\t" if suffix == ".tsv" else ","))


def _json_lines(file: Path, text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise _not_json(file, number, error) from None


def _read_json(file: Path, text: str) -> list[Row]:
    if not text.strip():
        return []
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _not_json(file, getattr(error, "lineno", 1), error) from None
    if not isinstance(values, list):
        raise UserError(f"{file}: a list of objects is expected; one object a line is .jsonl")
    return [_checked(f"{file}[{number}]", value) for number, value in enumerate(values)]


def _not_json(file: Path, line: int, error: Exception) -> UserError:
    """Besides syntax: numbers of thousands of digits, and lists in lists without an end."""
    if isinstance(error, json.JSONDecodeError):
        return UserError(f"{file}:{line}: not JSON: {error.msg} (column {error.colno})")
    return UserError(f"{file}:{line}: not readable as JSON: {error}")


def _checked(place: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise UserError(f"{place}: an object with named columns is expected, not {value!r:.40}")
    return Row(place, value)


def _read_csv(file: Path, text: str, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline="\n"), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    last = 0
    try:
        for values in reader:
            first, last = last + 1, reader.line_num  # a quoted value may hold line ends
            if not values:
                continue
            if header is None:
                header = values
                if len(set(header)) < len(header) or "" in header:
                    raise UserError(f"{file}:{first}: columns need names that differ: {header}")
            elif len(values) != len(header):
                raise UserError(f"{file}:{first}: {len(values)} values for {len(header)} columns")
            else:
                columns = dict(zip(header, values, strict=True))
                yield Row(f"{file}:{first}", columns)
    except csv.Error as error:
        raise UserError(f"{file}:{last + 1}: not readable as a table: {error}") from None
