"""Safety checks for any transformers Trainer: transformers' own, TRL's, or a subclass.

Most are callbacks; `Guards` holds the rest, a mixin in front of the trainer's class:

    trainer = guarded(DPOTrainer)(task, run, directory, stop, groups, model=model, args=arguments)

Guarded training takes the same steps as unguarded training. It stops before NaN reaches the
weights, after the step in which a signal arrives, and on early stopping; it seals checkpoints,
keeps the best one, counts tokens and seconds, splits micro-batches that run out of memory, and is
audited: every tensor that should train is checked for gradients.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import send_to_device
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState

from lora_kit.adapter.audit import Audit, Groups
from lora_kit.errors import CheckFailed
from lora_kit.schema import Run
from lora_kit.speed.prefix import Prefix
from lora_kit.tasks.batches import real_tokens
from lora_kit.tasks.task import Task
from lora_kit.train import checkpoint
from lora_kit.train.directory import RunDirectory
from lora_kit.train.evaluation import check_finite, held_out_loss, own_random_numbers
from lora_kit.train.halving import Batch, Halving
from lora_kit.train.interrupt import StopSignal

# Files in each checkpoint that contain local paths and that nothing reads.
_UNUSED_FILES = ("training_args.bin", "README.md")
_ROLLOUT = "rollout_{rank}.pt"  # sampled and not yet used completions (GRPO, RLOO)


@dataclass
class Guard:
    """State of the guards, as `trainer.guard`.

    Attributes:
        own_loss: whether the task computes the loss, instead of the trainer.
        prefix: the frozen layers, if batches are without padding.
        plan: the memory plan in use.
        peak_mib: peak memory at the end of training.
    """

    task: Task
    run: Run
    directory: RunDirectory
    stop: StopSignal
    own_loss: bool
    audit: Audit
    meter: Meter
    halving: Halving
    prefix: Prefix | None = None
    plan: Any = None
    peak_mib: float = 0.0

    def frozen(self, batch: Mapping[str, Any]) -> contextlib.AbstractContextManager[None]:
        """Context of a batch's forward pass; `numbers` are the row indices of the batch."""
        if self.prefix is None:
            return contextlib.nullcontext()
        return self.prefix.batch(batch.get("numbers", ()))


class Guards(Trainer):
    """A mixin with the guards that cannot be callbacks; `guarded` puts it first in the MRO.

    Args:
        groups: {name: which tensors must train}.
        options: of the trainer.
    """

    model: Any  # never None here
    guard: Guard
    _step: int  # GRPO and RLOO: index of the sampled batch in use
    _buffered_inputs: Any

    def __init__(
        self,
        task: Task,
        run: Run,
        directory: RunDirectory,
        stop: StopSignal,
        groups: Groups,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        own_loss = has_own_loss(task)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        audit = Audit(self.model, self.accelerator, groups)
        meter = Meter(self.accelerator)
        halving = Halving(
            task.halve,
            trained,
            directory.say,
            allowed=self.accelerator.num_processes == 1 and not sharded,
            by_length=own_loss and run.speed == "auto",
        )
        self.guard = Guard(task, run, directory, stop, own_loss, audit, meter, halving)
        if own_loss:  # divided by the items of the whole step, not of a micro-batch
            self.loss_is_scaled_for_ga = True
        self.remove_callback(PrinterCallback)
        for callback in (Auditing(audit), meter, Best(run.train.early_stopping_patience)):
            self.add_callback(callback)
        self.add_callback(Stopping(stop, self.accelerator))
        self.add_callback(Sealing(self))

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        model.train()  # GRPO samples in _prepare_inputs, depending on the mode
        batch = Batch(self._prepare_inputs(inputs))
        self.guard.meter.count(batch)
        turn = getattr(self, "_step", None)  # all parts of a batch use the same sampled batch

        def step(part: Batch) -> torch.Tensor:
            if turn is not None:
                self._step = turn
            given = Batch(part)  # a copy, since SFTTrainer adds keys
            given.factor = part.factor
            with self.guard.frozen(given):
                return super(Guards, self).training_step(model, given, num_items_in_batch)

        return self.guard.halving.run(batch, step)

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs if isinstance(inputs, Batch) else super()._prepare_inputs(inputs)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """The divisor of the loss: items of all micro-batches of a step, on all ranks."""
        if not self.guard.own_loss or not batch_samples:
            return super()._get_num_items_in_batch(batch_samples, device)
        counted = (torch.as_tensor(self.guard.task.items(batch)) for batch in batch_samples)
        items = torch.stack([count.to(device) for count in counted]).sum()
        return self.accelerator.reduce(items, "sum").float()

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        guard = self.guard
        if guard.own_loss:
            items = options["num_items_in_batch"]
            # DDP averages gradients over the ranks.
            loss: Any = guard.task.loss(model, inputs, items, guard.run.train)
            loss = loss * self.accelerator.num_processes
        else:
            loss = super().compute_loss(model, inputs, *args, **options)
        if not isinstance(inputs, Batch):  # called from the trainer's own evaluation
            return loss
        if not loss.requires_grad:
            raise guard.audit.without_gradient()
        return loss if inputs.factor == 1 else loss * inputs.factor

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Checks for NaN between the backward pass and the optimizer step. The norm is over all
        ranks, so all of them stop; DeepSpeed exposes nothing else of the gradients."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        if grad_norm is not None and not math.isfinite(grad_norm):  # None: DeepSpeed has none yet
            raise CheckFailed(
                f"step {self.state.global_step + 1}: the loss or its gradient is not finite "
                f"(gradient norm {float(grad_norm)}): stopped before the optimizer step; earlier "
                "checkpoints are kept; lower train.learning_rate, or check the base's weights"
            )
        return grad_norm

    def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
        if not self.guard.own_loss:
            with own_random_numbers(self.args.seed):
                metrics = super().evaluate(*args, **options)
            check_finite(metrics.get("eval_loss", 0.0), self.state.global_step)
            return metrics
        metrics = {"eval_loss": held_out_loss(self)}
        self.log(metrics)
        handler = self.callback_handler
        self.control = handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self.guard.meter.figures()
        super().log(logs, start_time)

    def _run_epoch(self, *args: Any, **options: Any) -> None:
        """Prevents one more step in a run that is resumed after its last step."""
        stopped = stopped_early(self.state, self.guard.run.train.early_stopping_patience)
        if stopped or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **options)

    def create_model_card(self, *args: Any, **options: Any) -> None:
        """Disabled: TRL would write a template with local paths into each checkpoint."""


def guarded(trainer_class: type[Trainer]) -> type[Guards]:
    """A trainer class with the guards mixed in.

    >>> guarded(Trainer).__mro__[1:3]
    (<class 'lora_kit.train.guards.Guards'>, <class 'transformers.trainer.Trainer'>)
    """
    made = type(f"Guarded{trainer_class.__name__}", (Guards, trainer_class), {})
    return cast("type[Guards]", made)


def has_own_loss(task: Task) -> bool:
    """Whether the task computes the loss; otherwise its trainer does, such as TRL's."""
    return type(task).loss is not Task.loss


class Meter(TrainerCallback):
    """Counts tokens (without padding) and seconds of training, including the earlier parts of a
    resumed run. Both are saved in the seal of each checkpoint."""

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.seconds = 0.0
        self._tokens_before, self._seconds_before = 0, 0.0
        self._tokens_here: torch.Tensor | int = 0  # on this rank, on its device
        self._counted_to = 0.0

    def resume(self, found: checkpoint.Checkpoint) -> None:
        self._tokens_before = found.tokens
        self.seconds = self._seconds_before = found.seconds

    def count(self, batch: Batch) -> None:
        if "input_ids" in batch:
            self._tokens_here += real_tokens(batch)
        else:  # GRPO's sampled batches
            for name in ("prompt_mask", "completion_mask"):
                if name in batch:
                    self._tokens_here += batch[name].sum()

    def tokens(self) -> int:
        """Tokens on all ranks; a collective operation."""
        here = torch.as_tensor(self._tokens_here, device=self.accelerator.device)
        return self._tokens_before + int(self.accelerator.reduce(here, "sum").item())

    def figures(self) -> dict[str, Any]:
        """Values for a logged step; a collective operation."""
        tokens = self.tokens()
        here, spent = tokens - self._tokens_before, self.seconds - self._seconds_before
        return {
            "tokens": tokens,
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(here / spent, 1) if spent > 0 else 0.0,
        }

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._counted_to = time.perf_counter()

    # The time between two steps counts, except for evaluating and saving.
    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._counted_to = time.perf_counter()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._counted_to = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = time.perf_counter()
        self.seconds += now - self._counted_to
        self._counted_to = now


class Auditing(TrainerCallback):
    """Runs the audit (`adapter.audit`) during training; `fit` ends it."""

    def __init__(self, audit: Audit) -> None:
        self.audit = audit

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.audit.begin()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.audit.observe()


class Best(TrainerCallback):
    """Saves a checkpoint at the lowest eval_loss, and stops early."""

    def __init__(self, patience: int | None) -> None:
        self.patience = patience

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # A resumed state has the old intervals.
        state.compute_steps(args, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.eval_steps and state.global_step >= state.max_steps:
            control.should_evaluate = True  # the last step may be the best

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        stops = stopped_early(state, self.patience)
        control.should_training_stop |= stops
        control.should_save |= stops or best_step(state) == state.global_step


def _evaluations(state: TrainerState) -> list[tuple[float, int]]:
    """(eval_loss, step), from the state in the checkpoint: the same on all ranks and after a
    resume."""
    rows = [row for row in state.log_history if "eval_loss" in row]
    return [(row["eval_loss"], int(row["step"])) for row in rows]


def best_step(state: TrainerState) -> int | None:
    """The first step with the lowest eval_loss; None before any evaluation."""
    evaluations = _evaluations(state)
    return min(evaluations)[1] if evaluations else None


def stopped_early(state: TrainerState, patience: int | None) -> bool:
    """Whether train.early_stopping_patience was exceeded before the last step."""
    best = best_step(state)
    if patience is None or best is None or state.global_step >= state.max_steps:
        return False
    return sum(step > best for _, step in _evaluations(state)) >= patience


class Stopping(TrainerCallback):
    """Saves and stops after the step in which a signal arrived."""

    def __init__(self, stop: StopSignal, accelerator: Any) -> None:
        self.stop, self.accelerator = stop, accelerator

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        signum = self.stop.signum or 0
        # Signals can reach the ranks at different steps; all stop at the same one.
        if args.world_size > 1:
            mine = torch.tensor([signum], device=args.device)
            signum = int(self.accelerator.gather(mine).max())
        if signum:
            self.stop.signum = signum
            control.should_save = control.should_training_stop = True


class Sealing(TrainerCallback):
    """Seals each checkpoint once all its files are written, and removes old ones."""

    def __init__(self, trainer: Guards) -> None:
        self.trainer = trainer

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        trainer, first = self.trainer, state.is_world_process_zero
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        finite = self._finite(model)
        if finite and hasattr(trainer, "_buffered_inputs"):
            sampled = {"step": trainer._step, "inputs": trainer._buffered_inputs}
            torch.save(sampled, folder / _ROLLOUT.format(rank=args.process_index))
        guard = trainer.guard
        tokens = guard.meter.tokens()
        trainer.accelerator.wait_for_everyone()  # each rank writes its own random state
        if first and finite:
            for name in _UNUSED_FILES:
                (folder / name).unlink(missing_ok=True)
            checkpoint.seal(folder, state.global_step, tokens, guard.meter.seconds)
            keep = guard.run.train.save_total_limit
            checkpoint.rotate(folder.parent, keep, best_step(state))
        elif first:
            shutil.rmtree(folder)
        trainer.accelerator.wait_for_everyone()
        if not finite:
            raise CheckFailed(
                f"step {state.global_step}: the adapter's weights are no longer finite: "
                "the previous checkpoint is kept; lower train.learning_rate"
            )

    def _finite(self, model: Any) -> bool:
        """Weights can overflow although the gradient was finite; such a checkpoint must not replace
        the last good one."""
        broken = torch.zeros((), device=self.trainer.args.device)
        for parameter in model.parameters():
            if parameter.requires_grad:
                local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
                broken += (~torch.isfinite(local.detach()).all()).float()
        return not float(self.trainer.accelerator.reduce(broken, "sum"))


def resume_from(trainer: Guards, found: checkpoint.Checkpoint) -> None:
    """Restore what a sealed checkpoint holds besides transformers' own state."""
    trainer.guard.meter.resume(found)
    file = found.folder / _ROLLOUT.format(rank=trainer.args.process_index)
    if file.is_file():
        sampled = torch.load(file, map_location="cpu", weights_only=True)
        trainer._step = sampled["step"]
        trainer._buffered_inputs = send_to_device(sampled["inputs"], trainer.args.device)
