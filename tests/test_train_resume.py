"""Continuing a run: only the same one, only from a whole checkpoint, and what is kept on disk."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from conftest import make_base
from processes import adapter_hash
from trained import folder_maker

import lora_kit as package
from lora_kit.errors import CheckFailed, UserError
from lora_kit.train import trainer as module
from lora_kit.train.callbacks import Progress, read_metrics

pytestmark = pytest.mark.slow

RUN = Path("runs/test")
CHECKPOINTS = RUN / "checkpoints"


class Crash(Progress):
    """Breaks off after step 6 as a fault of the program would: nothing is saved there."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 7:
            raise ZeroDivisionError


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `kept`: the working folder of the two runs below."""
    folder = tmp_path_factory.mktemp("resume")
    work = folder / "work"
    work.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        changes = {"train.max_steps": 8, "train.save_steps": 2}
        file = folder_maker(work, base)("cpt", **changes)
        package.train(file, "name=straight")
        patch.setattr(module, "Progress", Crash)
        with pytest.raises(ZeroDivisionError):
            package.train(file)
        assert kept() == [4, 6]
    work.rename(folder / "kept")
    return folder


@pytest.fixture
def crashed(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run file of runs/test, of 8 steps, that broke off in the seventh, with checkpoints of
    steps 4 and 6; runs/straight is the same, unbroken. Always in the same place, as a run knows
    where its data lie."""
    shutil.rmtree(trained / "work", ignore_errors=True)
    shutil.copytree(trained / "kept", trained / "work")
    monkeypatch.chdir(trained / "work")
    return trained / "work" / "run.yaml"


def kept() -> list[int]:
    return sorted(int(folder.name.split("-")[1]) for folder in CHECKPOINTS.iterdir())


def change(file: Path, key: str, value: Any) -> None:
    values = json.loads(file.read_text())
    place = values
    *sections, last = key.split(".")
    for section in sections:
        place = place[section]
    place[last] = value
    file.write_text(json.dumps(values))


def test_refuses_what_decides_the_result(crashed: Path, tmp_path: Path) -> None:
    """Each difference by itself is refused and named; together they are all named at once."""
    differences = {
        "seed": ("seed=1", "seed was 0, is now 1"),
        "batch": ("train.per_device_train_batch_size=2", "batch_size was 4, is now 2"),
        "accumulation": ("train.gradient_accumulation_steps=2", "steps was 1, is now 2"),
        "rate": ("train.learning_rate=1e-3", "train.learning_rate was 0.01, is now 0.001"),
        "rank": ("adapter.r=8", "adapter.r was 4, is now 8"),
        "share": ("data.eval=0.3", "data.eval was 0.4, is now 0.3"),
        "dtype": ("base.dtype=bfloat16", "base.dtype was 'float32', is now 'bfloat16'"),
        "steps": ("train.max_steps=9", "train.max_steps was 8, is now 9"),
        "evaluations": ("train.eval_steps=4", "train.eval_steps was None, is now 4"),
    }
    before = adapter_files()
    for override, words in differences.values():
        with pytest.raises(UserError) as caught:
            package.train(crashed, override, resume=True)
        assert words in str(caught.value)
        assert caught.value.exit_code == 2
        assert str(caught.value).count(", is now ") == 1
    with pytest.raises(UserError) as caught:
        package.train(crashed, *(o for o, _ in differences.values()), resume=True)
    for _, words in differences.values():
        assert words in str(caught.value)
    assert adapter_files() == before


def adapter_files() -> dict[str, int]:
    files = [file for file in RUN.rglob("*") if file.is_file() and file.name != ".writer"]
    return {str(file): file.stat().st_mtime_ns for file in files}


def test_refuses_other_data_and_another_base(crashed: Path, tmp_path: Path) -> None:
    text = Path("text.txt").read_text()
    Path("text.txt").write_text(text.replace("queen", "king", 1) + "<|endoftext|>more")
    with pytest.raises(UserError, match=r"text\.txt was changed"):
        package.train(crashed, resume=True)
    Path("text.txt").write_text(text)
    base = Path(json.loads(crashed.read_text())["base"]["model"])
    moved = shutil.copytree(base, tmp_path / "copy")
    (moved / "model.safetensors").unlink()
    other = make_base(tmp_path / "other", initializer_range=0.03)
    (other / "model.safetensors").rename(moved / "model.safetensors")
    change(crashed, "base.model", str(moved))
    # The run remembers the path: make it the same one, so that the weights alone differ.
    stored = RUN / "run.yaml"
    stored.write_text(stored.read_text().replace(str(base), str(moved)))
    with pytest.raises(UserError, match=r"the files of the base .* were changed") as caught:
        package.train(crashed, resume=True)
    assert "is now" not in str(caught.value)


def test_refuses_another_number_of_processes(
    crashed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")  # as accelerate tells its workers
    with pytest.raises(UserError, match="processes were 1, are now 2"):
        package.train(crashed, resume=True)


@pytest.mark.quick
def test_goes_on_where_only_the_writing_differs(crashed: Path) -> None:
    report = package.train(crashed, "train.logging_steps=2", "train.save_steps=3", resume=True)
    assert report["training"]["steps"] == 8
    assert adapter_hash() == adapter_hash("runs/straight")
    rows = read_metrics(RUN / "metrics.jsonl")
    # Cut back to step 6, then every second step; each once.
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6, 8]
    straight = read_metrics(Path("runs/straight/metrics.jsonl"))
    assert rows[5]["loss"] == straight[5]["loss"]
    assert rows[6]["tokens"] == straight[7]["tokens"]
    with pytest.raises(UserError, match="already finished; choose another with name=NAME"):
        package.train(crashed, resume=True)


def test_nothing_to_continue(crashed: Path) -> None:
    with pytest.raises(UserError, match="no such run to resume"):
        package.train(crashed, "name=another", resume=True)
    assert not Path("runs/another").exists()
    with pytest.raises(
        UserError,
        match=r"runs/test exists: resume it \(lora-kit train runs/test/run.yaml --resume\)",
    ):
        package.train(crashed)
    lock = RUN / "run.lock.json"
    kept_lock = lock.rename(RUN / "aside.json")
    with pytest.raises(UserError, match=r"run\.lock\.json: missing or incomplete"):
        package.train(crashed, resume=True)
    kept_lock.rename(lock)
    shutil.rmtree(CHECKPOINTS)
    with pytest.raises(UserError, match=r"no intact checkpoint to resume from \(none was saved"):
        package.train(crashed, resume=True)


def damage(how: str, folder: Path) -> None:
    if how == "no optimizer":
        (folder / "optimizer.pt").unlink()
    elif how == "flipped bit":
        file = folder / "adapter_model.safetensors"
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.write_bytes(content)
    elif how == "no seal":
        (folder / "seal.json").unlink()
    elif how == "another seal":
        (folder / "seal.json").write_text('{"files": []}')
    else:
        seal = folder / "seal.json"
        seal.write_bytes(seal.read_bytes()[:40])


DAMAGES = {
    "no optimizer": "optimizer.pt is missing",
    "flipped bit": "adapter_model.safetensors was changed after it was saved",
    "no seal": "incomplete: the run was stopped while saving it",
    "cut seal": "incomplete: the run was stopped while saving it",
    "another seal": "incomplete: the run was stopped while saving it",
}


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_checkpoint_is_not_used(
    crashed: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    damage(how, CHECKPOINTS / "checkpoint-6")
    capsys.readouterr()
    package.train(crashed, resume=True)
    said = capsys.readouterr().err
    assert f"skipping a checkpoint: runs/test/checkpoints/checkpoint-6: {DAMAGES[how]}" in said
    assert "resuming after step 4" in said
    assert adapter_hash() == adapter_hash("runs/straight")


def test_all_checkpoints_damaged(crashed: Path) -> None:
    damage("flipped bit", CHECKPOINTS / "checkpoint-6")
    damage("no seal", CHECKPOINTS / "checkpoint-4")
    with pytest.raises(UserError) as caught:
        package.train(crashed, resume=True)
    assert "was changed after it was saved" in str(caught.value)
    assert "incomplete: the run was stopped" in str(caught.value)
    assert kept() == [4, 6]


@pytest.mark.parametrize(("limit", "expected"), [(1, [8]), (2, [6, 8])])
def test_checkpoints_are_bounded(run_file: Any, limit: int, expected: list[int]) -> None:
    changes = {"max_steps": 8, "save_steps": 2, "save_total_limit": limit}
    package.train(run_file("cpt", **{f"train.{key}": value for key, value in changes.items()}))
    assert kept() == expected
    names = {file.name for file in (CHECKPOINTS / "checkpoint-8").iterdir()}
    assert names == {
        *("adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt"),
        *("rng_state.pth", "trainer_state.json", "seal.json"),
    }


def test_stopped_after_the_last_step(run_file: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last checkpoint is there, the comparison is not: continuing trains no further."""
    file = run_file()
    package.train(file, "name=straight")
    with monkeypatch.context() as patch:
        patch.setattr("lora_kit.prove.evaluate.evaluate", lambda *a, **b: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            package.train(file)
    report = package.train(file, resume=True)
    assert report["training"]["steps"] == 4
    assert adapter_hash() == adapter_hash("runs/straight")
    assert [row["step"] for row in read_metrics(RUN / "metrics.jsonl")] == [1, 2, 3, 4]


def test_disk_is_checked_before_training(run_file: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda where: usage(1 << 40, 1 << 40, 100_000))
    with pytest.raises(UserError, match=r"needs [1-9]\d* MiB of disk space, 0 MiB are free: free"):
        package.train(run_file())
    assert not Path("runs").exists()


class Overflow(Progress):
    """The gradient of step 3 is finite, the weights after it are not."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == 3:
            next(p for p in model.parameters() if p.requires_grad).data[0, 0] = float("inf")


def test_overflown_weights_push_out_no_checkpoint(
    run_file: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "Progress", Overflow)
    changes = {"save_steps": 1, "save_total_limit": 1}
    with pytest.raises(CheckFailed, match="step 3: the adapter's weights are no longer finite"):
        package.train(run_file("cpt", **{f"train.{key}": value for key, value in changes.items()}))
    assert kept() == [2]
    assert (CHECKPOINTS / "checkpoint-2" / "seal.json").is_file()


def test_another_tokenizer_is_refused(run_file: Any, tmp_path: Path) -> None:
    own = make_base(tmp_path / "own")
    file = run_file("cpt", **{"base.model": str(own), "train.save_steps": 2})
    package.train(file)
    write_lock_unfinished(Path("runs/test"))
    text = (own / "chat_template.jinja").read_text(encoding="utf-8")
    (own / "chat_template.jinja").write_text(text + " ", encoding="utf-8")
    with pytest.raises(UserError, match=r"the files of the base .* were changed"):
        package.train(file, resume=True)


def write_lock_unfinished(run: Path) -> None:
    lock = json.loads((run / "run.lock.json").read_text(encoding="utf-8"))
    (run / "run.lock.json").write_text(json.dumps({**lock, "finished": False}), encoding="utf-8")
