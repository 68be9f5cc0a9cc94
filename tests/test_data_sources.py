"""Files, folders and tables -> rows with their places."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from lora_kit.data.sources import BLOCK_BYTES, Row, read_sources
from lora_kit.errors import UserError
from lora_kit.run import EMBEDDED


def put(folder: Path, name: str, content: str | bytes) -> str:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(file)


def rows(*sources: str) -> list[Row]:
    return read_sources(list(sources))[0]


def refused(*sources: str) -> str:
    with pytest.raises(UserError) as caught:
        read_sources(list(sources))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- Text


def test_end_of_text_markers_part_documents_and_places_are_their_lines(tmp_path: Path) -> None:
    text = "\n\nfirst\nline<|endoftext|>\n  second\n<|endoftext|>\n \n<|endoftext|>third"
    file = put(tmp_path, "a.txt", "﻿" + text.replace("\n", "\r\n"))
    found = rows(file)
    assert [r.columns["text"] for r in found] == ["first\nline", "second", "third"]
    assert [r.place for r in found] == [f"{file}:3", f"{file}:5", f"{file}:8"]
    assert not any(r.joins for r in found)


@pytest.mark.parametrize("seed", range(5))
def test_a_text_is_cut_into_blocks_that_join_to_it(tmp_path: Path, seed: int) -> None:
    chooser = random.Random(seed)
    signs = ["ä", "word ", "\n", "\f", "\u2028", "😀", "x" * 3000, "\x85", "one two three four "]
    text = "".join(chooser.choices(signs, weights=[9, 90, 20, 1, 1, 3, 1, 1, 40], k=4000)).strip()
    found = rows(put(tmp_path, "a.txt", text))
    texts = [r.columns["text"] for r in found]
    assert "".join(texts) == text
    assert [r.joins for r in found] == [False] + [True] * (len(found) - 1)
    assert all(BLOCK_BYTES <= len(t.encode()) < 6 * BLOCK_BYTES for t in texts[:-1])
    position = 0
    for row, block in zip(found, texts, strict=True):
        assert row.place.endswith(f"a.txt:{text[:position].count(chr(10)) + 1}")
        position += len(block)


def test_one_endless_line_is_cut_at_spaces(tmp_path: Path) -> None:
    found = rows(put(tmp_path, "a.txt", "word " * 2000 + "end"))
    assert len(found) == 5
    assert all(r.columns["text"].startswith(" word") for r in found[1:])


def test_twenty_documents_are_enough_to_stay_whole(tmp_path: Path) -> None:
    long = "A line.\n" * 1000
    assert len(rows(put(tmp_path, "a.txt", "<|endoftext|>".join([long] * 20)))) == 20
    assert len(rows(put(tmp_path, "b.txt", "<|endoftext|>".join([long] * 19)))) > 19


def test_a_folder_gives_its_files_in_order_without_the_hidden_and_unknown(tmp_path: Path) -> None:
    put(tmp_path, "docs/b.md", "second")
    put(tmp_path, "docs/a/c.TXT", "first")
    put(tmp_path, "docs/.git/x.md", "hidden")
    put(tmp_path, "docs/.x.md", "hidden")
    put(tmp_path, "docs/picture.png", b"\x89PNG\xff")
    put(tmp_path, "docs/empty.md", "")
    (tmp_path / "docs" / "broken.md").symlink_to(tmp_path / "gone")
    found = rows(str(tmp_path / "docs"))
    assert [r.columns["text"] for r in found] == ["first", "second"]


def test_the_hash_is_that_of_the_content(tmp_path: Path) -> None:
    one, two = put(tmp_path, "a.txt", "same"), put(tmp_path, "b.txt", "same")
    other = put(tmp_path, "c.txt", "other")
    hashes = read_sources([one, two, other])[1]
    assert hashes[one] == hashes[two] != hashes[other]
    assert list(hashes) == [one, two, other]


# --- Tables

TABLE = [{"prompt": 'a, "b"\nc', "completion": "ä\u2028z"}, {"prompt": "2", "completion": "3"}]


def as_csv(delimiter: str) -> str:
    lines = [f"prompt{delimiter}completion"]
    for row in TABLE:
        quoted = '"' + row["prompt"].replace('"', '""') + '"'
        lines.append(quoted + delimiter + row["completion"])
    return "\n".join(lines) + "\n\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", "\n".join(json.dumps(r, ensure_ascii=False) for r in TABLE) + "\n\n"),
        ("a.JSON", json.dumps(TABLE)),
        ("a.csv", as_csv(",")),
        ("a.tsv", as_csv("\t")),
    ],
)
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_a_table_reads_the_same_in_every_kind(
    tmp_path: Path, name: str, content: str, ends: str
) -> None:
    file = put(tmp_path, name, "﻿" + content.replace("\n", ends))
    found = rows(file)
    assert [r.columns for r in found] == TABLE
    lines = {"a.jsonl": [":1", ":2"], "a.JSON": ["[0]", "[1]"]}.get(name, [":2", ":4"])
    assert [r.place for r in found] == [file + line for line in lines]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"fine\nfine\nb\xe9d", ":3: not UTF-8 (byte 11)"),
        ("a.txt", "text".encode("utf-16"), ":1: not UTF-8"),
        ("a.bin", b"one\ntwo\0", ":2: holds a zero byte"),
        ("a.txt", b"", ": empty"),
        ("a.txt", b" \n<|endoftext|>\n", ": empty"),
        ("a.jsonl", b"", ": empty"),
        ("a.json", b"\n", ": empty"),
        ("a.json", b"[]", ": empty"),
        ("a.csv", b"text\n", ": empty"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "b', ":3: not JSON: Unterminated string"),
        ("a.jsonl", b'{"text": 1}\n[1]', ":2: an object with named columns is expected, not [1]"),
        ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}", ":1: not readable as JSON"),
        ("a.jsonl", b"[" * 100_000, ":1: not readable as JSON"),
        ("a.json", b'[{"text": "a"},\n{"text": ', ":2: not JSON"),
        ("a.json", b'{"text": "a"}', "a list of objects is expected"),
        ("a.json", b'[{"text": "a"}, 7]', "[1]: an object with named columns"),
        ("a.csv", b'a,b\n1,2\n"3\n4",5\n6', ":5: 1 values for 2 columns"),
        ("a.csv", b"a,b\n1,2,3\n", ":2: 3 values for 2 columns"),
        ("a.csv", b'a,b\n1,2\n3,"4\n', ":3: not readable as a table"),
        ("a.csv", b"a,a\n1,2\n", ":1: columns need names that differ"),
        ("a.tsv", b"a\t\n1\t2\n", ":1: columns need names that differ"),
    ],
)
def test_broken_files_are_refused_with_file_and_line(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    file = put(tmp_path, name, content)
    line = refused(file)
    assert line.startswith(file) and words in line


def test_sources_that_are_not_there_or_twice_are_refused(tmp_path: Path) -> None:
    file = put(tmp_path, "a.txt", "text")
    assert "no such file or folder" in refused(file, str(tmp_path / "gone"))
    assert "no such file or folder" in refused("x" * 5000)
    assert "named twice" in refused(file, file)
    (tmp_path / "empty").mkdir()
    assert "no file of a known kind" in refused(str(tmp_path / "empty"))
    assert "nano:topics, nano:docstrings, nano:instructions" in refused("nano:other")


def test_the_embedded_texts_are_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_kit import nano

    pair: list[tuple[str, str]] = [("x.y", "Text.")]
    qa: list[dict[str, Any]] = [{"prompt": "p", "completion": "c"}]
    monkeypatch.setattr(nano, "topics", lambda: pair)
    monkeypatch.setattr(nano, "general", lambda: pair)
    monkeypatch.setattr(nano, "instructions", lambda: qa)
    found = rows(*EMBEDDED)
    assert [r.place for r in found] == [
        "nano:topics/x.y",
        "nano:docstrings/x.y",
        "nano:instructions/1",
    ]
    assert found[2].columns == qa[0]
