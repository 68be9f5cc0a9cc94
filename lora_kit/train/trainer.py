"""Builds a recipe's guarded trainer and runs the training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers.integrations import TensorBoardCallback

from lora_kit.base.load import base_is_sharded
from lora_kit.errors import Interrupted, UserError
from lora_kit.folders import check_room
from lora_kit.schema import Run
from lora_kit.speed.fast import Probe, documents_loss, make_fast, make_plain
from lora_kit.speed.memory import recompute
from lora_kit.speed.prefix import Prefix
from lora_kit.tasks.batches import collator, in_one_row
from lora_kit.tasks.packing import Packed, check_isolation, content_hash
from lora_kit.tasks.task import Processor, Task
from lora_kit.train import checkpoint
from lora_kit.train.arguments import training_arguments
from lora_kit.train.callbacks import Metrics, Progress, peak_mib
from lora_kit.train.enough import too_little
from lora_kit.train.guards import Guards, best_step, guarded, has_own_loss, resume_from
from lora_kit.train.journey import Journey
from lora_kit.train.strategies import Strategy

if TYPE_CHECKING:
    from lora_kit.tasks.encode import Prepared

_FOR_ANY_MODEL = ("linear", "norm")  # the other fast paths are for causal language models


class _WithRowIndex:
    """A data set that adds each row's index as `row`."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {**self.rows[number], "row": number}


def make_trainer(
    journey: Journey,
    model: Any,
    fresh: Sequence[str],
    processor: Any,
    data: Prepared,
    strategy: Strategy,
    plan: Any = None,
) -> Guards:
    """The guarded trainer of a task, with metrics.jsonl and a progress display.

    Args:
        model: a PEFT model, with the adapter attached.
        fresh: names of its fresh modules.
        plan: the memory plan, which sets the batch and recomputation; None: the run's settings.

    Raises:
        UserError: the disk is too small for the kept checkpoints; or the base does not isolate
            packed documents.
    """
    task, run, directory = journey.task, journey.run, journey.directory
    if fresh and type(task).rivals is Task.rivals:
        raise UserError(
            "TASK.rivals: missing: an untrained head is no baseline to compare with; see "
            "recipes/README.md"
        )
    directory.lock(fresh=list(fresh))
    if pooling := getattr(model, "pooling", None):
        directory.lock(pooling=pooling)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    keep = run.train.save_total_limit + bool(run.train.eval_steps)  # the best one
    needed = checkpoint.checkpoint_bytes(trainable, keep, run.train.optim)
    check_room(directory.path, needed, "lower train.save_total_limit")
    chosen = plan.choice if plan and run.speed == "auto" else None
    planned = chosen and {
        "per_device_train_batch_size": chosen.micro_batch,
        "gradient_accumulation_steps": chosen.accumulation,
        "gradient_checkpointing": False,  # only in the layers that `recompute` sets
    }
    trainer_class, arguments_class = task.classes()
    arguments = training_arguments(run, directory.checkpoints, planned, arguments_class)
    own_loss = has_own_loss(task)
    if own_loss and not (base_is_sharded() or getattr(model, "is_quantized", False)):
        # Fast paths are tested, and references computed, on the training device.
        model.to(arguments.device)
    flat = False
    if own_loss and run.speed == "auto":  # TRL's trainers patch the model's forward themselves
        flat = _make_fast(journey, model, processor, data)
    if chosen:
        recompute(model, chosen.recomputed)
    train: Any = task.annotate(data.train, model, processor, run)
    held_out = task.annotate(data.eval, model, processor, run) if run.train.eval_steps else None
    options = task.options(processor, data.facts, run)
    if own_loss:
        train = _WithRowIndex(train) if flat else train
    else:  # a library's trainer needs a Dataset and the tokenizer
        train, held_out = train.dataset(), held_out and held_out.dataset()
        options = {"processing_class": processor, **options}
    if collate := task.collate(processor, flat):
        options["data_collator"] = collate
    trainer = guarded(trainer_class)(
        task,
        run,
        directory,
        journey.stop,
        strategy.groups(task.groups(fresh)),
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=held_out,
        callbacks=[Metrics(directory.metrics), Progress()],
        **options,
    )
    trainer.guard.plan = plan
    packed = isinstance(data.train, Packed)
    if packed:
        check_isolation(trainer.model)
    if flat:
        trainer.guard.prefix = prefix = Prefix(trainer.model)
        if prefix.layers:
            lengths = data.train.lengths if packed else task.tokens(data.train)
            epochs = _epochs(trainer.args, len(data.train))
            directory.say(prefix.keep(lengths, content_hash(data.train), epochs))
    directory.check_world(trainer.accelerator.num_processes)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(directory.path / "tensorboard")
    for line in too_little(task, run, data, trainable):
        directory.say(line)
    return trainer


def _epochs(arguments: Any, rows: int) -> float:
    """Number of epochs of a run."""
    if arguments.max_steps <= 0:
        return float(arguments.num_train_epochs)
    step = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    return float(arguments.max_steps * step / rows)


def _make_fast(journey: Journey, model: Any, processor: Processor, data: Prepared) -> bool:
    """Install the fast paths and report what uses the standard path. Returns whether batches are
    without padding."""
    task, run = journey.task, journey.run
    if base_is_sharded():
        journey.say("speed: standard path, since the base is sharded")
        return False
    if task.flat:
        plain = make_fast(model, documents_loss(model, collator(0), in_one_row))
    else:
        plain = make_fast(model, _rows_loss(task, run, model, processor, data), _FOR_ANY_MODEL)
    if plain:
        parts = "; ".join(f"{part} ({why})" for part, why in plain.items())
        journey.say(f"speed: standard path for {parts}")
    return task.flat and "attention" not in plain


def _rows_loss(task: Task, run: Run, model: Any, processor: Processor, data: Prepared) -> Probe:
    """The loss of the first training rows, to compare the paths on."""
    rows, device = data.rows("train"), next(model.parameters()).device
    collate = task.collate(processor)
    assert collate is not None  # a task with its own loss has a collator
    batch = collate([rows[number] for number in range(min(2, len(rows)))])

    def loss(flat: bool) -> torch.Tensor:
        moved = {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}
        return task.loss(model, moved, task.items(moved), run.train)

    return loss


def fit(trainer: Guards, resume: bool) -> None:
    """Train to the end, or until a signal arrives.

    Raises:
        CheckFailed: the loss or its gradient became NaN or infinite, or no gradient reached the
            adapter (exit code 1).
        Interrupted: SIGINT or SIGTERM; a checkpoint was saved (exit code 130 or 143).
        UserError: there is no intact checkpoint to resume from; or the checkpoint of the best
            adapter is corrupt.
    """
    guard = trainer.guard
    found = guard.directory.checkpoint_to_resume() if resume else None
    if found:
        resume_from(trainer, found)
        guard.directory.say(f"resuming after step {found.step}")
    guard.stop.saving = True
    try:
        trainer.train(resume_from_checkpoint=str(found.folder) if found else None)
    finally:
        guard.stop.saving = False
        if guard.prefix:
            guard.prefix.close()
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, Progress):
                callback.close()
    signum, step = guard.stop.signum, trainer.state.global_step
    guard.stop.signum = None  # the next signal interrupts the evaluation
    if signum is not None and step < trainer.state.max_steps:
        raise Interrupted(
            signum,
            f"stopped after step {step}, checkpoint saved: resume with "
            f"lora-kit train {guard.directory.path / 'run.yaml'} --resume",
        )
    guard.peak_mib = peak_mib()
    _use_best(trainer)
    # Evaluate with the standard arithmetic, as other programs will.
    make_plain(trainer.model)
    guard.audit.end(step)


def _use_best(trainer: Guards) -> None:
    """Load the adapter of the lowest eval_loss into the model, unless it is the last."""
    guard, best = trainer.guard, best_step(trainer.state)
    if best in (None, trainer.state.global_step) or not guard.run.train.load_best_model_at_end:
        return
    folder = guard.directory.checkpoints / f"checkpoint-{best}"
    try:
        checkpoint.read_seal(folder)
    except UserError as error:
        raise UserError(
            f"{error} (best checkpoint): to use the last one instead: lora-kit train "
            f"{guard.directory.path / 'run.yaml'} --resume train.load_best_model_at_end=false"
        ) from None
    # transformers stores an absolute path, which is wrong after a run was moved.
    trainer.state.best_model_checkpoint = str(folder)
    trainer._load_best_model()
    guard.directory.say(f"using the adapter of step {best}, which had the lowest eval_loss")
