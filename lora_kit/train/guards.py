"""Safety checks for any transformers Trainer: transformers' own, TRL's, or a subclass.

`GuardEvents` is a callback; `Guards` holds the rest, a mixin in front of the trainer's class:

    trainer = guarded(DPOTrainer)(task, run, directory, stop, groups, model=model, args=arguments)

Guarded training takes the same steps as unguarded training. It stops before NaN reaches the
weights, after the step in which a signal arrives, and on early stopping; it seals checkpoints,
keeps the best one, counts tokens and seconds, splits micro-batches that run out of memory, and is
audited (`adapter.audit`): every tensor that should train must receive gradients and change.
"""

from __future__ import annotations

import contextlib
import math
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import send_to_device
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from lora_kit.adapter.audit import Audit, Groups
from lora_kit.errors import CheckFailed
from lora_kit.run import read_lock
from lora_kit.schema import Run, Train
from lora_kit.speed.prefix import Prefix
from lora_kit.tasks.task import Batch, Task
from lora_kit.train.callbacks import Meter
from lora_kit.train.halving import Halving, MicroBatch
from lora_kit.train.interrupt import StopSignal
from lora_kit.train.save import Checkpoint, rotate, seal

# Files in each checkpoint that contain local paths and that nothing reads.
_UNUSED_FILES = ("training_args.bin", "README.md")
_ROLLOUT = "rollout_{rank}.pt"  # sampled and not yet used completions (GRPO, RLOO)


class GuardState:
    """State of the guards, as `trainer.guard`: a single attribute cannot clash with the trainer's.

    Attributes:
        directory: the run directory.
        own_loss: whether the task computes the loss, instead of the trainer.
        prefix: the frozen layers, if batches are without padding.
        plan: the memory plan in use, a `lora_kit.plan.MemoryPlan`.
        peak_mib: peak memory at the end of training.
    """

    def __init__(
        self,
        trainer: Guards,
        task: Task,
        run: Run,
        directory: Path,
        stop: StopSignal,
        groups: Groups,
    ) -> None:
        self.task, self.run, self.directory, self.stop = task, run, directory, stop
        self.own_loss = has_own_loss(task)
        accelerator = trainer.accelerator
        sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        self.audit = Audit(trainer.model, accelerator, groups)
        self.meter = Meter(accelerator)
        self.halving = Halving(
            task.halve,
            [p for p in trainer.model.parameters() if p.requires_grad],
            allowed=accelerator.num_processes == 1 and not sharded,
            by_length=self.own_loss and run.speed == "auto",
        )
        self.prefix: Prefix | None = None
        self.plan: Any = None
        self.peak_mib = 0.0


class Guards(Trainer):
    """A mixin with the guards that cannot be callbacks; `guarded` puts it first in the MRO.

    Args:
        directory: the run directory, for messages and files; `options["args"]` names the one for
            checkpoints.
        groups: {group: whether a parameter belongs to it}; each must train (`Task.groups`).
        options: of the trainer.
    """

    model: Any  # never None here
    guard: GuardState
    _step: int  # GRPO and RLOO: index of the sampled batch in use
    _buffered_inputs: Any

    def __init__(
        self,
        task: Task,
        run: Run,
        directory: Path,
        stop: StopSignal,
        groups: Groups,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.guard = GuardState(self, task, run, directory, stop, groups)
        if self.guard.own_loss:  # divided by the items of the whole step, not of a micro-batch
            self.loss_is_scaled_for_ga = True
        self.remove_callback(PrinterCallback)
        self.add_callback(GuardEvents(self))
        self.add_callback(self.guard.meter)

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: Batch,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        model.train()  # GRPO samples in _prepare_inputs, depending on the mode
        batch = MicroBatch(self._prepare_inputs(inputs))
        self.guard.meter.count(batch)
        # GRPO and RLOO count calls; all parts of a micro-batch must use the same sampled batch.
        sampled = getattr(self, "_step", None)
        prefix = self.guard.prefix

        def step(part: MicroBatch) -> torch.Tensor:
            if sampled is not None:
                self._step = sampled
            given = MicroBatch(part, part.factor)  # a copy, since SFTTrainer adds keys
            # `numbers` are the row indices of the batch; parts of a halved one have none.
            frozen = prefix.batch(given.get("numbers", ())) if prefix else contextlib.nullcontext()
            with frozen:
                return super(Guards, self).training_step(model, given, num_items_in_batch)

        return self.guard.halving.run(batch, step)

    def _prepare_inputs(self, inputs: Batch) -> Batch:
        return inputs if isinstance(inputs, MicroBatch) else super()._prepare_inputs(inputs)

    def _get_num_items_in_batch(
        self, batch_samples: list[Batch], device: torch.device
    ) -> torch.Tensor | int | None:
        """The divisor of the loss: items of all micro-batches of a step, on all ranks."""
        if not self.guard.own_loss or not batch_samples:
            return super()._get_num_items_in_batch(batch_samples, device)
        counted = [torch.as_tensor(self.guard.task.items(batch)) for batch in batch_samples]
        items = torch.stack([count.to(device) for count in counted]).sum()
        divisor: torch.Tensor = self.accelerator.reduce(items, "sum").float()
        return divisor

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, object]:
        guard = self.guard
        if guard.own_loss:
            assert num_items_in_batch is not None  # from `_get_num_items_in_batch`
            loss = guard.task.loss(model, inputs, num_items_in_batch, guard.run.train)
            loss = loss * self.accelerator.num_processes  # DDP averages gradients over the ranks
        else:
            found = super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
            if isinstance(found, tuple):
                return found
            loss = found
        if not isinstance(inputs, MicroBatch):  # called from the trainer's own evaluation
            return loss
        if not loss.requires_grad:
            raise guard.audit.without_gradient()
        return loss if inputs.factor == 1 else loss * inputs.factor

    def _get_grad_norm(
        self, model: torch.nn.Module, grad_norm: torch.Tensor | float | None = None
    ) -> torch.Tensor | float | None:
        """Checks for NaN between the backward pass and the optimizer step. The norm is over all
        ranks, so all of them stop; DeepSpeed exposes nothing else of the gradients."""
        norm: torch.Tensor | float | None = super()._get_grad_norm(model, grad_norm)
        if norm is not None and not math.isfinite(norm):  # None: DeepSpeed has none yet
            # The first step computes with the weights as they were loaded.
            rate = f"{rate_advice(self.args)}, or " if self.state.global_step else ""
            raise CheckFailed(
                f"step {self.state.global_step + 1}: the loss or its gradient is not finite "
                f"(gradient norm {float(norm)}): stopped before the optimizer step; earlier "
                f"checkpoints are kept; {rate}check the base's weights"
            )
        return norm

    def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
        if not self.guard.own_loss:
            with _own_random_numbers(self.args.seed):
                metrics = super().evaluate(*args, **options)
            _check_finite(metrics.get("eval_loss", 0.0), self)
            return metrics
        metrics = {"eval_loss": self._held_out_loss()}
        self.log(metrics)
        handler = self.callback_handler
        self.control = handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _held_out_loss(self) -> float:
        """The mean loss over all items of the held-out rows: sum of `task.loss` / sum of
        `task.items`.

        It does not depend on batch size and number of ranks; transformers takes the mean of
        batch means, of which the last may be of fewer rows. All ranks must call it.

        Raises:
            CheckFailed: it is NaN or infinite.
        """
        args, task, rows = self.args, self.guard.task, cast(Any, self.eval_dataset)
        model, collate = self.model_wrapped, cast(Any, self.data_collator)
        size, ranks = args.per_device_eval_batch_size, args.world_size
        starts = range(0, len(rows), size)
        order = task.tokens(rows).argsort(kind="stable")  # by length, for little padding
        sums = torch.zeros(2, dtype=torch.float64, device=args.device)  # losses, items
        model.eval()
        with torch.no_grad(), self.compute_loss_context_manager():
            for first_of_round in range(0, len(starts), ranks):
                mine = first_of_round + args.process_index
                # Every rank runs the same number of batches, as a sharded model needs.
                first = starts[min(mine, len(starts) - 1)]
                chosen = [rows[number] for number in order[first : first + size].tolist()]
                batch = self._prepare_inputs(collate(chosen))
                items = torch.as_tensor(task.items(batch), device=args.device)
                loss = task.loss(model, batch, 1, self.guard.run.train)
                if mine < len(starts):
                    sums += torch.stack([loss.double(), items.double()])
                self.callback_handler.on_prediction_step(args, self.state, self.control)
        model.train()
        total, count = self.accelerator.reduce(sums, "sum").tolist()
        mean: float = total / count if count else math.nan
        _check_finite(mean, self, f" over {count:.0f} held-out labels")
        return mean

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self.guard.meter.figures()
        super().log(logs, start_time)

    def _run_epoch(self, *args: Any, **options: Any) -> None:
        """Prevents one more step in a run that is resumed after its last step or early stopping."""
        stopped = stopped_early(self.state, self.guard.run.train.early_stopping_patience)
        if stopped or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **options)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves what trains in float32: DeepSpeed has it in the base's dtype, and a float32 copy in
        its optimizer. All ranks must call it."""
        if not self.is_deepspeed_enabled:
            super().save_model(output_dir, _internal_call)
            return
        from deepspeed.utils import safe_get_full_fp32_param

        weights = {
            name: safe_get_full_fp32_param(parameter).cpu()
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }
        self._save(output_dir, weights)

    def create_model_card(self, *args: object, **options: object) -> None:
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


def resume_from(trainer: Guards, found: Checkpoint) -> None:
    """Restore what a sealed checkpoint holds besides transformers' own state."""
    trainer.guard.meter.resume(found.tokens, found.seconds)
    file = found.folder / _ROLLOUT.format(rank=trainer.args.process_index)
    if file.is_file():
        sampled = torch.load(file, map_location="cpu", weights_only=True)
        trainer._step = sampled["step"]
        trainer._buffered_inputs = send_to_device(sampled["inputs"], trainer.args.device)


class GuardEvents(TrainerCallback):
    """What the guards do at the events of a training: audit it, save the best step, stop it early
    or after a signal, seal its checkpoints."""

    def __init__(self, trainer: Guards) -> None:
        self.trainer, self.guard = trainer, trainer.guard

    def on_train_begin(self, *_: object, **__: object) -> None:
        self.guard.audit.begin()
        # A resumed state has the old intervals.
        state = self.trainer.state
        state.compute_steps(self.trainer.args, state.max_steps)

    def on_pre_optimizer_step(self, *_: object, **__: object) -> None:
        self.guard.audit.observe()

    def on_step_end(self, *_: object, **__: object) -> None:
        args, state, control = self.trainer.args, self.trainer.state, self.trainer.control
        if args.eval_steps and state.global_step >= state.max_steps:
            control.should_evaluate = True  # the last step may be the best
        signum = self.guard.stop.signum or 0
        # Signals can reach the ranks at different steps; all stop at the same one.
        if args.world_size > 1:
            mine = torch.tensor([signum], device=args.device)
            signum = int(self.trainer.accelerator.gather(mine).max())
        if signum:
            self.guard.stop.signum = signum
            control.should_save = control.should_training_stop = True

    def on_evaluate(self, *_: object, **__: object) -> None:
        state, control = self.trainer.state, self.trainer.control
        stops = stopped_early(state, self.guard.run.train.early_stopping_patience)
        control.should_training_stop |= stops
        control.should_save |= stops or best_step(state) == state.global_step

    def on_save(self, *_: object, **__: object) -> None:
        """Seal the checkpoint once all its files are written, and remove old ones."""
        trainer, meter = self.trainer, self.guard.meter
        step, first = trainer.state.global_step, trainer.state.is_world_process_zero
        keep = self.guard.run.train.save_total_limit
        folder = self.guard.directory / "checkpoints" / f"checkpoint-{step}"
        finite = self._weights_are_finite()
        if finite and hasattr(trainer, "_buffered_inputs"):
            sampled = {"step": trainer._step, "inputs": trainer._buffered_inputs}
            torch.save(sampled, folder / _ROLLOUT.format(rank=trainer.args.process_index))
        tokens = meter.tokens()
        trainer.accelerator.wait_for_everyone()  # each rank writes its own random state
        if first and finite:
            for name in _UNUSED_FILES:
                (folder / name).unlink(missing_ok=True)
            seal(folder, step, tokens, meter.seconds)
            rotate(folder.parent, keep, best_step(trainer.state))
        elif first:
            shutil.rmtree(folder)
        elif trainer.state.is_local_process_zero and not read_lock(self.guard.directory):
            # A node without a disk shared with rank 0.
            rotate(folder.parent, keep, best_step(trainer.state), sealed_only=False)
        trainer.accelerator.wait_for_everyone()
        if not finite:
            raise CheckFailed(
                f"step {step}: the adapter's weights are no longer finite: "
                f"the previous checkpoint is kept; {rate_advice(trainer.args)}"
            )

    def _weights_are_finite(self) -> bool:
        """Weights can overflow although the gradient was finite; such a checkpoint must not replace
        the last good one."""
        broken = torch.zeros((), device=self.trainer.args.device)
        for parameter in self.trainer.model.parameters():
            if parameter.requires_grad:
                local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
                broken += (~torch.isfinite(local.detach()).all()).float()
        return not float(self.trainer.accelerator.reduce(broken, "sum"))


def _evaluations(state: TrainerState) -> Sequence[tuple[float, int]]:
    """(eval_loss, step), from the state in the checkpoint: the same on all ranks and after a
    resume."""
    rows = [row for row in state.log_history if "eval_loss" in row]
    return [(row["eval_loss"], int(row["step"])) for row in rows]


def best_step(state: TrainerState) -> int | None:
    """The first step with the lowest eval_loss; None before any evaluation."""
    evaluations = _evaluations(state)
    return min(evaluations)[1] if evaluations else None


def stopped_early(state: TrainerState, patience: int | None) -> bool:
    """Whether the last `patience` evaluations did not improve eval_loss, before the last step."""
    best = best_step(state)
    if patience is None or best is None or state.global_step >= state.max_steps:
        return False
    return sum(step > best for _, step in _evaluations(state)) >= patience


def _check_finite(loss: float, trainer: Guards, over: str = "") -> None:
    """Raises CheckFailed if eval_loss is NaN or infinite."""
    if not math.isfinite(loss):
        raise CheckFailed(
            f"step {trainer.state.global_step}: eval_loss is {loss}{over}: check data.eval, or "
            f"{rate_advice(trainer.args)}"
        )


def rate_advice(train: TrainingArguments | Train) -> str:
    """Advice for a training that diverges."""
    return f"lower train.learning_rate ({train.learning_rate:g}; usual with LoRA: 1e-5 to 1e-3)"


@contextlib.contextmanager
def _own_random_numbers(seed: int) -> Iterator[None]:
    """Inside the block, random numbers start from `seed`; afterwards the earlier state is restored,
    so that evaluations do not change the training."""
    before = random.getstate(), np.random.get_state()
    gpus = range(torch.cuda.device_count())
    with torch.random.fork_rng(gpus):
        set_seed(seed)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
