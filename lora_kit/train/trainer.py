"""Builds a recipe's guarded trainer and runs the training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import send_to_device
from transformers.integrations import TensorBoardCallback

from lora_kit.base.load import base_is_sharded
from lora_kit.data.rows import Row, Rows
from lora_kit.errors import Interrupted, UserError
from lora_kit.folders import check_room
from lora_kit.hashes import file_hash
from lora_kit.schema import Run, Train
from lora_kit.speed.fast import FOR_ANY_MODEL, FixedLoss, documents_loss, make_fast, make_plain
from lora_kit.speed.memory import Choice, recompute
from lora_kit.speed.prefix import Prefix
from lora_kit.tasks.batches import collator, in_one_row
from lora_kit.tasks.packing import Packed, check_isolation, content_hash
from lora_kit.tasks.task import Processor, Task
from lora_kit.train.arguments import training_arguments
from lora_kit.train.callbacks import Metrics, Progress, peak_mib
from lora_kit.train.directory import (
    add_to_lock,
    agree,
    batch_geometry,
    check_processes,
    check_sharded,
    say,
)
from lora_kit.train.guards import Guards, best_step, guarded, has_own_loss, rate_advice, resume_from
from lora_kit.train.journey import Journey
from lora_kit.train.save import SEAL, checkpoint_bytes, newest_intact, read_seal
from lora_kit.train.strategies import Strategy

if TYPE_CHECKING:
    from lora_kit.tasks.encode import Prepared

# A rule of thumb, not a known bound. A parameter stores about 2 bits (Allen-Zhu & Li 2024,
# arXiv:2404.05405), so almost any adapter could memorize its rows, and most still generalize:
# 750,000 tokens in 15 epochs were enough for full fine-tuning of 65B parameters (LIMA: Zhou et al.
# 2023, arXiv:2305.11206). So the warning is for runs far below the usual: with 42M parameters
# (8B, r = 16), 2,000 completions of 150 tokens in 3 epochs are one supervised token per 47
# parameters; 90 completions are one per 1,000.
PARAMETERS_PER_LABEL = 1_000
# Repeated tokens are worth nearly as much as new ones up to 4 epochs, and little beyond 16
# (Muennighoff et al. 2023, arXiv:2305.16264).
EPOCHS = 10
# Far above any that trains an adapter: tiny models in tests are still trained with 3e-2.
LARGEST_RATE = 0.1


def make_trainer(
    journey: Journey,
    model: torch.nn.Module,
    fresh: Sequence[str],
    processor: Processor,
    data: Prepared,
    strategy: Strategy,
    plan: Any = None,
) -> Guards:
    """The guarded trainer of a task, with metrics.jsonl and a progress display.

    Args:
        model: a PEFT model, with the adapter attached.
        fresh: names of its fresh modules.
        plan: the memory plan (`lora_kit.plan.MemoryPlan`), which sets the batch and recomputation;
            None: the run's settings.

    Raises:
        UserError: the disk is too small for the kept checkpoints; or the base does not isolate
            packed documents.
    """
    task, run = journey.task, journey.run
    directory = run.directory
    if fresh and type(task).rivals is Task.rivals:
        raise UserError(
            "TASK.rivals: missing: an untrained head is no baseline to compare with; see "
            "recipes/README.md"
        )
    pooling = getattr(model, "pooling", None)
    add_to_lock(directory, fresh=list(fresh), **({"pooling": pooling} if pooling else {}))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    keep = run.train.save_total_limit + bool(run.train.eval_steps)  # and the best checkpoint
    needed = checkpoint_bytes(trainable, keep, run.train.optim)
    check_room(directory, needed, "lower train.save_total_limit")

    if base_is_sharded():
        journey.connect()

    # The trainer's arguments, with the batch that the plan chose.
    choice: Choice | None = plan.choice if plan and run.speed == "auto" else None
    planned = _planned(choice) if choice else {}
    trainer_class, arguments_class = task.classes()
    arguments = training_arguments(run, directory / "checkpoints", planned, arguments_class)

    # The fast paths. Not with TRL's trainers, which patch the model's forward themselves.
    flat = False  # batches without padding
    if has_own_loss(task):
        if not (base_is_sharded() or getattr(model, "is_quantized", False)):
            # Fast paths are tested, and references computed, on the training device.
            model.to(arguments.device)
        if run.speed == "auto":
            flat = _make_fast(task, run, model, processor, data)
    if choice:
        recompute(model, choice.recomputed)

    trainer = guarded(trainer_class)(
        task,
        run,
        directory,
        journey.stop,
        strategy.groups(task.groups(fresh)),
        model=model,
        args=arguments,
        callbacks=[Metrics(directory / "metrics.jsonl"), Progress()],
        **_rows_and_collator(task, run, model, processor, data, flat),
    )
    trainer.guard.plan = plan
    if isinstance(data.train, Packed):
        check_isolation(trainer.model)
    if flat:
        trainer.guard.prefix = _frozen_prefix(trainer, data.train)
    check_processes(trainer.accelerator.num_processes)
    check_sharded(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(directory / "tensorboard")
    for line in too_little(task, run.train, data, trainable):
        say(line)
    return trainer


def _planned(choice: Choice) -> dict[str, object]:
    """Fields of `train:` as the plan sets them."""
    return {
        "per_device_train_batch_size": choice.micro_batch,
        "gradient_accumulation_steps": choice.accumulation,
        "gradient_checkpointing": False,  # only in the layers that `recompute` sets
    }


def _make_fast(
    task: Task, run: Run, model: torch.nn.Module, processor: Processor, data: Prepared
) -> bool:
    """Install the fast paths and report which parts use the standard path, and why. Returns whether
    batches are without padding."""
    if base_is_sharded():
        say("speed: standard path, since the base is sharded")
        return False
    if task.flat:
        standard = make_fast(model, documents_loss(model, collator(0), in_one_row))
    else:
        rows = data.rows("train")
        first = [rows[number] for number in range(min(2, len(rows)))]
        standard = make_fast(model, _loss_of(first, task, run, model, processor), FOR_ANY_MODEL)
    if standard:
        parts = "; ".join(f"{part} ({why})" for part, why in standard.items())
        say(f"speed: standard path for {parts}")
    return task.flat and "attention" not in standard


def _loss_of(
    rows: Sequence[Row], task: Task, run: Run, model: torch.nn.Module, processor: Processor
) -> FixedLoss:
    """The loss of these rows, to compare fast and standard path on; never without padding."""
    collate = task.collate(processor)
    assert collate is not None  # a task with its own loss has a collator
    batch = send_to_device(collate(rows), next(model.parameters()).device)
    return lambda flat: task.loss(model, batch, task.items(batch), run.train)


def _rows_and_collator(
    task: Task, run: Run, model: torch.nn.Module, processor: Processor, data: Prepared, flat: bool
) -> dict[str, Any]:
    """The trainer's arguments that depend on the rows and on the task."""
    train: Any = data.train
    if not isinstance(data.train, Packed):  # only rows that are not packed get more columns
        train = task.annotate(data.train, model, processor, run)
    held_out: Any = None
    if run.train.eval_steps:
        held_out = task.annotate(data.eval, model, processor, run)
    options: dict[str, Any] = {}
    if not has_own_loss(task):  # a library's trainer needs a Dataset and the tokenizer
        options["processing_class"] = processor
        train, held_out = train.dataset(), held_out and held_out.dataset()
    elif flat:
        train = _WithRowIndex(train)
    options |= {"train_dataset": train, "eval_dataset": held_out}
    options |= task.options(processor, data.facts, run)
    if collate := task.collate(processor, flat):
        options["data_collator"] = collate
    return options


class _WithRowIndex:
    """A data set that adds each row's index as `row`, for the frozen prefix."""

    def __init__(self, rows: Rows | Packed) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Row:
        return {**self.rows[number], "row": number}


def _frozen_prefix(trainer: Guards, rows: Rows | Packed) -> Prefix:
    """The layers below the adapter; their output is cached if rows are reused."""
    prefix = Prefix(trainer.model)
    if prefix.layers:
        task, train = trainer.guard.task, trainer.guard.run.train
        lengths = rows.lengths if isinstance(rows, Packed) else task.tokens(rows)
        say(prefix.keep(lengths, content_hash(rows), _epochs(train, len(rows))))
    return prefix


def _epochs(train: Train, rows: int) -> float:
    """How often a run trains on each of its (packed) rows."""
    if not train.max_steps:
        return train.num_train_epochs
    return train.max_steps * batch_geometry(train)["rows_per_step"] / max(1, rows)


def too_little(task: Task, train: Train, data: Prepared, trainable: int) -> list[str]:
    """Warnings about few supervised tokens, many epochs or a large learning rate; none for a usual
    run.

    Args:
        trainable: number of trainable parameters.
    """
    labels, epochs = task.supervised(data.rows("train")), _epochs(train, len(data.train))
    lines = []
    if trainable > PARAMETERS_PER_LABEL * labels * epochs:
        lines.append(
            f"warning: little data: {labels * epochs:,.0f} labels ({labels:,} x {epochs:.1f} "
            f"epochs) for {trainable:,} trainable parameters; the adapter may memorize these rows: "
            "add data, or lower adapter.r"
        )
    if train.learning_rate > LARGEST_RATE:
        lines.append(f"warning: training will diverge: {rate_advice(train)}")
    # If the best adapter is kept, too many epochs only cost time.
    if epochs > EPOCHS and not (train.eval_steps and train.load_best_model_at_end):
        key = "max_steps" if train.max_steps else "num_train_epochs"
        lines.append(
            f"warning: {epochs:.1f} epochs over {labels:,} labels: beyond about {EPOCHS}, models "
            f"overfit; lower train.{key}, or set train.eval_steps to keep the best adapter"
        )
    return lines


def fit(trainer: Guards, resume: bool) -> None:
    """Train to the end, or until a signal arrives.

    Raises:
        CheckFailed: the loss or its gradient became NaN or infinite, or no gradient reached the
            adapter (exit code 1).
        Interrupted: by a signal; a checkpoint was saved (exit code 130, 143 or 129).
        UserError: there is no intact checkpoint to resume from; or the checkpoint of the best
            adapter is corrupt.
    """
    guard = trainer.guard
    found = newest_intact(guard.directory) if resume else None
    if found:
        seal = {"step": found.step, "seal": file_hash(found.folder / SEAL)}
        agree({f"the checkpoint's {name}": value for name, value in seal.items()})
        resume_from(trainer, found)
        say(f"resuming after step {found.step}")
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
    # After a signal in the last step the run still completes; the next one interrupts it.
    guard.stop.signum = None
    if signum is not None and step < trainer.state.max_steps:
        raise Interrupted(
            signum,
            f"stopped after step {step}, checkpoint saved: resume with "
            f"lora-kit train {guard.directory / 'run.yaml'} --resume",
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
    folder = guard.directory / "checkpoints" / f"checkpoint-{best}"
    try:
        read_seal(folder)
    except UserError as error:
        raise UserError(
            f"{error} (best checkpoint): to use the last one instead: lora-kit train "
            f"{guard.directory / 'run.yaml'} --resume train.load_best_model_at_end=false"
        ) from None
    # transformers stores an absolute path, which is wrong after a run was moved.
    trainer.state.best_model_checkpoint = str(folder)
    trainer._load_best_model()
    say(f"using the adapter of step {best}, which had the lowest eval_loss")
