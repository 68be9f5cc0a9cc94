"""Several processes that share a model, or machines: the same losses and adapter as one process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import yaml
from accelerate.utils.other import get_free_port
from forked import launch
from processes import adapter_hash
from safetensors.torch import load_file
from test_train_equivalence import losses
from trained import edit, folder_maker

import lora_kit as package
from lora_kit.run import shipped

pytestmark = pytest.mark.slow
HERE = Path(__file__).resolve().parent
# Chat rows of different lengths that divide evenly into steps of 8.
SETTINGS = {
    "data.eval": 12 / 60,
    "train.max_steps": 6,
    "train.per_device_train_batch_size": 4,
    "train.eval_steps": 3,
    "train.save_steps": 3,
    "train.ddp_timeout": 120,
}


@pytest.fixture(scope="module")
def alone(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with a run file, and `runs/one`: trained with one process."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        file = folder_maker(folder, base)("sft", **SETTINGS)
        package.train(file, "name=one", "train.gradient_accumulation_steps=2")
    return folder


@pytest.fixture
def place(alone: Path, work: Path) -> Path:
    """A copy of it, entered."""
    return Path(shutil.copytree(alone, work, dirs_exist_ok=True))


def config(name: str, **changes: Any) -> str:
    """A shipped config with other values, in the working folder."""
    values = yaml.safe_load((shipped("accelerate_configs") / f"{name}.yaml").read_text())
    file = Path(f"{name}-{changes.get('machine_rank', 0)}.yaml")
    file.write_text(yaml.safe_dump({**values, **changes}))
    return str(file)


def sharded(config_file: str, *arguments: str) -> None:
    """Train as `accelerate launch` would, sharded on a CPU."""
    recipe = str(shipped("recipes") / "sft.py")
    script = HERE / "sharded_on_cpu.py"
    code, said = launch(config_file, script, recipe, "run.yaml", *arguments)
    assert code == 0, said


def is_that_of_one_process(name: str) -> None:
    """The losses, the evaluation and the adapter of a run are those of `runs/one`."""
    run, one = Path("runs", name), Path("runs/one")
    for key in ("loss", "eval_loss"):
        assert len(losses(str(one), key)) == (6 if key == "loss" else 2)
        assert losses(str(run), key) == pytest.approx(losses(str(one), key), abs=1e-5)
    reports = [json.loads((folder / "report.json").read_text()) for folder in (run, one)]
    for who in ("base", "adapted"):
        found, expected = (report["domain"]["loss"][who] for report in reports)
        assert found == pytest.approx(expected, abs=1e-4)  # rounded to four digits
    assert reports[0]["training"]["world_size"] == 2
    assert reports[0]["audit"]["problems"] == []
    adapters = [
        load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (run, one)
    ]
    assert adapters[0].keys() == adapters[1].keys()
    for tensor, found in adapters[0].items():
        assert found.dtype == torch.float32, tensor
        assert torch.allclose(found, adapters[1][tensor], rtol=0, atol=1e-5), tensor


def interrupt(name: str) -> str:
    """Take a finished run back to its first checkpoint; returns the hash of its adapter."""
    run = Path("runs", name)
    before = adapter_hash(run)
    for rest in (run / "adapter", run / "checkpoints" / "checkpoint-6"):
        shutil.rmtree(rest)
    edit(run / "run.lock.json", lambda lock: lock.update(finished=False))
    return before


def test_fsdp2_equals_one_process(place: Path) -> None:
    file = config("fsdp_qlora", use_cpu=True)
    sharded(file, "name=two")
    is_that_of_one_process("two")
    before = interrupt("two")
    sharded(file, "name=two", "--resume")
    assert adapter_hash("runs/two") == before


def test_zero3_equals_one_process(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cpu")
    file = config("zero3", mixed_precision="no")
    sharded(file, "name=two")
    is_that_of_one_process("two")
    before = interrupt("two")
    sharded(file, "name=two", "--resume")
    assert adapter_hash("runs/two") == before


def test_two_nodes_equals_one_process(place: Path) -> None:
    """Two machines are two launches on one."""

    def train(*arguments: str) -> None:
        port = get_free_port()
        started = []
        for rank in (0, 1):
            file = config("cpu_2nodes", machine_rank=rank, main_process_port=port)
            words = ["train", "run.yaml", "name=two", "--accelerate", file, *arguments]
            started.append(processes.start([*processes.LORA_KIT, *words]))
        ended = [processes.finish(process) for process in started]
        assert [code for code, _ in ended] == [0, 0], ended

    train()
    is_that_of_one_process("two")
    before = interrupt("two")
    train("--resume")
    assert adapter_hash("runs/two") == before
