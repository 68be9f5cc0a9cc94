"""The script that compares two checkouts: its run files, its keys, what it says of a difference."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_kit.run import load_run

BENCH = Path(__file__).resolve().parent.parent / "scripts" / "bench"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("same_bytes")


@pytest.fixture
def data(script: Any, tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    script.write_data(folder, BENCH.parent.parent)
    return folder


def test_every_case_is_a_run_file(script: Any, data: Path) -> None:
    assert len(script.CASES) >= 45
    for name, case in script.CASES.items():
        file = data / f"{name}.yaml"
        file.write_text(script.run_file(name))
        assert load_run(file).name == name
        assert case.get("after", name) in script.CASES


def test_a_kept_result_is_for_one_run_file_and_its_data(script: Any, data: Path) -> None:
    def key(name: str = "sft-padding", environment: str = "") -> str:
        return str(script.case_key(name, data, [environment]))

    before = key()
    (data / "held.jsonl").write_text("{}\n")  # this case does not read it
    assert key() == before
    (data / "prompts.jsonl").write_text("{}\n")
    changed = key()
    assert len({before, changed, key("sft-last"), key(environment="other versions")}) == 4


def test_a_difference_names_the_step_and_the_tensor(script: Any, tmp_path: Path) -> None:
    for folder, loss, weight in (("old", 2.0, 1.0), ("new", 2.5, 1.25)):
        (tmp_path / folder).mkdir()
        rows = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": loss}]
        (tmp_path / folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
        tensors = {"a": np.zeros(2, np.float32), "b": np.full(2, weight, np.float32)}
        save_file(tensors, tmp_path / folder / "adapter_model.safetensors")
    found = script.difference(tmp_path / "old", tmp_path / "new")
    assert found == "losses differ from step 2 on; 1 of 2 tensors, up to 2.5e-01 in b"
    assert script.difference(tmp_path / "old", tmp_path / "old").startswith("the losses are equal")
