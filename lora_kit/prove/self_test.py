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
from lora_kit.base.load import gpu_is_used, load_base, load_tokenizer
from lora_kit.base.pin import Pinned, pin
from lora_kit.base.templates import set_template
from lora_kit.data.prepare import Prepared, kind_of, prepare
from lora_kit.errors import UserError
from lora_kit.schema import Run, Train
from lora_kit.speed.fast import PARTS, make_fast, make_plain
from lora_kit.tasks.batches import IGNORED, Labelled, LabelledWriter, collator, in_one_row
from lora_kit.tasks.packing import Packed, check_isolation
from lora_kit.train.arguments import check_installed
from lora_kit.train.directory import RunDirectory, is_first_rank
from lora_kit.train.interrupt import StopSignal

# JSON for the ranks: the `file` for their step, and the `recipe` whose rows they take.
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

    pinned: Pinned
    rows: Labelled
    pad_id: int


def self_test(run: Run, in_two_processes: Callable[[str], None]) -> dict[str, Any]:
    """Compare the ways, in the run's own type and quantization, with dropout switched off.

    Args:
        in_two_processes: runs `one_rank` in two ranks of the accelerate config that it is given.

    Returns:
        {"model", "dtype", "quantize", "labels": of each row, "comparisons": [{"name", "ways": two,
        "loss": two, "loss_difference", "gradient_difference": relative, "tolerance": {"loss",
        "gradient"}, "passed": null where it was not checked, "note": cause, reason or null}]}

    Raises:
        UserError: as the run itself would.
    """
    check_installed(run)
    batch = choose(run)
    # First, while this process holds no model: two more of them have to fit.
    two = _two_processes(run, in_two_processes)
    model = load_model(run, batch.pinned)
    packed = Packed(batch.rows, 2 * int(batch.rows.lengths.max()))
    padded = one_step(run, model, batch, batch.rows, (ROWS, 1))
    accumulated = one_step(run, model, batch, batch.rows, (1, ROWS))
    try:
        check_isolation(model)
        full = one_step(run, model, batch, packed, (len(packed), 1))
    except UserError:
        if run.data.packing == "documents":
            raise
        full = None
    by_hand = alone(model, batch)
    plain = make_fast(model) if run.speed == "auto" else dict.fromkeys(PARTS, "speed: plain")
    collate = collator(batch.pad_id) if "attention" in plain else in_one_row
    other = None
    if plain.keys() != set(PARTS):
        other = one_step(run, model, batch, batch.rows, (ROWS, 1), collate)
    make_plain(model)
    found = [
        compare_steps(name, ways, padded, other, TOLERANCE[run.base.dtype])
        for name, ways, other in (
            ("accumulation", [f"{ROWS} rows x 1 pass", f"1 row x {ROWS} passes"], accumulated),
            ("packing", ["a document a row", f"{len(packed)} packed rows"], full),
            ("padding", [f"{ROWS} rows padded", "each row alone, by hand"], by_hand),
            ("speed", ["transformers' path", "the quick paths"], other),
            ("processes", ["one process", "two processes"], two),
        )
    ]
    if found[0]["passed"] is found[2]["passed"] is False:
        found[0]["note"] = "one pass is padded and the others are not: see padding"
    return {
        **run.base.model_dump(include={"model", "dtype", "quantize"}),
        "labels": [int((batch.rows[n]["labels"][1:] != IGNORED).sum()) for n in range(ROWS)],
        "comparisons": found,
    }


def one_rank(run: Run) -> dict[str, Any]:
    """What each of the two processes does: half of the rows, in one pass."""
    told = json.loads(os.environ[STEP_VARIABLE])
    run = run.model_copy(update={"recipe": told["recipe"]})
    batch = choose(run)
    step = one_step(run, load_model(run, batch.pinned), batch, batch.rows, (ROWS // 2, 1))
    if is_first_rank():
        np.savez(told["file"], **step._asdict())
    return {"loss": step.loss}


def _two_processes(run: Run, start: Callable[[str], None]) -> Step | None:
    import torch

    if gpu_is_used() and torch.cuda.device_count() < 2:
        return None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "step.npz"
        os.environ[STEP_VARIABLE] = json.dumps({"file": str(file), "recipe": run.recipe})
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


def choose(run: Run) -> Batch:
    """Rows of the run's training data that have different lengths and numbers of labels."""
    pinned = pin(run.base)
    tokenizer = load_tokenizer(pinned)
    set_template(tokenizer, run.data.chat_template)
    kind = kind_of(run.recipe)
    data = prepare(run.data, kind, tokenizer, run.train.max_length, run.seed, limits=False)
    return Batch(pinned, unequal_rows(data, run.seed), tokenizer.pad_token_id)


def unequal_rows(data: Prepared, seed: int) -> Labelled:
    """Eight rows, fewer are repeated, each cut after another share of its labels. The mean of equal
    parts would be right by chance; where each answer is of one token, every second row is therefore
    learned from as a whole."""
    rows = data.rows("train")
    drawn = np.random.default_rng(seed).permutation(len(rows))[:_DRAWN]
    drawn = np.resize(drawn[np.argsort(rows.lengths[drawn], kind="stable")], ROWS)
    writer = LabelledWriter()
    for number, row in enumerate(drawn.tolist()):
        ids, labels = (rows[row][name] for name in ("input_ids", "labels"))
        if data.kind == "text":
            ids, labels = ids[:_LONGEST], labels[:_LONGEST]
        learned = np.flatnonzero(labels != IGNORED)
        end = max(2, int(learned[len(learned) * (number + 1) // ROWS - 1]) + 1)
        if len(learned) < 2 and number % 2:
            learned = np.arange(end)
        writer.add(ids[:end], [(n, n + 1) for n in learned[learned < end].tolist()])
    return writer.finish()


def load_model(run: Run, pinned: Pinned) -> Any:
    """The base with a fresh adapter, B small instead of zero, so that A has a gradient as well;
    without any dropout, the base's own included."""
    import torch

    model = attach(load_base(run.base, pinned), run.adapter, run.seed)
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


def one_step(
    run: Run, model: Any, batch: Batch, rows: Any, cut: tuple[int, int], collate: Any = None
) -> Step:
    """One step of the trainer over all rows; the model is left as it was.

    Args:
        cut: (rows of one pass, passes), on each rank. collate: instead of padding.
    """
    from transformers import TrainerCallback

    from lora_kit.train.arguments import training_arguments
    from lora_kit.train.trainer import LoraTrainer

    caught: list[np.ndarray] = []

    class Catch(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            caught.append(gradient_of(model))

    # max_grad_norm 0: no clipping, which would hide a wrong scale.
    settings = Train(
        max_steps=1, learning_rate=0, max_grad_norm=0, logging_steps=1,
        per_device_train_batch_size=cut[0], gradient_accumulation_steps=cut[1],
        gradient_checkpointing=run.train.gradient_checkpointing,
    )  # fmt: skip
    run = run.model_copy(update={"train": settings, "speed": "plain"})
    collate = collate or collator(batch.pad_id)
    options: dict[str, Any] = {"data_collator": collate, "callbacks": [Catch()]}
    with tempfile.TemporaryDirectory() as folder:
        directory = RunDirectory(Path(folder))
        arguments = training_arguments(run, directory.path)
        arguments.save_strategy = "no"
        options |= {"model": model, "train_dataset": rows, "args": arguments}
        trainer = LoraTrainer(run, directory, StopSignal(), **options)
        directory.check_world(trainer.accelerator.num_processes)
        loss = trainer.train().training_loss
    return Step(loss, caught[0])


def alone(model: Any, batch: Batch) -> Step:
    """The same step by hand: the nats of every row, computed alone, over the number of labels."""
    import torch

    device = next(model.parameters()).device
    model.zero_grad()
    loss = 0.0
    for number in range(ROWS):
        collated = collator(batch.pad_id)([batch.rows[number]])
        alone = {name: tensor.to(device) for name, tensor in collated.items()}
        labels = alone.pop("labels")[0, 1:]
        logits = model(**alone).logits[0, :-1].float()  # (tokens - 1, vocabulary)
        nats = torch.nn.functional.cross_entropy(
            logits, labels, ignore_index=IGNORED, reduction="sum"
        )
        nats = nats / batch.rows.supervised_tokens
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
