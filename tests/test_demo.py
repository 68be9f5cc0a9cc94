"""`lora-kit demo`, with fewer steps; and which type it takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora_kit import demo
from lora_kit.errors import UserError
from lora_kit.speed.runtime import float32_is_faster
from lora_kit.start import start


@pytest.mark.slow
def test_the_demo_ends_with_a_merged_model_and_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ["train.max_steps=3", "prove.shots=0", "data.general="]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "start", lambda file, given: start(file, [*given, *short]))
    demo.run_demo()
    out = capsys.readouterr().out
    assert "1. Continued pre-training" in out and "2. Instruction tuning" in out
    assert out.partition("A: ")[2].splitlines()[0].strip()
    assert (tmp_path / "runs/demo/merged/model.safetensors").is_file()
    lock = json.loads((tmp_path / "runs/demo/sft/run.lock.json").read_text(encoding="utf-8"))
    assert lock["finished"]


def test_what_is_no_demo_is_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    notes = tmp_path / "runs/demo/merged/notes.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match=r"merged exists and is not from a demo"):
        demo.run_demo()
    assert notes.read_text(encoding="utf-8") == "mine"


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
