"""The best adapter is the one that is kept and used; a run that no longer improves stops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import RunMaker
from forked import two_ranks
from processes import adapter_hash
from trained import folder_maker

import lora_kit as package
from lora_kit.errors import CheckFailed, RunFileError, UserError
from lora_kit.hashes import file_hash
from lora_kit.run import load_run
from lora_kit.tasks.batches import IGNORED
from lora_kit.train import trainer as module
from lora_kit.train.callbacks import Progress, read_metrics
from lora_kit.train.guards import Guards, best_step, stopped_early

pytestmark = pytest.mark.slow

# A dozen short rows again and again: learned by heart, and the held-out ones get worse.
OVERFIT = {
    "data.eval": 0.8,
    "data.packing": "none",
    "adapter.r": 16,
    "train.max_steps": 40,
    "train.eval_steps": 4,
    "train.save_steps": 5,
    "train.lr_scheduler_type": "constant",
    "train.logging_steps": 20,
}
PATIENCE = "train.early_stopping_patience=2"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """The working folder of a run of 40 steps, which does not stop early."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        package.train(folder_maker(folder, base)("cpt", **OVERFIT))
    return folder


def losses(run: Path) -> dict[int, float]:
    rows = read_metrics(run / "metrics.jsonl")
    return {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}


def kept(run: Path) -> list[int]:
    return sorted(int(folder.name[11:]) for folder in (run / "checkpoints").iterdir())


def weights(run: Path, step: int) -> str:
    return file_hash(run / "checkpoints" / f"checkpoint-{step}" / "adapter_model.safetensors")


def expected_stop(curve: dict[int, float], patience: int) -> tuple[int, int]:
    """The best step and the one to stop after, found by walking along the curve."""
    best, waited = min(curve), 0
    for step in sorted(curve)[1:]:
        best, waited = (step, 0) if curve[step] < curve[best] else (best, waited + 1)
        if waited == patience:
            return best, step
    raise AssertionError("the curve goes on falling: it tests nothing")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The trainers that were made."""
    trainers: list[Any] = []
    real = Guards.__init__

    def remembered(self: Any, *args: Any, **options: Any) -> None:
        trainers.append(self)
        real(self, *args, **options)

    monkeypatch.setattr(Guards, "__init__", remembered)
    return trainers


def outcome(trainer: Any) -> tuple[int | None, bool]:
    """The best step, and whether the run stopped early."""
    patience = trainer.guard.run.train.early_stopping_patience
    return best_step(trainer.state), stopped_early(trainer.state, patience)


def test_the_best_is_kept_and_used(whole: Path) -> None:
    run = whole / "runs" / "test"
    curve = losses(run)
    assert list(curve) == list(range(4, 44, 4))
    best = min(curve, key=lambda step: curve[step])
    assert 4 < best < 35 and curve[40] > curve[best] + 0.01  # it did overfit
    assert kept(run) == [best, 35, 40]  # the newest two, and the best
    assert adapter_hash(run) == weights(run, best) != weights(run, 40)
    for step in (best, 35, 40):
        folder = run / "checkpoints" / f"checkpoint-{step}"
        # A run may be moved: the state that is continued from names no place.
        assert str(whole) not in (folder / "trainer_state.json").read_text()
        assert "checkpoint-" not in (folder / "trainer_state.json").read_text()


def test_the_last_one_where_it_is_asked_for(
    whole: Path, run_file: RunMaker, seen: list[Any]
) -> None:
    package.train(run_file("cpt", **OVERFIT), "train.load_best_model_at_end=false")
    run = Path("runs/test")
    assert kept(run) == kept(whole / run)
    assert adapter_hash() == weights(whole / run, 40)
    assert outcome(seen[0]) == (kept(run)[0], False)


def test_no_evaluation_no_best(run_file: RunMaker, seen: list[Any]) -> None:
    package.train(run_file())
    assert outcome(seen[0]) == (None, False)
    assert kept(Path("runs/test")) == [4]


def test_the_last_step_is_looked_at(run_file: RunMaker) -> None:
    package.train(run_file(), "train.eval_steps=3")
    assert list(losses(Path("runs/test"))) == [3, 4]


@pytest.mark.parametrize("patience", [1, 2])
def test_stops_when_patience_runs_out(
    whole: Path, run_file: RunMaker, seen: list[Any], patience: int
) -> None:
    best, stop = expected_stop(losses(whole / "runs/test"), patience)
    package.train(run_file("cpt", **OVERFIT), f"train.early_stopping_patience={patience}")
    run = Path("runs/test")
    assert list(losses(run)) == list(range(4, stop + 4, 4))
    assert {best, stop} <= set(kept(run)) and max(kept(run)) == stop < 40
    assert adapter_hash() == weights(run, best) == weights(whole / run, best)
    assert outcome(seen[0]) == (best, True)


class Crash(Progress):
    """Breaks off in step 26, while the patience runs out: nothing is saved there."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 26:
            raise ZeroDivisionError


def test_continued_is_uninterrupted(
    whole: Path, run_file: RunMaker, seen: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a crash between the best step and the stop, and one between the stop and the report."""
    best, stop = expected_stop(losses(whole / "runs/test"), 2)
    assert best < 25 < 26 < stop and stop % 3  # steps in an epoch: the stop lies inside of one
    file = run_file("cpt", **OVERFIT)
    package.train(file, PATIENCE, "name=straight")
    with monkeypatch.context() as patch:
        patch.setattr(module, "Progress", Crash)
        with pytest.raises(ZeroDivisionError):
            package.train(file, PATIENCE)
    with monkeypatch.context() as patch:
        patch.setattr("lora_kit.prove.evaluate.evaluate", lambda *a, **b: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            package.train(file, PATIENCE, resume=True)
    package.train(file, PATIENCE, resume=True)
    run, straight = Path("runs/test"), Path("runs/straight")
    assert adapter_hash() == adapter_hash(straight)
    assert (losses(run), kept(run)) == (losses(straight), kept(straight))
    for trainer in (seen[0], *seen[2:]):
        assert (trainer.state.global_step, outcome(trainer)) == (stop, (best, True))


def test_continued_after_the_last_step_takes_no_other(
    run_file: RunMaker, seen: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last step lies inside an epoch, of which rows are left."""
    changes = {"data.packing": "none", "train.max_steps": 4}  # of 9 steps
    file = run_file("cpt", **changes)
    package.train(file, "name=straight")
    with monkeypatch.context() as patch:
        patch.setattr("lora_kit.prove.evaluate.evaluate", lambda *a, **b: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            package.train(file)
    package.train(file, resume=True)
    assert seen[-1].state.global_step == 4
    assert adapter_hash() == adapter_hash("runs/straight")


def test_the_best_checkpoint_is_damaged(
    whole: Path, run_file: RunMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = run_file("cpt", **OVERFIT)
    with monkeypatch.context() as patch:
        patch.setattr("lora_kit.prove.evaluate.evaluate", lambda *a, **b: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            package.train(file)
    best = kept(Path("runs/test"))[0]
    (Path("runs/test/checkpoints") / f"checkpoint-{best}" / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError) as caught:
        package.train(file, resume=True)
    assert f"checkpoint-{best}: adapter_model.safetensors is missing (best" in str(caught.value)
    assert "runs/test/run.yaml --resume train.load_best_model_at_end=false" in str(caught.value)
    package.train(file, "train.load_best_model_at_end=false", resume=True)
    assert adapter_hash() == weights(whole / "runs" / "test", 40)


def test_all_ranks_stop_at_the_same_step(run_file: RunMaker) -> None:
    file = run_file("cpt", **OVERFIT, **{"train.per_device_train_batch_size": 2})
    code, said = two_ranks("cpt", file, PATIENCE)
    assert code == 0, said
    run = Path("runs/test")
    best, stop = expected_stop(losses(run), 2)
    assert max(losses(run)) == stop < 40
    assert adapter_hash() == weights(run, best)
    assert said.count(f"using the adapter of step {best}") == 1


def test_mistakes(run_file: RunMaker) -> None:
    with pytest.raises(RunFileError) as caught:
        load_run(run_file(), [PATIENCE, "train.metric_for_best_model=loss", "train.patience=2"])
    assert caught.value.problems == [
        "train.early_stopping_patience: 2 is invalid: it counts evaluations: set train.eval_steps",
        "train.metric_for_best_model: not set here: the best adapter is the one with the lowest "
        "eval_loss",
        "train.patience: unknown key; did you mean `early_stopping_patience`?",
    ]
    # Where eval_steps itself is wrong, it alone is named.
    with pytest.raises(RunFileError) as caught:
        load_run(run_file(), [PATIENCE, "train.eval_steps=0"])
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["train.eval_steps"]


def test_nothing_to_judge_by(run_file: RunMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss over no label is no loss of 0, which would be the lowest."""

    def without_labels(self: Any, inputs: Any) -> Any:
        inputs["labels"][:] = inputs["labels"].new_tensor(IGNORED)
        inputs.pop("places", None)
        return inputs

    real = Guards.evaluate

    def evaluate(self: Any, *args: Any, **options: Any) -> Any:
        self._prepare_inputs = without_labels.__get__(self)
        return real(self, *args, **options)

    monkeypatch.setattr(Guards, "evaluate", evaluate)
    with pytest.raises(CheckFailed, match="step 2: eval_loss is nan over 0 held-out labels"):
        package.train(run_file(), "train.eval_steps=2")


def test_disk_for_the_best_one_too(run_file: RunMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def full(where: Path, needed: int, _: str) -> None:
        asked.append(needed)
        raise UserError("full")

    monkeypatch.setattr(module, "check_room", full)
    for changes in ([], ["train.eval_steps=4"], ["train.save_total_limit=3"]):
        with pytest.raises(UserError, match="full"):
            package.train(run_file(), *changes)
    assert asked[0] < asked[1] == asked[2]
