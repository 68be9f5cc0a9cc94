"""What is held out: by the text alone, never on both sides."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from lora_kit.data.formats import Example
from lora_kit.data.splits import hold_out, load_splits
from lora_kit.errors import UserError
from lora_kit.run import Data


def texts(count: int) -> list[Example]:
    return [Example(f"f:{n}", text=f"text {n}") for n in range(count)]


def keys(examples: list[Example]) -> set[str]:
    return {example.key for example in examples}


def put(folder: Path, name: str, *parts: str) -> str:
    file = folder / name
    file.write_text("<|endoftext|>".join(parts), encoding="utf-8")
    return str(file)


def put_rows(folder: Path, name: str, count: int) -> str:
    rows = [json.dumps({"prompt": f"q {n}", "completion": f"a {n}"}) for n in range(count)]
    (folder / name).write_text("\n".join(rows), encoding="utf-8")
    return str(folder / name)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.99])
def test_the_share_is_held_out_and_nothing_is_lost(share: float) -> None:
    train, held_out = hold_out(texts(50), share, seed=0)
    assert len(held_out) == min(49, max(1, round(50 * share)))
    assert keys(train) | keys(held_out) == keys(texts(50))
    assert not keys(train) & keys(held_out)


def test_the_choice_depends_on_seed_and_text_and_not_on_the_order() -> None:
    examples = texts(60)
    shuffled = random.Random(1).sample(examples, 60)
    train, held_out = hold_out(examples, 0.3, seed=5)
    again, held_out_again = hold_out(shuffled, 0.3, seed=5)
    assert keys(held_out) == keys(held_out_again)
    assert [e.place for e in again] == [e.place for e in shuffled if e.key in keys(train)]
    assert keys(hold_out(examples, 0.3, seed=6)[1]) != keys(held_out)
    # A text that is added moves at most one other.
    more = keys(hold_out([*examples, Example("g:1", text="another")], 0.3, seed=5)[1])
    assert len((more ^ keys(held_out)) - {"another"}) <= 1


def test_equal_rows_stand_on_one_side_whatever_their_white_space() -> None:
    examples = [Example(f"f:{n}", text=f"text  {n % 10}" + "\n" * n) for n in range(100)]
    train, held_out = hold_out(examples, 0.3, seed=0)
    assert len(keys(held_out)) == 3 and len(held_out) == 30
    assert not keys(train) & keys(held_out)


def test_blocks_join_only_where_the_one_before_is_on_the_same_side() -> None:
    blocks = [Example(f"f:{n}", text=f"block {n}", joins=n not in (0, 20)) for n in range(40)]
    train, held_out = hold_out(blocks, 0.5, seed=0)
    side = {e.place: number for number, s in enumerate((train, held_out)) for e in s}
    joined = {e.place: e.joins for e in (*train, *held_out)}
    assert {0, 1} == set(side.values())
    for n, block in enumerate(blocks):
        wanted = block.joins and side[f"f:{n}"] == side[f"f:{n - 1}"]
        assert joined[f"f:{n}"] == wanted, n
    assert any(joined.values()) and not all(joined[f"f:{n}"] for n in range(1, 20))


def test_one_document_cannot_be_split() -> None:
    with pytest.raises(UserError, match=r"data\.eval: 1 different document\(s\) cannot be split"):
        hold_out([Example("f:1", text="a"), Example("f:2", text="a ")], 0.5, seed=0)


def test_all_three_uses_are_read_and_hashed(tmp_path: Path) -> None:
    train = put(tmp_path, "train.txt", *(f"train {n}" for n in range(30)), " ")
    held_out = put(tmp_path, "eval.txt", "held out")
    general = put(tmp_path, "general.txt", "general", "held  out", "train 3")
    splits = load_splits(Data(train=train, eval=held_out, general=general), "text", seed=0)
    assert (len(splits.train), len(splits.eval), len(splits.general)) == (30, 1, 1)
    assert splits.hashes.keys() == {train, held_out, general}
    assert splits.kind == "text"
    summary = splits.summary()
    assert "30 examples to train on, 1 held out, 1 general" in summary
    assert "2 general rows that stand in the domain's data too" in summary


def test_without_a_wish_the_kind_is_what_is_there(tmp_path: Path) -> None:
    assert load_splits(Data(train=put_rows(tmp_path, "a.jsonl", 9)), None, 0).kind == "chat"
    assert load_splits(Data(train=put(tmp_path, "a.txt", "a", "b")), None, 0).kind == "text"


def test_a_row_on_both_sides_is_refused(tmp_path: Path) -> None:
    train = put(tmp_path, "train.txt", *(f"text {n}" for n in range(30)))
    held_out = put(tmp_path, "eval.txt", *(f"other {n}" for n in range(19)), "text\n\n4")
    with pytest.raises(UserError, match=r"1 of 20 rows .*eval\.txt:1 is .*train\.txt:1"):
        load_splits(Data(train=train, eval=held_out), "text", 0)


@pytest.mark.parametrize(
    ("settings", "wanted", "words"),
    [
        ({"train": "text"}, "chat", "text without an answer: use `recipe: cpt`"),
        ({"train": "rows"}, "text", "a question and answer, not text: use `recipe: sft`"),
        ({"train": "rows", "eval": "text"}, "chat", "use `recipe: cpt`"),
        ({"train": "text", "general": "rows"}, "text", "data.general: text is expected"),
        ({"train": "blank"}, None, "data.train: no rows left; left out: 3 empty (first: "),
        ({"train": "text", "eval": "blank"}, "text", "data.eval: no rows left; left out: 3 empty"),
        ({"train": "text", "general": "blank"}, "text", "data.general: no rows left"),
        ({"train": "text", "general": "text"}, "text", "data.general: no rows left"),
        ({"train": "single"}, "text", "cannot be split"),
    ],
)
def test_what_leaves_nothing_to_learn_or_judge_is_refused(
    tmp_path: Path, settings: dict[str, str], wanted: str, words: str
) -> None:
    blank = tmp_path / "blank.jsonl"
    blank.write_text('{"text": " "}\n' * 3, encoding="utf-8")
    files = {
        "text": put(tmp_path, "text.txt", *(f"text {n}" for n in range(30))),
        "rows": put_rows(tmp_path, "rows.jsonl", 30),
        "single": put(tmp_path, "single.txt", "one text"),
        "blank": str(blank),
    }
    data = Data(**{key: files[name] for key, name in settings.items()})  # type: ignore[arg-type]
    with pytest.raises(UserError) as caught:
        load_splits(data, wanted, 0)  # type: ignore[arg-type]
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_renamed_columns_leave_text_as_it_is(tmp_path: Path) -> None:
    """`general` is text; it has no columns to rename."""
    rows = [{"q": f"question {n}", "a": f"answer {n}"} for n in range(30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    data = Data(
        train=str(tmp_path / "rows.jsonl"),
        eval=0.2,
        general="nano:docstrings",
        columns={"prompt": "q", "completion": "a"},
    )
    splits = load_splits(data, "chat", 0)
    assert len(splits.train) == 24 and len(splits.general) > 20
    assert len(splits.eval) == 6 and "20 are needed for a verdict" in splits.summary()
