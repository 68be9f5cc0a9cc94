"""What `data:` names -> files, each once, with a hash of the content."""

from __future__ import annotations

import gzip
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from conftest import make_tokenizer, sentences
from prepared import prepared

from lora_kit.data import readers
from lora_kit.data.prepare import prepare
from lora_kit.data.readers import FEWEST_DOCUMENTS, OpenedSource, RawRow
from lora_kit.data.sources import check_apart, open_sources
from lora_kit.errors import UserError
from lora_kit.schema import EMBEDDED, Data, Source
from lora_kit.tasks.causal import Text


def put(folder: Path, name: str, content: str | bytes) -> str:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(file)


def rows(*sources: Any) -> list[RawRow]:
    return [r for s in open_sources(list(sources)) for b in s.batches() for r in b.parsed()]


def texts(*sources: Any) -> list[str]:
    return [row.columns["text"] for row in rows(*sources)]


def digest(source: Any) -> str:
    (opened,) = open_sources(source)
    return opened.digest


def refused(*sources: Any) -> str:
    with pytest.raises(UserError) as caught:
        open_sources(list(sources))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_gives_its_files_in_order_without_the_hidden_and_unknown(tmp_path: Path) -> None:
    put(tmp_path, "docs/b.md", "second")
    put(tmp_path, "docs/a/c.TXT", "first")
    put(tmp_path, "docs/a/a.jsonl", '{"text": "a table"}')
    put(tmp_path, "docs/d.md.gz", gzip.compress(b"third"))
    put(tmp_path, "docs/.git/x.md", "hidden")
    put(tmp_path, "docs/.x.md", "hidden")
    put(tmp_path, "docs/picture.png", b"\x89PNG\xff")
    put(tmp_path, "docs/a/other.zip.gz", b"\x1f\x8b")
    put(tmp_path, "docs/empty.md", "")
    (tmp_path / "docs" / "broken.md").symlink_to(tmp_path / "gone")
    (opened,) = open_sources(str(tmp_path / "docs"))
    assert opened.note == (
        "files that are read: a/a.jsonl, a/c.TXT, b.md, d.md.gz, empty.md; "
        "not read: a/other.zip.gz, picture.png"
    )
    assert len(opened.files) == 5
    # Text first, then tables.
    assert texts(str(tmp_path / "docs")) == ["first", "second", "third", "a table"]


def test_a_pattern_gives_what_fits_it(tmp_path: Path) -> None:
    put(tmp_path, "a/1.txt", "one")
    put(tmp_path, "a/b/2.txt", "two")
    put(tmp_path, "a/b/2.png", b"\x89PNG\xff")
    put(tmp_path, "a/.hidden/3.txt", "three")
    put(tmp_path, "a[1].txt", "a name that looks like a pattern")
    here = str(tmp_path)
    assert texts(f"{here}/a/*.txt") == ["one"]
    assert texts(f"{here}/a/**/*.txt") == texts(f"{here}/**/a/**/*.txt") == ["one", "two"]
    assert texts(f"{here}/a[1].txt") == ["a name that looks like a pattern"]
    (opened,) = open_sources(f"{here}/a/b/*")
    assert opened.note == "files that are read: 2.txt; not read: 2.png"
    assert "*.png: no file of a supported type (.arrow .bio" in refused(f"{here}/a/b/*.png")
    assert refused(f"{here}/*.none").endswith(" among 0")


def test_the_hash_changes_with_the_content_and_with_nothing_else(tmp_path: Path) -> None:
    one, two = put(tmp_path, "a.txt", "same"), put(tmp_path, "b.txt", "same")
    first = digest(one)
    os.utime(one, (1, 1))
    os.chmod(one, 0o600)
    assert digest(one) == first == digest(two) == digest(Source(source=two))
    put(tmp_path, "a.txt", "Same")
    assert digest(one) != first
    put(tmp_path, "folder/a.txt", "same")
    put(tmp_path, "folder/b.txt", "other")
    both = digest(str(tmp_path / "folder"))
    assert both == digest(str(tmp_path / "folder" / "*.txt"))
    (tmp_path / "folder").rename(tmp_path / "moved")
    put(tmp_path, "moved/.hidden", "not read")
    assert digest(str(tmp_path / "moved")) == both
    put(tmp_path, "moved/c.txt", "more")
    assert digest(str(tmp_path / "moved")) != both
    # Where one file ends and the next begins is content too.
    put(tmp_path, "x/a.txt", "ab")
    put(tmp_path, "x/b.txt", "c")
    put(tmp_path, "y/a.txt", "a")
    put(tmp_path, "y/b.txt", "bc")
    assert digest(str(tmp_path / "x")) != digest(str(tmp_path / "y"))


def test_fractions_are_given_to_all_of_a_list_and_are_one_together(tmp_path: Path) -> None:
    a, b, c = (put(tmp_path, f"{name}.txt", name) for name in "abc")

    def share(*fractions: float | None) -> list[Source]:
        pairs = zip((a, b, c), fractions, strict=False)
        return [Source(source=name, fraction=fraction) for name, fraction in pairs]

    assert [s.fraction for s in open_sources(share(0.7, 0.2, 0.1))] == [0.7, 0.2, 0.1]
    assert [s.fraction for s in open_sources([a, Source(source=b)])] == [None, None]
    assert f"{b}: no fraction" in refused(*share(0.5, None, 0.5))
    assert f"{b}: no fraction" in refused(Source(source=a, fraction=0.9), b)
    for wrong in ((0.5, 0.4), (0.5, 0.6), (0.9,)):
        line = refused(*share(*wrong))
        assert f"not {sum(wrong):g}: {a} {wrong[0]:g}" in line


def test_what_is_named_twice_is_refused(tmp_path: Path) -> None:
    file, other = put(tmp_path, "docs/a.txt", "text"), put(tmp_path, "docs/b.txt", "text")
    folder = str(tmp_path / "docs")
    assert refused(file, file) == f"{file}: named twice: remove one of the two"
    assert refused(file, f"{folder}/../docs/a.txt").endswith(
        f"is also in {file}: remove one of the two"
    )
    assert f"{file} is also in {folder}: remove one of the two" in refused(folder, file)
    assert f"a.txt is also in {file}: remove one of the two" in refused(file, folder)
    assert "is also in" in refused(f"{folder}/a*", f"{folder}/*.txt")
    assert (
        refused("nano:topics", "nano:topics") == "nano:topics: named twice: remove one of the two"
    )
    assert texts(file, other) == ["text", "text"]  # other files with the same content are counted
    (tmp_path / "link.txt").symlink_to(file)
    assert f"is also in {file}" in refused(file, str(tmp_path / "link.txt"))


def test_a_file_is_not_learned_from_and_judged_by(tmp_path: Path) -> None:
    file, other = put(tmp_path, "docs/a.txt", "text"), put(tmp_path, "b.txt", "text")
    train = open_sources([str(tmp_path / "docs")])
    check_apart(train, open_sources(other), "eval")
    check_apart(train, open_sources("nano:topics"), "eval")
    with pytest.raises(UserError, match=r"data\.eval: .*a\.txt is also trained on"):
        check_apart(train, open_sources([other, file]), "eval")


# The names are the same in every process: what is compressed carries the time.
@pytest.mark.parametrize(
    "content",
    [b"", gzip.compress(b""), gzip.compress(b" \n")],
    ids=["nothing", "nothing compressed", "blanks compressed"],
)
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".json", ".csv", ".tsv", ".conll"])
def test_an_empty_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, kind: str
) -> None:
    monkeypatch.setenv("LORA_KIT_CACHE", str(tmp_path / "cache"))
    file = put(tmp_path, f"a{kind}{'.gz' if content else ''}", content)
    with pytest.raises(UserError) as caught:
        prepare(Data(train=file), Text(), seed=0)
    assert str(caught.value) == f"{file}: empty: there is nothing to train on"


def test_sources_that_are_not_there_are_refused(tmp_path: Path) -> None:
    file = put(tmp_path, "a.txt", "text")
    assert refused(file, str(tmp_path / "gone")) == f"{tmp_path / 'gone'}: no such file or folder"
    assert "no such file or folder" in refused("x" * 5000)
    (tmp_path / "empty").mkdir()
    assert "no file of a supported type" in refused(str(tmp_path / "empty"))
    assert "nano:topics, nano:docstrings, nano:instructions" in refused("nano:other")
    assert "save it as text" in refused(put(tmp_path, "a.docx", b"PK"))


def test_few_documents_are_whole_so_that_they_can_be_cut(tmp_path: Path) -> None:
    for count in (FEWEST_DOCUMENTS - 1, FEWEST_DOCUMENTS):
        text = "<|endoftext|>".join(["A line.\n" * 9] * count)
        (opened,) = open_sources(put(tmp_path, "a.txt", text))
        batches = list(opened.batches())
        assert [batch.whole for batch in batches] == (
            [True] * count if count < FEWEST_DOCUMENTS else [False]
        )
        assert sum(len(list(batch.parsed())) for batch in batches) == count
    many = [put(tmp_path, f"{n}.txt", "A line.") for n in range(FEWEST_DOCUMENTS)]
    (opened,) = open_sources(f"{tmp_path}/[0-9]*.txt")
    assert {batch.whole for batch in opened.batches()} == {False}
    (opened,) = open_sources(many[0])
    assert {batch.whole for batch in opened.batches()} == {True}


def test_few_long_documents_are_told_from_many_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "BATCH_BYTES", 64)
    text = "\n".join(sentences(100))
    (opened,) = open_sources(put(tmp_path, "a.txt", text))
    batches = list(opened.batches())
    assert len(batches) > FEWEST_DOCUMENTS and all(batch.whole for batch in batches)
    assert [batch.starts for batch in batches] == [True] + [False] * (len(batches) - 1)
    assert "".join(row.columns["text"] for b in batches for row in b.parsed()) == text


def test_a_file_that_becomes_another_kind_is_prepared_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The content, and so the hash, of a folder can be the same while its rows are not."""
    monkeypatch.setenv("LORA_KIT_CACHE", str(tmp_path / "cache"))
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    lines = "\n".join(json.dumps({"text": s}) for s in random.Random(0).sample(sentences(99), 60))
    file = Path(put(tmp_path, "docs/a.jsonl", lines))
    data: dict[str, Any] = {"train": str(file.parent), "eval": 0.4, "max_length": 64}
    assert not prepared(tokenizer, "text", **data).cached
    assert prepared(tokenizer, "text", **data).cached
    file.rename(file.with_suffix(".txt"))
    again = prepared(tokenizer, "text", **data)
    assert not again.cached
    assert again.files[0].name.endswith("a.txt")


def test_the_embedded_texts_are_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_kit import nano

    pair: list[tuple[str, str]] = [("x.y", "Text.")]
    qa: list[dict[str, Any]] = [{"prompt": "p", "completion": "c"}]
    monkeypatch.setattr(nano, "topics", lambda: pair)
    monkeypatch.setattr(nano, "general", lambda: pair)
    monkeypatch.setattr(nano, "instructions", lambda: qa)
    found = rows(*EMBEDDED)
    assert [r.place for r in found] == [f"{name}/1" for name in EMBEDDED]
    assert [r.columns for r in found] == [{"text": "Text."}] * 2 + qa
    same: list[OpenedSource] = open_sources(["nano:topics", "nano:docstrings"])
    assert same[0].digest == same[1].digest != digest("nano:instructions")
