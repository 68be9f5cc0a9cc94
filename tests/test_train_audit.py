"""Every run is checked: planted faults stop it or end it with 1, saved and reported; no others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_base
from forked import two_ranks
from safetensors.torch import load_file, save_file
from trained import finish

import lora_kit as package
from lora_kit.adapter import attach as adapter_room
from lora_kit.errors import CheckFailed, Interrupted
from lora_kit.train import trainer as module
from lora_kit.train.callbacks import Progress
from lora_kit.train.guards import Guards

pytestmark = pytest.mark.slow

RUN = Path("runs/test")


def audit_of(run: Path = RUN) -> dict[str, Any]:
    return dict(json.loads((run / "report.json").read_text(encoding="utf-8"))["audit"])


def failed(run: Path = RUN) -> list[str]:
    return [check["name"] for check in audit_of(run)["checks"] if check["passed"] is not True]


def damaging(monkeypatch: pytest.MonkeyPatch, step: int, damage: Any) -> None:
    """Does something to the model after a step."""

    class Damage(Progress):
        def on_step_end(
            self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
        ) -> None:
            if state.global_step == step:
                with torch.no_grad():
                    damage(model)

    monkeypatch.setattr(module, "Progress", Damage)


def attached(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Does something to the model once its adapter is attached."""
    real = adapter_room.attach

    def attach(*arguments: Any) -> Any:
        model = real(*arguments)
        change(model)
        return model

    monkeypatch.setattr(adapter_room, "attach", attach)


def checkpointed(model: Any) -> None:
    """Gradients are checkpointed the old way, and nobody lets the inputs have any."""
    base = model.get_base_model()
    base.gradient_checkpointing_enable({"use_reentrant": True})
    base.disable_input_require_grads()


@pytest.mark.parametrize("recipe", ["cpt", "sft"])
@pytest.mark.quick
def test_a_run_says_what_was_found(recipe: str, request: pytest.FixtureRequest) -> None:
    run = request.getfixturevalue(f"{recipe}_run")
    audit = audit_of(run)
    assert audit["problems"] == []
    assert failed(run) == []
    assert audit["modules"]["q_proj"] == 2
    assert sum(audit["modules"].values()) == 14
    assert audit["coverage"] + audit["not_covered"]["embed_tokens"] == pytest.approx(1, abs=0.01)
    names = ["coverage", "gradients", "moved", "lora_B", "frozen", "saved", "effect"]
    assert [check["name"] for check in audit["checks"]] == names


def test_a_rate_of_zero(run_file: Any) -> None:
    with pytest.raises(CheckFailed, match="the adapter did not change: the learning rate was 0"):
        finish(run_file, **{"train.learning_rate": 0.0})
    assert (RUN / "adapter" / "adapter_model.safetensors").is_file()
    assert json.loads((RUN / "run.lock.json").read_text())["finished"]
    assert failed() == ["moved", "effect"]
    assert len(audit_of()["problems"]) == 1


def test_a_typo_that_matches_one_layer_of_eight(
    run_file: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    deep = make_base(tmp_path / "deep", num_hidden_layers=8, hidden_size=32, intermediate_size=32)
    changes = {"base.model": str(deep), "adapter.target_modules": r".*layers\.1\..*q_proj"}
    with pytest.raises(CheckFailed, match="q_proj is adapted in 1 of 8 layers"):
        finish(run_file, **changes)
    said = capsys.readouterr().err
    warned = said.index("warning: q_proj is adapted in 1 of 8 layers")
    assert warned < said.index("step 1/8")
    assert failed() == ["coverage"]


def test_a_frozen_head(run_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def freeze(model: Any) -> None:
        for name, parameter in model.named_parameters():
            if "lm_head.lora_" in name:
                parameter.requires_grad_(False)

    attached(monkeypatch, freeze)
    own = make_base(tmp_path / "own", tie_word_embeddings=False)
    changes = {"base.model": str(own), "adapter.target_modules": ["q_proj", "lm_head"]}
    with pytest.raises(CheckFailed, match="lm_head got no gradient in the first steps"):
        finish(run_file, **changes)
    assert "gradients" in failed()


def test_a_b_of_zeros_in_memory(run_file: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def zero(model: Any) -> None:
        next(p for n, p in model.named_parameters() if "1.self_attn.q_proj.lora_B" in n).zero_()

    damaging(monkeypatch, 8, zero)
    with pytest.raises(CheckFailed, match=r"1\.self_attn\.q_proj\.lora_B.* is zero") as caught:
        finish(run_file)
    assert "\n" not in str(caught.value)
    assert failed() == ["lora_B"]


def test_a_shard_lost_in_saving(run_file: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Guards.save_model

    def save_model(self: Any, folder: str, **options: Any) -> None:
        real(self, folder, **options)
        file = Path(folder) / "adapter_model.safetensors"
        weights = load_file(file)
        next(w for name, w in weights.items() if "lora_B" in name)[16:] = 0
        save_file(weights, file, metadata={"format": "pt"})

    monkeypatch.setattr(Guards, "save_model", save_model)
    with pytest.raises(CheckFailed, match=r"is incomplete .*accelerate#4206"):
        finish(run_file)
    assert failed() == ["saved"]


def test_a_frozen_weight_that_moves(run_file: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def move(model: Any) -> None:
        weight = next(p for n, p in model.named_parameters() if "embed_tokens.weight" in n)
        weight[5, 5] += 1e-6

    damaging(monkeypatch, 3, move)
    with pytest.raises(CheckFailed, match=r"embed_tokens\.weight changed during training"):
        finish(run_file)
    assert failed() == ["frozen"]


def test_no_gradient_through_checkpoints_stops_at_once(
    run_file: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    attached(monkeypatch, checkpointed)
    with pytest.raises(CheckFailed, match=r"no gradient reaches the adapter.*open-unlearning#178"):
        finish(run_file, speed="plain")  # else the plan says what is computed again
    assert not (RUN / "adapter").exists()


def test_checkpoints_that_keep_gradients_from_the_layers(
    run_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head learns, and the loss falls, so that only the audit sees it."""
    attached(monkeypatch, checkpointed)
    own = make_base(tmp_path / "own", tie_word_embeddings=False)
    changes = {"base.model": str(own), "speed": "plain"}
    changes |= {"adapter.target_modules": ["q_proj", "v_proj", "lm_head"]}
    words = r"q_proj and 3 more: got no gradient in the first steps: .*open-unlearning#178"
    with pytest.raises(CheckFailed, match=words):
        finish(run_file, **changes)


def test_nothing_trainable_stops(run_file: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    attached(monkeypatch, lambda model: model.requires_grad_(False))
    with pytest.raises(CheckFailed, match="nothing trains"):
        package.train(run_file())


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter.use_dora": True},
        {"adapter.lora_dropout": 0.2, "train.gradient_checkpointing": True},
        {"base.quantize": "nf4", "train.lr_scheduler_type": "cosine"},  # the first step has rate 0
        {"base.quantize": "int8"},
        {"train.optim": "adamw_8bit", "train.max_steps": 2},
        {"adapter.target_modules": ["embed_tokens", "q_proj"]},
    ],
    ids=str,
)
def test_no_false_alarm(run_file: Any, changes: dict[str, Any]) -> None:
    finish(run_file, **changes)
    assert failed() == []


def test_no_false_alarm_where_a_run_goes_on(run_file: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resumed with one step left, then with none, then begun from the adapter of another run."""
    import signal

    def stop(model: Any) -> None:
        signal.raise_signal(signal.SIGTERM)

    file = run_file("cpt", **{"train.max_steps": 8})
    with monkeypatch.context() as patch:
        damaging(patch, 7, stop)
        with pytest.raises(Interrupted):
            package.train(file)
    with monkeypatch.context() as patch:
        patch.setattr("lora_kit.prove.evaluate.evaluate", lambda *a, **b: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            package.train(file, resume=True)
    package.train(file, resume=True)
    assert failed() == ["gradients"]  # not seen, as no step was left
    assert audit_of()["problems"] == []
    package.train(run_file("sft", **{"adapter": {"start": "runs/test"}}), "name=next")
    assert failed(Path("runs/next")) == []


def test_two_processes_find_the_same(run_file: Any) -> None:
    """That a good run of two passes every check is part of test_train_equivalence.py."""
    file = run_file("sft")
    code, said = two_ranks("sft", file, "train.learning_rate=0")
    assert code == 1
    assert "the adapter did not change" in said
