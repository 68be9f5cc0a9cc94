"""Every row is accounted for, and what is lost beyond a limit stops the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from prepared import chats, ids_of, prepared, put, put_texts, supervised, texts, tokens

from lora_kit.data.census import Census, Count
from lora_kit.data.formats import REJECTED
from lora_kit.errors import UserError
from lora_kit.schema import Limits
from lora_kit.tasks.batches import IGNORED

pytestmark = pytest.mark.usefixtures("own_cache")


def conversation(*said: str, **last: Any) -> dict[str, Any]:
    """Turns of the user and the assistant; `last` is more of the last one."""
    turns: list[dict[str, Any]] = [
        {"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(said)
    ]
    turns[-1] |= last
    return {"messages": turns}


def of_all_kinds(count: int = 80) -> list[dict[str, Any]]:
    """Good conversations of two answers, and one of each kind of bad one."""
    said = texts(4 * count, 4)
    good = [conversation(*said[n : n + 4]) for n in range(0, 4 * count, 4)]
    bad = [
        conversation("unanswered", "yes", "so?"),
        conversation("much", " ".join(texts(1, 400))),
        conversation("a", "b", "c", " ".join(texts(1, 400))),  # cut after b
        conversation("not learned from", "no", weight=0),
        {"messages": None},
        {"messages": [{"role": "robot", "content": "?"}]},
        {"messages": []},
    ]
    return good + bad


def general_texts() -> list[str]:
    return texts(90, 12, seed=3)


def everything(folder: Path) -> dict[str, Any]:
    """Settings that use all that can happen to a row."""
    rows = of_all_kinds()
    other = [conversation(*texts(4, 4, seed=n)) for n in range(100, 160)]
    return {
        "train": [
            {"source": put(folder / "a.jsonl", [*rows, rows[0], rows[1]]), "fraction": 0.6},
            {"source": put(folder / "b.jsonl", other), "fraction": 0.4},
        ],
        "eval": put(
            folder / "eval.jsonl",
            [
                *of_all_kinds(20)[20:],
                *other[:1],
                *[conversation(*texts(4, 4, seed=n)) for n in range(200, 230)],
            ],
        ),
        "general": put_texts(folder / "general.txt", general_texts()),
        "replay": 0.1,
    }


SETTINGS: dict[str, dict[str, Any]] = {
    "all": {},
    "a share held out": {"eval": 0.2},
    "no replay": {"replay": None},
    "no general": {"replay": None, "general": None},
}


@pytest.mark.parametrize("change", SETTINGS.values(), ids=SETTINGS)
def test_the_rows_of_every_use_add_up(
    tmp_path: Path, tokenizer: Any, change: dict[str, Any]
) -> None:
    found = prepared(tokenizer, check=False, **{**everything(tmp_path), **change})
    census = found.census
    uses = {"train": census.train, "eval": census.eval}
    uses |= {"general": census.general} if found.general else {}
    for use, count in uses.items():
        assert count.rows_read > 0, use
        assert count.rows_read == count.rows_kept + sum(count.dropped.values()) + count.unused, use
        assert count.first.keys() == count.dropped.keys() | count.truncated.keys()
        rows = found.rows(use)
        assert count.samples == len(rows)
        counted = sum(number for _, number in count.lengths)
        # A mixture is of chosen rows; elsewhere those that are too long are shown as well.
        too_long = sum(count.too_long.values()) - sum(count.truncated.values())
        assert counted == count.samples + (too_long if use == "eval" else 0)
        assert (count.tokens, count.supervised_tokens) == (tokens(rows), supervised(rows))
        assert count.longest == rows.sizes("input_ids").max()
        longest = max([count.longest, *(map(int, count.too_long) if use == "eval" else [])])
        assert count.lengths[-1][0] == longest
    read = census.train.rows_read + (census.eval.rows_read if "eval" in change else 0)
    assert read == 89 + 60
    assert census.train.unused > 0
    # The bad rows, each with its reason; of a share held out some are on that side.
    both = census.train + census.eval if "eval" in change else census.train
    assert sum(both.dropped.values()) == 6 and len(both.dropped) == 6
    assert both.truncated == {"cut after the last completion that fits": 1}
    assert both.samples_without_supervision == 1
    if "eval" not in change:
        # Leaks come first: two that cannot be encoded, too long or without supervision, are in it.
        assert census.eval.dropped["that are also in data.train"] == 4
        assert sum(census.eval.dropped.values()) == 8


def test_what_is_learned_from_is_counted_as_it_is(tmp_path: Path, tokenizer: Any) -> None:
    rows = [conversation(*texts(4, 4, seed=n)) for n in range(40)]
    found = prepared(tokenizer, train=put(tmp_path / "a.jsonl", rows), eval=0.25)
    for use, conversations in (("train", 30), ("eval", 10)):
        count, labelled = getattr(found.census, use), found.rows(use)
        assert (count.rows_kept, count.samples) == (conversations, conversations)
        # Two answers in each, and the marker that ends them.
        assert count.end_markers_supervised == 2 * conversations
        labels = [labelled[n]["labels"][1:] for n in range(len(labelled))]
        assert count.supervised_tokens == sum(int((row != IGNORED).sum()) for row in labels)
        assert count.tokens == sum(len(row) + 1 for row in labels)
    assert found.census.duplicates == {"exact": 0, "near": 0}


def test_text_is_closed_where_it_is_learned_and_not_where_it_is_judged(
    tmp_path: Path, tokenizer: Any
) -> None:
    train = put_texts(tmp_path / "a.txt", texts(40))
    census = prepared(tokenizer, "text", train=train, eval=0.25).census
    assert (census.train.end_markers_supervised, census.eval.end_markers_supervised) == (30, 0)


def test_blocks_that_go_on_are_closed_once(tmp_path: Path, tokenizer: Any) -> None:
    """One long text is cut into blocks; what stands between two that are held out is a text."""
    train = put_texts(tmp_path / "a.txt", ["\n".join(texts(300))])
    general = put_texts(tmp_path / "b.txt", texts(60, seed=1))
    for packing in ("documents", "running"):
        data = {"train": train, "eval": 0.25, "packing": packing}
        for more in ({}, {"general": general, "replay": 0.05}):
            found = prepared(tokenizer, "text", **data, **more)
            closed = ids_of(found.rows("train")).count(tokenizer.eos_token_id)
            assert 1 < found.census.train.end_markers_supervised == closed


def test_repeated_rows_are_counted_once_each(tmp_path: Path, tokenizer: Any) -> None:
    rows = chats(50)
    again = [{**row, "prompt": f" {row['prompt'].upper()}\n"} for row in rows[:7]]
    nearly = [{**row, "completion": row["completion"] + " too"} for row in rows[10:15]]
    train = put(tmp_path / "a.jsonl", [*rows, *again, *nearly])
    assert prepared(tokenizer, train=train).census.duplicates == {"exact": 7, "near": 5}


def test_the_json_holds_what_the_contract_names(tmp_path: Path, tokenizer: Any) -> None:
    census = prepared(tokenizer, check=False, **everything(tmp_path)).census
    values = json.loads(json.dumps(census.to_json()))
    for name in (
        *("rows_read", "rows_kept", "tokens", "supervised_tokens"),
        *("samples_without_supervision", "end_markers_supervised"),
    ):
        assert values[name] == values["train"][name] + values["eval"][name], name
        assert values[name] > 0, name
    assert values["supervised_share"] == round(values["supervised_tokens"] / values["tokens"], 4)
    for name in ("dropped", "truncated"):
        parts = [values[use][name] for use in ("train", "eval")]
        assert values[name] == {
            reason: sum(part.get(reason, 0) for part in parts)
            for reason in {**parts[0], **parts[1]}
        }
    assert values["duplicates"].keys() == values["leaks"].keys() == {"exact", "near"}
    (leak,) = values["leaks_by_source"].values()
    assert values["leaks"] == {"exact": leak["exact"], "near": leak["near"]}
    again = Census.from_json(values)
    assert again.to_json() == Census.from_json(again.to_json()).to_json()
    assert json.loads(json.dumps(again.to_json())) == values
    assert again.lines() == census.lines()


def test_the_lines_say_how_many_why_and_where_first(tmp_path: Path, tokenizer: Any) -> None:
    census = prepared(tokenizer, check=False, **everything(tmp_path)).census
    text = "\n".join(census.lines())
    assert (
        f"train: 149 rows read, {census.train.rows_kept} kept, {census.train.unused} not needed"
        in (text)
    )
    assert f"  dropped: 1 with a null `messages` (first: {tmp_path}/a.jsonl:85)" in text
    assert (
        f"  truncated: 1 cut after the last completion that fits (first: {tmp_path}/a.jsonl:83"
        in text
    )
    assert "duplicates in train: 2 exact, 1 near" in text
    assert "note: replay: " in text


def exceeding(folder: Path, key: str) -> dict[str, Any]:
    """Data that exceed one limit, by 6 of 100 rows where it is a share."""
    said = texts(400, 4)
    good = [conversation(*said[n : n + 4]) for n in range(0, 400, 4)]
    long = " ".join(texts(1, 400))
    bad = {
        "dropped": [{"messages": []}] * 6,
        "truncated": [conversation(str(n), "b", "c", long) for n in range(6)],
        "without_supervision": [conversation("a", "b", weight=0)],
    }.get(key, [])
    train = [*good[: 100 - len(bad)], *bad]
    data: dict[str, Any] = {"train": put(folder / "train.jsonl", train), "packing": "none"}
    if key.endswith("leaks"):
        leaked = train[0]
        if key == "near_leaks":
            words = train[0]["messages"][3]["content"].split()
            leaked = conversation(*said[:3], " ".join([*words[:-1], "other"]))
        other = [conversation(*texts(4, 4, seed=n)) for n in range(500, 539)]
        data["eval"] = put(folder / "eval.jsonl", [leaked, *other])
    return data


@pytest.mark.parametrize(
    ("key", "higher", "place"),
    [
        ("dropped", 0.06, "train.jsonl:95"),
        ("truncated", 0.06, "train.jsonl:95"),
        ("without_supervision", 1, "train.jsonl:100"),
        ("exact_leaks", 1, "eval.jsonl:1 is "),
        ("near_leaks", 0.03, "eval.jsonl:1 is "),
    ],
)
def test_each_limit_stops_the_run_names_its_key_and_can_be_raised(
    tmp_path: Path, tokenizer: Any, key: str, higher: float, place: str
) -> None:
    data = exceeding(tmp_path, key)
    with pytest.raises(UserError) as caught:
        prepared(tokenizer, **data)
    message = str(caught.value)
    assert f"raise data.limits.{key}" in message and place in message and "\n" not in message
    assert message.startswith("data.eval" if "leaks" in key else "data.train")
    prepared(tokenizer, **data, limits={key: higher})


def test_a_limit_is_exceeded_above_it_and_not_at_it() -> None:
    census = Census(held_out=True, train=Count(rows_read=90), eval=Count(rows_read=10))
    census.train.dropped, census.train.first = {"empty": 5}, {"empty": "f:1"}
    assert census.problems(Limits()) == []  # 5 of 100, though a tenth of them is held out
    census.train.dropped["null"] = 1
    (problem,) = census.problems(Limits())
    assert problem.startswith("data.train: 6 of 100 rows (6.0%) are dropped, most of them empty")
    assert census.problems(Limits(dropped=1)) == []


def test_all_that_is_exceeded_is_said_at_once() -> None:
    first = {"empty": "f:1", "cut": "f:2", "without supervised tokens": "f:3"}
    count = Count(10, 5, 0, {"empty": 5}, {"cut": 5}, first, samples_without_supervision=1)
    leak = {"rows": 9, "exact": 1, "near": 1, "first_exact": "a is b", "first_near": "c is d"}
    census = Census(train=count, general=Count(10, 5, 0, {"empty": 5}, {}, first))
    census.leaks["data.decontaminate: x.jsonl"] = leak
    with pytest.raises(UserError) as caught:
        census.check(Limits())
    keys = [line.rpartition("data.limits.")[2] for line in str(caught.value).split("\n")]
    assert keys == [
        *("dropped", "truncated", "without_supervision", "dropped", "exact_leaks", "near_leaks")
    ]


def test_the_worse_answers_of_a_preference_are_no_loss() -> None:
    """Half of an unpaired set; left out and counted, but nothing to fix."""
    census = Census(held_out=True)
    census.train = Count(
        rows_read=20, rows_kept=10, dropped={REJECTED: 10}, first={REJECTED: "f:1"}
    )
    assert census.problems(Limits()) == []
    census.train.dropped["empty"] = 2
    census.train.first["empty"] = "f:9"
    (problem,) = census.problems(Limits())
    assert "2 of 20 rows" in problem and "empty (first: f:9)" in problem
