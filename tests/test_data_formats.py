"""Rows -> examples: the format is found by the columns, and nothing is guessed."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest

from lora_kit.data.census import Count
from lora_kit.data.formats import (
    FORMATS,
    Columns,
    Example,
    NotUsable,
    format_of,
    normalised,
    to_example,
)
from lora_kit.data.readers import RawRow
from lora_kit.errors import UserError
from lora_kit.schema import Column

Values = dict[str, Any]
ASK = {"role": "user", "content": "Q"}
ANSWER = {"role": "assistant", "content": "A"}
OTHER = {"role": "assistant", "content": "B"}
SYSTEM = {"role": "system", "content": "S"}
HUMAN, GPT = {"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}


def one(values: Values, **columns: Any) -> Example:
    told = Columns(**columns)
    row = RawRow("f:1", values)
    return to_example(row, format_of(row, told, list(FORMATS)), told)


def turns(values: Values, **columns: Any) -> list[tuple[str, str]]:
    example = one(values, **columns)
    assert example.place == "f:1"
    return [(m["role"], m["content"]) for m in example.messages]


def refused(values: Values, **columns: Any) -> str:
    with pytest.raises(UserError) as caught:
        one(values, **columns)
    line = str(caught.value)
    assert line.startswith("f:1: ") and "\n" not in line
    return line


def dropped(values: Values, **columns: Any) -> tuple[str, str]:
    with pytest.raises(NotUsable) as caught:
        one(values, **columns)
    return caught.value.reason, caught.value.detail


QA = [("user", "Q"), ("assistant", "A")]
SQA = [("system", "S"), *QA]
PAIR = {"prompt": "Q", "completion": "A"}
ASKED = {"question": "Q", "answer": "A"}
TOLD = {"instruction": "Q", "output": "A"}
# Of each format: rows, and the turns they become; or what is asked and answered.
CASES: list[tuple[str, Values, Any]] = [
    ("prompt-completion", PAIR | {"id": 7}, QA),
    ("prompt-completion", PAIR | {"prompt": ""}, ("", "A")),
    ("prompt-completion", {"prompt": [SYSTEM, ASK], "completion": [ANSWER]}, SQA),
    ("question-answer", ASKED | {"context": None}, QA),
    ("question-answer", ASKED | {"context": "C"}, ("C\n\nQ", "A")),
    ("question-answer", ASKED | {"context": ["C", "D"]}, ("C\n\nD\n\nQ", "A")),
    ("question-answer", ASKED | {"output": "of another format"}, QA),
    ("instruction-response", {"instruction": "Q", "response": "A", "context": ""}, QA),
    ("instruction-output", TOLD | {"input": " \n"}, QA),
    ("instruction-output", TOLD | {"input": "I"}, ("Q\n\nI", "A")),
    ("instruction-output", TOLD | {"input": "I", "instruction": ""}, ("I", "A")),
    ("messages", {"messages": [ASK, ANSWER], "prompt": "Q"}, QA),
    (
        "messages",
        {"messages": [SYSTEM, ASK, ANSWER, ASK, OTHER]},
        [*SQA, QA[0], ("assistant", "B")],
    ),
    ("messages", {"messages": [{**SYSTEM, "role": "developer"}, ASK, ANSWER]}, SQA),
    ("messages", {"messages": [{**ASK, "content": [{"type": "text", "text": "Q"}]}, ANSWER]}, QA),
    ("messages", {"messages": [HUMAN, GPT]}, QA),
    ("sharegpt", {"conversations": [HUMAN, GPT], "id": "x"}, QA),
    ("sharegpt", {"conversations": [{"from": "system", "value": "S"}, HUMAN, GPT]}, SQA),
    ("sharegpt", {"conversations": [ASK, ANSWER]}, QA),
    ("text-label", {"text": "Q", "label": "A"}, QA),
    ("sentence-pair", {"sentence1": "Q", "sentence2": "A", "score": 0.5}, QA),
    ("sentence-pair", {"sentence1": "Q", "sentence2": "A", "score": "4"}, QA),
    ("tokens-tags", {"tokens": ["a", "b", "c"], "tags": ["B-X", "I-X", "O"]}, ("a b c", "X: a b")),
    ("tokens-tags", {"tokens": ["a", "b"], "tags": ["B-X", "B-X"]}, ("a b", "X: a\nX: b")),
    ("tokens-tags", {"tokens": ["a", "b"], "tags": ["B-X", "B-Y"]}, ("a b", "X: a\nY: b")),
    ("tokens-tags", {"tokens": ["a", "b"], "tags": ["B-X", "L-X"]}, ("a b", "X: a b")),
    ("tokens-tags", {"tokens": ["a", "b"], "tags": ["U-X", "S-X"]}, ("a b", "X: a\nX: b")),
    ("tokens-tags", {"tokens": ["a"], "tags": ["O"]}, ("a", "none")),
    ("preference", {"prompt": "Q", "chosen": "A", "rejected": "B"}, QA),
    ("preference", {"prompt": "Q", "chosen": [ANSWER], "rejected": [OTHER]}, QA),
    ("preference", {"prompt": [ASK], "chosen": [ANSWER], "rejected": [OTHER]}, QA),
    ("preference", {"prompt": "Q", "chosen": [ASK, ANSWER], "rejected": [ASK, OTHER]}, QA),
    ("preference", {"prompt": [ASK], "chosen": [ASK, ANSWER], "rejected": [ASK, OTHER]}, QA),
    ("preference", {"prompt": "", "chosen": [ASK, ANSWER], "rejected": [ASK, OTHER]}, QA),
    ("preference", {"chosen": [HUMAN, GPT], "rejected": [ASK, OTHER]}, QA),
    ("unpaired-preference", PAIR | {"label": True}, QA),
    ("unpaired-preference", {"prompt": [ASK], "completion": [ANSWER], "label": True}, QA),
]
CLOSE = ("prompt-completion", "messages", "sharegpt", "preference", "unpaired-preference")


@pytest.mark.parametrize(("name", "values", "expected"), CASES)
def test_the_columns_name_the_format(name: str, values: Values, expected: Any) -> None:
    if isinstance(expected, tuple):
        expected = list(zip(("user", "assistant"), expected, strict=True))
    assert format_of(RawRow("f:1", values), Columns(), list(FORMATS)) == name
    assert turns(values) == expected
    example = one(values)
    # What stands between prompt and answer where there is no chat template.
    assert example.joiner == ("" if name in CLOSE else "\n\n")
    label = {"text-label": "label", "sentence-pair": "score"}.get(name)
    assert example.label == (str(values[label]) if label else None)
    if "system" in FORMATS[name].optional and expected[0][0] != "system":
        for nothing in (None, "", " "):
            assert turns(values | {"system": nothing}) == expected
        assert turns(values | {"system": "S"}) == [("system", "S"), *expected]


def test_every_format_has_a_case_and_the_run_file_knows_its_columns() -> None:
    assert {name for name, *_ in CASES} | {"text"} == set(FORMATS)
    assert set(get_args(Column)) == {c for f in FORMATS.values() for c in (*f.needed, *f.optional)}


def test_a_prompt_beside_turns_must_be_among_them() -> None:
    """Sets name the first question, the last one, or all of the conversation so far."""
    first, last = [ASK, ANSWER, {"role": "user", "content": "Why?"}], {"role": "user", "content": 0}
    sides = {"chosen": [SYSTEM, *first, ANSWER], "rejected": [SYSTEM, *first, OTHER]}
    for prompt in ("q", "Why", first, [SYSTEM, *first], None):
        assert len(turns({"prompt": prompt, **sides})) == 5
    for prompt in ("Where?", [{**ASK, "content": "Where?"}], [*first, ANSWER, ASK]):
        found = dropped({"prompt": prompt, **sides})
        assert found == ("whose `prompt` is not in the turns of `chosen`", found[1])
    assert dropped({"prompt": [last], **sides})[0] == "with a turn whose `content` is not text"
    other = {"chosen": [ASK, ANSWER], "rejected": [{**ASK, "content": "Where?"}, OTHER]}
    found = dropped({"prompt": "Q", **other})
    assert found[0] == "whose `prompt` is not in the turns of `rejected`"


@pytest.mark.parametrize("score", ["high", True, None, [1], "nan", "inf", ""])
def test_the_score_of_a_pair_is_a_number(score: Any) -> None:
    assert dropped({"sentence1": "Q", "sentence2": "A", "score": score})[0] in (
        "whose `score` is not a number",
        "with a null `score`",
    )


def test_a_text_is_kept_as_it_is() -> None:
    example = one({"text": "  a\n", "id": 1})
    assert (example.text, example.messages) == ("  a\n", ())
    assert dropped({"text": " \n"}) == ("empty", "")


def test_the_order_of_the_turns_is_that_of_a_conversation() -> None:
    assert dropped({"messages": [SYSTEM, ASK]}) == ("without an assistant turn", "")
    assert dropped({"messages": [ASK, ANSWER, OTHER]}) == (
        "with two assistant turns in a row",
        "turn 3",
    )
    last = ("whose last turn is not the assistant's", "it is the user's")
    assert dropped({"messages": [ASK, ANSWER, ASK]}) == last
    late = ("with a system turn after the first", "turn 2")
    assert dropped({"messages": [ASK, SYSTEM, ANSWER]}) == late
    empty = ("with an empty completion", "turn 2")
    assert dropped({"messages": [ASK, {**ANSWER, "content": " "}, ASK, ANSWER]}) == empty
    assert dropped({"prompt": "Q", "completion": ""}) == empty
    system = {"messages": [SYSTEM, ASK, ANSWER], "system": "S"}
    assert turns(system) == [("system", "S"), *QA]
    assert "is not the system's turn" in dropped(system | {"system": "other"})[0]


CALL = {"id": "1", "function": {"name": "f", "arguments": '{"x": 1}'}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def test_tools_and_their_calls_are_kept() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    result = {"role": "tool", "content": "2", "tool_call_id": "1", "name": "f", "weight": None}
    for tools in ([TOOL], json.dumps([TOOL])):
        example = one({"messages": [ASK, call, result, ANSWER], "tools": tools})
        assert example.tools == (TOOL,)
        assert example.messages[1] == {**call, "content": ""}
        assert example.messages[2] == {k: v for k, v in result.items() if k != "weight"}
    thought = one({"messages": [ASK, {**ANSWER, "reasoning_content": "hm"}]})
    assert thought.messages[1]["reasoning_content"] == "hm"
    other = {**call, "tool_calls": [{"function": {"name": "g"}}]}
    assert one({"messages": [ASK, call]}).key != one({"messages": [ASK, other]}).key
    for nothing in (None, "", "null", []):
        assert one({"messages": [ASK, ANSWER], "tools": nothing}).tools == ()


def test_nulls_of_other_rows_in_json_are_no_part_of_a_call() -> None:
    """`datasets` and pandas write the fields of all rows' tools and calls to each row."""
    own = {"x": {"type": "number"}, "unit": {"type": "string"}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": own}}}
    wide = json.loads(json.dumps(tool))
    wide["function"]["parameters"]["properties"]["city"] = None

    def call(**arguments: Any) -> dict[str, Any]:
        calls = [{"type": "function", "function": {"name": "f", "arguments": arguments}}]
        return {"role": "assistant", "content": "", "tool_calls": calls}

    def calls(tools: Any, **arguments: Any) -> Example:
        return one({"messages": [ASK, call(**arguments), ASK, ANSWER], "tools": tools})

    for tools in ([wide], json.dumps([wide]), [wide["function"]]):
        example = calls(tools, x=1, city=None)
        assert example.messages == calls([tool], x=1).messages
    # A null that the tool has, or a call of a tool that is not listed, is kept.
    for tools, arguments in (([tool], {"x": 1, "unit": None}), ([], {"x": 1, "city": None})):
        assert calls(tools, **arguments).messages[1] == call(**arguments)


def test_a_turn_can_be_left_out_of_what_is_learned() -> None:
    for out in ({"weight": 0}, {"weight": 0.0}, {"train": False}, {"weight": 1, "train": False}):
        answers = one({"messages": [ASK, {**ANSWER, **out}, ASK, OTHER]}).messages[1::2]
        assert [m.get("weight") for m in answers] == [0, None]
    for kept in (
        {"weight": 1},
        {"weight": 1.0},
        {"weight": None},
        {"train": True},
        {"train": None},
    ):
        assert "weight" not in one({"conversations": [HUMAN, {**GPT, **kept}]}).messages[1]
    assert dropped({"messages": [ASK, {**ANSWER, "weight": 0.5}]}) == (
        "with a `weight` other than 0 or 1",
        "turn 2 has 0.5",
    )
    assert "other than true or false" in dropped({"messages": [ASK, {**ANSWER, "train": "no"}]})[0]


def test_examples_that_differ_in_case_and_punctuation_alone_are_the_same() -> None:
    assert one({"text": "What's  NEW?\n"}).key == one({"text": "what s new"}).key
    assert one({"text": "a+b"}).key != one({"text": "a-b"}).key
    left = one({"prompt": "a b", "completion": "c"})
    assert left.key != one({"prompt": "a", "completion": "b c"}).key
    assert left.question == "a b"
    assert one({"messages": [SYSTEM, ASK, ANSWER, ASK, OTHER]}).question == "Q\0A\0Q"
    assert normalised("?!") == "?!"  # or all such texts would be one


def test_dropped_rows_are_counted_with_the_first_place() -> None:
    counts, more = Count(), Count()
    for number in (2, 3):
        counts.count_lost("empty", f"f:{number}")
    more.count_lost("empty", "f:9")
    more.count_lost("with a NUL byte", "f:10: in `text`")
    found = (counts + more).dropped_text()
    assert found == "3 empty (first: f:2); 1 with a NUL byte (first: f:10: in `text`)"
