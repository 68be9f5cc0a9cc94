"""Whether the loss is the same however a batch is cut up: `lora-kit doctor --loss`.

One optimizer step of the user's own model on a few of their rows is done in ways that must agree.
Each runs through the trainer of every recipe with a learning rate of 0; its loss and the gradient
of the whole adapter are compared. Correct is the mean over all labels of the batch. A recipe of the
user's own that changes the trainer is not tested.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate.utils import send_to_device
from transformers import TrainerCallback

from lora_kit.adapter.attach import attach
from lora_kit.base.load import gpu_is_used
from lora_kit.base.pin import pin
from lora_kit.data.rows import Rows
from lora_kit.errors import UserError
from lora_kit.schema import Json, Run
from lora_kit.speed.fast import PARTS, documents_loss, make_fast, make_plain
from lora_kit.tasks.batches import IGNORED, collator, in_one_row
from lora_kit.tasks.encode import rows_of
from lora_kit.tasks.packing import Packed, check_isolation
from lora_kit.tasks.task import Batch, Collate, Processor, Task
from lora_kit.train.arguments import check_installed, training_arguments
from lora_kit.train.directory import check_processes, is_first_rank
from lora_kit.train.guards import guarded, has_own_loss
from lora_kit.train.interrupt import StopSignal
from lora_kit.train.strategies import choose

# The file in which the first of two ranks leaves its step.
STEP_VARIABLE = "LORA_KIT_STEP"
ROWS = 8
_DRAWN = 64  # rows, of which the shortest are used: one micro-batch contains them all
_LONGEST = 256  # tokens of a row
_SIZE_OF_B = 0.02
# Relative differences that rounding alone may make: of the loss, and of the gradient (L2).
TOLERANCE = {"float32": (1e-5, 1e-4), "bfloat16": (5e-3, 5e-2)}
_CAUSES = {
    "accumulation": "the means of the passes are averaged, not the loss of all labels of the batch "
    "(as in transformers#34191)",
    "packing": "documents of one row see each other (position_ids are ignored or lost), or a first "
    "token is predicted from the document before it",
    "padding": "padding is attended to or trained on, or the model's loss is more than the mean "
    "over its labels",
    "processes": "gradients are summed and not averaged over the ranks, or each rank counts only "
    "its own labels",
    "speed": "a fast path is not exact on these rows: set speed=plain, and report it",
}
_NOT_CHECKED = {
    "packing": "not supported by this base",
    "processes": "one GPU is no two processes",
    "speed": "the standard path is used",
}


class Step(NamedTuple):
    """One optimizer step: the loss in nats per label; the gradient, float32, (trainable,)."""

    loss: float
    gradient: np.ndarray


class Setup(NamedTuple):
    """What takes the step: the model with its adapter, on rows of different lengths."""

    run: Run
    task: Task
    processor: Processor
    model: torch.nn.Module
    rows: Rows


def self_test(run: Run, task: Task, in_two_processes: Callable[[str], None]) -> Json:
    """Compare the ways, in the run's own type and quantization, with dropout switched off.

    Args:
        in_two_processes: runs `one_rank` in two ranks of the accelerate config that it is given.

    Returns:
        {"model", "dtype", "quantize", "labels": of each row, "comparisons": [{"name", "ways": two,
        "loss": two, "loss_difference", "gradient_difference": relative, "tolerance": {"loss",
        "gradient"}, "passed": null where it was not checked, "note": cause, reason or null}]}

    Raises:
        UserError: as the run itself would; or the loss is that of a library's trainer.
    """
    if not has_own_loss(task):
        raise UserError("--loss: the loss of this recipe is its trainer's own: it is not checked")
    check_installed(run)
    # First, while this process holds no model: two more of them have to fit.
    two = _two_processes(in_two_processes)
    setup = make_setup(run, task)
    rows = setup.rows
    padded = one_step(setup, rows, ROWS, 1)
    accumulated = one_step(setup, rows, 1, ROWS)
    by_hand = _step_by_hand(setup)
    packed, packed_rows, quick = None, 0, None
    if _token_labels(rows):
        packed, packed_rows = _packed_step(setup)
        quick = _quick_step(setup)
    found = [
        compare_steps(name, ways, padded, other, TOLERANCE[run.base.dtype])
        for name, ways, other in (
            ("accumulation", [f"{ROWS} rows x 1 pass", f"1 row x {ROWS} passes"], accumulated),
            ("packing", ["a document a row", f"{packed_rows} packed rows"], packed),
            ("padding", [f"{ROWS} rows padded", "each row alone, by hand"], by_hand),
            ("speed", ["the standard path", "the fast paths"], quick),
            ("processes", ["one process", "two processes"], two),
        )
    ]
    if found[0]["passed"] is False and found[2]["passed"] is False:  # accumulation and padding
        found[0]["note"] = "one pass is padded and the others are not: see padding"
    return {
        **run.base.model_dump(include={"model", "dtype", "quantize"}),
        "labels": [task.supervised(rows.select([number])) for number in range(ROWS)],
        "comparisons": found,
    }


def compare_steps(
    name: str, ways: list[str], one: Step, other: Step | None, tolerance: tuple[float, float]
) -> Json:
    """One entry of `comparisons`. A difference that is NaN does not pass."""
    if other is None:
        return {"name": name, "ways": None, "passed": None, "note": _NOT_CHECKED[name]}
    loss = abs(other.loss - one.loss) / abs(one.loss)
    gradient = np.linalg.norm(other.gradient - one.gradient) / np.linalg.norm(one.gradient)
    passed = bool(loss <= tolerance[0] and gradient <= tolerance[1])
    return {
        "name": name,
        "ways": ways,
        "loss": [one.loss, other.loss],
        "loss_difference": float(loss),
        "gradient_difference": float(gradient),
        "tolerance": {"loss": tolerance[0], "gradient": tolerance[1]},
        "passed": passed,
        "note": None if passed else _CAUSES[name],
    }


# ------------------------------------------------------------------ what takes the step
def make_setup(run: Run, task: Task) -> Setup:
    """The base with a fresh adapter, and rows of the run's training data.

    B is small instead of zero, so that A has a gradient as well; there is no dropout, the base's
    own included.
    """
    pinned = pin(run.base)
    processor, data = rows_of(task, run, pinned, limits=False)
    rows = _unequal_rows(data.rows("train"), run.seed)
    base, fresh = task.model(pinned, data.facts, run)
    strategy = choose(run.train, run.adapter, base, fresh)
    model = attach(base, strategy.adapter, fresh, run.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_B" in name and parameter.requires_grad and not parameter.any():
                parameter.copy_(torch.randn(parameter.shape) * _SIZE_OF_B)
    for holder in (model.config.get_text_config(), *model.modules()):
        for name, value in list(vars(holder).items()):
            # nn.Dropout's own, and those that a model hands to its attention.
            if isinstance(value, float) and (name == "p" or "drop" in name):
                setattr(holder, name, 0.0)
    return Setup(run, task, processor, model, task.annotate(rows, model, processor, run))


def _token_labels(rows: Rows) -> bool:
    """Whether labels are per token, as in language models."""
    return "labels" in rows.columns and isinstance(rows[0]["labels"], np.ndarray)


def _unequal_rows(rows: Rows, seed: int) -> Rows:
    """ROWS rows; if there are fewer, they are repeated. Rows with a label per token are cut to
    different lengths, and every second one is supervised in its second half only: with equal counts
    of labels, a mean of means would be right by chance."""
    drawn = np.random.default_rng(seed).permutation(len(rows))[:_DRAWN]
    if "input_ids" in rows.columns:
        drawn = drawn[np.argsort(rows.sizes("input_ids")[drawn], kind="stable")]
    chosen = rows.select(np.resize(drawn, ROWS))
    if not _token_labels(rows):
        return chosen
    cut = []
    for number, row in enumerate(chosen):
        ids = row["input_ids"][:_LONGEST]
        ids = ids[: max(2, len(ids) * (number + 1) // ROWS)]
        labels = ids.copy()
        if number % 2:
            labels[: len(ids) // 2] = IGNORED
        cut.append({"input_ids": ids, "labels": labels, "unit": number})
    return Rows.of(cut)


# ------------------------------------------------------------------ the ways to take it
class _Gradient(TrainerCallback):
    """Copies the gradient of all trainable parameters before the optimizer step."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.found = np.zeros(0, np.float32)

    def on_pre_optimizer_step(self, *_: object, **__: object) -> None:
        self.found = _gradient_of(self.model)


def one_step(
    setup: Setup,
    rows: Rows | Packed,
    rows_per_pass: int,
    passes: int,
    collate: Collate | None = None,
) -> Step:
    """One step of the trainer over all rows; the model is left as it was.

    Args:
        rows_per_pass, passes: rows per micro-batch and micro-batches, on each rank.
        collate: a collator instead of the task's.
    """
    settings: dict[str, object] = {
        "max_steps": 1,
        "learning_rate": 0.0,
        "max_grad_norm": 0.0,  # no clipping, which would hide a wrong scale
        "logging_steps": 1,
        "per_device_train_batch_size": rows_per_pass,
        "gradient_accumulation_steps": passes,
        "eval_steps": None,
        "early_stopping_patience": None,
        "report_to": [],
    }
    train = setup.run.train.model_copy(update=settings)
    run = setup.run.model_copy(update={"train": train, "speed": "plain"})
    task, model = setup.task, setup.model
    trainer_class, arguments_class = task.classes()
    gradient = _Gradient(model)
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(run, Path(folder), None, arguments_class)
        arguments.save_strategy = "no"
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        trainer = guarded(trainer_class)(
            task,
            run,
            Path(folder),
            StopSignal(),
            {"adapter": trained.__contains__},
            model=model,
            args=arguments,
            train_dataset=rows,
            data_collator=collate or task.collate(setup.processor),
            callbacks=[gradient],
        )
        check_processes(trainer.accelerator.num_processes)
        loss = trainer.train().training_loss
    return Step(loss, gradient.found)


def _packed_step(setup: Setup) -> tuple[Step | None, int]:
    """The step on packed rows, and the number of these; None if the base does not isolate packed
    documents, unless the run needs that: then an error."""
    packed = Packed(setup.rows, 2 * int(setup.rows.sizes("input_ids").max()))
    try:
        check_isolation(setup.model)
    except UserError:
        if setup.run.data.packing == "documents":
            raise
        return None, 0
    return one_step(setup, packed, len(packed), 1), len(packed)


def _quick_step(setup: Setup) -> Step | None:
    """The step on the fast paths of `speed: auto`; None if this base uses none of them."""
    if setup.run.speed == "plain":
        return None
    pad = collator(setup.processor.pad_token_id)
    plain = make_fast(setup.model, documents_loss(setup.model, pad, in_one_row))
    try:
        if plain.keys() == set(PARTS):
            return None
        collate = pad if "attention" in plain else in_one_row
        return one_step(setup, setup.rows, ROWS, 1, collate)
    finally:
        make_plain(setup.model)


def _step_by_hand(setup: Setup) -> Step:
    """The step without the trainer: each row alone, its loss divided by the items of all rows."""
    task, model = setup.task, setup.model
    device = next(model.parameters()).device
    collate = task.collate(setup.processor)
    assert collate is not None  # a task with its own loss has a collator
    batches = [collate([row]) for row in setup.rows]
    items = sum(int(task.items(batch)) for batch in batches)
    model.zero_grad()
    total = 0.0
    for batch in batches:
        moved = send_to_device(batch, device)
        if _token_labels(setup.rows):
            loss = _nats(model, moved) / items  # the model's own loss may be more than that
        else:
            loss = task.loss(model, moved, items, setup.run.train)
        loss.backward()
        total += loss.item()
    return Step(total, _gradient_of(model))


def _nats(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """The cross entropy of one row, summed over its labels."""
    labels = batch["labels"][0, 1:]
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits = model(**inputs).logits[0, :-1].float()  # (tokens - 1, vocabulary)
    return torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")


def _gradient_of(model: torch.nn.Module) -> np.ndarray:
    """The gradient of all that trains, as one vector of float32."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in trainable]
    joined = torch.cat([part.detach().float().flatten().cpu() for part in parts])
    return np.asarray(joined.numpy())


def _two_processes(start: Callable[[str], None]) -> Step | None:
    if gpu_is_used() and torch.cuda.device_count() < 2:
        return None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "step.npz"
        os.environ[STEP_VARIABLE] = str(file)
        start("multi_gpu" if gpu_is_used() else "cpu_2proc")
        with np.load(file) as stored:
            return Step(float(stored["loss"]), stored["gradient"])


def one_rank(run: Run, task: Task) -> Json:
    """What each of the two processes does: half of the rows, in one micro-batch."""
    setup = make_setup(run, task)
    step = one_step(setup, setup.rows, ROWS // 2, 1)
    if is_first_rank():
        np.savez(os.environ[STEP_VARIABLE], loss=step.loss, gradient=step.gradient)
    return {"loss": step.loss}


def show(found: Json) -> None:
    """Print it as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("", "", "loss", "differs by", "gradient by", ""):
        table.add_column(name, justify="right" if name else "left")
    words = {True: "pass", False: "FAIL", None: "not checked"}
    for one in found["comparisons"]:
        word = words[one["passed"]]
        if not one["ways"]:
            table.add_row(one["name"], one["note"], "", "", "", word)
            continue
        (first, second), (loss, other) = one["ways"], one["loss"]
        differences = f"{one['loss_difference']:.1e}", f"{one['gradient_difference']:.1e}"
        table.add_row(one["name"], first, f"{loss:.6f}")
        table.add_row("", second, f"{other:.6f}", *differences, word)
    labels, kind = found["labels"], f"{found['dtype']}, quantize: {found['quantize']}"
    print(f"{found['model']}, {kind}: one step on {ROWS} rows")
    print(f"of {min(labels)} to {max(labels)} labels, through the trainer, without dropout")
    Console().print(table)
    loss, gradient = TOLERANCE[found["dtype"]]
    print(f"allowed for rounding in {found['dtype']}: loss {loss:.0e}, gradient {gradient:.0e}")
