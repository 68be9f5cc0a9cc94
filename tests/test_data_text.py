"""Text -> rows: every token is learned from, or judged, exactly once."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import WORDS, make_tokenizer
from lora_kit.data.encode import Encoder, Settings
from lora_kit.tasks.arrange import write_judged, write_train

from lora_kit.data.formats import Columns
from lora_kit.data.readers import Batch, text_batches
from lora_kit.data.table import Table
from lora_kit.errors import UserError
from lora_kit.tasks.arrange import write_judged, write_train
from lora_kit.tasks.batches import IGNORED, Labelled

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


def table_of(folder: Path, tokenizer: Any, batches: list[Batch]) -> Table:
    encoder = Encoder(tokenizer, Settings(Columns(), "assistant", 8, 0, False))
    table = Table(folder / "a.table", 0)
    for batch in batches:
        table.add(0, encoder(batch, "text", table.below))
    return table.finish()


def documents(folder: Path, tokenizer: Any, texts: list[str]) -> Table:
    """A table of whole documents, the n-th of them in line n."""
    numbers = list(range(1, len(texts) + 1))
    return table_of(
        folder, tokenizer, [Batch("f", "{}:{}", numbers, [{"text": text} for text in texts])]
    )


def blocks(folder: Path, tokenizer: Any, *texts: str) -> Table:
    """A table of the blocks of long texts."""
    files = []
    for n, text in enumerate(texts):
        files.append(folder / f"{n}.txt")
        files[-1].write_text(text, encoding="utf-8")
    return table_of(folder, tokenizer, list(text_batches(files, whole=True)))


def some_texts(seed: int) -> list[str]:
    chooser = random.Random(seed)
    words = [*WORDS, "ä😀", "\n", "naïve"]
    lengths = [chooser.choice([1, 2, 5, 30, 200]) for _ in range(12)]
    return [" ".join(["the", *chooser.choices(words, k=k), "end"]) for k in lengths]


def all_of(table: Table) -> tuple[Table, np.ndarray]:
    return table, np.ones(len(table), dtype=bool)


def train(table: Any, tokenizer: Any, packing: str, length: int, **more: Any) -> Labelled:
    """What is learned from, written beside the table."""
    chosen = table if isinstance(table, tuple) else all_of(table)
    path = chosen[0].path.with_name("train")
    return write_train(path, chosen, more.get("replayed"), "text", packing, tokenizer, length)


def ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def closed(tokenizer: Any, text: str) -> list[int]:
    begin = [BOS] if tokenizer.bos_token_id is not None else []
    return [*begin, *ids(tokenizer, text), EOS]


@pytest.mark.parametrize("seed", range(4))
def test_running_text_loses_and_doubles_no_token(tmp_path: Path, tokenizer: Any, seed: int) -> None:
    texts = some_texts(seed)
    length = random.Random(seed).choice([8, 9, 33])
    rows = train(documents(tmp_path, tokenizer, texts), tokenizer, "running", length)
    expected = [token for text in texts for token in closed(tokenizer, text)]
    # A last chunk of one token predicts nothing and is left out.
    expected = expected[:-1] if len(expected) % length == 1 else expected
    assert rows.ids.tolist() == expected
    assert rows.lengths[:-1].tolist() == [length] * (len(rows) - 1) and rows.lengths[-1] > 1
    assert all((row["labels"] == row["input_ids"]).all() for row in map(rows.__getitem__,
               range(len(rows))))  # fmt: skip
    assert rows.supervised_tokens == rows.tokens - len(rows)


def test_a_row_of_running_text_stands_where_its_first_token_does(
    tmp_path: Path, plain: Any
) -> None:
    rows = train(documents(tmp_path, plain, ["the fox", "a dog", "an oven"]), plain, "running", 2)
    lengths = [len(closed(plain, text)) for text in ("the fox", "a dog", "an oven")]
    lines = np.repeat([1, 2, 3], lengths)
    assert rows.numbers.tolist() == lines[::2][: len(rows)].tolist()


@pytest.mark.parametrize("seed", range(4))
def test_documents_are_learned_from_each_for_itself(
    tmp_path: Path, tokenizer: Any, seed: int
) -> None:
    texts = some_texts(seed)
    for packing in ("none", "documents"):
        rows = train(documents(tmp_path, tokenizer, texts), tokenizer, packing, 9)
        learned: dict[int, list[int]] = {}
        for n in range(len(rows)):
            row, line = rows[n], int(rows.numbers[n])
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
    table = blocks(tmp_path, tokenizer, text)
    assert 10 < len(table) < 20
    (row,) = [train(table, tokenizer, "running", 10**6)[0]["input_ids"].tolist()]
    assert row == closed(tokenizer, text)
    assert int(table.sizes.sum()) == len(text.encode())
    assert table.joins.tolist() == [False] + [True] * (len(table) - 1)
    # A block says in which line it begins.
    for n, number in enumerate(table.numbers.tolist()):
        assert tokenizer.decode(table.tokens(n)).split("\n")[0] == text.split("\n")[number - 1]


@pytest.mark.parametrize("what", ["one long line", "no space", "characters of four bytes"])
def test_text_without_line_ends_is_cut_as_well(tmp_path: Path, plain: Any, what: str) -> None:
    text = {
        "one long line": " ".join(WORDS * 60),
        "no space": "abc" * 5000,
        "characters of four bytes": "😀😎" * 3000,
    }[what]
    table = blocks(tmp_path, plain, text)
    assert len(table) >= 2 and table.sizes.max() <= 4 * 2048
    assert train(table, plain, "running", 10**6).ids.tolist() == closed(plain, text)


def test_a_training_text_has_no_seam_into_what_is_held_out(tmp_path: Path, plain: Any) -> None:
    text = "\n".join(" ".join(random.Random(n).choices(WORDS, k=30)) for n in range(400))
    table = blocks(tmp_path, plain, text, "another text of its own")
    keep = np.ones(len(table), dtype=bool)
    keep[[0, 4, 5, 9]] = False  # runs: 1-3, 6-8, 10-..., and the other text
    rows = train((table, keep), plain, "running", 10**6)
    runs = " ".join(map(str, rows.ids.tolist())).split(f" {EOS} ")
    assert rows.ids.tolist().count(EOS) == 4 and len(runs) == 4
    first = [token for n in (1, 2, 3) for token in table.tokens(n).tolist()]
    assert runs[0] == " ".join(map(str, first))


def test_replayed_text_comes_last(tmp_path: Path, plain: Any) -> None:
    general = tmp_path / "general"
    general.mkdir()
    replayed = all_of(documents(general, plain, ["an oven", "a stone"]))
    for packing in ("running", "none"):
        table = documents(tmp_path, plain, ["the fox", "a dog"])
        rows = train(table, plain, packing, 10**6, replayed=replayed)
        texts = ("the fox", "a dog", "an oven", "a stone")
        assert rows.ids.tolist() == [t for text in texts for t in closed(plain, text)]


@pytest.mark.parametrize("seed", range(4))
def test_what_is_judged_scores_every_token_once(tmp_path: Path, tokenizer: Any, seed: int) -> None:
    texts = some_texts(seed)
    length = random.Random(seed).choice([8, 9, 33])
    table = documents(tmp_path, tokenizer, texts)
    rows = write_judged(tmp_path / "eval", all_of(table), "text", tokenizer, length)
    assert rows.unit_bytes.tolist() == [len(text.encode()) for text in texts]
    scored: list[list[int]] = [[] for _ in texts]
    before: dict[int, int] = {}
    for n, unit in enumerate(rows.units.tolist()):
        row = rows[n]
        assert len(row["input_ids"]) <= length and row["labels"][0] == IGNORED
        # The first window begins with a token of context, each other with the last one before.
        assert row["input_ids"][0] == before.get(unit, tokenizer.bos_token_id or EOS)
        scored[unit] += row["labels"][1:].tolist()
        before[unit] = int(row["input_ids"][-1])
    assert scored == [ids(tokenizer, text) for text in texts]


def test_only_what_is_chosen_is_judged(tmp_path: Path, plain: Any) -> None:
    table = documents(tmp_path, plain, ["the fox", "a dog", "an oven"])
    chosen = np.array([False, True, True])
    rows = write_judged(tmp_path / "eval", (table, chosen), "text", plain, 64)
    assert rows.numbers.tolist() == [2, 3] and rows.unit_bytes.tolist() == [5, 7]


def test_too_little_text_is_refused(tmp_path: Path, plain: Any) -> None:
    table = documents(tmp_path, plain, ["the fox"])
    with pytest.raises(UserError, match="less than two tokens"):
        train((table, np.zeros(1, dtype=bool)), plain, "running", 8)
