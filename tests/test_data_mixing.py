"""Fractions and replay, through `prepare`: shares of the tokens trained on, and no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import make_tokenizer
from prepared import chats, prepared, put, put_texts, texts, tokens

from lora_kit.errors import UserError
from lora_kit.tasks.encode import Prepared


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), bos=True)


@pytest.fixture(params=["plain", "with_bos"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


pytestmark = pytest.mark.usefixtures("own_cache")


def tokens_of(found: Prepared) -> dict[str, tuple[int, int]]:
    """{file: (tokens to train on, of the longest row)}."""
    rows = found.rows("train")
    counts: dict[str, tuple[int, int]] = {}
    for file, length in zip(
        rows.column("file").tolist(), rows.sizes("input_ids").tolist(), strict=True
    ):
        total, longest = counts.get(found.files[file].name, (0, 0))
        counts[found.files[file].name] = total + length, max(longest, length)
    return counts


def check_shares(found: Prepared, shares: dict[str, float]) -> None:
    counts = tokens_of(found)
    total = sum(count for count, _ in counts.values())
    longest = max(longest for _, longest in counts.values())
    for name, share in shares.items():
        assert abs(counts[name][0] - share * total) <= longest, (counts, name)


@pytest.mark.parametrize("fractions", [(0.5, 0.3, 0.2), (0.05, 0.15, 0.8)])
@pytest.mark.parametrize("kind", ["chat", "text"])
def test_fractions_are_shares_of_the_tokens(
    tmp_path: Path, tokenizer: Any, kind: Any, fractions: tuple[float, ...]
) -> None:
    """However short the rows of one source are against those of another."""
    sources = []
    for n, (words, fraction) in enumerate(zip((1, 4, 25), fractions, strict=True)):
        file = tmp_path / f"{n}.jsonl"
        rows = (
            chats(300, words, seed=n)
            if kind == "chat"
            else [{"text": text} for text in texts(300, words, seed=n)]
        )
        sources.append({"source": put(file, rows), "fraction": fraction})
    found = prepared(tokenizer, kind, train=sources, packing="none", eval=0.1)
    check_shares(found, {s["source"]: s["fraction"] for s in sources})
    count = found.census.train
    assert count.unused > 0 and count.rows_kept == len(found.train)
    # As much as possible: of one source every row.
    read = {s["source"]: 0 for s in sources}
    for file in found.train.column("file").tolist():
        read[found.files[file].name] += 1
    held = [found.files[file].name for file in found.eval.column("file").tolist()]
    assert any(read[name] + held.count(name) == 300 for name in read)


def test_another_seed_mixes_other_rows(tmp_path: Path, plain: Any) -> None:
    train = [
        {"source": put(tmp_path / "a.jsonl", chats(100)), "fraction": 0.8},
        {"source": put(tmp_path / "b.jsonl", chats(100, seed=1)), "fraction": 0.2},
    ]
    eval_ = put(tmp_path / "eval.jsonl", chats(9, seed=2))

    def chosen(seed: int, sources: Any) -> set[int]:
        found = prepared(plain, train=sources, eval=eval_, seed=seed)
        of_b = [found.files[f].name.endswith("b.jsonl") for f in found.train.column("file")]
        return {int(n) for n, b in zip(found.train.column("number"), of_b, strict=True) if b}

    first = chosen(0, train)
    assert 20 <= len(first) <= 30 and first != chosen(1, train)
    assert chosen(0, train[::-1]) == first  # the order of the list decides nothing


def test_duplicates_are_not_mixed_in_before_others(tmp_path: Path, plain: Any) -> None:
    """Rows that say the same have one rank; they come together or not at all, as they are there."""
    rows = chats(50)
    train = [
        {"source": put(tmp_path / "a.jsonl", chats(100, seed=1)), "fraction": 0.5},
        {"source": put(tmp_path / "b.jsonl", [*rows, *rows, *chats(300, seed=2)]), "fraction": 0.5},
    ]
    found = prepared(plain, train=train, eval=put(tmp_path / "e.jsonl", chats(9, seed=3)))
    files, numbers = found.train.column("file"), found.train.column("number")
    of_b = [
        int(number)
        for file, number in zip(files, numbers, strict=True)
        if found.files[file].name.endswith("b.jsonl")
    ]
    assert 15 <= sum(n <= 100 for n in of_b) <= 35  # a quarter of the 100 rows taken


@pytest.mark.parametrize("share", [0.05, 0.3])
@pytest.mark.parametrize("kind", ["chat", "text"])
def test_replay_is_a_share_of_the_tokens_and_nothing_judged(
    tmp_path: Path, tokenizer: Any, kind: Any, share: float
) -> None:
    general = put_texts(tmp_path / "general.txt", texts(300, 9, seed=8))
    train = (
        put(tmp_path / "a.jsonl", chats(60))
        if kind == "chat"
        else put_texts(tmp_path / "a.txt", texts(90))
    )
    found = prepared(tokenizer, kind, train=train, general=general, replay=share, packing="none")
    check_shares(found, {general: share})
    assert found.general is not None and found.general.units >= 20
    of_general = [found.files[f].name == general for f in found.train.column("file")]
    replayed = {int(n) for n, g in zip(found.train.column("number"), of_general, strict=True) if g}
    judged = set(found.general.column("number").tolist())
    assert replayed and judged and not replayed & judged
    (note,) = [note for note in found.census.notes if "replay" in note]
    assert note.startswith(f"replay: also training on {len(replayed)} general rows (")
    count = found.census.general
    assert count.rows_kept == len(replayed) + len(judged) and count.rows_read == 300


def test_replay_adds_to_running_text(tmp_path: Path, plain: Any) -> None:
    general = put_texts(tmp_path / "general.txt", texts(300, 9, seed=8))
    train = put_texts(tmp_path / "a.txt", texts(90))
    without = prepared(plain, "text", train=train, general=general)
    found = prepared(plain, "text", train=train, general=general, replay=0.2)
    more = tokens(found.rows("train")) - tokens(without.rows("train"))
    assert abs(more - 0.2 * tokens(found.rows("train"))) <= 60
    assert found.general is not None and without.general is not None
    assert len(found.general) < len(without.general)


def test_general_rows_that_repeat_each_other_are_judged_or_replayed(
    tmp_path: Path, plain: Any
) -> None:
    some = texts(150, 9, seed=8)
    general = put_texts(tmp_path / "general.txt", some + some)
    train = put(tmp_path / "a.jsonl", chats(60))
    found = prepared(plain, train=train, general=general, replay=0.3)
    assert found.general is not None
    of_general = [found.files[f].name == general for f in found.train.column("file")]
    replayed = [row["input_ids"].tolist()[:-1] for n, row in enumerate(map(
        found.train.__getitem__, range(len(found.train)))) if of_general[n]]  # fmt: skip
    judged = [found.general[n]["input_ids"].tolist()[1:] for n in range(len(found.general))]
    assert replayed and not [ids for ids in replayed if ids in judged]


def test_too_little_general_text_is_an_error_that_names_what_it_is_enough_for(
    tmp_path: Path, plain: Any
) -> None:
    train = put(tmp_path / "a.jsonl", chats(200))
    general = put_texts(tmp_path / "general.txt", texts(60, 9, seed=8))
    with pytest.raises(UserError, match=r"data\.replay: 0\.5 needs .* lower it to 0\.\d+"
                       ) as caught:  # fmt: skip
        prepared(plain, train=train, general=general, replay=0.5)
    enough = float(str(caught.value).partition("lower it to ")[2].partition(",")[0])
    assert 0 < enough < 0.5
    prepared(plain, train=train, general=general, replay=enough)


def test_a_fraction_of_nothing_is_a_mistake(tmp_path: Path, plain: Any) -> None:
    empty = put(tmp_path / "b.jsonl", [{"prompt": "a", "completion": ""}] * 3)
    train = [
        {"source": put(tmp_path / "a.jsonl", chats(100)), "fraction": 0.5},
        {"source": empty, "fraction": 0.5},
    ]
    with pytest.raises(UserError, match=r"b\.jsonl: has a fraction, but no rows left"):
        prepared(plain, train=train)


def test_only_what_is_learned_from_is_mixed(tmp_path: Path, plain: Any) -> None:
    other = [
        {"source": put(tmp_path / f"{name}.jsonl", chats(30, seed=n)), "fraction": 0.5}
        for n, name in enumerate("abc")
    ]
    with pytest.raises(
        UserError, match=r"data\.eval: .*only sources of data\.train take a fraction"
    ):
        prepared(plain, train=other[0]["source"], eval=other[1:])
