"""Is the loss the same, however a batch is cut up? One optimizer step of the user's own model on a
few of their rows, done in ways that must agree: `lora-kit doctor --loss`.

Each way runs through the trainer of every recipe with a learning rate of 0, and its loss and the
gradient of the whole adapter are compared. What is right is the mean over all labels of the batch.
A recipe of the user's own that changes the trainer is not seen.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_kit.adapter.attach import attach
from lora_kit.base.load import gpu_is_used
from lora_kit.base.pin import Pinned, pin
from lora_kit.data.rows import Rows
from lora_kit.errors import UserError
from lora_kit.schema import Run
from lora_kit.speed.fast import PARTS, documents_loss, make_fast, make_plain
from lora_kit.tasks.batches import IGNORED, collator, in_one_row
from lora_kit.tasks.encode import Prepared, rows_of
from lora_kit.tasks.packing import Packed, check_isolation
from lora_kit.tasks.task import Collate, Facts, Processor, Task
from lora_kit.train.arguments import check_installed
from lora_kit.train.directory import check_processes, is_first_rank
from lora_kit.train.guards import guarded, has_own_loss
from lora_kit.train.interrupt import StopSignal
from lora_kit.train.strategies import choose as choose_strategy

# JSON for the ranks: the `file` for their step.
STEP_VARIABLE = "LORA_KIT_STEP"
ROWS = 8
_DRAWN = 64  # rows, of which the shortest are taken: one pass holds all at once
_LONGEST = 256  # tokens of a text
_SIZE_OF_B = 0.02
# Relative differences that rounding alone may make: of the loss, and of the gradient (L2).
TOLERANCE = {"float32": (1e-5, 1e-4), "bfloat16": (5e-3, 5e-2)}
_CAUSES = {
    "accumulation": "the means of the passes are averaged, not the loss of all labels of the batch "
    "(as in transformers#34191)",
    "packing": "documents of one row see each other (position_ids are ignored or lost), or a first "
    "token is predicted from the document before it",
    "padding": "padding is attended to or learned from, or the model's loss is more than the mean "
    "over its labels",
    "processes": "gradients are summed and not averaged over the ranks, or each rank counts only "
    "its own labels",
    "speed": "a quick path is not exact on these rows: set speed=plain, and report it",
}
_NOT_CHECKED = {
    "packing": "not supported by this base",
    "processes": "one GPU is no two processes",
    "speed": "transformers' path is taken",
}


class Step(NamedTuple):
    """One optimizer step: the loss in nats per label; the gradient, float32, (trainable,)."""

    loss: float
    gradient: np.ndarray


class Batch(NamedTuple):
    """The rows of the step, and what they are put through."""

    task: Task
    pinned: Pinned
    processor: Processor
    facts: Facts
    rows: Rows

    @property
    def token_labels(self) -> bool:
        """Whether each token has a label, as in language models."""
        return "labels" in self.rows.columns and isinstance(self.rows[0]["labels"], np.ndarray)


def self_test(run: Run, task: Task, in_two_processes: Callable[[str], None]) -> dict[str, Any]:
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
    batch = choose(run, task)
    # First, while this process holds no model: two more of them have to fit.
    two = _two_processes(in_two_processes)
    model = load_model(run, batch)
    batch = annotated(run, model, batch)
    padded = one_step(run, model, batch, batch.rows, (ROWS, 1))
    accumulated = one_step(run, model, batch, batch.rows, (1, ROWS))
    full = packed = quick = None
    if batch.token_labels:
        packed = Packed(batch.rows, 2 * int(batch.rows.sizes("input_ids").max()))
        full = _packed_step(run, model, batch, packed)
        by_hand = alone(model, batch)
        quick = _quick_step(run, model, batch)
    else:
        by_hand = each_alone(run, model, batch)
    found = [
        compare_steps(name, ways, padded, other, TOLERANCE[run.base.dtype])
        for name, ways, other in (
            ("accumulation", [f"{ROWS} rows x 1 pass", f"1 row x {ROWS} passes"], accumulated),
            ("packing", ["a document a row", f"{len(packed or ())} packed rows"], full),
            ("padding", [f"{ROWS} rows padded", "each row alone, by hand"], by_hand),
            ("speed", ["the standard path", "the quick paths"], quick),
            ("processes", ["one process", "two processes"], two),
        )
    ]
    if found[0]["passed"] is found[2]["passed"] is False:
        found[0]["note"] = "one pass is padded and the others are not: see padding"
    return {
        **run.base.model_dump(include={"model", "dtype", "quantize"}),
        "labels": [task.supervised(batch.rows.select([n])) for n in range(ROWS)],
        "comparisons": found,
    }


def one_rank(run: Run, task: Task) -> dict[str, Any]:
    """What each of the two processes does: half of the rows, in one micro-batch."""
    told = json.loads(os.environ[STEP_VARIABLE])
    batch = choose(run, task)
    model = load_model(run, batch)
    batch = annotated(run, model, batch)
    step = one_step(run, model, batch, batch.rows, (ROWS // 2, 1))
    if is_first_rank():
        np.savez(told["file"], **step._asdict())
    return {"loss": step.loss}


def _packed_step(run: Run, model: Any, batch: Batch, packed: Packed) -> Step | None:
    try:
        check_isolation(model)
        return one_step(run, model, batch, packed, (len(packed), 1))
    except UserError:
        if run.data.packing == "documents":
            raise
        return None


def _quick_step(run: Run, model: Any, batch: Batch) -> Step | None:
    """The step on the quick paths; None where there are none."""
    pad = collator(batch.processor.pad_token_id)
    plain = dict.fromkeys(PARTS, "speed: plain")
    if run.speed == "auto":
        plain = make_fast(model, documents_loss(model, pad, in_one_row))
    try:
        if plain.keys() == set(PARTS):
            return None
        collate = pad if "attention" in plain else in_one_row
        return one_step(run, model, batch, batch.rows, (ROWS, 1), collate)
    finally:
        make_plain(model)


def _two_processes(start: Callable[[str], None]) -> Step | None:
    import torch

    if gpu_is_used() and torch.cuda.device_count() < 2:
        return None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "step.npz"
        os.environ[STEP_VARIABLE] = json.dumps({"file": str(file)})
        start("multi_gpu" if gpu_is_used() else "cpu_2proc")
        with np.load(file) as stored:
            return Step(float(stored["loss"]), stored["gradient"])


def compare_steps(
    name: str, ways: list[str], one: Step, other: Step | None, tolerance: tuple[float, float]
) -> dict[str, Any]:
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
        "tolerance": dict(zip(("loss", "gradient"), tolerance, strict=True)),
        "passed": passed,
        "note": None if passed else _CAUSES[name],
    }


def choose(run: Run, task: Task) -> Batch:
    """Rows of the run's training data that have different lengths and numbers of labels."""
    pinned = pin(run.base)
    processor, data = rows_of(task, run, pinned, limits=False)
    return Batch(task, pinned, processor, data.facts, unequal_rows(data, run.seed))


def unequal_rows(data: Prepared, seed: int) -> Rows:
    """Eight rows, fewer are repeated. Those whose tokens have labels are each cut after another
    share of them: the mean of equal parts would be right by chance; where each completion is of one
    token, every second row is therefore supervised as a whole."""
    rows = data.rows("train")
    drawn = np.random.default_rng(seed).permutation(len(rows))[:_DRAWN]
    if "input_ids" in rows.columns:
        drawn = drawn[np.argsort(rows.sizes("input_ids")[drawn], kind="stable")]
    drawn = np.resize(drawn, ROWS)
    if "labels" not in rows.columns or not isinstance(rows[0]["labels"], np.ndarray):
        return rows.select(drawn)
    made = []
    for number, row in enumerate(drawn.tolist()):
        ids, labels = rows.cell("input_ids", row), rows.cell("labels", row)
        if labels[1:2] != IGNORED:  # a text, of which the beginning is enough
            ids, labels = ids[:_LONGEST], labels[:_LONGEST]
        trained = np.flatnonzero(labels != IGNORED)
        end = max(2, int(trained[len(trained) * (number + 1) // ROWS - 1]) + 1)
        if len(trained) < 2 and number % 2:
            trained = np.arange(end)
        short = np.full(end, IGNORED)
        short[trained[trained < end]] = ids[trained[trained < end]]
        made.append({"input_ids": ids[:end], "labels": short, "unit": number})
    return Rows.of(made)


def load_model(run: Run, batch: Batch) -> Any:
    """The base with a fresh adapter, B small instead of zero, so that A has a gradient as well;
    without any dropout, the base's own included."""
    import torch

    model, fresh = batch.task.model(batch.pinned, batch.facts, run)
    strategy = choose_strategy(run.train, run.adapter, model, fresh)
    model = attach(model, strategy.adapter, fresh, run.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_B" in name and parameter.requires_grad and not parameter.any():
                parameter.copy_(torch.randn(parameter.shape) * _SIZE_OF_B)
    for holder in (model.config.get_text_config(), *model.modules()):
        for name, value in list(vars(holder).items()):
            # nn.Dropout's own, and those that a model hands to its attention.
            if isinstance(value, float) and (name == "p" or "drop" in name):
                setattr(holder, name, 0.0)
    return model


def annotated(run: Run, model: Any, batch: Batch) -> Batch:
    """With the columns that a model has to compute, such as the reference of a preference."""
    return batch._replace(rows=batch.task.annotate(batch.rows, model, batch.processor, run))


def one_step(
    run: Run,
    model: Any,
    batch: Batch,
    rows: Any,
    cut: tuple[int, int],
    collate: Collate | None = None,
) -> Step:
    """One step of the trainer over all rows; the model is left as it was.

    Args:
        cut: (rows of one pass, passes), on each rank. collate: instead of padding.
    """
    from transformers import TrainerCallback

    from lora_kit.train.arguments import training_arguments

    caught: list[np.ndarray] = []

    class Catch(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            caught.append(gradient_of(model))

    settings = run.train.model_copy(
        update={
            "max_steps": 1,
            "learning_rate": 0.0,
            "max_grad_norm": 0.0,  # no clipping, which would hide a wrong scale
            "logging_steps": 1,
            "per_device_train_batch_size": cut[0],
            "gradient_accumulation_steps": cut[1],
            "eval_steps": None,
            "early_stopping_patience": None,
            "report_to": [],
        }
    )
    run = run.model_copy(update={"train": settings, "speed": "plain"})
    task = batch.task
    trainer_class, arguments_class = task.classes()
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
            data_collator=collate or task.collate(batch.processor),
            callbacks=[Catch()],
        )
        check_processes(trainer.accelerator.num_processes)
        loss = trainer.train().training_loss
    return Step(loss, caught[0])


def each_alone(run: Run, model: Any, batch: Batch) -> Step:
    """The same step by hand: the task's loss of every row alone, over the items of all."""
    task, device = batch.task, next(model.parameters()).device
    collate = task.collate(batch.processor)
    assert collate is not None
    rows = list(batch.rows)
    items = sum(int(task.items(collate([row]))) for row in rows)
    model.zero_grad()
    loss = 0.0
    for row in rows:
        moved = {k: v.to(device) if hasattr(v, "to") else v for k, v in collate([row]).items()}
        part = task.loss(model, moved, items, run.train)
        part.backward()
        loss += part.item()
    return Step(loss, gradient_of(model))


def alone(model: Any, batch: Batch) -> Step:
    """The same step by hand: the nats of every row, computed alone, over the number of labels."""
    import torch

    device = next(model.parameters()).device
    model.zero_grad()
    loss = 0.0
    for number in range(ROWS):
        collated = collator(batch.processor.pad_token_id)([batch.rows[number]])
        alone = {name: tensor.to(device) for name, tensor in collated.items()}
        labels = alone.pop("labels")[0, 1:]
        logits = model(**alone).logits[0, :-1].float()  # (tokens - 1, vocabulary)
        nats = torch.nn.functional.cross_entropy(
            logits, labels, ignore_index=IGNORED, reduction="sum"
        )
        nats = nats / batch.task.supervised(batch.rows)
        nats.backward()
        loss += nats.item()
    return Step(loss, gradient_of(model))


def gradient_of(model: Any) -> np.ndarray:
    """The gradient of all that trains, as one vector of float32."""
    import torch

    trainable = [p for p in model.parameters() if p.requires_grad]
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in trainable]
    return torch.cat([part.detach().float().flatten().cpu() for part in parts]).numpy()


def show(found: dict[str, Any]) -> None:
    """Print it as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("", "", "loss", "differs by", "gradient by", ""):
        table.add_column(name, justify="right" if name else "left")
    words = {True: "pass", False: "FAIL", None: "not checked"}
    for one in found["comparisons"]:
        if one["ways"]:
            (first, second), (loss, other) = one["ways"], one["loss"]
            table.add_row(one["name"], first, f"{loss:.6f}")
            by = [f"{one[f'{what}_difference']:.1e}" for what in ("loss", "gradient")]
            table.add_row("", second, f"{other:.6f}", *by, words[one["passed"]])
        else:
            table.add_row(one["name"], one["note"], "", "", "", words[one["passed"]])
    labels, kind = found["labels"], f"{found['dtype']}, quantize: {found['quantize']}"
    print(f"{found['model']}, {kind}: one step on {ROWS} rows")
    print(f"of {min(labels)} to {max(labels)} labels, through the trainer, without dropout")
    Console().print(table)
    loss, gradient = TOLERANCE[found["dtype"]]
    print(f"allowed for rounding in {found['dtype']}: loss {loss:.0e}, gradient {gradient:.0e}")
