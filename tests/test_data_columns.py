"""Columns that fit no format, or several, and values that are not what a column should hold."""

from __future__ import annotations

from typing import Any

import pytest
from test_data_formats import ANSWER, ASK, GPT, HUMAN, OTHER, QA, dropped, one, refused, turns

from lora_kit.data.formats import FORMATS, Columns, format_of, to_example
from lora_kit.data.readers import RawRow
from lora_kit.errors import NotUsable

ALPACA = {"instruction": "Q", "input": "", "output": "A", "text": "Below is an instruction."}
TAGS = {"tokens": ["a", "b"], "tags": ["O", "B-X"]}


def test_columns_are_renamed_even_where_the_names_are_swapped() -> None:
    assert (
        turns({"q": "Q", "a": "A", "prompt": "no"}, renames={"prompt": "q", "completion": "a"})
        == QA
    )
    swapped = {"prompt": "completion", "completion": "prompt"}
    assert turns({"prompt": "A", "completion": "Q"}, renames=swapped) == QA
    # The row's own `prompt` is not what was asked for.
    told = Columns({"prompt": "q"})
    with pytest.raises(NotUsable, match="without `prompt`"):
        to_example(RawRow("f:2", {"prompt": "Q", "completion": "A"}), "prompt-completion", told)
    # Renames are for tables: a file of text has one column.
    assert one({"text": "x"}, renames={"prompt": "text", "completion": "y"}, group="z").text == "x"


def test_columns_that_fit_several_formats_are_refused_until_one_is_told() -> None:
    line = refused(ALPACA)
    assert "(instruction, input, output, text) fit more than one format" in line
    assert "(text, instruction-output)" in line and "data.columns: {output: output}" in line
    assert turns(ALPACA, renames={"output": "output"}) == QA
    assert one(ALPACA, renames={"text": "text"}).text == "Below is an instruction."
    both = {
        "prompt": "Q",
        "messages": [ASK, OTHER],
        "chosen": [ASK, ANSWER],
        "rejected": [ASK, OTHER],
    }
    assert "data.columns: {rejected: rejected}" in refused(both)
    assert turns(both, renames={"rejected": "rejected"}) == QA
    assert turns(both, renames={"messages": "messages"}) == [("user", "Q"), ("assistant", "B")]


def test_what_an_error_suggests_tells_formats_apart() -> None:
    names = list(FORMATS)
    for first in names:
        for second in names:
            needed = {*FORMATS[first].needed, *FORMATS[second].needed}
            row = RawRow("f:1", dict.fromkeys(sorted(needed), "x"))
            try:
                assert format_of(row, Columns(), names) in (first, second, "unpaired-preference")
            except ValueError as error:
                told = str(error).rpartition("{")[2].partition(":")[0]
                assert format_of(row, Columns({told: told}), names) in (
                    first,
                    second,
                    "unpaired-preference",
                )


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "the columns (none) fit no format"),
        ({"a": "x"}, "the columns (a) fit no format (text; text+label; sentence1+sentence2"),
        ({"document": "x", "summary": "x"}, "data.columns: {prompt: YOURS, completion: YOURS}"),
        ({"context": "x", "question": "x", "answers": {}}, "data.columns: {answer: YOURS}"),
        ({"tokens": ["x"], "ner_tags": ["O"]}, "data.columns: {tags: YOURS}"),
        ({"Text": "x"}, "data.columns: {text: Text}"),
        (
            {"QUESTION": "x", "LONG_ANSWER": "x"},
            "data.columns: {question: QUESTION, answer: YOURS}",
        ),
        ({f"{n}\n" + "long " * 999: "x" for n in range(50)}, ", 30 more) fit no format"),
    ],
)
def test_columns_of_no_format_are_refused_with_what_helps(values: Any, words: str) -> None:
    line = refused(values)
    assert words in line and len(line) < 1300


def test_columns_that_the_run_file_names_must_be_there() -> None:
    line = refused({"text": "x", "id": 1}, renames={"text": "b"})
    assert line == "f:1: data.columns names `b`; the columns are: text, id"
    line = refused({"text": "x", "id": 1}, renames={"prompt": "text"})
    assert line.startswith("f:1: the columns (text, id; by data.columns: id, prompt) fit no format")
    line = refused({"text": "x", "id": 1}, group="user")
    assert line == "f:1: data.group names `user`; the columns are: text, id"


def test_rows_are_grouped_by_what_a_column_says() -> None:
    row = {"prompt": "Q", "completion": "A"}
    assert one(row).group is None
    assert (
        one(row | {"user": 7}, group="user").group == one(row | {"user": "7"}, group="user").group
    )
    assert one({"text": "x", "user": "\ud83d"}, group="user").group == "\ud83d"
    assert dropped(row | {"user": None}, group="user") == ("without the group `user`", "")


def test_labels_are_names_or_the_numbers_of_names() -> None:
    def label(value: Any, *labels: str) -> str | None:
        return one({"text": "x", "label": value}, labels=labels).label

    assert label("good") == label("good", "bad", "good") == label(1, "bad", "good") == "good"
    assert label("1", "bad", "good") == "good"  # as a CSV file has it
    assert label("1", "2", "1") == label("1") == "1"
    number = ("whose `label` is a number without a name", "it is 1: name data.labels")
    assert dropped({"text": "x", "label": 1}) == number
    for value, detail in (
        ("Good", "'Good'"), (2, "2"), (-1, "-1"), ("2", "'2'"), ("²", "'²'"),
        ("9" * 5000, "'999999999999...9999999999999'"), (10**9, "1000000000"),
    ):  # fmt: skip
        reason = ("whose `label` is not in data.labels", f"it is {detail}")
        assert dropped({"text": "x", "label": value}, labels=("bad", "good")) == reason
    for value in (True, 1.0, ["good"], {"a": 1}):
        reason, _ = dropped({"text": "x", "label": value}, labels=("bad", "good"))
        assert reason == "whose `label` is neither text nor a whole number"
    assert dropped({"text": "x", "label": " "}) == ("with an empty `label`", "")


def test_tags_mark_entities_or_the_sentence_is_dropped() -> None:
    expected = [("user", "a b"), ("assistant", "X: b")]
    assert turns(TAGS, labels=("X",)) == turns(TAGS, labels=("O", "B-X", "I-X")) == expected
    assert turns(TAGS | {"tags": [0, 1]}, labels=("O", "B-X", "I-X")) == expected
    for tags, labels, reason, detail in (
        (["O", "I-X"], (), "with an invalid IOB sequence", "token 2 has 'I-X' after no entity"),
        (["B-Y", "I-X"], (), "with an invalid IOB sequence", "token 2 has 'I-X' after 'Y'"),
        (["U-X", "I-X"], (), "with an invalid IOB sequence", "token 2 has 'I-X' after no entity"),
        (["O", "X"], (), "with a tag that is not IOB", "token 2 has 'X'"),
        (["O", "B-"], (), "with a tag that is not IOB", "token 2 has 'B-'"),
        (["O", None], ("O",), "with a tag that is not IOB", "token 2 has None: name data.labels"),
        ([0, 1], (), "with a tag that is not IOB", "token 1 has 0: name data.labels"),
        ([0, 2], ("O", "B-X"), "with a tag that is not IOB", "token 2 has 2: name data.labels"),
        (["O", "B-Y"], ("X",), "whose tag is not in data.labels", "token 2 has 'B-Y'"),
        (["O"], (), "without one tag a token", ""),
        ("OO", (), "without one tag a token", ""),
    ):
        assert dropped(TAGS | {"tags": tags}, labels=labels) == (reason, detail)
    for tokens in (["a", None], ["a", ""], "ab", [["a"], "b"]):
        reason, _ = dropped(TAGS | {"tokens": tokens})
        assert reason == "whose `tokens` are not a list of texts"
    assert dropped({"tokens": [], "tags": []}) == ("with an empty prompt", "")


HALF = "bad \ud83d end"
DEEP: Any = "x"
for _ in range(900):
    DEEP = [DEEP]


PAIR = {"prompt": "x", "completion": "x"}
ASKED = {"question": "x", "answer": "x"}
CHOSEN = {"prompt": "x", "chosen": "x"}


def chat(**answer: Any) -> dict[str, Any]:
    return {"messages": [ASK, {"role": "assistant", "content": "x", **answer}]}


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"text": None}, "with a null `text`"),
        ({"text": 5}, "whose `text` is not text: it is 5"),
        ({"text": DEEP}, "whose `text` is not text: it is [[[[[[[...]]]]]]]"),
        ({"text": HALF}, "with a lone surrogate: '\\ud83d' in `text`"),
        ({"text": "a\0b"}, "with a NUL byte: in `text`"),
        ({"text": "x", "label": HALF}, "with a lone surrogate: '\\ud83d' in `label`"),
        ({"text": " ", "label": "x"}, "with an empty prompt"),
        (ASKED | {"question": ""}, "with an empty prompt"),
        (ASKED | {"question": None}, "with a null `question`"),
        (ASKED | {"answer": 7}, "whose `answer` is not text: it is 7"),
        (ASKED | {"context": 0}, "whose `context` is not text: it is 0"),
        (ASKED | {"context": ["x", 1]}, "whose `context` is not text: it is ['x', 1]"),
        (PAIR | {"completion": ["x"]}, "with a turn that is not an object: turn 1"),
        (PAIR | {"prompt": 1}, "whose `prompt` is not text: it is 1"),
        (PAIR | {"system": False}, "whose `system` is not text: it is False"),
        (PAIR | {"label": "yes"}, "whose `label` is not true or false: it is 'yes'"),
        (PAIR | {"label": False}, "with a rejected completion (`label` is false)"),
        (CHOSEN | {"rejected": None}, "with a null `rejected`"),
        (CHOSEN | {"rejected": 1}, "whose `rejected` is not text: it is 1"),
        (CHOSEN | {"rejected": []}, "whose turns are not a list: they are []"),
        (
            {"chosen": "x", "rejected": "y"},
            "with a preference without a prompt: name data.columns: {prompt: ...}",
        ),
        ({"messages": "x"}, "whose turns are not a list: they are 'x'"),
        ({"messages": []}, "whose turns are not a list: they are []"),
        ({"messages": {"a": 1}}, "whose turns are not a list: they are {'a': 1}"),
        ({"messages": [ASK, "x"]}, "with a turn that is not an object: turn 2"),
        ({"messages": [ASK, {"content": "x"}]}, "with an unknown role: turn 2 has None"),
        (chat(role="human"), "with an unknown role: turn 2 has 'human'"),
        (chat(role=["x"]), "with an unknown role: turn 2 has ['x']"),
        (
            {"conversations": [HUMAN, GPT | {"from": "bard"}]},
            "with an unknown role: turn 2 has 'bard'",
        ),
        (
            {"conversations": [HUMAN, GPT | {"value": 1}]},
            "with a turn whose `value` is not text: turn 2 has 1",
        ),
        (chat(content=None), "with a turn whose `content` is not text: turn 2 has None"),
        (
            chat(content=[{"type": "x"}]),
            "with a turn whose `content` is not text: turn 2 has [{'type': 'x'}]",
        ),
        (chat(content="\udc00"), "with a lone surrogate: '\\udc00' in turn 2"),
        (chat(reasoning_content="\0"), "with a NUL byte: in turn 2"),
        (
            chat(role="user", tool_calls=[{}]),
            "with a tool call outside an assistant turn: turn 2",
        ),
        (chat(tool_calls="f"), "whose `tool_calls` are not a list of objects: turn 2"),
        (chat(tool_calls=[{"f": HALF}]), "with a lone surrogate: '\\ud83d' in turn 2"),
        (chat(tool_calls=[{"f": DEEP}]), "with nesting too deep: in turn 2"),
        (chat() | {"tools": [{HALF: 1}]}, "with a lone surrogate: '\\ud83d' in `tools`"),
        (chat() | {"tools": "[{"}, "whose `tools` are not JSON"),
        (chat() | {"tools": "[" * 100_000}, "whose `tools` are not JSON"),
        (chat() | {"tools": {"f": 1}}, "whose `tools` are not a list of objects"),
    ],
)
def test_a_value_that_is_not_usable_drops_its_row(values: Any, why: str) -> None:
    reason, _, detail = why.partition(": ")
    assert dropped(values) == (reason, detail)


def test_a_row_without_a_column_of_its_file_is_dropped() -> None:
    for name, form in FORMATS.items():
        for missing in form.needed:
            values = dict.fromkeys(form.needed, "x")
            del values[missing]
            with pytest.raises(NotUsable) as caught:
                to_example(RawRow("f:2", values), name, Columns())
            assert caught.value.reason == f"without `{missing}`"
