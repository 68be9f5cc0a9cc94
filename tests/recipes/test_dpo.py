"""The dpo recipe on a tiny base: its files, its report, and the way of a run through the verbs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from conftest import sentences
from processes import adapter_hash
from typer.testing import CliRunner

from lora_kit.cli import app
from lora_kit.errors import UserError
from lora_kit.launch import train
from lora_kit.train import trainer as module
from lora_kit.train.callbacks import Progress

RUN = Path("runs/test")


@pytest.fixture
def pairs_file(run_file: Any, work: Path) -> Path:
    """A run file with 60 pairs: the chosen completion is always the one with "fox" in it."""
    words = sentences(60)
    rows = [
        {
            "prompt": f"What is {number}?",
            "chosen": f"fox fox {text.split()[0]}",
            "rejected": text,
        }
        for number, text in enumerate(words)
    ]
    (work / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (work / "general.txt").write_text("<|endoftext|>".join(sentences(30, seed=9)))
    file: Path = run_file(
        "dpo",
        **{
            "data.train": "pairs.jsonl",
            "data.general": "general.txt",
            "train.max_steps": 8,
            "train.beta": 0.2,
        },
    )
    return file


def test_a_run_from_its_first_step_to_its_report(pairs_file: Path) -> None:
    report = train(pairs_file)
    rows = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[-1]["loss"] < 0.5
    assert rows[0].keys() >= {"step", "loss", "tokens", "seconds"}

    assert report == json.loads((RUN / "report.json").read_text())
    domain = report["domain"]
    assert (domain["documents"], domain["rival"]) == (24, "base")
    assert domain["accuracy"]["base"] == 0.5 and domain["margin"]["base"] == 0
    assert domain["accuracy"]["adapted"] == 1 and domain["margin"]["ci95"][0] > 0
    assert report["contenders"]["base"] == {"accuracy": 0.5, "margin": 0.0}
    assert report["general"]["documents"] == 30
    generation = report["generation"]
    for name in ("length", "unfinished", "kl"):
        assert generation[name].keys() == domain["margin"].keys()
    assert report["overfitting"]["train_accuracy"]["base"] == 0.5
    assert generation["kl"]["adapted"] > generation["kl"]["base"] == 0
    assert "objection" not in domain and report["verdict"]["domain"] == "better"
    assert "accuracy" in (RUN / "report.html").read_text(encoding="utf-8")

    lock = json.loads((RUN / "run.lock.json").read_text())
    assert lock["recipe"]["name"] == "dpo" and lock["auto"] == "AutoModelForCausalLM"
    assert lock["kind"] == "chat" and lock["finished"] is True


@pytest.mark.slow
def test_verbs_that_need_the_loss_of_a_text_say_so_in_one_line(pairs_file: Path) -> None:
    train(pairs_file, "train.max_steps=1")
    for words, verb in {
        "--scratch": ["compare", str(RUN), "--scratch"],
        f"--on {RUN}": ["combine", str(RUN), str(RUN), "--out", "out", "--on", str(RUN)],
    }.items():
        done = CliRunner().invoke(app, verb)
        assert isinstance(done.exception, UserError), done.exception
        said = str(done.exception)
        assert words in said and "cpt or sft" in said and "\n" not in said
    assert not Path("out").exists()


class Crash(Progress):
    """Breaks off after step 5 as a fault of the program would: nothing is saved there."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 5:
            raise ZeroDivisionError


@pytest.mark.slow
def test_a_resumed_run_is_the_same(pairs_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also its reference: it is of the model before the first step, not of the checkpoint."""
    train(pairs_file, "name=straight", "train.save_steps=4")
    with monkeypatch.context() as patch:
        patch.setattr(module, "Progress", Crash)
        with pytest.raises(ZeroDivisionError):
            train(pairs_file, "train.save_steps=4")
    train(pairs_file, "train.save_steps=4", resume=True)
    assert adapter_hash(RUN) == adapter_hash(Path("runs/straight"))


def test_what_it_does_not_read_and_what_is_missing_is_said(pairs_file: Path) -> None:
    for override, words in {
        "data.packing=documents": "data.packing",
        "data.supervise=all": "data.supervise",
        "prove.metrics=[f1]": "prove.metrics",
        "train.beta=0": "train.beta",
        "train.loss_type=ipo": "train.loss_type",
    }.items():
        with pytest.raises(UserError) as caught:
            train(pairs_file, override)
        assert words in str(caught.value) and "\n" not in str(caught.value).strip()
    Path("rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 30)
    with pytest.raises(UserError) as caught:
        train(pairs_file, "data.train=rows.jsonl")
    assert "chosen" in str(caught.value) and "rejected" in str(caught.value)
    assert not RUN.exists()
