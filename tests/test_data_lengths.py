"""What is too long: which value of train.max_length fits, and that the held-out set stays."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import CHATML, make_tokenizer
from prepared import chats, prepared, put, put_texts, run_of, texts
from test_data_marks import shown

from lora_kit.data.census import Count
from lora_kit.data.prepare import prepare
from lora_kit.data.rows import Rows
from lora_kit.errors import UserError
from lora_kit.tasks.causal import Conversations
from lora_kit.tasks.encode import Prepared, encode
from lora_kit.tasks.preference import Preference
from lora_kit.tasks.sequence import Classification
from lora_kit.tasks.task import Task

FITS = re.compile(r"(\d+)( \(the base's limit\))? keeps ([\d,]+) rows")


pytestmark = pytest.mark.usefixtures("own_cache")


def rising(count: int = 60) -> list[dict[str, Any]]:
    """Rows of 1 to 60 words."""
    return [
        {"prompt": f"number {n}", "completion": " ".join(texts(1, n, seed=n))}
        for n in range(1, count + 1)
    ]


def fitting(message: str) -> list[tuple[int, bool, int]]:
    """(train.max_length, whether it is the base's limit, rows that it keeps), as told."""
    found = [(int(n), bool(limit), int(rows)) for n, limit, rows in FITS.findall(message)]
    assert found, message
    return found


def of(task: Task, tokenizer: Any, file: str, length: int, **data: Any) -> Prepared:
    run = run_of("sft", length, train=file, **data)
    split = prepare(run.data, task, run.seed)
    return encode(task, split, tokenizer, task.facts(split.train, run.data), run)


# --- The value that fits


def test_a_length_error_names_values_that_keep_as_many_rows_as_told(
    tmp_path: Path, tokenizer: Any
) -> None:
    file = put(tmp_path / "a.jsonl", rising())
    with pytest.raises(UserError) as caught:
        prepared(tokenizer, train=file, max_length=64)
    assert "raise train.max_length (" in str(caught.value)
    values = fitting(str(caught.value))
    assert len(values) == 3 and values[-1][2] == 60
    for value, _, rows in values:
        census = prepared(tokenizer, train=file, max_length=value, check=False).census
        assert census.train.rows_kept + census.eval.rows_kept == rows
    assert prepared(tokenizer, train=file, max_length=values[-2][0])  # within data.limits
    with pytest.raises(UserError, match="keeps 60 rows"):
        prepared(tokenizer, train=file, max_length=values[-1][0] - 1, limits={"dropped": 0.0})


@pytest.mark.parametrize("positions", [400, 200])
def test_the_limit_of_the_base_is_one_of_them(tmp_path: Path, positions: int) -> None:
    folder = tmp_path / "base"
    tokenizer = make_tokenizer(folder, CHATML)
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": positions}))
    tokenizer.name_or_path = str(folder)
    with pytest.raises(UserError) as caught:
        prepared(tokenizer, train=put(tmp_path / "a.jsonl", rising()), max_length=64)
    values = fitting(str(caught.value))
    assert values[-1][:2] == (positions, True) and len(values) == 3
    assert all(value < positions and not limit for value, limit, _ in values[:-1])
    assert (values[-1][2] == 60) == (positions == 400)
    census = prepared(
        tokenizer, train=str(tmp_path / "a.jsonl"), max_length=positions, check=False
    ).census
    assert census.train.rows_kept + census.eval.rows_kept == values[-1][2]


def test_a_value_is_named_once() -> None:
    count = Count(rows_read=2, dropped={"too long": 2}, too_long={"150": 1, "200": 1})
    assert count.fitting(200) == "200 (the base's limit) keeps 2 rows"


def test_where_no_row_is_left_the_value_is_named_too(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(UserError, match="no rows left") as caught:
        prepared(tokenizer, train=put(tmp_path / "a.jsonl", rising()), max_length=8)
    assert fitting(str(caught.value))[-1][2] in range(50, 60)  # those for training


@pytest.mark.parametrize("kind", ["a pair", "a class", "turns"])
def test_every_task_names_it(tmp_path: Path, tokenizer: Any, kind: str) -> None:
    rows: list[dict[str, Any]] = []
    for n, row in enumerate(rising()):
        turns = [{"role": "user", "content": row["prompt"]}]
        turns.append({"role": "assistant", "content": "A short one."})
        longer = [{"role": "user", "content": "More."}]
        longer.append({"role": "assistant", "content": row["completion"]})
        rows.append(
            {
                "a pair": {"prompt": row["prompt"], "chosen": row["completion"], "rejected": "No."},
                "a class": {"text": row["completion"], "label": "ab"[n % 2]},
                "turns": {"messages": turns + longer},
            }[kind]
        )
    task = {"a pair": Preference(), "a class": Classification(), "turns": Conversations()}[kind]
    file = put(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError, match=r"raise train\.max_length") as caught:
        of(task, tokenizer, file, 64)
    *_, (value, _, kept) = fitting(str(caught.value))
    assert kept == 60
    census = of(task, tokenizer, file, value).census
    assert not census.train.dropped and not census.train.truncated


# --- The preview


def test_the_histogram_goes_to_the_longest_row(tmp_path: Path) -> None:
    file = put(tmp_path / "a.jsonl", rising())
    _, out = shown(tmp_path, train=file)
    longest = int(re.findall(r"longest (\d+)", out)[0])
    code, out = shown(tmp_path, "train.max_length=64", train=file)
    assert code == 0 and "in tokens, with those that are too long:" in out
    bars = re.findall(r"≤ (\d+) \S* ?(\d+)", out.partition("⟦")[0])
    assert int(bars[-1][0]) == longest and "keeps 60 rows" in out


def test_rows_that_are_cut_are_counted_as_long_as_they_were() -> None:
    import numpy as np

    count = Count(rows_read=4)
    count.count_lost("cut", "f:1", what="truncated", length=90)
    count.count_lost("longer", "f:2", length=120)
    count.measure(np.array([10, 64, 20]), 3, cut=np.array([False, True, False]))
    assert (count.longest, count.samples) == (64, 3)
    assert count.lengths[-1][0] == 120 and sum(rows for _, rows in count.lengths) == 4
    assert [n for n, rows in count.lengths for _ in range(rows)] == [10, 20, 90, 120]


# --- The held-out set


def held_out(rows: Rows) -> set[tuple[int, int]]:
    """(file, line) of the rows that are evaluated on."""
    pairs = zip(rows.column("file").tolist(), rows.column("number").tolist(), strict=True)
    return {*pairs}


def test_the_held_out_rows_depend_on_no_base_and_no_length(tmp_path: Path, tokenizer: Any) -> None:
    """Those that can be encoded, of the same set."""
    file = put(tmp_path / "a.jsonl", [*rising(), *chats(60)])
    other = make_tokenizer(tmp_path / "other", CHATML.replace("<|im_start|>", "[role]"), bos=True)
    settings: dict[str, Any] = {"train": file, "eval": 0.3, "check": False}
    whole = held_out(prepared(tokenizer, **settings).eval)
    assert len(whole) == 36
    for used, length in ((tokenizer, 64), (tokenizer, 100), (other, 512), (other, 100)):
        found = prepared(used, max_length=length, **settings)
        lost = sum(found.census.eval.dropped.values())
        assert held_out(found.eval) <= whole and len(held_out(found.eval)) == 36 - lost
        assert not held_out(found.rows("train")) & whole
        assert bool(lost) == (length < 512)
    assert held_out(prepared(tokenizer, seed=1, **settings).eval) != whole


def test_the_held_out_text_depends_on_no_base_and_no_length(tmp_path: Path, tokenizer: Any) -> None:
    other = make_tokenizer(tmp_path / "other", bos=True)
    for name, parts in (("many", texts(60)), ("one", ["\n".join(texts(600))])):
        file = put_texts(tmp_path / f"{name}.txt", parts)
        found = [
            held_out(prepared(used, "text", train=file, eval=0.3, max_length=length).eval)
            for used, length in ((tokenizer, 512), (tokenizer, 16), (other, 64))
        ]
        assert found[0] == found[1] == found[2] and found[0]
