"""Columns that no format reads, but that change what a row means: used or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_data_formats import ANSWER, ASK, GPT, HUMAN, Values, dropped, one
from typer.testing import CliRunner

from lora_kit.cli import app
from lora_kit.data.marks import Unseen

ROWS: dict[str, Values] = {
    "messages": {"messages": [ASK, ANSWER]},
    "sharegpt": {"conversations": [HUMAN, GPT]},
    "instruction-output": {"instruction": "Q", "output": "A"},
    "question-answer": {"question": "Q", "answer": "A"},
}
PICTURE = {"bytes": b"\x89PNG", "path": None}


def shown(folder: Path, *overrides: str, **data: Any) -> tuple[int, str]:
    """The exit code of `lora-kit preview` with these settings of `data:`, and what it prints."""
    run = {
        "recipe": "sft",
        "name": "test",
        "base": {"model": "nano"},
        "data": {"workers": 1} | data,
    }
    (folder / "run.yaml").write_text(json.dumps(run))
    done = CliRunner().invoke(
        app, ["preview", str(folder / "run.yaml"), *overrides, "--samples", "99"]
    )
    code = getattr(done.exception, "exit_code", done.exit_code)
    return code, " ".join(f"{done.output} {done.exception or ''}".split())


def preview(folder: Path, rows: list[Values], **data: Any) -> tuple[int, str]:
    """The same, for a file of these rows."""
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return shown(folder, train=str(folder / "d.jsonl"), **data)


def chat(number: int, answer: str = "Here it is.") -> Values:
    asked = {"role": "user", "content": f"Where did the thing with number {number} go?"}
    return {"messages": [asked, {"role": "assistant", "content": answer}]}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("label", True, False),
        ("label", "True", "False"),  # CSV
        ("kto_tag", True, False),
        ("weight", 1, 0),
        ("weight", "1.0", "0.0"),
        ("train", True, False),
        ("training", True, False),
        ("chosen", True, False),
        ("accepted", True, False),
        ("keep", True, False),
        ("rejected", False, True),
        ("is_rejected", "false", "true"),
        ("exclude", False, True),
        ("loss_scale", 1.0, 0.0),
        ("loss_mask", 1, 0),
        ("trainable", True, False),
        ("train_on_turn", "true", "false"),
        ("is_train", True, False),
        ("valid", True, False),
        ("is_valid", True, False),
        ("deleted", False, True),
        ("masked", False, True),
    ],
)
def test_a_flag_excludes_a_row(kind: str, name: str, good: Any, bad: Any) -> None:
    plain = one(ROWS[kind])
    assert one(ROWS[kind] | {name: good}) == one(ROWS[kind] | {name: None}) == plain
    assert dropped(ROWS[kind] | {name: bad}) == (f"excluded by `{name}: {bad!r}`", "")
    # A column of this name can be told to mean nothing, or be a group.
    assert one(ROWS[kind] | {name: bad}, ignored=(name,)) == plain
    assert one(ROWS[kind] | {name: bad}, group=name).messages == plain.messages


@pytest.mark.parametrize(
    ("name", "value"),
    [("label", 0), ("label", "1"), ("weight", 0.5), ("weight", "high"), ("train", "no"),
     ("training", 1), ("kto_tag", "good"), ("rejected", 1), ("keep", 0), ("loss_scale", 2.0),
     ("loss_mask", [0, 1]), ("trainable", "maybe"), ("deleted", 0)],
)  # fmt: skip
def test_a_flag_that_is_neither_true_nor_false_is_refused(name: str, value: Any) -> None:
    reason, detail = dropped(ROWS["messages"] | {name: value})
    zero_or_one = name in ("weight", "loss_scale", "loss_mask")
    expected = "0 or 1" if zero_or_one else "true or false"
    assert reason == f"with a `{name}` other than {expected}"
    assert detail == f"it has {value!r}: remove it, or add it to data.ignore"


@pytest.mark.parametrize(
    "extra",
    [{"label": "travel"}, {"rejected": "another completion"}, {"chosen": [ASK, ANSWER]},
     {"loss": 1.73}, {"history": []}, {"tools": None}, {"split": "train"}, {"id": 0, "score": 0},
     {"image": None}, {"images": []}, {"path": "a/b.py"}, {"audio": ""},
     {"source": {"path": "docs/a.md"}}, {"source": {"path": None}}],
)  # fmt: skip
def test_other_columns_are_ignored(extra: Values) -> None:
    assert one(ROWS["question-answer"] | extra) == one(ROWS["question-answer"])


@pytest.mark.parametrize(
    "flag",
    [{"weight": 0}, {"train": False}, {"training": False}, {"loss": False}, {"label": False},
     {"rejected": True}, {"loss_scale": 0.0}, {"loss_mask": 0}, {"masked": True},
     {"train_on_turn": False}, {"trainable": False}],
)  # fmt: skip
def test_a_flag_excludes_a_turn(flag: Values) -> None:
    turns = one({"messages": [ASK, ANSWER | flag, ASK, ANSWER]}).messages
    assert [turn.get("weight") for turn in turns] == [None, 0, None, None]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train_detail", [{"begin_offset": 0, "end_offset": 2, "train": False}]),  # Axolotl
        ("training_detail", "0-2"),
        ("mask", False),
    ],
)
def test_a_turn_of_which_a_part_is_trained_on_is_refused(name: str, value: Any) -> None:
    reason, detail = dropped({"messages": [ASK, ANSWER | {name: value}]})
    assert reason == f"with a turn that has a `{name}`"
    assert detail == "turn 2: a turn is excluded as a whole, by `train: false`"
    assert one({"messages": [ASK, ANSWER | {name: None}]}) == one(ROWS["messages"])


def test_a_class_of_a_text_is_no_flag() -> None:
    assert one({"text": "x", "label": "0"}, labels=("ham", "spam")).label == "ham"
    row = {"sentence1": "Q", "sentence2": "A", "score": 1, "label": False}
    assert one(row).label == "1"


@pytest.mark.parametrize("name", ["history", "functions", "tools"])
def test_a_part_of_the_prompt_is_not_left_out(name: str) -> None:
    row = ROWS["instruction-output"] | {name: [["Q1", "A1"]]}
    reason, detail = dropped(row)
    assert reason == f"whose `{name}` is not read" and "data.ignore" in detail
    assert one(row, ignored=(name,)) == one(ROWS["instruction-output"])
    assert one({"text": "x", name: "y"}).text == "x"


@pytest.mark.parametrize(
    "name", ["context", "documents", "instruction", "input", "system_prompt", "system_message"]
)
@pytest.mark.parametrize("value", ["A long passage.", ["A long", "passage."], {"text": "A long"}])
def test_a_text_of_the_prompt_is_not_left_out(name: str, value: Any) -> None:
    turns = {"prompt": "What is it?", "completion": "A thing."}
    plain = one(turns)
    reason, detail = dropped(turns | {name: value})
    assert reason == f"whose `{name}` is not read"
    use = f"data.columns: {{system: {name}}}" if "system" in name else "`messages`"
    expected = f"it is a part of the prompt: use {use}, remove it, or add it to data.ignore"
    assert detail == expected
    assert one(turns | {name: value}, ignored=(name,)) == plain
    for empty in (None, "", []):
        assert one(turns | {name: empty}) == plain
    # The turns have it already.
    asked = turns | {"prompt": "Given: A  long\npassage. What is it?"}
    if not isinstance(value, dict):
        assert one(asked | {name: value}) == one(asked)
    said = {"messages": [{"role": "system", "content": "A long passage."}, ASK, ANSWER]}
    assert one(said | {name: "A long passage."}) == one(said)
    assert one({"text": "x", name: value}).text == "x"


@pytest.mark.parametrize("name", ["split", "partition", "set"])
def test_a_row_of_a_held_out_split_is_not_trained_on(name: str) -> None:
    reason, _ = dropped(ROWS["messages"] | {name: "Test"})
    assert reason == f"whose `{name}` is not train"
    assert one(ROWS["messages"] | {name: "train"}) == one(ROWS["messages"])


def test_a_call_in_the_old_form_is_not_left_out() -> None:
    turn = ANSWER | {"function_call": {"name": "add", "arguments": "{}"}}
    assert dropped({"messages": [ASK, turn]}) == (
        "with a `function_call`",
        "turn 2: use `tool_calls`",
    )
    assert one({"messages": [ASK, ANSWER | {"function_call": None}]}) == one(ROWS["messages"])


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"image": PICTURE}, "the column `image`"),  # datasets.Image
        ({"photo": PICTURE}, "the column `photo`"),
        ({"speech": {"bytes": None, "path": "a.wav"}}, "the column `speech`"),  # datasets.Audio
        ({"images": [PICTURE]}, "the column `images`"),
        ({"jpg": b"\xff\xd8"}, "the column `jpg`"),  # WebDataset
        ({"image": "pictures/1.jpg"}, "the column `image` ('pictures/1.jpg')"),  # LLaVA
        ({"images": ["1.jpg", "2.jpg"]}, "the column `images`"),
        ({"Image": "https://example.org/1"}, "the column `Image`"),
        ({"videos": ["1.mp4"]}, "the column `videos`"),
        ({"audio": {"array": [0.1], "sampling_rate": 16000}}, "the column `audio`"),
        ({"file_name": "1.PNG"}, "the column `file_name`"),  # ImageFolder
        ({"path": "clips/1.mp3"}, "the column `path`"),  # Common Voice
    ],
)
@pytest.mark.parametrize("kind", [*ROWS, "text"])
def test_what_a_text_model_cannot_see_is_refused(kind: str, extra: Values, words: str) -> None:
    row = ROWS.get(kind, {"text": "a caption"})
    with pytest.raises(Unseen, match="the column") as caught:
        one(row | extra)
    assert caught.value.reason.startswith(words)
    assert one(row | extra, ignored=tuple(extra)) == one(row)


@pytest.mark.parametrize(
    ("turn", "words"),
    [
        ({"content": [{"type": "image"}, {"type": "text", "text": "Q"}]}, "`image` in turn 1"),
        ({"content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "`image_url` in turn 1"),
        ({"content": [{"type": "input_audio", "input_audio": {}}]}, "`input_audio` in turn 1"),
        ({"content": [{"type": "video", "video": "x"}]}, "`video` in turn 1"),
        ({"images": ["x.png"]}, "`images` in turn 1"),  # Ollama
    ],
)
def test_turns_with_images_or_audio_are_refused(turn: Values, words: str) -> None:
    with pytest.raises(Unseen, match=words):
        one({"messages": [ASK | turn, ANSWER]})
    with pytest.raises(Unseen, match=words):
        one({"prompt": [ASK | turn], "completion": [ANSWER]})


@pytest.mark.parametrize(
    "text",
    [
        "<image>\nWhat is it?",  # LLaVA
        "What is it?\n<image>",
        "<image>What is it?",  # LLaMA-Factory
        "<image><image>What differs?",
        "First:\n <image_2> \nand what else?",
        "<video>\nWhat happens?",
        "What is said?<audio>",
        "<|vision_start|><|image_pad|><|vision_end|>What is it?",  # Qwen
        "What is <|image_1|> of?",  # Phi
        "What is <start_of_image>?",  # Gemma
        "Look: data:image/png;base64,iVBORw0KGgo=",
        "clips/1.WAV",
        " https://example.org/cat.jpg?size=9 ",
    ],
)
@pytest.mark.parametrize("kind", ["prompt", "messages", "text-label", "question-answer", "pair"])
def test_a_mark_of_an_image_in_a_prompt_is_refused(kind: str, text: str) -> None:
    rows: dict[str, Values] = {
        "prompt": {"prompt": text, "completion": "A cat."},
        "messages": {"messages": [ASK, ANSWER, {"role": "user", "content": text}, ANSWER]},
        "text-label": {"text": text, "label": "cat"},
        "question-answer": {"question": text, "answer": "A cat."},
        "pair": {"prompt": text, "chosen": "A cat.", "rejected": "A dog."},
    }
    reason, detail = dropped(rows[kind])
    assert reason == "with an image, audio or video in its text"
    assert detail.endswith(": a text model cannot read images, audio or video: remove the row")


@pytest.mark.parametrize(
    "text",
    [
        "How does the <image> of an RSS feed work?",
        "<audio>\n<source src='a.ogg'>\n</audio>\nWhy is it silent?",
        "How do I open cat.jpg?",
        "What is data:image/png?",
        "Explain <img> and <picture>.",
        "is the.mp3 file gone",
    ],
)
def test_words_about_images_are_no_mark_of_one(text: str) -> None:
    assert one({"prompt": text, "completion": "So."}).messages[0]["content"] == text
    assert one({"text": text}).text == text


def test_a_document_is_refused_where_it_begins_with_an_image() -> None:
    assert dropped({"text": "<image>\nA cat."})[0] == "with an image, audio or video in its text"
    assert dropped({"text": "a/b.png"})[0] == "with an image, audio or video in its text"
    for text in ("A cat:\n<image>\nIt sits.", "The token <|image_pad|> is special."):
        assert one({"text": text}).text == text
    assert one({"messages": [ASK, ANSWER | {"content": "<image>"}]}).messages[1]["content"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("image_path", "a/b.png"), ("img_url", "https://x.org/1.jpg?w=3"), ("audio_file", "my a.wav"),
     ("filename", "1.mp4"), ("wav", "1.wav")],
)  # fmt: skip
def test_a_column_with_the_path_of_an_image_is_refused(name: str, value: str) -> None:
    with pytest.raises(Unseen, match="the column"):
        one(ROWS["messages"] | {name: value})
    assert one(ROWS["messages"] | {name: "a/b.py"}) == one(ROWS["messages"])
    assert one(ROWS["messages"] | {"thumbnail_of": value}) == one(ROWS["messages"])


# --- As a user meets it


def test_rows_with_label_false_are_not_imitated(tmp_path: Path) -> None:
    rows = [chat(n) | {"label": True} for n in range(30)]
    rows += [chat(n, "Go away") | {"label": False} for n in range(30, 60)]
    code, out = preview(tmp_path, rows)
    assert code == 0 and "Go away" not in out and "Here it is." in out
    assert "excluded by `label: False`" in out and "unused columns" not in out
    assert "training would stop" not in out


@pytest.mark.parametrize("column", ["split", "weight"])
def test_a_column_that_is_refused_is_named_with_the_fix(tmp_path: Path, column: str) -> None:
    value = {"split": "test", "weight": 0.5}[column]
    rows = [chat(n) for n in range(40)] + [chat(n) | {column: value} for n in range(40, 60)]
    _, out = preview(tmp_path, rows)
    assert f"`{column}`" in out and "d.jsonl:41: it" in out
    assert "or add it to data.ignore" in out and "training would stop" in out
    _, out = preview(tmp_path, rows, ignore=[column])
    assert "dropped" not in out and "training would stop" not in out


def test_rows_of_another_split_can_be_evaluated_on(tmp_path: Path) -> None:
    held = tmp_path / "test.jsonl"
    held.write_text("".join(json.dumps(chat(n) | {"split": "test"}) + "\n" for n in range(60, 90)))
    _, out = preview(tmp_path, [chat(n) | {"split": "train"} for n in range(60)], eval=str(held))
    assert "eval: 30 rows read, 30 kept" in out and "dropped" not in out


def test_a_flag_that_is_not_used_is_listed_as_unused(tmp_path: Path) -> None:
    general = tmp_path / "general.jsonl"
    general.write_text(json.dumps({"text": "Some words of no field.", "weight": 0}) + "\n")
    code, out = preview(tmp_path, [chat(n) for n in range(60)], general=str(general))
    assert code == 0 and "general: 1 rows read, 1 kept" in out
    assert "unused columns: weight (first: " in out


def test_a_row_with_an_image_stops_the_run(tmp_path: Path) -> None:
    rows = [chat(n) for n in range(59)]
    rows.append({"messages": chat(60, "A cat.")["messages"], "images": ["1.jpg"]})
    code, out = preview(tmp_path, rows)
    assert code == 2
    assert "d.jsonl:60: the column `images`" in out and "data.ignore" in out
    code, out = preview(tmp_path, rows, ignore=["images"])
    assert code == 0 and "A cat." in out
