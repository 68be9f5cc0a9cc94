"""Files of every kind -> the same rows; broken ones are refused with file and line."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lora_kit.data import readers
from lora_kit.data.readers import BATCH_BYTES, documents, table_batches, text_batches
from lora_kit.errors import UserError

Rows = list[dict[str, Any]]
TABLE: Rows = [
    {"prompt": 'a, "b"\nc\td', "completion": "ä\u2028z\x85"},
    {"prompt": "2", "completion": "3"},
]


def put(folder: Path, name: str, content: str | bytes) -> Path:
    content = content.encode() if isinstance(content, str) else content
    file = folder / name
    file.write_bytes(gzip.compress(content) if name.lower().endswith(".gz") else content)
    return file


def rows(file: Path) -> Rows:
    return [row.columns for batch in table_batches(file) for row in batch.parsed()]


def places(file: Path) -> list[str]:
    found = [row.place for batch in table_batches(file) for row in batch.parsed()]
    assert all(place.startswith(str(file)) for place in found)
    return [place.removeprefix(str(file)) for place in found]


def texts(*files: Path) -> list[str]:
    batches = list(text_batches(files, whole=False))
    return [row.columns["text"] for batch in batches for row in batch.parsed()]


def as_csv(delimiter: str, found: Rows = TABLE) -> str:
    lines = [list(found[0]), *(list(row.values()) for row in found)]
    quoted = [delimiter.join('"' + v.replace('"', '""') + '"' for v in line) for line in lines]
    return "\n".join(quoted) + "\n\n"


def as_parquet(found: Rows) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(found), sink)
    return sink.getvalue()


def as_arrow(found: Rows, opened: Callable[..., Any], **metadata: str) -> bytes:
    content = pa.Table.from_pylist(found).replace_schema_metadata(metadata)
    sink = io.BytesIO()
    with opened(sink, content.schema) as writer:
        writer.write_table(content)
    return sink.getvalue()


KINDS: dict[str, tuple[str | bytes, list[str]]] = {
    "a.jsonl": ("\n".join(json.dumps(r, ensure_ascii=False) for r in TABLE) + "\n\n", [":1", ":2"]),
    "a.ndjson": ("\n\n".join(map(json.dumps, TABLE)), [":1", ":3"]),
    "a.JSON": (json.dumps(TABLE), ["[0]", "[1]"]),
    "a.b.json": (json.dumps(dict(zip("xy", TABLE, strict=True)), indent=1), ["[0]", "[1]"]),
    "a.csv": (as_csv(","), [":2", ":4"]),
    "a.tsv": (as_csv("\t"), [":2", ":4"]),
    "a.parquet": (as_parquet(TABLE), ["[0]", "[1]"]),
    "file.arrow": (as_arrow(TABLE, pa.ipc.new_file), ["[0]", "[1]"]),
    "stream.arrow": (as_arrow(TABLE, pa.ipc.new_stream), ["[0]", "[1]"]),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("packed", ["", ".gz", ".GZ"])
def test_a_table_reads_the_same_in_every_kind(tmp_path: Path, name: str, packed: str) -> None:
    content, expected = KINDS[name]
    file = put(tmp_path, name + packed, content)
    assert readers.is_table(file)
    assert rows(file) == TABLE
    assert places(file) == expected


CALL = {"name": "add", "arguments": {"x": 1}}
OTHER = {"name": "weather", "arguments": {"city": "Rome", "days": {"from": 1, "to": 2}}}
TOOL = {"name": "add", "parameters": {"properties": {"x": {"type": "number"}}, "required": ["x"]}}
OTHER_TOOL = {"name": "weather", "parameters": {"properties": {"city": {"type": "string"}}}}
NO_ARGUMENT = {"name": "now", "parameters": {"properties": {}}}
# Rows that have other fields than their neighbours.
UNLIKE: dict[str, Rows] = {
    "arguments": [{"calls": [CALL]}, {"calls": [OTHER]}],
    "without arguments": [{"calls": [{"name": "now", "arguments": {}}]}, {"calls": [OTHER]}],
    "tools": [{"tools": [TOOL]}, {"tools": [OTHER_TOOL]}, {"tools": [NO_ARGUMENT]}],
    "turns": [
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "calls": [CALL]}]},
        {"messages": [{"role": "tool", "content": "1", "name": "add", "extra": {"id": 7}}]},
    ],
    "parts": [{"content": [{"type": "text", "text": "Q"}]}, {"content": [{"type": "x", "x": 1}]}],
    "preference": [{"chosen": [{"role": "a", "calls": [CALL]}]}, {"chosen": [{"role": "b"}]}],
    "one object": [{"metadata": {"a": 1}}, {"metadata": {"b": {"c": [None, 1]}}}],
}


def filled(value: Any, field: pa.Field) -> Any:
    """As some writers (Spark, Polars, TensorFlow) store it: a missing struct has null fields."""
    if pa.types.is_struct(field.type):
        value = value or {}
        return {part.name: filled(value.get(part.name), part) for part in field.type}
    if pa.types.is_list(field.type) and value is not None:
        return [filled(part, field.type.value_field) for part in value]
    return value


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("by", ["pyarrow", "filled", "datasets"])
@pytest.mark.parametrize("name", UNLIKE)
def test_a_struct_has_the_fields_of_its_own_row(
    tmp_path: Path, kind: str, by: str, name: str
) -> None:
    import datasets

    content = pa.Table.from_pylist(UNLIKE[name])
    if by == "filled":
        columns = {
            field.name: [filled(row[field.name], field) for row in UNLIKE[name]]
            for field in content.schema
        }
        content = pa.Table.from_pydict(columns, schema=content.schema)
    if by == "datasets":
        content = datasets.Dataset.from_list(UNLIKE[name]).data.table
    file = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(content, file)
    else:
        with pa.ipc.new_stream(file, content.schema) as writer:
            writer.write_table(content)
    assert rows(file) == UNLIKE[name]


def test_nulls_of_columns_and_of_lists_are_kept(tmp_path: Path) -> None:
    found = [{"a": None, "b": [1, None]}, {"a": "x", "b": None}]
    assert rows(put(tmp_path, "a.parquet", as_parquet(found))) == found


def test_text_that_is_marked_as_json_is_parsed_with_its_nulls(tmp_path: Path) -> None:
    import datasets

    found = [{"calls": [{"x": 1, "city": None}]}, {"calls": [{"x": "one"}]}]
    made = datasets.Dataset.from_list(found, on_mixed_types="use_json")
    made.to_parquet(tmp_path / "a.parquet")
    assert rows(tmp_path / "a.parquet") == found


@pytest.mark.parametrize(
    ("header", "names"),
    [
        (",prompt", ["Unnamed: 0", "prompt"]),  # pandas: to_csv()
        ("Unnamed: 0,prompt", ["Unnamed: 0", "prompt"]),  # read and written again
        ("prompt,", ["prompt", "Unnamed: 1"]),  # a spreadsheet
        ('" ",prompt', ["Unnamed: 0", "prompt"]),
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_a_column_without_a_name_is_none_of_the_content(
    tmp_path: Path, header: str, names: list[str], suffix: str
) -> None:
    text = f"{header}\n0,1\n1,2\n".replace(",", "," if suffix == ".csv" else "\t")
    assert [list(row) for row in rows(put(tmp_path, f"a{suffix}", text))] == [names] * 2


@pytest.mark.parametrize("name", [n for n, (content, _) in KINDS.items() if type(content) is str])
@pytest.mark.parametrize("ends", ["\r\n", "\r"])
def test_a_byte_order_mark_and_other_line_ends_change_nothing(
    tmp_path: Path, name: str, ends: str
) -> None:
    content, expected = KINDS[name]
    file = put(tmp_path, name, "\ufeff" + str(content).replace("\n", ends))
    assert rows(file) == TABLE
    assert places(file) == expected


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("most", "size"), [(1, 10**9), (7, 10**9), (256, 1), (256, 700)])
def test_rows_are_the_same_whatever_the_size_of_a_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, most: int, size: int
) -> None:
    many = [{"prompt": f"{n} " * (n % 9), "completion": str(n)} for n in range(300)]
    whole: dict[str, str | bytes] = {
        ".jsonl": "\n".join(map(json.dumps, many)),
        ".ndjson": "\n".join(map(json.dumps, many)),
        ".json": json.dumps(many),
        ".csv": as_csv(",", many),
        ".tsv": as_csv("\t", many),
        ".parquet": as_parquet(many),
        ".arrow": as_arrow(many, pa.ipc.new_file if "file" in name else pa.ipc.new_stream),
    }
    file = put(tmp_path, name, whole[Path(name).suffix.lower()])
    expected = places(file)
    monkeypatch.setattr(readers, "BATCH_ROWS", most)
    monkeypatch.setattr(readers, "BATCH_BYTES", size)
    assert rows(file) == many
    assert places(file) == expected
    assert max(len(batch.numbers) for batch in table_batches(file)) <= most
    assert len(list(table_batches(file))) > 1


@pytest.mark.parametrize(
    ("name", "line", "broken"),
    [
        ("a.jsonl", '{"text": "word"}\n', "{"),
        ("a.json", '{"text": "word"},', "7]"),
        ("a.csv", "text,id\n" + "word,1\n", "word"),
        ("a.conll", "word O\n\n", "word"),
    ],
)
def test_a_file_is_read_as_a_stream(tmp_path: Path, name: str, line: str, broken: str) -> None:
    """The first rows are there before a later one, which is broken, is looked at."""
    start = "[" if name == "a.json" else ""
    file = put(tmp_path, name, start + line + line.split("text,id\n")[-1] * 2000 + broken)
    batches = table_batches(file)
    assert len(list(next(batches).parsed())) == readers.BATCH_ROWS
    with pytest.raises(UserError, match=r"a\.\w+[:\[]\d+"):
        [list(batch.parsed()) for batch in batches]


def test_long_rows_make_small_batches(tmp_path: Path) -> None:
    turns = [{"messages": [{"role": "user", "content": "x" * 300_000}]}] * 8
    batches = list(table_batches(put(tmp_path, "a.json", json.dumps(turns))))
    assert [len(batch.numbers) for batch in batches] == [4, 4]


def test_numbers_of_classes_become_their_names(tmp_path: Path) -> None:
    label = {"names": ["bad", "good"], "_type": "ClassLabel"}
    features = {
        "label": label,
        "tags": {"feature": {**label, "names": ["O", "B-X"]}, "_type": "Sequence"},
        "id": {"dtype": "int64", "_type": "Value"},
    }
    note = json.dumps({"info": {"features": features}})
    found: Rows = [{"label": n, "tags": [n, 1], "id": n} for n in (1, 0, -1, 7)]
    named = [{"label": "good", "tags": ["B-X", "B-X"], "id": 1}]
    named += [{"label": "bad", "tags": ["O", "B-X"], "id": 0}]
    named += [{"label": None, "tags": [None, "B-X"], "id": n} for n in (-1, 7)]
    assert rows(put(tmp_path, "a.arrow", as_arrow(found, pa.ipc.new_file, huggingface=note)))
    for opened in (pa.ipc.new_file, pa.ipc.new_stream):
        file = put(tmp_path, "a.arrow", as_arrow(found, opened, huggingface=note))
        assert rows(file) == named
        for other in ("no JSON", "[]", '{"info": {"features": []}}', '{"info": {"features": 3}}'):
            file = put(tmp_path, "a.arrow", as_arrow(found, opened, huggingface=other))
            assert rows(file) == found


TAGGED = [
    {"tokens": ["colon", "cancer", "\xa0", "is"], "tags": ["B-X", "I-X", "O", "O"]},
    {"tokens": ["#", "1"], "tags": ["O", "O"]},
]


@pytest.mark.parametrize("name", ["a.iob", "a.iob2", "a.bio", "a.conll", "a.tsv"])
@pytest.mark.parametrize("between", ["\t", " ", "\tNN\t", " NN  "])
@pytest.mark.parametrize("packed", ["", ".gz"])
def test_tagged_sentences(tmp_path: Path, name: str, between: str, packed: str) -> None:
    lines = ["-DOCSTART- -X- O", ""]
    for sentence in TAGGED:
        lines += map(between.join, zip(sentence["tokens"], sentence["tags"], strict=True))
        lines += ["", ""]
    file = put(tmp_path, name + packed, "\n".join(lines))
    assert rows(file) == TAGGED
    assert places(file) == [":3", ":9"]


def test_comments_between_tagged_sentences_are_none_of_their_tokens(tmp_path: Path) -> None:
    file = put(tmp_path, "a.conll", "# id 17 domain=en\nword _ _ O \n\n# id 18\nmore _ _ B-X\n")
    assert rows(file) == [
        {"tokens": ["word"], "tags": ["O"]},
        {"tokens": ["more"], "tags": ["B-X"]},
    ]


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.rst", "a.py", "a.unknown", "README"])
@pytest.mark.parametrize("packed", ["", ".gz"])
def test_text_of_any_kind(tmp_path: Path, name: str, packed: str) -> None:
    text = "\n\nfirst\nline<|endoftext|>\n  second\n<|endoftext|>\n \n<|endoftext|>third"
    for ends in ("\n", "\r\n", "\r"):
        file = put(tmp_path, name + packed, "\ufeff" + text.replace("\n", ends))
        assert list(documents(file)) == [
            (3, "first\nline", True),
            (5, "second", True),
            (8, "third", True),
        ]
        assert texts(file, file) == ["first\nline", "second", "third"] * 2


@pytest.mark.parametrize("size", [1, 5, 9, 30, 1000])
@pytest.mark.parametrize("end", ["", "\n \n\n", "\n<|endoftext|>", "<|endoftext|>\n\n"])
def test_the_pieces_of_a_document_join_to_it(tmp_path: Path, size: int, end: str) -> None:
    body = "one\ntwo \n\n\n  three\nfour five six seven\n\nä\nlast"
    file = put(tmp_path, "a.txt", f"\n \n{body}{end}")
    found = list(documents(file, size))
    assert "".join(text for _, text, _ in found) == body
    assert [begins for _, _, begins in found] == [True] + [False] * (len(found) - 1)
    assert (len(found) == 1) == (size == 1000)
    position = 0
    for line, text, _ in found:
        assert line == 3 + body[:position].count("\n")
        position += len(text)


def test_a_long_text_comes_in_pieces_before_its_end_is_read(tmp_path: Path) -> None:
    file = put(tmp_path, "a.txt", b"some words\n" * 300_000 + b"\xff")
    batches = text_batches([file], whole=True)
    first = [next(batches), next(batches)]
    assert [batch.starts for batch in first] == [True, False]
    assert all(len((b.rows or [])[0]["text"]) <= BATCH_BYTES for b in first)
    with pytest.raises(UserError, match=":300001: not UTF-8"):
        list(batches)


def test_a_line_of_10_mb_is_a_row_like_others(tmp_path: Path) -> None:
    long = "ä word " * 1_250_000
    lines = "\n".join(map(json.dumps, [{"text": "a"}, {"text": long}, {"text": "b"}]))
    for file in (
        put(tmp_path, "a.jsonl", lines),
        put(tmp_path, "a.csv", f"text\na\n{long}\nb\n"),
        put(tmp_path, "a.json", json.dumps([{"text": "a"}, {"text": long}, {"text": "b"}])),
    ):
        assert [row["text"] for row in rows(file)] == ["a", long, "b"]
    assert texts(put(tmp_path, "a.txt", long)) == [long.strip()]
