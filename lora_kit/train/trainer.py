"""transformers' Trainer, made to count tokens, refuse NaN, seal checkpoints and stop politely."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback

from lora_kit.adapter.audit import Audit
from lora_kit.data.prepare import Prepared
from lora_kit.errors import CheckFailed, Interrupted, UserError
from lora_kit.folders import check_room
from lora_kit.schema import Run
from lora_kit.speed.fast import make_fast, make_plain
from lora_kit.speed.memory import recompute
from lora_kit.speed.prefix import Prefix
from lora_kit.tasks.batches import IGNORED, collator, halves, in_one_row, real_tokens
from lora_kit.tasks.packing import Packed, check_isolation
from lora_kit.train import checkpoint
from lora_kit.train.arguments import training_arguments
from lora_kit.train.callbacks import Metrics, Progress, peak_mib
from lora_kit.train.directory import RunDirectory
from lora_kit.train.enough import too_little
from lora_kit.train.interrupt import StopSignal

# Written into each checkpoint; hold this machine's paths and are read by nobody.
_LITTER = ("training_args.bin", "README.md")


_HALVINGS = 3  # of the micro-batch, where the memory does not suffice
_NO_MEMORY = (
    "out of memory, the micro-batch halved {halvings} times: lower train.max_length or adapter.r, "
    "set train.gradient_checkpointing=true, or base.quantize=nf4"
)


def out_of_memory(error: BaseException) -> bool:
    """torch says it in one class for GPUs, and in a text for the CPU's allocator."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _wasteful(batch: dict[str, Any]) -> bool:
    """Whether a third and more of a padded batch of several rows is padding."""
    mask = batch.get("attention_mask")
    if mask is None or mask.device.type != "cpu":  # on a GPU the question would wait for it
        return False
    return len(mask) > 1 and float(mask.float().mean()) < 2 / 3


class _Numbered:
    """A data set whose rows say which one they are."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {**self.rows[number], "row": number}


class LoraTrainer(Trainer):
    """The trainer of every recipe. Data come labelled, so that the loss is transformers' own:
    the mean over all labels of the whole batch, all ranks and accumulation steps together."""

    def __init__(self, run: Run, directory: RunDirectory, stop: StopSignal, **options: Any) -> None:
        self.run = run
        self.directory = directory
        self.stop = stop
        self.plan: Any = None
        self.peak_mib = 0.0  # at the end of the training
        self.prefix: Prefix | None = None  # of frozen layers, where rows come without padding
        self.halvings = 0  # of the micro-batch, where the memory did not suffice
        self.seconds = 0.0  # spent in optimizer steps, earlier parts of a resumed run included
        self._tokens_before, self._seconds_before = 0, 0.0
        self._tokens_here: torch.Tensor | int = 0  # this rank's, kept on its device
        super().__init__(**options)
        # transformers 5.23 goes by the name of the class: for GPT2LMHeadModel it would divide by
        # one label too many a row, the first, which nothing predicts.
        self._loss_shifts_labels = True
        # Several ranks would have to halve together.
        self.can_halve = self.accelerator.num_processes == 1 and not (
            self.is_fsdp_enabled or self.is_deepspeed_enabled
        )
        self._trained = [p for p in options["model"].parameters() if p.requires_grad]
        self.audit = Audit(self.model, self.accelerator)
        self.remove_callback(PrinterCallback)
        self.add_callback(_Watch(self))

    def count_tokens(self) -> int:
        """Tokens trained on so far on all ranks, padding not counted. All ranks must ask."""
        here = torch.as_tensor(self._tokens_here, device=self.args.device)
        return self._tokens_before + int(self.accelerator.reduce(here, "sum").item())

    def resume(self, found: checkpoint.Checkpoint) -> None:
        self._tokens_before, self.seconds = found.tokens, found.seconds

    @property
    def _evaluations(self) -> list[tuple[float, int]]:
        """(eval_loss, step), from the state that each checkpoint holds: the same on all ranks, and
        in a run that was continued."""
        history = self.state.log_history
        return [(row["eval_loss"], int(row["step"])) for row in history if "eval_loss" in row]

    @property
    def best_step(self) -> int | None:
        """The step with the lowest eval_loss so far, the first of equal ones; None: no evaluation
        yet."""
        return min(self._evaluations)[1] if self._evaluations else None

    @property
    def stopped_early(self) -> bool:
        """Whether train.early_stopping_patience ran out before the last step."""
        patience, best = self.run.train.early_stopping_patience, self.best_step
        if patience is None or best is None or self.state.global_step >= self.state.max_steps:
            return False
        return sum(step > best for _, step in self._evaluations) >= patience

    def training_step(self, model: Any, inputs: dict[str, Any], num_items: Any = None) -> Any:
        self._tokens_here += real_tokens(inputs)
        parts = [inputs]
        for _ in range(self.halvings):
            parts = [half for part in parts for half in halves(part)]
        # Where rows are padded, in parts of about one length: the same sum, less of it padding.
        while self.can_halve and self.run.speed == "auto" and any(map(_wasteful, parts)):
            parts = [
                half for part in parts for half in (halves(part) if _wasteful(part) else [part])
            ]
        with self._frozen(inputs.get("numbers", ()) if len(parts) == 1 else ()):
            deep = self.halvings
            return sum(self._part_of_step(model, part, num_items, deep) for part in parts)

    def _frozen(self, numbers: Sequence[int]) -> Any:
        """Around passes over these rows of the data, in this order; none: over parts of them."""
        return self.prefix.batch(numbers) if self.prefix else contextlib.nullcontext()

    def _part_of_step(self, model: Any, inputs: dict[str, Any], num_items: Any, halved: int) -> Any:
        """Forward and backward of a batch that was `halved` so often; where the memory does not
        suffice, of two halves, from then on.

        The loss is a sum over the labels of the whole step, so halves add up to the same gradient.
        """
        trained = self._trained if self.can_halve else []
        before = [p.grad for p in trained]
        for parameter in trained:
            parameter.grad = None  # a backward pass that breaks off leaves sums half made
        again = None
        try:
            loss = super().training_step(model, inputs, num_items)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            again = halves(inputs) if self.can_halve else []
            if halved >= _HALVINGS or len(again) < 2:
                raise UserError(_NO_MEMORY.format(halvings=halved)) from None
        if again:
            for parameter, grad in zip(trained, before, strict=True):
                parameter.grad = grad
            halved += 1
            if halved > self.halvings:
                self.halvings = halved
                self.directory.say(f"out of memory: from here on {2**halved} passes for each batch")
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            with self._frozen(()):
                return sum(self._part_of_step(model, half, num_items, halved) for half in again)
        for parameter, grad in zip(trained, before, strict=True):
            if grad is not None:
                parameter.grad = grad if parameter.grad is None else grad.add_(parameter.grad)
        return loss

    def compute_loss(self, *args: Any, **options: Any) -> Any:
        loss: Any = super().compute_loss(*args, **options)
        if not loss.requires_grad:
            raise self.audit.without_gradient()
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Called between the backward pass and the optimizer's step: the last moment at which a NaN
        has not reached the weights. The norm is over all ranks, so that all of them stop."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        if grad_norm is None:  # DeepSpeed before it has one
            return None
        if not math.isfinite(grad_norm):
            raise CheckFailed(
                f"step {self.state.global_step + 1}: the loss or its gradient is not finite "
                f"(gradient norm {float(grad_norm)}): stopped before it reached the weights; "
                "checkpoints saved so far are kept; lower train.learning_rate, or look for broken "
                "weights in the base"
            )
        self.audit.observe()
        return grad_norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            tokens = self.count_tokens()
            logs["tokens"] = tokens
            logs["seconds"] = round(self.seconds, 3)
            here = tokens - self._tokens_before
            spent = self.seconds - self._seconds_before
            logs["tokens_per_second"] = round(here / spent, 1) if spent > 0 else 0.0
        super().log(logs, start_time)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The mean loss over all held-out labels, the same for every batch size and number of
        ranks. transformers' own is a mean of batches, of which the last one may be short."""
        rows: Any = self.eval_dataset
        size, ranks = self.args.per_device_eval_batch_size, self.args.world_size
        starts = range(0, len(rows), size)
        order = rows.lengths.argsort(kind="stable")  # little padding
        sums = torch.zeros(2, device=self.args.device)  # nats, labels
        self.model_wrapped.eval()
        with torch.no_grad(), self.compute_loss_context_manager():
            for turn in range(0, len(starts), ranks):
                mine = turn + self.args.process_index
                # Every rank runs as many passes as the others: a sharded model needs all of them.
                first = starts[min(mine, len(starts) - 1)]
                chosen = [rows[n] for n in order[first : first + size]]
                batch = self._prepare_inputs(self.data_collator(chosen))
                count = (batch["labels"][:, 1:] != IGNORED).sum()
                loss = self.model_wrapped(**batch).loss
                if mine < len(starts) and count:
                    sums += torch.stack([loss.float() * count, count.float()])
                self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        self.model_wrapped.train()
        nats, labels = self.accelerator.reduce(sums, "sum").tolist()
        metrics = {"eval_loss": nats / labels if labels else math.nan}
        if not math.isfinite(metrics["eval_loss"]):
            raise CheckFailed(
                f"step {self.state.global_step}: eval_loss is {metrics['eval_loss']} over "
                f"{labels:.0f} held-out tokens: look at data.eval, or lower train.learning_rate"
            )
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _run_epoch(self, *args: Any, **options: Any) -> None:
        """A run that is continued after its last step would take another one."""
        if self.stopped_early or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **options)

    def train(self, *args: Any, **options: Any) -> Any:
        self._seconds_before = self.seconds
        return super().train(*args, **options)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._check_weights(model)
        super()._save_checkpoint(model, trial)
        folder = self.directory.checkpoints / f"checkpoint-{self.state.global_step}"
        tokens = self.count_tokens()
        self.accelerator.wait_for_everyone()  # each rank writes its own random state
        if self.is_world_process_zero():
            for name in _LITTER:
                (folder / name).unlink(missing_ok=True)
            checkpoint.seal(folder, self.state.global_step, tokens, self.seconds)
            checkpoint.rotate(folder.parent, self.run.train.save_total_limit, self.best_step)
        self.accelerator.wait_for_everyone()

    def _check_weights(self, model: Any) -> None:
        """A step can overflow weights though its gradient was finite; the checkpoint written then
        would push out the last good one."""
        broken = torch.zeros((), device=self.args.device)
        for parameter in model.parameters():
            if parameter.requires_grad:
                local = getattr(parameter, "to_local", lambda p=parameter: p)()  # this rank's shard
                broken += (~torch.isfinite(local.detach()).all()).float()
        if float(self.accelerator.reduce(broken, "sum")):
            raise CheckFailed(
                f"step {self.state.global_step}: the adapter's weights are not finite any more: "
                "the checkpoint before is kept; lower train.learning_rate"
            )


class _Watch(TrainerCallback):
    """Measures the time of the steps and stops after the step in which a signal came."""

    def __init__(self, trainer: LoraTrainer) -> None:
        self.trainer = trainer
        self.counted_to = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # A resumed run brings the old ones with it, and would not read the new.
        state.compute_steps(args, state.max_steps)
        self.trainer.audit.begin()
        self.counted_to = time.perf_counter()

    # Between two steps lies the time to fetch data, which counts, to evaluate and to save.
    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.counted_to = time.perf_counter()
        stops = self.trainer.stopped_early
        control.should_training_stop |= stops
        control.should_save |= stops or self.trainer.best_step == state.global_step

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.counted_to = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.eval_steps and state.global_step >= state.max_steps:
            control.should_evaluate = True  # else nobody knows whether the last one is the best
        now = time.perf_counter()
        self.trainer.seconds += now - self.counted_to
        self.counted_to = now
        signum = self.trainer.stop.signum or 0
        # A signal reaches the ranks at different steps; they stop at the same one.
        if args.world_size > 1:
            mine = torch.tensor([signum], device=args.device)
            signum = int(self.trainer.accelerator.gather(mine).max())
        if signum:
            self.trainer.stop.signum = signum
            control.should_save = control.should_training_stop = True


def make_trainer(
    run: Run,
    directory: RunDirectory,
    stop: StopSignal,
    model: Any,
    tokenizer: Any,
    data: Prepared,
    plan: Any = None,
) -> LoraTrainer:
    """The trainer of a recipe, with metrics.jsonl, a progress display and sealed checkpoints.

    Args:
        plan: a `plan.Plan`, whose batch and recomputation are taken; None: the run's own.

    Raises:
        UserError: the disk is too small for the checkpoints that will be kept; or the base does
            not keep packed documents apart.
    """
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    keep = run.train.save_total_limit + bool(run.train.eval_steps)  # the best one
    needed = checkpoint.checkpoint_bytes(trainable, keep, run.train.optim)
    check_room(directory.path, needed, "lower train.save_total_limit")
    chosen = plan.choice if plan and run.speed == "auto" else None
    planned = chosen and {
        "per_device_train_batch_size": chosen.micro_batch,
        "gradient_accumulation_steps": chosen.accumulation,
        "gradient_checkpointing": False,  # but for the layers below
    }
    arguments = training_arguments(run, directory.checkpoints, planned)
    collate: Any = collator(tokenizer.pad_token_id)
    if run.speed == "auto" and _quicken(model, arguments.device, directory):
        collate = in_one_row
    if chosen:
        recompute(model, chosen.recomputed)
    trainer = LoraTrainer(
        run,
        directory,
        stop,
        model=model,
        args=arguments,
        train_dataset=_Numbered(data.train),
        eval_dataset=data.eval if run.train.eval_steps else None,
        data_collator=collate,
        callbacks=[Metrics(directory.metrics), Progress()],
    )
    trainer.plan = plan
    if isinstance(data.train, Packed):
        check_isolation(trainer.model)
    if collate is in_one_row:
        trainer.prefix = Prefix(trainer.model)
        if trainer.prefix.layers:
            passes = _passes(trainer.args, len(data.train))
            directory.say(trainer.prefix.keep(data.train, passes))
    directory.check_world(trainer.accelerator.num_processes)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(directory.path / "tensorboard")
    for line in too_little(run, data, trainable):
        directory.say(line)
    return trainer


def _passes(arguments: Any, rows: int) -> float:
    """How often a run trains on each row."""
    if arguments.max_steps <= 0:
        return float(arguments.num_train_epochs)
    step = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    return float(arguments.max_steps * step / rows)


def _quicken(model: Any, device: Any, directory: RunDirectory) -> bool:
    """Put the quick paths in; says what stays plain. Returns whether rows come without padding."""
    if any(os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("FSDP", "DEEPSPEED")):
        directory.say("speed: the base is sharded: transformers' own path")
        return False
    if not getattr(model, "is_quantized", False):
        model.to(device)  # where it is going to run is where the paths are tried
    plain = make_fast(model)
    if plain:
        parts = "; ".join(f"{part} ({why})" for part, why in plain.items())
        directory.say(f"speed: as transformers and PEFT have it: {parts}")
    return "attention" not in plain


def fit(trainer: LoraTrainer, resume: bool) -> None:
    """Train to the end, or to a signal.

    Raises:
        CheckFailed: the loss or its gradient became NaN or infinite, or no gradient reached the
            adapter (exit code 1).
        Interrupted: SIGINT or SIGTERM came; a checkpoint was saved (exit code 130 or 143).
        UserError: `resume`, and there is no whole checkpoint; or that of the best adapter, which
            is to be used, is damaged.
    """
    found = trainer.directory.checkpoint_to_resume() if resume else None
    if found:
        trainer.resume(found)
        trainer.directory.say(f"continuing after step {found.step}")
    trainer.stop.saving = True
    try:
        trainer.train(resume_from_checkpoint=str(found.folder) if found else None)
    finally:
        trainer.stop.saving = False
        if trainer.prefix:
            trainer.prefix.close()
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, Progress):
                callback.close()
    signum, step = trainer.stop.signum, trainer.state.global_step
    trainer.stop.signum = None  # the next signal stops what comes after training
    if signum is not None and step < trainer.state.max_steps:
        raise Interrupted(
            signum,
            f"stopped after step {step}, saved: go on with "
            f"lora-kit train {trainer.directory.path / 'run.yaml'} --resume",
        )
    trainer.peak_mib = peak_mib()
    _use_best(trainer)
    make_plain(trainer.model)  # the verdict is on the arithmetic that others load the adapter with
    trainer.audit.end(step)


def _use_best(trainer: LoraTrainer) -> None:
    """Put the adapter of the lowest eval_loss back into the model, where it is not the last."""
    run, best = trainer.run, trainer.best_step
    if best in (None, trainer.state.global_step) or not run.train.load_best_model_at_end:
        return
    folder = trainer.directory.checkpoints / f"checkpoint-{best}"
    try:
        checkpoint.read_seal(folder)
    except UserError as error:
        raise UserError(
            f"{error}, the best one: save the last instead: lora-kit train "
            f"{trainer.directory.path / 'run.yaml'} --resume train.load_best_model_at_end=false"
        ) from None
    trainer.state.best_model_checkpoint = str(folder)  # from here on it is not saved any more
    trainer._load_best_model()
    trainer.directory.say(f"eval_loss was lowest at step {best}: the adapter of that step is used")
