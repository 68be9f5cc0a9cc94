"""Files that are damaged, or of no kind that is read: refused in one line, with the place."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lora_kit.data.readers import is_table, table_batches, text_batches
from lora_kit.errors import UserError

ROWS = [{"text": f"word {n}", "label": "ä"} for n in range(9)]


def put(folder: Path, name: str, content: bytes) -> Path:
    file = folder / name
    file.write_bytes(content)
    return file


def read(file: Path) -> None:
    for batch in table_batches(file) if is_table(file) else text_batches([file], whole=False):
        list(batch.parsed())


def refused(file: Path, words: str = "") -> None:
    with pytest.raises(UserError) as caught:
        read(file)
    line = str(caught.value)
    assert (
        line.startswith(f"{file}{words}") and "\n" not in line and len(line) < len(str(file)) + 250
    )


def as_arrow(opened: str) -> bytes:
    content, sink = pa.Table.from_pylist(ROWS), io.BytesIO()
    if opened == "parquet":
        pq.write_table(content, sink)
    else:
        with getattr(pa.ipc, f"new_{opened}")(sink, content.schema) as writer:
            writer.write_table(content)
    return sink.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"fine\rfine\nb\xe9d", ":3: not UTF-8: convert it"),
        ("a.txt", "text".encode("utf-16"), ":1: not UTF-8"),
        ("a.csv", "text\nä".encode("utf-16-be"), ":1: contains a NUL byte"),
        ("a.bin", b"one\ntwo\0", ":2: contains a NUL byte"),
        ("a.csv", b'a,b\n1,2\n"3\n4",5\n6', ":5: 1 values for 2 columns"),
        ("a.csv", b"a,b\n1,2,3\n", ":2: 3 values for 2 columns"),
        ("a.csv", b'a,b\n1,2\n3,"4\n\n', ":3: not readable as a table: unexpected end"),
        ("a.csv", b'a,b\n1,"2" 3\n', ":2: not readable as a table"),
        ("a.csv", b"text;label\na;b\n", ":1: one column, 'text;label': separate values with a"),
        ("a.csv", b"a,a\n1,2\n", ":1: duplicate column names: ['a', 'a']"),
        ("a.conll", b"word O\nword\n", ":2: expected a token and its tag, not 'word\\n'"),
        ("a.iob", b"word\tO\n\tO\n", ":2: expected a token and its tag"),
        ("a.parquet", b"PAR1 and no more", "[0]: not readable as parquet"),
        ("a.arrow", b"ARROW1 and no more", "[0]: not readable as arrow"),
        ("a.parquet.gz", b"text", "[0]: not readable as parquet"),
    ],
)
def test_broken_files_are_refused_with_file_and_line(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    refused(put(tmp_path, name, content), words)


CONTENTS = {
    "a.txt": b"words\n" * 20,
    "a.jsonl": "\n".join(map(json.dumps, ROWS)).encode(),
    "a.json": json.dumps(ROWS).encode(),
    "a.csv": b"text,label\n" + b"word,\xc3\xa4\n" * 9,
    "a.parquet": as_arrow("parquet"),
    "file.arrow": as_arrow("file"),
    "stream.arrow": as_arrow("stream"),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_a_damaged_gzip_file_is_refused(tmp_path: Path, name: str) -> None:
    whole = gzip.compress(CONTENTS[name], mtime=0)
    file = put(tmp_path, f"{name}.gz", whole)
    read(file)
    for damaged in (whole[:-1], whole[: len(whole) // 2], b"\x1f\x8b" + bytes(99), b"plain text"):
        file.write_bytes(damaged)
        refused(file)
    for place in range(10, len(whole), 3):  # before is the header, whose date is of no matter
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        refused(file)


@pytest.mark.parametrize("name", ["a.parquet", "file.arrow", "stream.arrow"])
def test_a_damaged_arrow_file_is_refused_or_read(tmp_path: Path, name: str) -> None:
    whole = CONTENTS[name]
    refusals = 0
    for place in range(0, len(whole), 3):
        cut, changed = whole[:place], bytes([whole[place] ^ 255])
        for n, damaged in enumerate([cut, cut + changed + whole[place + 1 :]]):
            file = put(tmp_path, f"{place}-{n}-{name}", damaged)
            try:
                read(file)
            except UserError as error:
                assert str(error).startswith(str(file))
                refusals += 1
    assert refusals > len(whole) // 4


def test_tables_of_values_that_python_does_not_have_are_refused(tmp_path: Path) -> None:
    offsets = pa.array([0, 2], pa.int32()).buffers()[1]
    broken = pa.Array.from_buffers(pa.string(), 1, [None, offsets, pa.py_buffer(b"\xff\xfe")])
    late = pa.array([2**52], pa.timestamp("ms"))
    for columns, words in (
        ({"text": broken}, "[0]: not readable as parquet: In column 0: Invalid: Invalid UTF8"),
        ({"text": pa.array(["a"]), "when": late}, "[0]: not readable as parquet: date"),
    ):
        pq.write_table(pa.table(columns), tmp_path / "a.parquet")
        refused(tmp_path / "a.parquet", words)
    pq.write_table(pa.table([pa.array(["a"])] * 2, ["text", "text"]), tmp_path / "a.parquet")
    refused(tmp_path / "a.parquet", ": duplicate column names")
