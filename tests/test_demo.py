"""`lora-kit demo`, with fewer steps; and which type it takes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import lora_kit
from lora_kit import demo
from lora_kit.errors import UserError
from lora_kit.folders import only_writer
from lora_kit.run import load_run, write_run
from lora_kit.speed.runtime import float32_is_faster


@pytest.mark.slow
def test_the_demo_ends_with_a_merged_model_and_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ["train.max_steps=3", "prove.shots=0", "train.logging_steps=1"]
    monkeypatch.chdir(tmp_path)
    # In this process: two starts take twenty seconds of CPU time.
    monkeypatch.setattr(demo, "start", lambda file, given: lora_kit.train(file, *given, *short))
    demo.run_demo()
    out = capsys.readouterr().out
    assert "1. Continued pre-training" in out and "2. Instruction tuning" in out
    assert out.partition("A: ")[2].splitlines()[0].strip()
    assert (tmp_path / "runs/demo/merged/model.safetensors").is_file()
    for step in ("cpt", "sft"):
        run = tmp_path / "runs/demo" / step
        assert json.loads((run / "run.lock.json").read_text(encoding="utf-8"))["finished"]
        report = json.loads((run / "report.json").read_text(encoding="utf-8"))
        assert report["training"]["steps"] == 3
        assert report["domain"]["documents"] >= 20 and report["general"]["documents"] >= 20


def test_what_is_no_demo_is_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    notes = tmp_path / "runs/demo/merged/notes.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match=r"merged exists and is not from a demo"):
        demo.run_demo()
    assert notes.read_text(encoding="utf-8") == "mine"


def of_the_demo(folder: Path, step: str, **changes: Any) -> None:
    """A run as the demo leaves it, with another setting."""
    folder.mkdir(parents=True)
    run = load_run(demo._config(step))
    values = {"name": f"demo/{step}", "base": run.base.model_copy(update={"dtype": "float32"})}
    write_run(run.model_copy(update={**values, **changes}), folder / "run.yaml")
    (folder / "run.lock.json").write_text("{}", encoding="utf-8")


def test_runs_of_ones_own_are_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    of_the_demo(demo.CPT, "cpt")
    of_the_demo(demo.SFT, "sft")
    lock = {"adapter": {"sha256": "abc"}}
    (demo.SFT / "run.lock.json").write_text(json.dumps(lock), encoding="utf-8")
    demo.MERGED.mkdir()
    (demo.MERGED / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="merged exists and is not from a demo"):
        demo._remove_earlier()
    (demo.MERGED / "merge.json").write_text(json.dumps(lock), encoding="utf-8")
    for change in ({"seed": 1}, {"recipe": "sft"}):
        shutil.rmtree(demo.CPT)
        of_the_demo(demo.CPT, "cpt", **change)
        with pytest.raises(UserError, match="cpt exists and is not from a demo: move it away"):
            demo._remove_earlier()
        assert demo.CPT.is_dir() and demo.SFT.is_dir() and demo.MERGED.is_dir()
    shutil.rmtree(demo.CPT)
    of_the_demo(demo.CPT, "cpt")
    with only_writer(demo.CPT), pytest.raises(UserError, match="cpt: in use by process"):
        demo._remove_earlier()
    demo._remove_earlier()
    assert not list((tmp_path / "runs/demo").iterdir())


@pytest.mark.parametrize("seconds, faster", [((1.0, 30.0), True), ((1.0, 0.6), False)])
def test_the_type_follows_what_is_measured(
    seconds: tuple[float, float], faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Measured:
        def __init__(self, _: str, globals: dict[str, Any], **__: Any) -> None:
            self.times = [seconds["bfloat16" in str(globals["x"].dtype)]]

        def blocked_autorange(self, **_: Any) -> Measured:
            return self

    monkeypatch.setattr("torch.utils.benchmark.Timer", Measured)
    assert float32_is_faster() is faster
