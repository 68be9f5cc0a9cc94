"""Files -> batches of raw rows, streamed: at most one batch is in memory.

A batch knows the line of each row, so later messages can name file and line.

A document is a file, or the part of a file between end-of-text markers. A source with fewer than 20
documents is cut into blocks of 2 KiB at line ends, so a share of it can be held out.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_kit.data import extracted
from lora_kit.data.json_rows import (
    LONGEST_ROW,
    UNREADABLE,
    JsonList,
    error_text,
    leaves,
    open_bytes,
    parse_line,
    short_repr,
    text_pieces,
    too_long,
)
from lora_kit.errors import UserError
from lora_kit.schema import Json

if TYPE_CHECKING:
    import pyarrow as pa

END_OF_TEXT = "<|endoftext|>"
_CODE_SUFFIXES = {
    ".py", ".c", ".h", ".cpp", ".js", ".ts", ".java", ".go", ".rs", ".sh", ".sql",
}  # fmt: skip
TEXT_SUFFIXES = {".txt", ".md", ".rst", ".tex"} | _CODE_SUFFIXES | extracted.SUFFIXES
_IOB_SUFFIXES = {".iob", ".iob2", ".bio", ".conll"}
_ROW_SUFFIXES = {".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow"}
TABLE_SUFFIXES = _ROW_SUFFIXES | _IOB_SUFFIXES
SUFFIXES = TEXT_SUFFIXES | TABLE_SUFFIXES
_TAG = re.compile(r"O|[BIESLU]-\S+")
# The unit of work of one worker: small, so that its tokens stay in the CPU caches.
BATCH_ROWS = 256
BATCH_BYTES = 2**20
FEWEST_DOCUMENTS = 20  # with fewer, documents are cut into blocks
# Characters without white space: a tokenizer takes 200 bytes for each one of a word.
_WORD = 2**20
_SPACE = re.compile(r"\s")
_LONG_ROW = 2**16  # characters
_LARGEST_BATCH = 2**28  # bytes of the texts of an Arrow batch, if each row were all of it
_ROWS_PER_BYTE, _FEW_ROWS = 16, 2**18  # more are no data
# The index of a pandas table, in CSV and in Parquet.
INDEX = re.compile(r"Unnamed: [\d.]+|__index_level_\d+__")
# Fields of tools and tool calls in which an object without any key has a meaning.
_CAN_BE_EMPTY = ("arguments", "parameters", "properties")


@dataclass(frozen=True)
class RawRow:
    """A row before it is checked. `place` is file:line, or file[n] for the n-th item of a list."""

    place: str
    columns: Json


@dataclass(frozen=True)
class RowBatch:
    """Rows of one file: parsed, or lines of JSON that a worker will parse.

    `numbers[i]` is the line, or list index, of row i; `style` is the format of its place, such as
    `{}:{}`. `whole`: the only row is a document, or a piece of one, to be cut into blocks;
    `starts`: it begins the document.
    """

    name: str
    style: str
    numbers: list[int]
    rows: Sequence[Json | str]
    whole: bool = False
    starts: bool = True

    def place(self, number: int) -> str:
        return self.style.format(self.name, number)

    def parsed(self) -> Iterator[RawRow]:
        """The rows. Raises UserError with file and line if one is not a JSON object."""
        for number, row in zip(self.numbers, self.rows, strict=True):
            columns = parse_line(row, self.name, number) if isinstance(row, str) else row
            yield RawRow(self.place(number), columns)


@dataclass(frozen=True)
class OpenedSource:
    """A source that exists.

    `fraction` is its share of the training tokens; None: all of its rows. `digest` is the sha256 of
    its content; it has `files`, or embedded `rows`; `note`: which files of a folder are read. For a
    Hub data set, `labels` are the class names by column, and `commit` is its revision.
    """

    name: str
    fraction: float | None
    digest: str
    files: tuple[Path, ...] = ()
    labels: dict[str, list[str]] = field(default_factory=dict)
    commit: str | None = None
    rows: list[Json] | None = None
    note: str = ""

    def batches(self) -> Iterator[RowBatch]:
        """All rows in order: the documents of text files, then the rows of tables."""
        if self.rows is not None:
            yield from _batches(self.name, "{}/{}", enumerate(self.rows, 1))
            return
        texts = [file for file in self.files if not is_table(file)]
        yield from text_batches(texts, whole=_are_cut(texts))
        for file in self.files:
            if is_table(file):
                for batch in table_batches(file):
                    if self.labels:  # class names from the card
                        rows = [named(row.columns, self.labels) for row in batch.parsed()]
                        batch = replace(batch, rows=rows)
                    yield batch


def suffix_of(file: Path) -> str:
    """The suffix that gives a file's type: `.jsonl` for rows.jsonl and rows.JSONL.gz."""
    return Path(file.name.lower().removesuffix(".gz")).suffix


def is_table(file: Path) -> bool:
    return suffix_of(file) in TABLE_SUFFIXES


def check_first_line(file: Path) -> None:
    """Raises UserError if the first line is too long, before a large file is hashed."""
    if file.suffix.lower() in (".jsonl", ".csv", ".tsv", ".txt"):
        with file.open("rb") as opened:
            if len(opened.readline(4 * LONGEST_ROW + 1)) > 4 * LONGEST_ROW:  # bytes of a character
                raise too_long(f"{file}:1")


def table_batches(file: Path) -> Iterator[RowBatch]:
    """The rows of a table, in batches."""
    suffix = suffix_of(file)
    if suffix in (".jsonl", ".ndjson") or (suffix == ".json" and _has_json_lines(file)):
        filled = ((number, line) for number, line in text_pieces(file) if not line.isspace())
        yield from _batches(file, "{}:{}", filled)
    elif suffix == ".json":
        yield from _batches(file, "{}[{}]", JsonList(file).objects())
    elif suffix in (".parquet", ".arrow"):
        # A text that is stored once can be that of every row.
        most = max(2 * LONGEST_ROW, 10 * file.stat().st_size)
        yield from _batches(file, "{}[{}]", _arrow(file, suffix), most)
    elif suffix in _IOB_SUFFIXES or (suffix == ".tsv" and _looks_tagged(file)):
        yield from _batches(file, "{}:{}", _tagged_sentences(file))
    else:
        yield from _batches(file, "{}:{}", _csv(file, "\t" if suffix == ".tsv" else ","))


def documents(file: Path, size: int | None = None) -> Iterator[tuple[int, str, bool]]:
    """(line, text, begins) of the documents of a text file, separated by end-of-text markers.

    A document longer than `size` characters is yielded in pieces that end at a line end, unless a
    single line is twice as long; `begins`: the piece is the first of its document.
    """
    parts: list[str] = []  # of this document, not yet yielded
    length, first, begins = 0, 1, True
    for number, line in _lines(file):
        *closed, rest = line.split(END_OF_TEXT)
        for part in closed:
            yield from _pieces(first, "".join([*parts, part]).rstrip(), size, begins)
            parts, length, first, begins = [], 0, number, True
        if not rest:
            continue
        if size is not None and parts and length + len(rest) > size and not rest.isspace():
            for piece in _pieces(first, "".join(parts), size, begins):
                yield piece
                begins = False
            parts, length = [], 0
        if not parts:
            first = number
        parts.append(rest)
        length += len(rest)
        if length > LONGEST_ROW or len(parts) > LONGEST_ROW // 8:  # a line takes time, too
            raise too_long(f"{file}:{first}")
    yield from _pieces(first, "".join(parts).rstrip(), size, begins)


def _pieces(
    line: int, text: str, size: int | None, begins: bool
) -> Iterator[tuple[int, str, bool]]:
    """A part of a document, cut as in `documents`; white space before the document is stripped."""
    start = len(text) - len(text.lstrip()) if begins else 0
    line += text.count("\n", 0, start)
    while start < len(text):
        end = len(text)
        if size is not None and end - start > size:
            end = text.find("\n", start + size) + 1
            end = end if 0 < end <= start + 2 * size else start + size
        yield line, text[start:end], begins
        line += text.count("\n", start, end)
        start, begins = end, False


def text_batches(files: Iterable[Path], whole: bool) -> Iterator[RowBatch]:
    """The documents of text files, in batches.

    Args:
        whole: documents will be cut into blocks; a long one is yielded in pieces of about 1 MiB.
    """
    for file in files:
        found = documents(file, BATCH_BYTES if whole else None)
        if suffix_of(file) in extracted.SUFFIXES:
            # A scan, or a page without main text, is counted as an empty row.
            found = iter([*found] or [(1, "", True)])
        if whole:
            for line, text, begins in found:
                rows = [{"text": text}]  # without text it is no block, but a row that is dropped
                yield RowBatch(str(file), "{}:{}", [line], rows, whole=bool(text), starts=begins)
        else:
            numbered = ((line, {"text": text}) for line, text, _ in found)
            yield from _batches(file, "{}:{}", numbered)


def _batches(
    file: Path | str, style: str, rows: Iterable[tuple[int, Json | str]], most: float = math.inf
) -> Iterator[RowBatch]:
    """Numbered rows in batches of at most BATCH_ROWS rows and about BATCH_BYTES characters.

    Args:
        most: characters of all long rows together.
    """
    numbers: list[int] = []
    kept: list[Json | str] = []
    size = long = 0
    for number, row in rows:
        numbers.append(number)
        kept.append(row)
        try:
            # Characters of its texts, and 8 for any other value.
            own = sum(len(v) if isinstance(v, (str, bytes)) else 8 for v in leaves(row))
        except RecursionError:  # such a row cannot be pickled for a worker
            raise UserError(f"{style.format(file, number)}: nesting too deep") from None
        if own > LONGEST_ROW:
            raise too_long(style.format(file, number))
        long += own if own > _LONG_ROW else 0
        if long > most:
            raise UserError(f"{file}: its long rows are more than 10 times its size: no data")
        if own > _WORD:
            _check_words(style.format(file, number), row)
        size += own
        if len(kept) >= BATCH_ROWS or size >= BATCH_BYTES:
            yield RowBatch(str(file), style, numbers, kept)
            numbers, kept, size = [], [], 0
    if kept:
        yield RowBatch(str(file), style, numbers, kept)


def _check_words(place: str, row: Json | str) -> None:
    """Raises UserError for a text of which too much is without white space."""
    try:
        values = leaves(json.loads(row) if isinstance(row, str) else row)
        texts = [value for value in values if isinstance(value, str)]
    except (ValueError, RecursionError):  # reported when the row is parsed
        return
    for text in texts:
        for first in range(0, len(text) - _WORD + 1, _WORD):
            if not _SPACE.search(text, first, first + _WORD):
                raise UserError(f"{place}: {_WORD:,} characters without white space: split them")


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """(number, line) of a text file, or of the text in a page or PDF."""
    suffix = suffix_of(file)
    if suffix in extracted.SUFFIXES:
        return enumerate(io.StringIO(extracted.text_of(file, suffix)), 1)
    return text_pieces(file)


def _has_json_lines(file: Path) -> bool:
    """Whether a .json file is really JSON Lines, as many on the Hub are."""
    try:
        with open_bytes(file) as opened:
            first, second = (opened.readline(LONGEST_ROW) for _ in range(2))
        return second.startswith(b"{") and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError, *UNREADABLE):
        return False  # its reader reports what is wrong


def _csv(file: Path, delimiter: str) -> Iterator[tuple[int, Json]]:
    """Rows of a table with a header, numbered by their first line."""
    csv.field_size_limit(LONGEST_ROW)
    lines = (text for _, text in _lines(file))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    last = 0
    try:
        for values in reader:
            first, last = last + 1, reader.line_num  # a quoted value may hold line ends
            if not values:
                continue
            if header is None:
                # pandas writes its index without a name, and reads it by this one.
                header = [v if v.strip() else f"Unnamed: {n}" for n, v in enumerate(values)]
                if len(set(header)) < len(header):
                    raise UserError(f"{file}:{first}: duplicate column names: {short_repr(values)}")
                if len(header) == 1 and any(c in header[0] for c in ";\t|"):
                    raise UserError(
                        f"{file}:{first}: one column, {short_repr(header[0])}: separate values "
                        "with a comma (.csv) or a tab (.tsv)"
                    )
            elif len(values) != len(header):
                raise UserError(f"{file}:{first}: {len(values)} values for {len(header)} columns")
            else:
                yield first, dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise UserError(f"{file}:{last + 1}: not readable as a table: {error}") from None


def _looks_tagged(file: Path) -> bool:
    """Whether a .tsv holds tokens and IOB tags without a header: its first lines end with a tag."""
    first = [_fields(line) for _, line in islice(_lines(file), 20) if line.strip()]
    return bool(first) and all(len(f) > 1 and _TAG.fullmatch(f[-1]) is not None for f in first)


def _fields(line: str) -> list[str]:
    """The fields of a line, split at tabs, else at spaces: other white space can be a token."""
    if "\t" in line:
        return [field.strip(" \n") for field in line.split("\t")]
    return [field for field in line.strip(" \n").split(" ") if field]


def _tagged_sentences(file: Path) -> Iterator[tuple[int, Json]]:
    """Sentences of a file with one token per line and its IOB tag in the last column."""
    tokens: list[str] = []
    tags: list[str] = []
    start = 0
    for number, line in chain(_lines(file), [(0, "")]):
        fields = _fields(line)
        if not line.strip() or fields[0] == "-DOCSTART-":
            if tokens:
                yield start, {"tokens": tokens, "tags": tags}
            start, tokens, tags = 0, [], []
            continue
        if not tokens and line.startswith("# ") and not _TAG.fullmatch(fields[-1]):
            continue  # a comment, as `# id 17`
        if len(fields) < 2 or not fields[0]:
            raise UserError(
                f"{file}:{number}: expected a token and its tag, not {short_repr(line)}"
            )
        start = start or number
        if len(tokens) > LONGEST_ROW // 16:
            raise too_long(f"{file}:{start}")
        tokens.append(fields[0])
        tags.append(fields[-1])


def _arrow(file: Path, suffix: str) -> Iterator[tuple[int, Json]]:
    """Rows of Parquet or Arrow, numbered from 0; the numbers of a ClassLabel become its names."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        if file.suffix.lower() == ".gz":
            with open_bytes(file) as opened:
                stream = pa.BufferReader(opened.read())
        else:
            stream = pa.memory_map(str(file))
        if suffix == ".parquet":
            parquet = pq.ParquetFile(stream)
            schema = parquet.schema_arrow
            batches = parquet.iter_batches(batch_size=_rows_at_once(parquet.metadata))
        else:
            try:
                reader: Any = pa.ipc.open_file(stream)
                batches = (reader.get_batch(n) for n in range(reader.num_record_batches))
            except pa.ArrowInvalid:  # `datasets` writes the streaming format
                stream.seek(0)
                reader = pa.ipc.open_stream(stream)
                batches = iter(reader)
            schema = reader.schema
        if len(set(schema.names)) < len(schema.names):
            raise UserError(f"{file}: duplicate column names: {short_repr(schema.names)}")
        names = _class_names(schema.metadata)
        nested = [
            field
            for field in schema
            if pa.types.is_nested(field.type) or isinstance(field.type, pa.JsonType)
        ]
        most = max(_FEW_ROWS, _ROWS_PER_BYTE * file.stat().st_size)
        for batch in batches:
            batch.validate(full=True)  # else a corrupt batch is read out of bounds
            if number + batch.num_rows > most:
                raise UserError(f"{file}: more than {most:,} rows in a file of its size: no data")
            # Rows of a dictionary share its texts, and do not as Python objects.
            step = max(1, min(BATCH_ROWS, _LARGEST_BATCH // max(1, batch.nbytes)))
            for start in range(0, batch.num_rows, step):
                for row in batch.slice(start, step).to_pylist():
                    for field in nested:
                        row[field.name] = _without_filling(row[field.name], field)
                    yield number, named(row, names)
                    number += 1
    except UserError:
        raise
    # ValueError: text that is not UTF-8, a date that Python doesn't have
    except (
        pa.ArrowException, ValueError, OverflowError, RecursionError, *UNREADABLE
    ) as error:  # fmt: skip
        raise UserError(
            f"{file}[{number}]: not readable as {suffix[1:]}: {error_text(error)}"
        ) from None


def _without_filling(value: Any, field: pa.Field) -> Any:
    """A value of an Arrow column without what Arrow adds: a struct has all fields that any row has,
    null where a row lacks one; some writers fill a missing struct with nulls. Text that Arrow marks
    as JSON is parsed, and keeps its nulls.

    >>> kind = pa.struct({"city": pa.string(), "unit": pa.string()})
    >>> _without_filling({"city": "Rome", "unit": None}, pa.field("arguments", kind))
    {'city': 'Rome'}
    """
    import pyarrow as pa

    kind = field.type
    if value is None:
        return None
    if isinstance(kind, pa.JsonType):
        return json.loads(value)
    if isinstance(kind, (pa.ListType, pa.LargeListType, pa.FixedSizeListType)):
        parts = [(part, _without_filling(part, kind.value_field)) for part in value]
        return [filled for part, filled in parts if part is None or filled is not None]
    if isinstance(kind, pa.StructType):
        filled = {part.name: _without_filling(value[part.name], part) for part in kind}
        kept = {name: part for name, part in filled.items() if part is not None}
        return kept if kept or field.name in _CAN_BE_EMPTY else None
    return value


def _rows_at_once(metadata: Any) -> int:
    """Rows of Parquet to read in one batch: fewer if each can be a long text of a dictionary."""
    largest = 1
    for group in range(metadata.num_row_groups):
        for column in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(column)
            if chunk.has_dictionary_page:
                largest = max(largest, chunk.data_page_offset - chunk.dictionary_page_offset)
    return max(1, min(BATCH_ROWS, _LARGEST_BATCH // (4 * largest)))  # 4: decompressed


def _class_names(metadata: dict[bytes, bytes] | None) -> dict[str, list[str]]:
    """{column: class names}, from the schema metadata that `datasets` writes."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"].items()
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}
    inner = {name: f.get("feature", f) for name, f in features if isinstance(f, dict)}
    return {
        name: list(f.get("names") or [])
        for name, f in inner.items()
        if isinstance(f, dict) and f.get("_type") == "ClassLabel"
    }


def named(row: Json, names: dict[str, list[str]]) -> Json:
    """A row with class numbers replaced by class names (-1, no class, becomes null)."""
    for column, known in names.items():
        if column in row:
            row[column] = _class_name(row[column], known)
    return row


def _class_name(value: object, known: list[str]) -> object:
    if isinstance(value, list):
        return [_class_name(part, known) for part in value]
    if isinstance(value, str) and value not in known and value.lstrip("-").isdecimal():
        value = int(value)  # CSV has numbers as text
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    return known[value] if 0 <= value < len(known) else None


def _are_cut(files: list[Path]) -> bool:
    """Whether documents are cut into blocks: there are too few to hold out a share of them."""
    found = (begins for file in files for _, _, begins in documents(file, BATCH_BYTES))
    return sum(1 for _ in islice(filter(None, found), FEWEST_DOCUMENTS)) < FEWEST_DOCUMENTS
