"""Rows -> examples: the format is found by the columns, and nothing is guessed."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from lora_kit.data.formats import FORMATS, Dropped, Example, to_examples
from lora_kit.data.sources import Row
from lora_kit.errors import UserError
from lora_kit.run import Column

ANSWER = {"role": "assistant", "content": "A"}
ASK = {"role": "user", "content": "Q"}


def one(columns: dict[str, Any], names: dict[str, str] | None = None) -> Example:
    dropped = Dropped()
    (example,) = to_examples([Row("f:1", columns)], names or {}, dropped)
    assert not dropped.counts
    return example


def refused(columns: dict[str, Any], names: dict[str, str] | None = None) -> str:
    with pytest.raises(UserError) as caught:
        to_examples([Row("f:1", {"text": "x"}), Row("f:2", columns)], names or {}, Dropped())
    line = str(caught.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize(
    ("columns", "prompt", "joiner"),
    [
        ({"prompt": "Q", "completion": "A", "id": 7}, "Q", ""),
        ({"question": "Q", "answer": "A"}, "Q", "\n\n"),
        ({"instruction": "Q", "response": "A"}, "Q", "\n\n"),
        ({"instruction": "Q", "output": "A", "input": ""}, "Q", "\n\n"),
        ({"instruction": "Q", "output": "A", "input": "I"}, "Q\n\nI", "\n\n"),
        ({"messages": [ASK, ANSWER]}, "Q", ""),
    ],
)
def test_the_columns_name_the_format(columns: dict[str, Any], prompt: str, joiner: str) -> None:
    example = one(columns)
    assert [m["content"] for m in example.messages] == [prompt, "A"]
    assert [m["role"] for m in example.messages] == ["user", "assistant"]
    assert (example.joiner, example.text, example.place) == (joiner, None, "f:1")


def test_a_text_and_whole_conversations_are_kept_as_they_are() -> None:
    assert one({"text": "  a\n"}).text == "  a\n"
    turns = [{"role": "system", "content": ""}, ASK, ANSWER, ASK, ANSWER]
    assert list(one({"messages": turns}).messages) == turns


def test_columns_are_renamed_even_where_the_names_are_swapped() -> None:
    example = one({"q": "Q", "a": "A", "prompt": "not meant"}, {"prompt": "q", "completion": "a"})
    assert [m["content"] for m in example.messages] == ["Q", "A"]
    swapped = {"prompt": "completion", "completion": "prompt"}
    example = one({"prompt": "A", "completion": "Q"}, swapped)
    assert [m["content"] for m in example.messages] == ["Q", "A"]


def test_the_run_file_knows_the_columns_of_every_format() -> None:
    assert set(get_args(Column)) == {c for needed in FORMATS.values() for c in needed} | {"input"}


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"a": "x"}, "f:2: the columns (a) fit no format"),
        ({}, "f:2: the columns (none) fit no format"),
        ({"prompt": "x"}, "fit no format"),
        ({"text": "x", "prompt": "x", "completion": "x"}, "(text, prompt-completion)"),
        ({"text": None}, "f:2: `text` is None, not text"),
        ({"text": 5}, "`text` is 5, not text"),
        ({"prompt": "x", "completion": ["x"]}, "`completion` is ['x'], not text"),
        ({"text": "bad \ud83d end"}, "f:2: `text` holds half a character ('\\ud83d')"),
        ({"messages": "x"}, "`messages` is 'x', not a list of turns"),
        ({"messages": []}, "not a list of turns"),
        ({"messages": [ASK, "x"]}, "turn 2 has no `role` and text `content`"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "turn 1 has no"),
        ({"messages": [{"role": "human", "content": "x"}]}, "turn 1 has the role 'human'; known"),
        ({"messages": [{"role": ["x"], "content": "x"}]}, "turn 1 has the role ['x']"),
        ({"messages": [ASK, {**ANSWER, "content": "\udc00"}]}, "turn 2 holds half a character"),
        ({"messages": [ASK, {**ANSWER, "tool_calls": [{}]}, ANSWER]}, "turn 2 calls a tool"),
        ({"messages": [ASK, ANSWER, ASK]}, "the last turn is the user's"),
    ],
)
def test_a_row_of_no_format_is_refused_with_its_place(columns: dict[str, Any], words: str) -> None:
    line = refused(columns)
    assert line.startswith("f:2: ") and words in line


def test_a_renamed_column_must_be_there() -> None:
    line = refused({"text": "x"}, {"text": "b"})
    assert line == "f:1: data.columns names `b`; the columns are: text"


def test_empty_rows_are_dropped_counted_and_placed() -> None:
    columns: list[dict[str, Any]] = [
        {"text": "x"},
        {"text": " \n"},
        {"text": ""},
        {"prompt": "Q", "completion": " "},
        {"prompt": "", "completion": "A"},
    ]
    dropped = Dropped()
    rows = [Row(f"f:{n}", c) for n, c in enumerate(columns, 1)]
    assert [e.place for e in to_examples(rows, {}, dropped)] == ["f:1", "f:5"]
    assert dropped.counts == {"empty": 2, "with an empty answer": 1}
    assert str(dropped) == "2 empty (first: f:2); 1 with an empty answer (first: f:4)"


def test_examples_that_differ_in_white_space_alone_are_the_same() -> None:
    assert one({"text": "a  b\n"}).key == one({"text": "a b"}).key != one({"text": "ab"}).key
    left = one({"prompt": "a b", "completion": "c"})
    assert left.key != one({"prompt": "a", "completion": "b c"}).key
