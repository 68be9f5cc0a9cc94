"""Text -> rows: every token is learned from, or judged, exactly once."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import WORDS, make_tokenizer
from prepared import ids_of, prepared, put_texts, run_of, supervised, tokens, unit_bytes

from lora_kit.data.formats import Example
from lora_kit.data.readers import text_batches
from lora_kit.data.reading import _blocks
from lora_kit.data.rows import Rows
from lora_kit.errors import UserError
from lora_kit.tasks.batches import IGNORED
from lora_kit.tasks.causal import Text
from lora_kit.tasks.task import Dropped

EOS, BOS = 0, 2


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), bos=True)


@pytest.fixture(params=["plain", "with_bos"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def encoded(tokenizer: Any, examples: list[Example], length: int) -> Rows:
    """The rows of texts as they are evaluated; the n-th example has the number n + 1."""
    made = []
    run = run_of("cpt", max(8, length))
    for n, found in enumerate(Text().encode(examples, tokenizer, {}, run)):
        assert not isinstance(found, Dropped)
        for row in found:
            row = {k: v for k, v in row.items() if k != "length"}
            made.append({**row, "example": n, "unit": n, "file": 0, "number": n + 1})
    return Rows.of(made)


def documents(tokenizer: Any, texts: list[str], length: int = 10**6) -> Rows:
    return encoded(tokenizer, [Example("f", text=text) for text in texts], length)


def blocks(folder: Path, *texts: str) -> list[tuple[int, Example]]:
    """(line, block) of the blocks that long texts are cut into."""
    files = []
    for n, text in enumerate(texts):
        files.append(folder / f"{n}.txt")
        files[-1].write_text(text, encoding="utf-8")
    return [found for batch in text_batches(files, whole=True) for found in _blocks(batch)]


def some_texts(seed: int) -> list[str]:
    chooser = random.Random(seed)
    words = [*WORDS, "ä😀", "\n", "naïve"]
    lengths = [chooser.choice([1, 2, 5, 30, 200]) for _ in range(12)]
    return [" ".join(["the", *chooser.choices(words, k=k), "end"]) for k in lengths]


def train(rows: Rows, tokenizer: Any, packing: str, length: int, replayed: Any = None) -> Rows:
    """What is trained on."""
    run = run_of("cpt", max(8, length), packing=packing)
    return Rows.of(Text().arrange(rows, replayed, tokenizer, {}, run))


def ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def closed(tokenizer: Any, text: str) -> list[int]:
    begin = [BOS] if tokenizer.bos_token_id is not None else []
    return [*begin, *ids(tokenizer, text), EOS]


@pytest.mark.parametrize("seed", range(4))
def test_running_text_loses_and_doubles_no_token(tmp_path: Path, tokenizer: Any, seed: int) -> None:
    texts = some_texts(seed)
    length = random.Random(seed).choice([8, 9, 33])
    rows = train(documents(tokenizer, texts, length), tokenizer, "running", length)
    expected = [token for text in texts for token in closed(tokenizer, text)]
    # A last chunk of one token predicts nothing and is left out.
    expected = expected[:-1] if len(expected) % length == 1 else expected
    assert ids_of(rows) == expected
    lengths = rows.sizes("input_ids").tolist()
    assert lengths[:-1] == [length] * (len(rows) - 1) and lengths[-1] > 1
    assert all((row["labels"] == row["input_ids"]).all() for row in rows)
    assert supervised(rows) == tokens(rows) - len(rows)
    assert rows.column("end_markers").sum() == expected.count(EOS)


def test_a_row_of_running_text_stands_where_its_first_token_does(
    tmp_path: Path, plain: Any
) -> None:
    texts = ["the fox", "a dog in a stone oven", "an oven"] * 3
    rows = train(documents(plain, texts), plain, "running", 8)
    lengths = [len(closed(plain, text)) for text in texts]
    lines = np.repeat(np.arange(1, 10), lengths)
    assert len(rows) > 2
    assert rows.column("number").tolist() == lines[::8][: len(rows)].tolist()


@pytest.mark.parametrize("seed", range(4))
def test_documents_are_learned_from_each_for_itself(
    tmp_path: Path, tokenizer: Any, seed: int
) -> None:
    texts = some_texts(seed)
    for packing in ("none", "documents"):
        rows = train(documents(tokenizer, texts, 9), tokenizer, packing, 9)
        learned: dict[int, list[int]] = {}
        for n in range(len(rows)):
            row, line = rows[n], int(rows.cell("number", n))
            assert 2 <= len(row["input_ids"]) <= 9 and row["labels"][0] == IGNORED
            before = learned.setdefault(line, [int(row["input_ids"][0])])
            assert before[-1] == row["input_ids"][0]  # a window goes on from the one before
            before.extend(row["labels"][1:].tolist())
        assert [learned[n] for n in sorted(learned)] == [closed(tokenizer, t) for t in texts]


def test_blocks_join_to_exactly_the_tokens_of_the_whole_text(
    tmp_path: Path, tokenizer: Any
) -> None:
    chooser = random.Random(0)
    lines = [" ".join(chooser.choices([*WORDS, "größe", "😀😀"], k=30)) for _ in range(200)]
    text = "\n".join(lines)
    found = blocks(tmp_path, text)
    assert 10 < len(found) < 20
    table = encoded(tokenizer, [block for _, block in found], 10**6)
    (row,) = [train(table, tokenizer, "running", 10**6)[0]["input_ids"].tolist()]
    assert row == closed(tokenizer, text)
    assert sum(unit_bytes(table)) == len(text.encode())
    assert [block.joins for _, block in found] == [False] + [True] * (len(found) - 1)
    # A block says in which line it begins.
    for (line, _), block in zip(found, table, strict=True):
        words = tokenizer.decode(block["input_ids"][1:]).split("\n")[0]
        assert words == text.split("\n")[line - 1]


@pytest.mark.parametrize("what", ["one long line", "no space", "characters of four bytes"])
def test_text_without_line_ends_is_cut_as_well(tmp_path: Path, plain: Any, what: str) -> None:
    text = {
        "one long line": " ".join(WORDS * 60),
        "no space": "abc" * 5000,
        "characters of four bytes": "😀😎" * 3000,
    }[what]
    found = [block for _, block in blocks(tmp_path, text)]
    assert len(found) >= 2 and max(len((b.text or "").encode()) for b in found) <= 4 * 2048
    rows = encoded(plain, found, 10**6)
    assert ids_of(train(rows, plain, "running", 10**6)) == closed(plain, text)


def test_a_training_text_has_no_seam_into_what_is_held_out(tmp_path: Path, plain: Any) -> None:
    text = "\n".join(" ".join(random.Random(n).choices(WORDS, k=30)) for n in range(400))
    found = blocks(tmp_path, text, "another text of its own")
    table = encoded(plain, [block for _, block in found], 10**6)
    keep = np.ones(len(table), dtype=bool)
    keep[[0, 4, 5, 9]] = False  # runs: 1-3, 6-8, 10-..., and the other text
    rows = train(table.select(np.flatnonzero(keep)), plain, "running", 10**6)
    runs = " ".join(map(str, ids_of(rows))).split(f" {EOS} ")
    assert ids_of(rows).count(EOS) == 4 and len(runs) == 4
    first = [token for n in (1, 2, 3) for token in table[n]["input_ids"][1:].tolist()]
    assert runs[0] == " ".join(map(str, first))


def test_replayed_text_comes_last(plain: Any) -> None:
    replayed = documents(plain, ["an oven", "a stone"])
    for packing in ("running", "none"):
        rows = train(documents(plain, ["the fox", "a dog"]), plain, packing, 10**6, replayed)
        texts = ("the fox", "a dog", "an oven", "a stone")
        assert ids_of(rows) == [t for text in texts for t in closed(plain, text)]


@pytest.mark.parametrize("seed", range(4))
def test_evaluation_scores_every_token_once(tokenizer: Any, seed: int) -> None:
    texts = some_texts(seed)
    length = random.Random(seed).choice([8, 9, 33])
    rows = documents(tokenizer, texts, length)
    assert unit_bytes(rows) == [len(text.encode()) for text in texts]
    scored: list[list[int]] = [[] for _ in texts]
    before: dict[int, int] = {}
    for row, unit in zip(rows, rows.column("unit").tolist(), strict=True):
        assert len(row["input_ids"]) <= length and row["labels"][0] == IGNORED
        # The first window begins with a token of context, each other with the last one before.
        assert row["input_ids"][0] == before.get(unit, tokenizer.bos_token_id or EOS)
        scored[unit] += row["labels"][1:].tolist()
        before[unit] = int(row["input_ids"][-1])
    assert scored == [ids(tokenizer, text) for text in texts]


def test_too_little_text_is_refused(tmp_path: Path, plain: Any) -> None:
    train = put_texts(tmp_path / "a.txt", ["a"])
    with pytest.raises(UserError, match=r"1 different document\(s\) cannot be split"):
        prepared(plain, "text", train=train)
