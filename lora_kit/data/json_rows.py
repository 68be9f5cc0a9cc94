"""Files -> decoded text; JSON -> rows, from JSON Lines or one JSON list. Streamed."""

from __future__ import annotations

import gzip
import io
import json
import re
import reprlib
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from lora_kit.errors import UserError
from lora_kit.schema import Json

PIECE = 2**20  # characters
# Characters: books have up to 10 million. Tokenizing takes up to 200 bytes for each.
LONGEST_ROW = 2**24
# A .gz file that expands to more than 2 MiB and 100 times its size is no data: text compresses to a
# third, tables to a tenth.
_LARGEST_RATIO, _SMALL = 100, 2**21
# Compressed bytes of a row of JSON or CSV, and of another line, at least; words with tags take two.
_BYTES_OF_ROW, _BYTES_OF_LINE, _FEW_LINES = 8, 1, 2**17
_BROKEN = re.compile("[\0\udc80-\udcff]")
# Errors of reading a corrupt file or a truncated gzip file.
UNREADABLE = (OSError, EOFError, zlib.error)


def open_bytes(file: Path) -> BinaryIO:
    """Open a file for reading, decompressed if its name ends with .gz."""
    if file.suffix.lower() == ".gz":
        return io.BufferedReader(_Decompressed(file), 2**17)
    return file.open("rb")


class _Decompressed(io.RawIOBase):
    """The content of a .gz file. Reading raises OSError beyond _LARGEST_RATIO."""

    def __init__(self, file: Path) -> None:
        self.opened = gzip.GzipFile(file)
        self.left = max(_SMALL, _LARGEST_RATIO * file.stat().st_size)

    def readable(self) -> bool:
        return True

    # Any: a buffer.
    def readinto(self, into: Any) -> int:
        size = self.opened.readinto(into)
        self.left -= size
        if self.left < 0:
            raise OSError(f"expands to more than {_LARGEST_RATIO} times its size: unpack it first")
        return size


def text_pieces(
    file: Path, size: int | None = None, encoding: str = "utf-8-sig"
) -> Iterator[tuple[int, str]]:
    """(line, text) of a file's lines, or of pieces of `size` characters with the line each begins
    in. \\r\\n and \\r become \\n; a byte-order mark is removed.

    Raises:
        UserError: the file cannot be read, or a line has a NUL byte or is not in this encoding.
    """
    line = 1
    zipped = file.suffix.lower() == ".gz"
    try:
        least = _BYTES_OF_ROW if ".json" in file.name or ".csv" in file.name else _BYTES_OF_LINE
        most = max(_FEW_LINES, file.stat().st_size // least) if zipped else sys.maxsize
        with open_bytes(file) as opened:
            # Undecodable bytes become lone surrogates, so that their line can be reported.
            text = io.TextIOWrapper(opened, encoding, errors="surrogateescape")
            read = partial(text.read, size) if size else partial(text.readline, LONGEST_ROW + 1)
            for piece in iter(read, ""):
                if not size and len(piece) > LONGEST_ROW:
                    raise too_long(f"{file}:{line}")
                if line > most:
                    raise UserError(f"{file}: more than {most:,} lines: unpack it first")
                plain = piece.isascii() and "\0" not in piece  # most text; the search is slow
                if not plain and (found := _BROKEN.search(piece)):
                    line += piece.count("\n", 0, found.start())
                    if found[0] == "\0":
                        raise UserError(f"{file}:{line}: contains a NUL byte: not a text file")
                    name = encoding.removesuffix("-sig").upper()
                    raise UserError(f"{file}:{line}: not {name}: convert it to UTF-8 with iconv")
                yield line, piece
                line += piece.count("\n")
    except UNREADABLE as error:
        raise UserError(f"{file}:{line}: cannot be read ({error_text(error)})") from None


def too_long(place: str) -> UserError:
    """The error for a row that would take gigabytes of memory."""
    return UserError(f"{place}: a row of more than {LONGEST_ROW:,} characters: split it")


def short_repr(value: object) -> str:
    """A value for a message, in at most 40 characters."""
    text = repr(value) if isinstance(value, str) and len(value) < 40 else reprlib.repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def leaves(value: object, levels: int = 100) -> Iterator[object]:
    """The values inside nested lists and objects. Raises RecursionError beyond `levels`."""
    if not levels:
        raise RecursionError
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from leaves(part, levels - 1)
    else:
        yield value


def error_text(error: Exception) -> str:
    """An exception's message as one short line."""
    message = getattr(error, "strerror", None) or str(error)
    return " ".join(message.split())[:120] or type(error).__name__


def parse_line(line: str, name: str, number: int) -> Json:
    """One line of JSON: an object without duplicate keys."""
    try:
        value = json.loads(line, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise _not_json(f"{name}:{number}", error) from None
    return _object(value, f"{name}:{number}")


class JsonList:
    """Streams the objects of a JSON list, or of an object of objects ({id: row}).

    The file is read in pieces, whatever its length and line structure; objects are numbered from 0,
    as in Python and jq.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.text = ""  # read but not yet decoded
        self.position = 0
        self.lines_before = 0  # line ends before `text`
        self.columns_before = 0  # characters before `text` in the line it begins in
        self.pieces = text_pieces(file, PIECE)
        self.decoder = json.JSONDecoder(object_pairs_hook=_unique_keys)

    def objects(self) -> Iterator[tuple[int, Json]]:
        """(number, row). Raises UserError with the line if this is no list of objects."""
        opening = self._next()
        if not opening:
            return
        if opening not in "[{":
            raise self._error("expected a list of objects")
        closing = "]" if opening == "[" else "}"
        self.position += 1
        seen: set[int] = set()  # hashes of the keys of an object of objects
        number = 0
        while self._next() != closing:
            if number:
                self._skip(",", f"`{closing}` or a comma")
            if opening == "{":
                key = str(self._value())
                if hash(key) in seen:
                    raise self._error(f"duplicate key {short_repr(key)} in an object")
                seen.add(hash(key))
                self._skip(":", "a colon")
            value = self._value()
            if opening == "{" and not isinstance(value, dict):
                raise UserError(
                    f"{self.file}: expected a list of objects, or an object of objects; one object "
                    "per line is .jsonl"
                )
            yield number, _object(value, f"{self.file}[{number}]")
            number += 1
        self.position += 1
        if self._next():
            raise self._error(f"not JSON: extra text after the last `{closing}`")

    def _skip(self, sign: str, name: str) -> None:
        if self._next() != sign:
            raise self._error(f"not JSON: expected {name}")
        self.position += 1

    def _value(self) -> Any:
        """The next value; reads on until it is complete."""
        self._next()
        while True:
            try:
                value, self.position = self.decoder.raw_decode(self.text, self.position)
                return value
            except json.JSONDecodeError as error:
                # Perhaps incomplete: read as much again, since decoding starts anew each time, and
                # with pieces of a fixed size a long object would take quadratic time.
                ahead = error.pos - self.position
                left = len(self.text) - self.position
                if left < LONGEST_ROW and self._more(left):
                    continue
                self.position += ahead
                what = f"not JSON: {error.msg} (column {self._column()})"
                raise self._error(what) from None
            except (ValueError, RecursionError) as error:
                raise _not_json(f"{self.file}:{self._line()}", error) from None

    def _next(self) -> str:
        """Skip white space; returns the next character, or "" at the end."""
        while True:
            while self.position < len(self.text):
                if self.text[self.position] not in " \t\r\n":
                    return self.text[self.position]
                self.position += 1
            if not self._more():
                return ""

    def _more(self, least: int = 0) -> bool:
        """Read at least `least` more characters; discards what was decoded."""
        self.columns_before = self._column() - 1
        self.lines_before += self.text.count("\n", 0, self.position)
        kept = [self.text[self.position :]]
        size = 0
        for _, piece in self.pieces:
            kept.append(piece)
            size += len(piece)
            if size >= least:
                break
        self.text, self.position = "".join(kept), 0
        return size > 0

    def _line(self) -> int:
        return self.lines_before + self.text.count("\n", 0, self.position) + 1

    def _column(self) -> int:
        end = self.text.rfind("\n", 0, self.position)
        return self.position - end + (self.columns_before if end < 0 else 0)

    def _error(self, what: str) -> UserError:
        return UserError(f"{self.file}:{self._line()}: {what}")


def _unique_keys(pairs: list[tuple[str, Any]]) -> Json:
    values = dict(pairs)
    if len(values) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"duplicate key {short_repr(twice)} in an object")
    return values


def _not_json(place: str, error: Exception) -> UserError:
    """A syntax error, a number of thousands of digits, or nesting too deep."""
    if isinstance(error, json.JSONDecodeError):
        return UserError(f"{place}: not JSON: {error.msg} (column {error.colno})")
    return UserError(f"{place}: not readable as JSON: {error}")


def _object(value: object, place: str) -> Json:
    """The value itself. Raises UserError if it is not a JSON object."""
    if not isinstance(value, dict):
        raise UserError(f"{place}: expected an object with named columns, not {short_repr(value)}")
    return value
