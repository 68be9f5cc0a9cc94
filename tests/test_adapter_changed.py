"""A run's files that are not as they were saved are refused by every verb that reads them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from trained import copied, edit
from typer.testing import CliRunner

import lora_kit
from lora_kit.adapter.finished import FinishedRun
from lora_kit.cli import app
from lora_kit.errors import UserError
from lora_kit.run import FREE_TO_CHANGE, settings_hashes

Change = Callable[[Path], Any]


def settings(change: Callable[[dict[str, Any]], Any]) -> Change:
    """A change of run.yaml."""

    def changed(run: Path) -> None:
        values = yaml.safe_load((run / "run.yaml").read_text(encoding="utf-8"))
        change(values)
        (run / "run.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")

    return changed


def config(**values: Any) -> Change:
    return lambda run: edit(run / "adapter" / "adapter_config.json", lambda c: c.update(values))


def exchanged_tokens(run: Path) -> None:
    """Two tokens of the vocabulary change places."""

    def exchange(values: dict[str, Any]) -> None:
        vocabulary = values["model"]["vocab"]
        a, b = sorted(vocabulary)[40:42]
        vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]

    edit(run / "adapter" / "tokenizer.json", exchange)


def flipped_bit(run: Path) -> None:
    file = run / "adapter" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


REFUSED: dict[str, tuple[Change, str]] = {
    "weights": (flipped_bit, "adapter_model.safetensors: was changed"),
    "lora_alpha": (config(lora_alpha=64), "adapter_config.json: was changed"),
    "use_rslora": (config(use_rslora=True), "adapter_config.json: was changed"),
    "alpha_pattern": (config(alpha_pattern={"q_proj": 1}), "adapter_config.json: was changed"),
    "exchanged tokens": (exchanged_tokens, "tokenizer.json: was changed"),
    "end of text": (
        lambda run: edit(
            run / "adapter/tokenizer_config.json", lambda c: c.update(eos_token="<|im_end|>")
        ),
        "tokenizer_config.json: was changed",
    ),
    "chat template": (
        lambda run: (run / "adapter/chat_template.jinja").write_text("{{ messages[0].content }}"),
        "chat_template.jinja: was changed",
    ),
    "tokenizer gone": (
        lambda run: (run / "adapter/tokenizer.json").unlink(),
        "tokenizer.json: was",
    ),
    "tokens added": (
        lambda run: (run / "adapter/added_tokens.json").write_text('{"queen": 5}'),
        "added_tokens.json: was changed",
    ),
    "dtype": (settings(lambda v: v["base"].update(dtype="bfloat16")), "run.yaml: base: changed"),
    "quantized": (settings(lambda v: v["base"].update(quantize="nf4")), "run.yaml: base: changed"),
    "rate": (settings(lambda v: v["train"].update(learning_rate=0.5)), "run.yaml: train: changed"),
    "rank": (settings(lambda v: v["adapter"].update(r=8)), "run.yaml: adapter: changed"),
    "held-out share": (settings(lambda v: v["data"].update(eval=0.1)), "run.yaml: data: changed"),
    "seed": (settings(lambda v: v.update(seed=1)), "run.yaml: seed: changed"),
    "no run file": (
        lambda run: (run / "run.yaml").unlink(),
        "run.yaml: missing, beside run.lock.json: copy it again",
    ),
    "no lock file": (
        lambda run: (run / "run.lock.json").unlink(),
        "run.lock.json: missing, beside run.yaml: copy it again",
    ),
}
VERBS = {
    "merge": ["merge", "RUN", "--out", "out"],
    "generate": ["generate", "RUN", "What is 3?", "--max-new-tokens", "2"],
    "compare": ["compare", "RUN"],
    "export": ["export", "RUN", "--to", "portable", "--out", "out"],
    "push": ["push", "RUN", "me/test", "--dry-run"],
    "combine": ["combine", "RUN", "RUN", "--out", "out"],
}


@pytest.fixture
def run(sft_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a finished run, seen from an empty folder."""
    copy = copied(sft_run, tmp_path)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return copy


def assert_refused(words: str, call: Callable[[], Any]) -> None:
    with pytest.raises(UserError) as caught:
        call()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value) and "again" in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.slow
@pytest.mark.parametrize("what", REFUSED)
def test_what_was_changed_is_refused(what: str, run: Path) -> None:
    change, words = REFUSED[what]
    lora_kit.load(run)
    change(run)
    assert_refused(words, lambda: lora_kit.load(run))


@pytest.mark.slow
@pytest.mark.parametrize("what", ["lora_alpha", "exchanged tokens", "no run file", "no lock file"])
@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_refuses_it(verb: str, what: str, run: Path) -> None:
    change, words = REFUSED[what]
    change(run)
    done = CliRunner().invoke(app, [str(run) if w == "RUN" else w for w in VERBS[verb]])
    assert isinstance(done.exception, UserError), done.output
    assert words in str(done.exception)
    assert not Path("out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("inside", [False, True])
def test_an_adapter_beside_a_run_file_of_another_run(inside: bool, run: Path) -> None:
    """It is opened as what it is, whether the project's folder or its own is named."""
    shutil.copytree(run / "adapter", "project/adapter")
    if inside:  # as it is pulled or exported
        shutil.copy(run / "run.lock.json", "project/adapter")
    Path("project/run.yaml").write_text("recipe: sft\nname: other\nbase: {model: elsewhere}\n")
    for path in ("project", "project/adapter"):
        opened = FinishedRun(path)
        assert opened.home.name == "adapter" and opened.run is None
        assert bool(opened.lock) == inside
        lora_kit.load(path)


@pytest.mark.slow
def test_inspect_tells_what_was_changed(run: Path) -> None:
    for what in ("lora_alpha", "tokens added"):
        REFUSED[what][0](run)
    done = CliRunner().invoke(app, ["inspect", str(run), "--json"])
    assert done.exit_code == 0, done.output
    told = [issue["what"] for issue in json.loads(done.stdout)["loaders"]]
    assert "adapter_config.json, added_tokens.json changed since the run" in told


@pytest.mark.slow
def test_an_adapter_to_start_from_is_compared(run: Path, run_file: Any) -> None:
    REFUSED["weights"][0](run)
    file = run_file("sft", adapter={"start": str(run)}, name="more")
    assert_refused("adapter_model.safetensors: was changed", lambda: lora_kit.train(file))
    assert not Path("runs/more").exists()


@pytest.mark.slow
def test_what_a_user_may_edit(run: Path, base: Path, tmp_path: Path) -> None:
    own = shutil.copytree(base, tmp_path / "own")
    config(base_model_name_or_path=str(own), revision=None)(run)

    def edited(values: dict[str, Any]) -> None:
        values["name"] = "renamed"
        values["base"]["model"] = str(own)
        values["prove"]["shots"] = 0
        values["train"]["logging_steps"] = 7

    settings(edited)(run)
    (run / "adapter" / "notes.txt").write_text("mine", encoding="utf-8")
    (run / "adapter" / "README.md").write_text("mine", encoding="utf-8")
    renamed = run.rename(run.with_name("renamed"))
    assert FinishedRun(renamed).require_run().base.model == str(own)
    lora_kit.load(renamed)


def test_settings_that_are_compared(tmp_path: Path) -> None:
    def hashes(**changes: Any) -> dict[str, str]:
        values: dict[str, Any] = {
            "recipe": "sft",
            "name": "a",
            "seed": 0,
            "base": {"model": "here", "revision": None, "dtype": "float32"},
            "adapter": {"r": 4, "start": "../a"},
            "data": {
                "train": [{"source": "a.txt", "fraction": 0.5}],
                "eval": 0.1,
                "labels": ["no", "yes"],
                "workers": None,
            },
            "train": dict.fromkeys(k.removeprefix("train.") for k in FREE_TO_CHANGE),
            "prove": {"shots": 4},
        }
        for key, value in changes.items():
            section, _, name = key.partition("__")
            if name:
                values[section][name] = value
            else:
                values[section] = value
        (tmp_path / "run.yaml").write_text(json.dumps(values), encoding="utf-8")
        return settings_hashes(tmp_path / "run.yaml")

    plain = hashes()
    assert set(plain) == {"seed", "base", "adapter", "data", "train"}
    moved = [{"source": "/b.txt", "fraction": 0.5}]
    for same in (
        {"name": "b", "recipe": "../other/sft.py", "prove": {}},
        {"base__model": "there", "base__revision": "abc", "adapter__start": "../b"},
        {"data__train": moved, "data__workers": 3, "train__save_steps": 5},
    ):
        assert hashes(**same) == plain
    for section, other in (
        ("data", {"data__train": [{"source": "a.txt", "fraction": 0.6}]}),
        ("data", {"data__train": [*moved, "c.txt"]}),
        ("data", {"data__eval": 0.2}),
        ("data", {"data__labels": ["yes", "no"]}),
        ("base", {"base__dtype": "bfloat16"}),
        ("train", {"train__learning_rate": 1}),
        ("seed", {"seed": 1}),
    ):
        found = hashes(**other)
        assert {name for name in plain if plain[name] != found[name]} == {section}


@pytest.mark.slow
def test_settings_that_were_changed_are_not_continued(run_file: Any) -> None:
    """In the run directory itself: both sides of the comparison would be the same file."""
    file = run_file("cpt", **{"train.save_steps": 2})
    lora_kit.train(file)
    run = Path("runs/test")
    edit(run / "run.lock.json", lambda c: c.update(finished=False))
    settings(lambda v: v["train"].update(learning_rate=0.5))(run)
    words = "run.yaml: train: changed"
    assert_refused(words, lambda: lora_kit.train(run / "run.yaml", resume=True))
    assert_refused(words, lambda: lora_kit.train(file, "train.learning_rate=0.5", resume=True))
    settings(lambda v: v["train"].update(learning_rate=1e-2))(run)
    assert lora_kit.train(run / "run.yaml", resume=True)["training"]["steps"] == 4
