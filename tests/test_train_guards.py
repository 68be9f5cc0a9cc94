"""Each guard on trainers of many kinds: transformers' own, TRL's, and one that a test defines."""

from __future__ import annotations

import itertools
import json
import math
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forked import launch
from guarded import KINDS, At, Library, Penalized, crash, halves_of, make, tokenizer
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments

from lora_kit.base.pin import Pinned
from lora_kit.errors import CheckFailed, Interrupted, UserError
from lora_kit.hashes import file_hash
from lora_kit.run import shipped
from lora_kit.train.callbacks import read_metrics
from lora_kit.train.guards import GuardEvents, Guards, best_step, guarded, stopped_early
from lora_kit.train.interrupt import StopSignal
from lora_kit.train.save import read_seal, save_run
from lora_kit.train.trainer import fit


def any_trainer(test: Any) -> Any:
    """A column of the grid: the same test for each kind."""
    return pytest.mark.slow(pytest.mark.parametrize("kind", KINDS)(test))


def adapter(trainer: Any) -> dict[str, torch.Tensor]:
    named = trainer.model.named_parameters()
    return {name: p.detach().clone() for name, p in named if p.requires_grad}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def kept(folder: Path) -> list[int]:
    return sorted(int(found.name[11:]) for found in (folder / "checkpoints").glob("checkpoint-*"))


def weights(folder: Path, step: int) -> str:
    return file_hash(folder / "checkpoints" / f"checkpoint-{step}" / "adapter_model.safetensors")


def losses(trainer: Any, key: str = "loss") -> list[float]:
    return [row[key] for row in trainer.state.log_history if key in row]


# ------------------------------------------------------------------ the same training
# The plain loss of the two kinds that are left out is another one.
@pytest.mark.parametrize("kind", ["language model", "SFT", "DPO", "GRPO", "a user's"])
def test_guarded_is_plain(kind: str, tmp_path: Path) -> None:
    plain = make(kind, tmp_path / "plain", guards=False)
    plain.train()
    trainer = make(kind, tmp_path / "guarded")
    fit(trainer, resume=False)
    assert losses(trainer) == losses(plain)
    assert same(adapter(trainer), adapter(plain))


@any_trainer
def test_evaluating_changes_nothing(kind: str, tmp_path: Path) -> None:
    without = make(kind, tmp_path / "without")
    fit(without, resume=False)
    watched = make(kind, tmp_path / "with", eval_steps=1, load_best_model_at_end=False)
    fit(watched, resume=False)
    assert len(losses(watched, "eval_loss")) == 4
    assert same(adapter(watched), adapter(without))


# ------------------------------------------------------------------ a task's own loss
own_loss = pytest.mark.parametrize("kind", ["language model", "classifier"])


@pytest.mark.slow
@own_loss
@pytest.mark.parametrize("cut", [(4, 2), (1, 8)])
def test_the_step_does_not_depend_on_how_it_is_cut(
    kind: str, cut: tuple[int, int], tmp_path: Path
) -> None:
    def trained(rows: int, steps: int) -> tuple[list[float], torch.Tensor]:
        gradients = Gradients()
        sizes = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": steps}
        settings = {**UNCLIPPED, **sizes}
        trainer = make(kind, tmp_path / str(rows), callbacks=[gradients], **settings)
        fit(trainer, resume=False)
        return losses(trainer), torch.stack(gradients.seen)

    expected, gradient = trained(8, 1)
    found, other = trained(*cut)
    assert found == pytest.approx(expected, rel=1e-5)
    assert (other - gradient).norm() <= 1e-5 * gradient.norm()


@own_loss
def test_evaluation_is_the_mean_over_all_labels(kind: str, tmp_path: Path) -> None:
    """Computed here row by row; in batches of 3 the last one is short."""
    trainers = [
        make(kind, tmp_path / str(size), eval_steps=4, per_device_eval_batch_size=size)
        for size in (8, 3, 1)
    ]
    guard, rows = trainers[0].guard, trainers[0].eval_dataset
    total, items = 0.0, 0
    with torch.no_grad():
        for row in rows:
            batch = trainers[0].data_collator([row])
            total += float(guard.task.loss(trainers[0].model.eval(), batch, 1, guard.run.train))
            items += int(guard.task.items(batch))
    for trainer in trainers:
        found = trainer.evaluate()["eval_loss"]
        assert found == pytest.approx(total / items, rel=1e-6)


# ------------------------------------------------------------------ NaN
@any_trainer
def test_nan_stops_before_the_weights(kind: str, tmp_path: Path) -> None:
    trainer = make(kind, tmp_path, save_steps=1)
    first = next(p for n, p in trainer.model.named_parameters() if "lora_B" in n)
    first.register_hook(lambda grad: grad * math.nan if trainer.state.global_step == 2 else grad)
    with pytest.raises(CheckFailed, match="step 3: the loss or its gradient is not finite"):
        fit(trainer, resume=False)
    assert all(bool(tensor.isfinite().all()) for tensor in adapter(trainer).values())
    assert kept(tmp_path) == [1, 2]
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


@any_trainer
def test_overflown_weights_are_not_sealed(kind: str, tmp_path: Path) -> None:
    def overflow(model: Any) -> None:
        next(p for n, p in model.named_parameters() if "lora_A" in n).data[0, 0] = math.inf

    callbacks = [At(2, overflow)]
    trainer = make(kind, tmp_path, callbacks=callbacks, save_steps=1, save_total_limit=1)
    with pytest.raises(CheckFailed, match="step 2: the adapter's weights are no longer finite"):
        fit(trainer, resume=False)
    assert kept(tmp_path) == [1]
    read_seal(tmp_path / "checkpoints" / "checkpoint-1")


# ------------------------------------------------------------------ checkpoints
@any_trainer
def test_checkpoints_are_sealed_and_rotated(kind: str, tmp_path: Path) -> None:
    trainer = make(kind, tmp_path, save_steps=1, save_total_limit=2)
    fit(trainer, resume=False)
    assert kept(tmp_path) == [3, 4]
    for step in (3, 4):
        folder = tmp_path / "checkpoints" / f"checkpoint-{step}"
        sealed = read_seal(folder)
        assert (sealed.step, sealed.tokens > 0, sealed.seconds > 0) == (step, True, True)
        names = {file.name for file in folder.iterdir()}
        assert {"adapter_model.safetensors", "optimizer.pt", "rng_state.pth"} <= names
        assert not {"training_args.bin", "README.md"} & names
        state = (folder / "trainer_state.json").read_text(encoding="utf-8")
        assert str(tmp_path) not in state  # a run may be moved
    beside = {file.name for file in (tmp_path / "checkpoints").iterdir()}
    assert "README.md" not in beside
    (folder / "optimizer.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"optimizer\.pt was changed after it was saved"):
        read_seal(folder)


@any_trainer
def test_resumed_is_uninterrupted(kind: str, tmp_path: Path) -> None:
    """Broken off in the fourth step. GRPO had sampled for the third and fourth together. Tokens
    and seconds go on in metrics.jsonl."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    fit(make(kind, straight, save_steps=1, eval_steps=2), resume=False)
    first = make(kind, broken, callbacks=[At(4, crash, begins=True)], save_steps=1, eval_steps=2)
    with pytest.raises(ZeroDivisionError):
        fit(first, resume=False)
    assert kept(broken)[-1] == 3
    second = make(kind, broken, save_steps=1, eval_steps=2)
    fit(second, resume=True)
    assert weights(broken, 4) == weights(straight, 4)
    rows = {run: read_metrics(run / "metrics.jsonl") for run in (straight, broken)}
    for name in ("step", "loss", "eval_loss", "tokens"):
        found = [[row.get(name) for row in rows[run]] for run in (straight, broken)]
        assert found[0] == found[1], name
    trained = [row for row in rows[broken] if "loss" in row]
    assert [row["step"] for row in trained] == [1, 2, 3, 4]
    for earlier, later in itertools.pairwise(trained):
        assert earlier["tokens"] < later["tokens"]
        assert earlier["seconds"] < later["seconds"]
    assert second.guard.meter.tokens() == trained[-1]["tokens"]
    # After its last step a run takes no other one.
    third = make(kind, broken, save_steps=1, eval_steps=2)
    fit(third, resume=True)
    assert third.state.global_step == 4
    assert same(adapter(third), adapter(second))


@pytest.mark.slow
def test_the_adapter_is_saved_without_its_reference(tmp_path: Path) -> None:
    """TRL's DPOTrainer keeps the adapter of the beginning as a second one, `ref`."""
    trainer = make("DPO", tmp_path, max_steps=1)
    fit(trainer, resume=False)
    assert (tmp_path / "checkpoints" / "checkpoint-1" / "ref").is_dir()
    save_run(trainer, tokenizer(), Pinned("owner/base", str(tmp_path), "a" * 40))
    saved = tmp_path / "adapter"
    assert not [path for path in saved.iterdir() if path.is_dir()]
    assert not {"training_args.bin", "README.md"} & {path.name for path in saved.iterdir()}
    config = json.loads((saved / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/base", "a" * 40)
    assert trainer.guard.audit.checks[-1]["name"] == "saved"
    assert trainer.guard.audit.checks[-1]["passed"]


@pytest.mark.slow
def test_metrics_hold_what_the_trainer_logs(tmp_path: Path) -> None:
    trainer = make("GRPO", tmp_path, max_steps=2, eval_steps=1, beta=0.1)
    fit(trainer, resume=False)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    trained = [row for row in rows if "loss" in row]
    assert all({"kl", "learning_rate", "grad_norm"} <= row.keys() for row in trained)
    assert "reward" in trained[0]  # sampled for two steps
    evaluated = [row for row in rows if "eval_loss" in row]
    assert all("eval_reward" in row and "eval_runtime" not in row for row in evaluated)
    assert "num_tokens" not in trained[0]  # TRL's own count, which begins anew when resumed


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["DPO", "GRPO"])
def test_two_ranks_resume_exactly(kind: str, tmp_path: Path) -> None:
    """Each rank takes up its own random numbers, and what it had sampled."""
    config = shipped("accelerate_configs") / "cpu_2proc.yaml"
    file = Path(__file__).with_name("guarded.py")
    for name, stops in (("straight", ""), ("broken", "4")):
        code, said = launch(config, file, kind, str(tmp_path / name), stops)
        assert code == 0, said
    names = {path.name for path in (tmp_path / "broken" / "checkpoints" / "checkpoint-3").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= names
    assert ({"rollout_0.pt", "rollout_1.pt"} <= names) == (kind == "GRPO")
    assert weights(tmp_path / "broken", 4) == weights(tmp_path / "straight", 4)
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("straight", "broken")]
    for key in ("step", "loss", "eval_loss", "tokens"):
        assert [row.get(key) for row in rows[0]] == [row.get(key) for row in rows[1]]


# ------------------------------------------------------------------ signals
@any_trainer
def test_a_signal_saves_and_stops(kind: str, tmp_path: Path) -> None:
    stop = StopSignal()
    callbacks = [At(2, lambda model: signal.raise_signal(signal.SIGTERM))]
    trainer = make(kind, tmp_path, stop, callbacks, max_steps=20)
    with (
        stop.listening(),
        pytest.raises(Interrupted, match="stopped after step 2, checkpoint saved") as caught,
    ):
        fit(trainer, resume=False)
    assert caught.value.exit_code == 143
    assert kept(tmp_path) == [2]
    read_seal(tmp_path / "checkpoints" / "checkpoint-2")


# ------------------------------------------------------------------ best step, early stopping
@any_trainer
def test_stops_early_and_uses_the_best(kind: str, tmp_path: Path) -> None:
    """At a rate that is far too high the loss does not go on falling."""
    settings = {"max_steps": 12, "eval_steps": 1, "early_stopping_patience": 1}
    trainer = make(kind, tmp_path, **settings, learning_rate=0.3, save_total_limit=1)
    fit(trainer, resume=False)
    curve = dict(enumerate(losses(trainer, "eval_loss"), start=1))
    stop = next(
        step for step in range(2, 12) if curve[step] >= min(curve[n] for n in range(1, step))
    )
    best = min(curve, key=lambda step: curve[step])
    assert trainer.state.global_step == stop == max(curve)
    assert stopped_early(trainer.state, 1) and best_step(trainer.state) == best < stop
    assert kept(tmp_path) == sorted({best, stop})
    saved = load_file(tmp_path / "checkpoints" / f"checkpoint-{best}" / "adapter_model.safetensors")
    short = {
        name.replace(".modules_to_save", "").replace(".default", ""): tensor
        for name, tensor in adapter(trainer).items()
    }
    assert same(saved, short)


# ------------------------------------------------------------------ audit
@pytest.mark.parametrize("kind", KINDS)
def test_the_audit_finds_nothing_wrong(kind: str, tmp_path: Path) -> None:
    trainer = make(kind, tmp_path, max_steps=3)
    fit(trainer, resume=False)
    assert trainer.guard.audit.problems == []
    names = [check["name"] for check in trainer.guard.audit.checks if check["passed"]]
    assert names == ["coverage", "gradients", "moved", "lora_B", "frozen"]


@any_trainer
def test_the_audit_finds_a_dead_group(kind: str, tmp_path: Path) -> None:
    """No gradient goes below the second layer. The layer above learns, and the loss falls, so that
    only the groups show it."""
    groups = {
        f"layer {layer}": lambda name, layer=layer: f"layers.{layer}." in name and "lora_" in name
        for layer in (0, 1)
    }
    groups["head"] = lambda name: ".modules_to_save." in name
    if not KINDS[kind].labels:
        del groups["head"]
    model = KINDS[kind].model()
    lowest = next(m for name, m in model.named_modules() if name.endswith("layers.0"))
    lowest.register_forward_hook(lambda module, given, out: out.detach())
    with pytest.raises(CheckFailed, match="no gradient reaches the layer 0: it is frozen"):
        fit(make(kind, tmp_path, model=model, groups=groups), resume=False)


@any_trainer
def test_the_audit_finds_a_frozen_part_that_moves(kind: str, tmp_path: Path) -> None:
    def move(model: Any) -> None:
        with torch.no_grad():
            next(p for n, p in model.named_parameters() if "embed_tokens.weight" in n)[5, 5] += 1e-6

    trainer = make(kind, tmp_path, callbacks=[At(2, move)], max_steps=3)
    fit(trainer, resume=False)
    (problem,) = trainer.guard.audit.problems
    assert "embed_tokens.weight changed during training although it is frozen" in problem["what"]


@any_trainer
def test_the_audit_refuses_what_trains_unasked(kind: str, tmp_path: Path) -> None:
    model = KINDS[kind].model()
    norm = next(p for name, p in model.named_parameters() if name.endswith("model.norm.weight"))
    norm.requires_grad_(True)
    with pytest.raises(CheckFailed, match=r"model\.norm\.weight: trainable, but not part of the"):
        make(kind, tmp_path, model=model)


def test_a_live_head_hides_no_dead_adapter(tmp_path: Path) -> None:
    model = KINDS["classifier"].model()
    score = next(m for name, m in model.named_modules() if name.endswith("score"))
    score.register_forward_pre_hook(lambda module, given: (given[0].detach(),))
    with pytest.raises(CheckFailed, match="no gradient reaches the adapter: "):
        fit(make("classifier", tmp_path, model=model), resume=False)


def test_a_head_that_does_not_move(tmp_path: Path) -> None:
    trainer = make("classifier", tmp_path, max_steps=3)
    trainer.create_optimizer()
    head = next(p for n, p in trainer.model.named_parameters() if ".modules_to_save." in n)
    for group in trainer.optimizer.param_groups:
        group["params"] = [p for p in group["params"] if p is not head]
    fit(trainer, resume=False)
    (problem,) = trainer.guard.audit.problems
    assert problem["what"] == "the head did not change"


# ------------------------------------------------------------------ out of memory
class Small(TrainerCallback):
    """No batch of more than `most` rows has room. The lower layer's backward pass fails, when the
    upper one's gradients are already there."""

    def __init__(self, model: Any, most: int) -> None:
        self.most = most
        self.rows = 0
        self.hits = 0
        model.register_forward_pre_hook(self.look, with_kwargs=True)
        lowest = next(m for name, m in model.named_modules() if name.endswith("layers.0"))
        lowest.register_forward_hook(self.watch)

    def look(self, module: Any, args: Any, given: dict[str, Any]) -> None:
        self.rows = len(given["input_ids"])

    def watch(self, module: Any, given: Any, out: torch.Tensor) -> None:
        if torch.is_grad_enabled() and out.requires_grad and self.rows > self.most:
            out.register_hook(self.fail)

    def fail(self, grad: torch.Tensor) -> None:
        self.hits += 1
        raise torch.OutOfMemoryError("out of memory")


class Gradients(TrainerCallback):
    """What the optimizer gets, in each step."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, *_: Any, model: Any = None, **__: Any) -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        self.seen.append(torch.cat([p.grad.flatten().clone() for p in trained]))


# Without clipping, which would hide a wrong factor, as Adam does.
UNCLIPPED = {"max_steps": 2, "max_grad_norm": 0.0, "per_device_train_batch_size": 4}


def run_in_parts(
    kind: str, folder: Path, most: int | None, **options: Any
) -> tuple[Guards, torch.Tensor, int]:
    model, gradients = KINDS[kind].model(), Gradients()
    small = Small(model, most) if most else None
    trainer = make(kind, folder, callbacks=[gradients], model=model, **UNCLIPPED, **options)
    fit(trainer, resume=False)
    return trainer, torch.stack(gradients.seen), small.hits if small else 0


@any_trainer
def test_halves_give_the_same_losses_and_gradients(kind: str, tmp_path: Path) -> None:
    pairs = 2 if kind == "DPO" else 1  # rows of the model for one of the data
    whole, expected, _ = run_in_parts(kind, tmp_path / "whole", None)
    parts, found, hits = run_in_parts(kind, tmp_path / "parts", 2 * pairs)
    assert (hits, parts.guard.halving.times) == (1, 1)
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert parts.guard.meter.tokens() == whole.guard.meter.tokens()


@pytest.mark.slow
def test_quarters_after_a_second_time(tmp_path: Path) -> None:
    _, expected, _ = run_in_parts("language model", tmp_path / "whole", None)
    parts, found, hits = run_in_parts("language model", tmp_path / "parts", 1)
    assert (hits, parts.guard.halving.times) == (3, 2)  # the whole, and each half
    assert (found - expected).norm() <= 1e-5 * expected.norm()


@any_trainer
def test_what_cannot_be_halved_ends_in_advice(kind: str, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="out of memory, even with the micro-batch in 4 parts: lower"
    ):
        run_in_parts(kind, tmp_path, 0.5)  # type: ignore[arg-type]


@pytest.mark.slow
def test_pairs_are_not_rows(tmp_path: Path) -> None:
    """Cut by rows, a batch of pairs has other pairs, and another loss: how a batch is halved is
    the task's affair, and without its help nothing is."""

    class ByRows(type(KINDS["DPO"].task)):  # type: ignore[misc]
        def halve(self, batch: Any) -> Any:
            return halves_of(batch, len(batch["input_ids"]), mean=True)

    class NoHalves(type(KINDS["DPO"].task)):  # type: ignore[misc]
        def halve(self, batch: Any) -> Any:
            return []

    classes = KINDS["DPO"].task.classes()
    _, expected, _ = run_in_parts("DPO", tmp_path / "whole", None)
    _, found, _ = run_in_parts("DPO", tmp_path / "rows", 4, task=ByRows(*classes))
    assert (found - expected).norm() > 0.1 * expected.norm()
    with pytest.raises(
        UserError, match="out of memory, and the micro-batch cannot be halved: lower"
    ):
        run_in_parts("DPO", tmp_path / "none", 4, task=NoHalves(*classes))


def test_other_errors_are_not_caught(tmp_path: Path) -> None:
    model = KINDS["language model"].model()
    model.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("another one")))
    with pytest.raises(RuntimeError, match="another one"):
        fit(make("language model", tmp_path, model=model), resume=False)


# ------------------------------------------------------------------ the class itself
def test_guards_come_before_the_trainers_class() -> None:
    made = guarded(Penalized)
    assert made.__name__ == "GuardedPenalized"
    assert made.__mro__[1:3] == (Guards, Penalized)


def test_a_library_evaluation_that_is_nan_stops(tmp_path: Path) -> None:
    class Broken(Penalized):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
            found = super().compute_loss(model, inputs, *args, **options)
            return found if model.training else (found[0] * math.nan, found[1])

    own = type(KINDS["a user's"].task)(Broken, TrainingArguments)  # type: ignore[call-arg]
    assert isinstance(own, Library)
    with pytest.raises(CheckFailed, match=r"step 1: eval_loss is nan: check data\.eval"):
        fit(make("a user's", tmp_path, task=own, eval_steps=1), resume=False)


def test_random_states_of_another_node_do_not_pile_up(tmp_path: Path) -> None:
    """A node without a disk shared with rank 0 has only its ranks' files, which nobody seals."""
    saved = tmp_path / "checkpoints"
    state = SimpleNamespace(
        is_world_process_zero=False, is_local_process_zero=True, log_history=[], global_step=0
    )
    trainer = SimpleNamespace(
        state=state, accelerator=SimpleNamespace(wait_for_everyone=lambda: None)
    )
    events = GuardEvents.__new__(GuardEvents)
    events.trainer = trainer
    events.guard = SimpleNamespace(
        run=SimpleNamespace(train=SimpleNamespace(save_total_limit=2)),
        directory=tmp_path,
        meter=SimpleNamespace(tokens=lambda: 0, seconds=0.0),
    )
    events._weights_are_finite = lambda: True
    for step in range(1, 6):
        state.global_step = step
        if step == 2:
            state.log_history = [{"eval_loss": 1.0, "step": 2}]  # the best
        folder = saved / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "rng_state_2.pth").write_bytes(b"state")
        events.on_save()
    assert kept(tmp_path) == [2, 4, 5]
    # On a shared disk rank 0 alone decides.
    (tmp_path / "run.lock.json").write_text('{"id": "this"}', encoding="utf-8")
    state.global_step = 6
    (saved / "checkpoint-6").mkdir()
    events.on_save()
    assert kept(tmp_path) == [2, 4, 5, 6]
