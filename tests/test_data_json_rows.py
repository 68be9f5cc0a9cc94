"""JSON -> rows, in pieces of any size; what is no list of objects is refused with its line."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from lora_kit.data import json_rows
from lora_kit.data.json_rows import JsonList, parse_line, short_repr
from lora_kit.data.readers import table_batches
from lora_kit.errors import UserError


def objects(folder: Path, content: str | bytes) -> list[dict[str, Any]]:
    file = folder / "a.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    found = list(JsonList(file).objects())
    assert [number for number, _ in found] == list(range(len(found)))
    return [row for _, row in found]


def some_rows(seed: int) -> list[dict[str, Any]]:
    chooser = random.Random(seed)
    parts = ["word ", "ä", "\u2028", "😀", "\n", "\\", '"', "{", "]", ",", "\r\n", "\t"]
    values: list[Any] = [None, True, -1.5e300, [], {}, [{"a": [1, "]"]}], 12345678901234567890]
    return [
        {"text": "".join(chooser.choices(parts, k=chooser.randrange(40)))}
        | ({"more": chooser.choice(values)} if n % 2 else {})
        for n in range(40)
    ]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("indent", [None, 0, 2, "\t"])
@pytest.mark.parametrize("piece", [1, 7, 100, 2**20])
def test_rows_are_the_same_whatever_the_size_of_a_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, indent: Any, piece: int
) -> None:
    monkeypatch.setattr(json_rows, "PIECE", piece)
    rows = some_rows(seed)
    for plain in (True, False):
        assert objects(tmp_path, json.dumps(rows, indent=indent, ensure_ascii=plain)) == rows
        keyed = {f'id {n}"': row for n, row in enumerate(rows)}
        assert objects(tmp_path, json.dumps(keyed, indent=indent, ensure_ascii=plain)) == rows
        separate = json.dumps(rows, separators=(",", ":"), ensure_ascii=plain)
        assert objects(tmp_path, f"\ufeff \r\n{separate}\n\n") == rows


def test_a_file_larger_than_a_piece(tmp_path: Path) -> None:
    rows = [{"text": f"{n} " + "ä word " * 20_000} for n in range(30)]
    content = json.dumps(rows, ensure_ascii=False)
    assert len(content) > 4 * json_rows.PIECE
    assert objects(tmp_path, content) == rows


def test_nothing_is_read_that_is_not_needed(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    row = json.dumps({"text": "word " * 1000})
    file.write_text("[" + f"{row},\n" * 2000)
    reader = JsonList(file)
    found = reader.objects()
    assert [next(found)[0] for _ in range(1000)] == list(range(1000))
    assert len(reader.text) < 2 * json_rows.PIECE
    with pytest.raises(UserError, match=r"a\.json:2001: not JSON: Expecting value"):
        list(found)


@pytest.mark.parametrize("content", ["", " \n", "[]", "{}", " [ \n ] \n"])
def test_a_file_may_hold_nothing(tmp_path: Path, content: str) -> None:
    assert objects(tmp_path, content) == []


DEEP = "[" * 100_000


@pytest.mark.parametrize("piece", [1, 2**20])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('[{"text": "a"},\n{"text": ', ":2: not JSON: Expecting value (column 10)"),
        ('[{"text": "a"},\n{"text": "b', ":2: not JSON: Unterminated string"),
        ('[{"text": "a"},\n{"text": "b"}', ":2: not JSON: expected `]` or a comma"),
        ('{"x": {"text": "a"}', ":1: not JSON: expected `}` or a comma"),
        ('[{"text": "a"}\n{"text": "b"}]', ":2: not JSON: expected `]` or a comma"),
        ('[{"text": "a"},\n]', ":2: not JSON: Expecting value (column 1)"),
        ('[{"text": "a"}]\n[]', ":2: not JSON: extra text after the last `]`"),
        ('{"x": {"text": "a"}}\n{}', ":2: not JSON: extra text after the last `}`"),
        ('{"text": "a"}\n{"text": "b"}', ": expected a list of objects, or an object"),
        ('{"text": {"a": "b"}, "id": 1}', ": expected a list of objects, or an object"),
        ('{"x" {"text": "a"}}', ":1: not JSON: expected a colon"),
        ('\n{"x": {},\n"x": {}}', ":3: duplicate key 'x' in an object"),
        ('[{"a": 1},\n{"a": 1, "a": 1}]', ":2: not readable as JSON: duplicate key 'a'"),
        ('"text"', ":1: expected a list of objects"),
        ('[{"text": "a"}, 7]', "[1]: expected an object with named columns, not 7"),
        ("[[1]]", "[0]: expected an object with named columns, not [1]"),
        (f'\n[{{"text": {"9" * 5000}}}]', ":2: not readable as JSON: Exceeds the limit"),
        ('[{"text": "a\nb"}]', ":1: not JSON: Invalid control character"),
        (b'[{"text": "a"},\n{"text": "\xe9"}]', ":2: not UTF-8"),
        (b'[{"text": "a"},\n{"text": "\xc3', ":2: not UTF-8"),
        (b'[{"text": "a"},\n{"text": "\0"}]', ":2: contains a NUL byte"),
        ('[{"text": "a"}]'.encode("utf-16"), ":1: not UTF-8: convert it to UTF-8 with iconv"),
    ],
)
def test_what_is_no_list_of_objects_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int, content: str | bytes, words: str
) -> None:
    monkeypatch.setattr(json_rows, "PIECE", piece)
    with pytest.raises(UserError) as caught:
        objects(tmp_path, content)
    line = str(caught.value)
    assert line.startswith(f"{tmp_path / 'a.json'}{words}") and "\n" not in line


def test_lists_without_an_end_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.json:1: not readable as JSON: maximum recursion"):
        objects(tmp_path, f'[{{"text": {DEEP}')
    with pytest.raises(UserError, match=r"f:7: not readable as JSON: maximum recursion"):
        parse_line(f'{{"text": {DEEP}', "f", 7)


def test_a_row_that_no_worker_could_be_given_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    for levels in (50, 500):
        file.write_text(f'[{{"text": "a"}}, {{"text": "b", "more": {"[" * levels}{"]" * levels}}}]')
        if levels < 100:
            (batch,) = table_batches(file)
            assert batch.numbers == [0, 1]
        else:
            with pytest.raises(UserError, match=r"a\.json\[1\]: nesting too deep"):
                list(table_batches(file))


def test_the_column_of_a_mistake_in_one_long_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_rows, "PIECE", 64)
    for before in ("", "\n\n  "):
        good = "[" + '{"text": "word"}, ' * 50
        with pytest.raises(UserError) as caught:
            objects(tmp_path, before + good + '{"text": word}]')
        column = len(before.strip("\n") + good) + len('{"text": w')
        line = 1 + before.count("\n")
        assert str(caught.value).endswith(f":{line}: not JSON: Expecting value (column {column})")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "b', "not JSON: Unterminated string starting at (column 10)"),
        ('{"text": "b"} {"text": "c"}', "not JSON: Extra data (column 15)"),
        ('{"text": "b"},', "not JSON: Extra data (column 14)"),
        ("", "not JSON: Expecting value (column 1)"),
        ("[1]", "expected an object with named columns, not [1]"),
        ("null", "expected an object with named columns, not None"),
        ('{"a": {"b": 1, "b": 1}}', "not readable as JSON: duplicate key 'b' in an object"),
        (f'{{"a": {"9" * 5000}}}', "not readable as JSON: Exceeds the limit"),
        ('\ufeff{"a": 1}', "not JSON: Unexpected UTF-8 BOM"),
    ],
)
def test_a_line_is_one_object(line: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_line(line, "f", 7)
    assert str(caught.value).startswith(f"f:7: {words}")
    assert parse_line('{"a": "\\u0000\\ud83d", "b": NaN}\r\n', "f", 1)["a"] == "\0\ud83d"


def test_values_are_shown_short() -> None:
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    for value in (deep, "x" * 10**7, {"y" * 99: "z" * 99}, 10**3000, list(range(10**5)), "a\nb"):
        assert len(short_repr(value)) <= 40 and "\n" not in short_repr(value)
    assert short_repr("half a page") == "'half a page'"
