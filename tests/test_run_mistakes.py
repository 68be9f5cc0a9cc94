"""Mistakes in a run file: all at once, each with its key, its value and what is wanted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_kit.errors import RunFileError, UserError
from lora_kit.run import load_run

GOOD = """
recipe: cpt
name: test
base: {model: some/model}
data: {train: text.txt}
"""


@pytest.fixture
def folder(work: Path) -> Path:
    (work / "text.txt").write_text("Some text.", encoding="utf-8")
    return work


def write(folder: Path, text: str) -> Path:
    file = folder / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def problems(folder: Path, *overrides: str, text: str = GOOD) -> list[str]:
    """What load_run finds wrong; fails where it finds nothing."""
    with pytest.raises(RunFileError) as caught:
        load_run(write(folder, text), overrides)
    return caught.value.problems


def only(folder: Path, *overrides: str, text: str = GOOD) -> str:
    found = problems(folder, *overrides, text=text)
    assert len(found) == 1, found
    return found[0]


def refused(folder: Path, text: str) -> str:
    """The one line that says why a text is no run file."""
    with pytest.raises(UserError) as caught:
        load_run(write(folder, text))
    assert not isinstance(caught.value, RunFileError)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_a_head_alone_does_not_read_is_refused(folder: Path) -> None:
    head = "train.trainable=head"
    assert problems(folder, head, "adapter.r=4", "adapter.use_dora=true", "adapter.start=null") == [
        f"adapter.{key}: train.trainable: head trains without LoRA; remove it"
        for key in ("r", "use_dora")
    ]
    assert load_run(write(folder, GOOD), [head, "adapter.r=16"]).adapter.r == 16


def test_every_mistake_is_reported_at_once_with_key_value_and_nearest_name(folder: Path) -> None:
    text = """
recipe: spt
name: ../x
bas: {}
base: {model: m, quantise: nf4, dtype: float16}
data: {train: gone.txt, eval: 1.5, columns: {promt: q}}
adapter: {rank: 8, r: 16.5, start: other, lora_alpha: 8}
train: {learning_rate: abc, output_dir: x, max_step: 3}
"""
    found = problems(folder, "seed=-1", "nonsense", text=text)
    wanted = {
        "nonsense": "key=value",
        "recipe: ": 'unknown recipe "spt"; did you mean `sft`?',
        "name: ": '"../x" is invalid',
        "bas: ": "did you mean `base`?",
        "base.quantise: ": "did you mean `quantize`?",
        "base.dtype: ": '"float16" is invalid: one of bfloat16, float32.',
        "data.train: ": "gone.txt",
        "data.eval: ": "1.5 is invalid: a held-out share must be between 0 and 1",
        "data.columns.promt: ": "did you mean `prompt`?",
        "adapter.rank: ": "did you mean `r`?",
        "adapter.r: ": "16.5 is invalid: an integer >= 1. Rank",
        "adapter.lora_alpha: ": "adapter.start",
        "train.learning_rate: ": '"abc" is invalid: a number >= 0.',
        "train.output_dir: ": "set `name:`",
        "train.max_step: ": "did you mean `max_steps`?",
        "seed: ": "-1 is invalid: an integer >= 0 and < 4294967296.",
    }
    for key, words in wanted.items():
        matching = [line for line in found if key in line and words in line]
        assert len(matching) == 1, (key, words, found)
    assert len(found) == len(wanted) + 1  # adapter.start decides r as well


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("adapter.r", "16.5"),
        ("adapter.r", "'16'"),
        ("adapter.r", "true"),
        ("adapter.r", "0"),
        ("adapter.r", "null"),
        ("adapter.lora_dropout", "1.0"),
        ("adapter.target_modules", "5"),
        ("adapter.target_modules", "[q_proj, 5]"),
        ("adapter.layers_to_transform", "[-1]"),
        ("adapter.rank_pattern", "{q_proj: 0}"),
        ("adapter.use_dora", "1"),
        ("train.learning_rate", "abc"),
        ("train.learning_rate", "true"),
        ("train.learning_rate", ".nan"),
        ("train.learning_rate", ".inf"),
        ("train.learning_rate", "-1e-4"),
        ("train.max_grad_norm", ".inf"),
        ("train.num_train_epochs", ".inf"),
        ("train.max_length", "1e3"),
        ("train.optim", "sgd"),
        ("data.eval", "0"),
        ("data.eval", "1"),
        ("data.eval", ".nan"),
        ("data.eval", "true"),
        ("data.train", "''"),
        ("data.general", "{source: 3}"),
        ("base.model", "''"),
        ("base.quantize", "4"),
        ("base", "nano"),
        ("seed", "4294967296"),
    ],
)
def test_a_wrong_value_is_named_with_its_key(folder: Path, key: str, value: str) -> None:
    line = only(folder, f"{key}={value}")
    assert line.startswith(key)
    assert "is invalid: " in line and "see `lora-kit schema`" not in line


@pytest.mark.parametrize(
    "name",
    [
        *("../x", "/x", "", ".", "..", "a/../b", "a/..", "a//b", "a/", ".hidden", "a b", "a\\b"),
        *("'a\n'", "a\n", "x" * 300),
    ],
)
def test_a_name_stays_inside_runs_and_fits_a_file_system(folder: Path, name: str) -> None:
    assert only(folder, f"name={json.dumps(name)}").startswith("name: ")


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("train.seed", "the top-level `seed:`"),
        ("train.push_to_hub", "training does not upload"),
        ("train.hub_token", "do not put tokens into a run file"),
        ("base.trust_remote_code", "never run"),
        ("base.load_in_4bit", "quantize: nf4"),
        ("train.lr", "did you mean `learning_rate`"),
        ("train.batch_size", "did you mean `per_device_train_batch_size`"),
        ("learning_rate", "did you mean `train.learning_rate`"),
        ("adapter.modules_to_save", "LoraConfig has it, but lora_kit does not read it"),
        ("train.group_by_length", "unknown key"),
        ("train.adafactor", "unknown key"),
        ("train.neftune_noise_alpha", "TrainingArguments has it"),
        ("data.train.path", "train is not a section"),
    ],
)
def test_a_key_that_is_not_read_says_where_to_look(folder: Path, key: str, words: str) -> None:
    assert words in only(folder, f"{key}=1")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("data.train", "[text.txt, gone]", "gone: "),
        ("data.eval", "gone.txt", "gone.txt"),
        ("data.general", "nano:topic", "did you mean `nano:topics`"),
        ("data.train", "~nobody-of-that-name/x", "no such file or folder"),
        ("data.train", "x" * 5000, "no such file or folder"),
        ("data.train", '"a\\0b"', "no such file or folder"),
        ("recipe", "mine.py", "no such file"),
        ("recipe", "ppo", "unknown recipe"),
    ],
)
def test_what_is_named_must_be_there(folder: Path, key: str, value: str, words: str) -> None:
    line = only(folder, f"{key}={value}")
    assert line.startswith(f"{key}: ") and words in line.replace('"', "")
    assert len(line) < 300


@pytest.mark.parametrize(
    "item", ["nonsense", "=5", "train.max_steps", "train.max_steps=[1", "a=*b"]
)
def test_a_malformed_override_is_named(folder: Path, item: str) -> None:
    assert f"`{item}`" in only(folder, item)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "expected `key: value` lines"),
        ("- a\n- b", "expected `key: value` lines"),
        ("just words", "expected `key: value` lines"),
        ("a: [1", "run.yaml:1: not YAML"),
        ("name: x\nname: y", "run.yaml:2: not YAML: the key 'name' is duplicate"),
        ("base:\n  model: a\n  model: b", "run.yaml:3: not YAML: the key 'model' is duplicate"),
        ("1: x", "the key 1 is not a string"),
        ("? [a]\n: b", "is not a string"),
        ("a: x\n---\nb: y", "run.yaml:2: not YAML"),
        ("seed: !!int abc", "not YAML"),
        ("seed: !!bool abc", "not YAML"),
        ("seed: !!timestamp abc", "not YAML"),
        ("seed: !!python/object/apply:os.getcwd []", "not YAML"),
        ("seed: \x07", "not YAML"),
        ("seed: " + "9" * 5000, "not YAML"),
        ("a: " + "[" * 5000 + "]" * 5000, "nesting too deep"),
        ("a: &x [1]\nb: *x", "run.yaml:2: not YAML: aliases"),
        ("x" * 2_000_000, "not a run file"),
    ],
)
def test_what_is_no_run_file_is_refused_in_one_line(folder: Path, text: str, words: str) -> None:
    assert words in refused(folder, text)


def test_a_bomb_of_aliases_ends_at_once(folder: Path) -> None:
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}]" for n in range(1, 40)]
    assert "aliases" in refused(folder, "\n".join(lines) + "\ndata: {train: *a39}")


def test_a_file_that_cannot_be_read_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.yaml: cannot be read"):
        load_run(folder / "gone.yaml")
    with pytest.raises(UserError, match="is a folder"):
        load_run(folder)
    (folder / "run.yaml").write_bytes(b"name: \xff")
    with pytest.raises(UserError, match=r"not UTF-8 text \(byte 6\)"):
        load_run(folder / "run.yaml")
