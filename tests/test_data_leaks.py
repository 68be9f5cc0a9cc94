"""Rows to judge by that stand among the rows to learn from."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from prepared import chats, prepared, put, put_texts, texts

from lora_kit.data import duplicates
from lora_kit.errors import UserError

pytestmark = pytest.mark.usefixtures("own_cache")


def edited(text: str, seed: int) -> str:
    """One word changed."""
    chooser = random.Random(seed)
    words = text.split()
    words[chooser.randrange(len(words))] = "other"
    return " ".join(words)


def leaks(tokenizer: Any, **data: Any) -> dict[str, Any]:
    """The counts of the one source that was compared with data.train."""
    census = prepared(tokenizer, check=False, **data).census
    (found,) = census.leaks.values()
    return found


@pytest.mark.parametrize("words", [8, 60])
def test_copies_and_light_edits_are_found(tmp_path: Path, tokenizer: Any, words: int) -> None:
    """A tenth of the training rows is copied, another has a word of the answer changed."""
    train = chats(400, words)
    other = chats(100, words, seed=1)
    # White space, case and punctuation make no other row.
    same = [{"prompt": r["prompt"].upper() + " ?", "completion": r["completion"] + "."}
            for r in train[:20]] + train[20:40]  # fmt: skip
    light = [
        {**row, "completion": edited(row["completion"], n)} for n, row in enumerate(train[40:80])
    ]
    found = leaks(
        tokenizer,
        train=put(tmp_path / "train.jsonl", train),
        eval=put(tmp_path / "eval.jsonl", [*other, *same, *light]),
        max_length=4096,
    )
    assert (found["rows"], found["exact"]) == (180, 40)
    assert 36 <= found["near"] <= 40
    assert found["first_exact"] == f"{tmp_path}/eval.jsonl:101 is {tmp_path}/train.jsonl:1"
    assert found["first_near"].startswith(f"{tmp_path}/eval.jsonl:1")


def test_a_system_prompt_hides_no_leak(tmp_path: Path, tokenizer: Any) -> None:
    """Whatever stands before a conversation, its question and its answer are known."""
    rows = [{"prompt": f"Who is {n}?", "completion": f"It is {n * n}."} for n in range(60)]
    others = chats(9)
    system = {"system": texts(1, 40)[0]}
    train = put(tmp_path / "train.jsonl", [row | system for row in rows])
    both = put(tmp_path / "both.jsonl", rows + others)
    assert leaks(tokenizer, train=train, eval=both)["exact"] == 60
    other, same = put(tmp_path / "other.jsonl", others), put(tmp_path / "same.jsonl", rows)
    found = prepared(
        tokenizer, check=False, train=train, eval=other, decontaminate=same
    ).census.leaks
    assert found[f"data.decontaminate: {same}"]["exact"] == 60


def test_none_is_reported_on_a_clean_pair(tmp_path: Path, tokenizer: Any) -> None:
    train = put(tmp_path / "train.jsonl", chats(500, 10))
    found = prepared(tokenizer, train=train, eval=put(tmp_path / "eval.jsonl", chats(200, 10, 1)))
    (leak,) = found.census.leaks.values()
    assert (leak["rows"], leak["exact"], leak["near"]) == (200, 0, 0)
    assert leak["first_exact"] == leak["first_near"] == ""
    assert found.census.train.rows_kept == 500 and found.census.eval.rows_kept == 200


def test_a_leak_stops_the_run_and_a_higher_limit_leaves_the_row_out(
    tmp_path: Path, tokenizer: Any
) -> None:
    train, other = chats(60), chats(30, seed=1)
    data = {
        "train": put(tmp_path / "train.jsonl", train),
        "eval": put(tmp_path / "eval.jsonl", [*other, train[5], train[5]]),
    }
    with pytest.raises(UserError, match=r"2 of 32 rows .*eval\.jsonl:31 is .*train\.jsonl:6.*"
                       r"data\.limits\.exact_leaks"):  # fmt: skip
        prepared(tokenizer, **data)
    census = prepared(tokenizer, **data, limits={"exact_leaks": 2}).census
    assert census.eval.rows_read == 32 and census.eval.rows_kept == 30
    assert census.eval.dropped == {"that are also in data.train": 2}
    assert census.eval.first["that are also in data.train"] == f"{tmp_path}/eval.jsonl:31"
    everything = put(tmp_path / "all.jsonl", train[:9])
    with pytest.raises(UserError, match=r"data\.eval: every row is also in data\.train"):
        prepared(tokenizer, train=data["train"], eval=everything)


def test_near_leaks_have_a_limit_of_their_own(tmp_path: Path, tokenizer: Any) -> None:
    train, other = chats(60), chats(38, seed=1)
    light = [{**row, "completion": edited(row["completion"], 1)} for row in train[:2]]
    data = {
        "train": put(tmp_path / "train.jsonl", train),
        "eval": put(tmp_path / "eval.jsonl", [*light, *other]),
    }
    with pytest.raises(UserError, match=r"2 of 40 rows are nearly .*1\.0%.*data\.limits\.near_"):
        prepared(tokenizer, **data)
    assert prepared(tokenizer, **data, limits={"near_leaks": 0.05}).census.eval.rows_kept == 40


def benchmark(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same rows as a benchmark of other columns has them."""
    return [
        {"id": n, "item": {"stem": r["prompt"], "choices": [r["completion"], "none"]}, "n": 3.5}
        for n, r in enumerate(rows)
    ]


def test_benchmarks_of_any_columns_are_searched(tmp_path: Path, tokenizer: Any) -> None:
    train, other = chats(300), chats(100, seed=1)
    # Only the question is the same: such an answer may be anything.
    asked = [{"prompt": r["prompt"], "completion": o["completion"]}
             for r, o in zip(train[:30], other, strict=False)]  # fmt: skip
    nearly = [{"prompt": edited(r["prompt"], n), "completion": o["completion"]}
              for n, (r, o) in enumerate(zip(train[30:60], other, strict=False))]  # fmt: skip
    rows = benchmark([*other[60:], *asked, *nearly])
    found = leaks(
        tokenizer,
        train=put(tmp_path / "train.jsonl", train),
        eval=0.01,
        decontaminate=put(tmp_path / "benchmark.jsonl", rows),
    )
    assert found["rows"] == 100
    assert 28 <= found["exact"] <= 30  # a few questions may be held out
    assert 26 <= found["near"] <= 30
    assert "benchmark.jsonl:41 is " in found["first_exact"]


@pytest.mark.parametrize("index", ["Unnamed: 0", "Unnamed: 0.1", "__index_level_0__"])
def test_an_index_hides_no_leak(tmp_path: Path, tokenizer: Any, index: str) -> None:
    train = chats(60, words=2)  # shorter than what is also searched for on its own
    rows = [{index: str(n), **row} for n, row in enumerate(train[:20])]
    against = put(tmp_path / "benchmark.jsonl", rows)
    source = put(tmp_path / "train.jsonl", train)
    assert leaks(tokenizer, train=source, eval=0.01, decontaminate=against)["exact"] >= 19


def test_a_clean_benchmark_is_clean_whatever_it_holds(tmp_path: Path, tokenizer: Any) -> None:
    rows: list[dict[str, Any]] = benchmark(chats(50, seed=1))
    rows += [{"id": 1, "answer": 2}, {"id": None, "item": ""}, {"item": {"stem": "  ?"}}]
    against = put(tmp_path / "benchmark.jsonl", rows)
    train = put(tmp_path / "train.jsonl", chats(100))
    found = leaks(tokenizer, train=train, decontaminate=against)
    assert (found["rows"], found["exact"], found["near"]) == (53, 0, 0)
    documents = put_texts(tmp_path / "train.txt", texts(100))
    found = leaks(tokenizer, kind="text", train=documents, decontaminate=against)
    assert (found["rows"], found["exact"], found["near"]) == (53, 0, 0)


def test_a_benchmark_of_documents_is_searched_in_text(tmp_path: Path, tokenizer: Any) -> None:
    train = texts(100, 40)
    against = [{"passage": train[n]} for n in range(5)] + [{"passage": edited(train[9], 0)}]
    census = prepared(
        tokenizer,
        "text",
        check=False,
        train=put_texts(tmp_path / "train.txt", train),
        eval=put_texts(tmp_path / "eval.txt", texts(20, 40, seed=1)),
        decontaminate=put(tmp_path / "benchmark.jsonl", [*against, {"passage": "short"}]),
    ).census
    found = census.leaks[f"data.decontaminate: {tmp_path}/benchmark.jsonl"]
    assert (found["rows"], found["exact"], found["near"]) == (7, 5, 1)


def test_rows_that_are_held_out_are_no_leak(tmp_path: Path, tokenizer: Any) -> None:
    """A benchmark must not stand in what is learned from; that it is judged does no harm."""
    train = put(tmp_path / "train.jsonl", chats(40))
    whole = leaks(tokenizer, train=train, eval=0.5,
                  decontaminate=put(tmp_path / "b.jsonl", benchmark(chats(40))))  # fmt: skip
    assert whole["exact"] == 20


@pytest.mark.parametrize("what", ["eval", "decontaminate"])
def test_a_file_on_both_sides_is_refused(tmp_path: Path, tokenizer: Any, what: str) -> None:
    train = put(tmp_path / "train.jsonl", chats(40))
    with pytest.raises(UserError, match=rf"data\.{what}: .*is also trained on"):
        prepared(tokenizer, train=train, **{what: train})


def test_beyond_a_sample_near_ones_are_looked_for_in_it(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "LARGEST_SAMPLE", 200)
    train, other = chats(600), chats(60, seed=1)
    light = [{**row, "completion": edited(row["completion"], 1)} for row in train[:60]]
    data = {
        "train": put(tmp_path / "train.jsonl", train),
        "eval": put(tmp_path / "eval.jsonl", [*other, *train[60:120], *light]),
    }
    census = prepared(tokenizer, check=False, **data).census
    assert 100 <= census.compared <= 200
    (note,) = census.notes
    assert note == (
        "near duplicates and near leaks were searched among a random sample of "
        f"{census.compared} of 600 rows"
    )
    (leak,) = census.leaks.values()
    assert leak["exact"] == 60  # by their hashes, always
    # The rows to judge are few: each of them is compared with the sample.
    assert abs(leak["near"] - 60 * census.compared / 600) <= 10
