"""Trainings of many kinds for the tests of the guards: each a task, a trainer's class, its rows."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import trl
from conftest import make_tokenizer, sentences
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from lora_kit.data.rows import Rows
from lora_kit.schema import Run, Train
from lora_kit.tasks.causal import Text
from lora_kit.tasks.task import Batch, Collate, Task
from lora_kit.train.arguments import training_arguments
from lora_kit.train.callbacks import Metrics
from lora_kit.train.guards import Guards, guarded
from lora_kit.train.interrupt import StopSignal
from lora_kit.train.trainer import fit

SIZES = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 1,
    "initializer_range": 0.15,  # wide enough that LoRA learns something in a few steps
}
ROWS = 24


@functools.cache
def tokenizer() -> Any:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return make_tokenizer(Path(folder))


@functools.cache
def texts() -> list[str]:
    """Of different lengths, so that batches are padded."""
    return [" ".join(text.split()[: 4 + n % 7]) for n, text in enumerate(sentences(ROWS))]


def language_model(labels: int | None = None) -> Any:
    """A random Llama with LoRA; with `labels` it classifies, by a new head."""
    config = LlamaConfig(**SIZES, **({"num_labels": labels} if labels else {}))
    kind = LlamaForSequenceClassification if labels else LlamaForCausalLM
    set_seed(0)
    model = kind(config).requires_grad_(False)
    adapter = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj", "up_proj", "down_proj"],
        modules_to_save=["score"] if labels else None,
    )
    return get_peft_model(model, adapter)


# ------------------------------------------------------------------ halves of library batches
def rows_of(batch: Batch, chosen: slice, rows: int) -> Batch:
    """These of `rows` rows; a tensor of 2 * rows holds pairs, all chosen ones first."""

    def cut(value: Any) -> Any:
        if not torch.is_tensor(value) or value.dim() == 0:
            return value
        if len(value) == 2 * rows:
            return torch.cat([value[:rows][chosen], value[rows:][chosen]])
        return value[chosen] if len(value) == rows else value

    return {name: cut(value) for name, value in batch.items()}


def halves_of(batch: Batch, rows: int, mean: bool) -> list[tuple[Batch, float]]:
    """Two halves; `mean`: of a loss that is a mean over rows, else of one that is a sum."""
    middle = rows // 2
    if not middle:
        return []
    factors = (middle / rows, 1 - middle / rows) if mean else (1.0, 1.0)
    sides = (slice(None, middle), slice(middle, None))
    return [
        (rows_of(batch, side, rows), factor) for side, factor in zip(sides, factors, strict=True)
    ]


# ------------------------------------------------------------------ tasks
class Labels(Task):
    """A class for a text, with a loss of its own."""

    def collate(self, processor: Any, flat: bool = False) -> Collate:
        def collate(rows: Sequence[dict[str, Any]]) -> Batch:
            ids = [torch.as_tensor(row["input_ids"]) for row in rows]
            padded = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
            return {
                "input_ids": padded(ids, padding_value=1),
                "attention_mask": padded([torch.ones_like(some) for some in ids]),
                "labels": torch.tensor([row["label"] for row in rows]),
            }

        return collate

    def items(self, batch: Batch) -> int:
        return len(batch["labels"])

    def loss(self, model: Any, batch: Batch, items: Any, train: Any) -> torch.Tensor:
        given = {name: value for name, value in batch.items() if name != "labels"}
        logits = model(**given).logits.float()
        nats = torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="sum")
        return nats / items

    def halve(self, batch: Batch) -> list[tuple[Batch, float]]:
        return halves_of(batch, len(batch["labels"]), mean=False)


class Library(Task):
    """A task that leaves the loss to its trainer."""

    def __init__(self, trainer: type[Trainer], arguments: type[TrainingArguments]) -> None:
        self._classes = trainer, arguments

    def classes(self) -> tuple[type[Trainer], type[TrainingArguments]]:
        return self._classes

    def collate(self, processor: Any, flat: bool = False) -> Collate | None:
        return None

    def items(self, batch: Batch) -> Any:
        raise AssertionError("the trainer counts its items itself")

    def halve(self, batch: Batch) -> list[tuple[Batch, float]]:
        return halves_of(batch, len(batch["input_ids"]), mean=False)


class Pairs(Library):
    def halve(self, batch: Batch) -> list[tuple[Batch, float]]:
        return halves_of(batch, len(batch["input_ids"]) // 2, mean=True)


class Rollouts(Library):
    def halve(self, batch: Batch) -> list[tuple[Batch, float]]:
        return halves_of(batch, len(batch["completion_ids"]), mean=False)


class Penalized(Trainer):
    """A user's trainer: the mean of each micro-batch, and a penalty on large logits."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, **options: Any
    ) -> Any:
        outputs = model(**inputs)
        loss = outputs.loss + 1e-3 * outputs.logits.square().mean()
        return (loss, outputs) if return_outputs else loss


class UsersOwn(Library):
    """Rows of one length, so that halves are halves of the mean."""

    def collate(self, processor: Any, flat: bool = False) -> Collate:
        def collate(rows: Sequence[dict[str, Any]]) -> Batch:
            ids = torch.tensor([row["input_ids"][:4] for row in rows])
            return {"input_ids": ids, "labels": ids}

        return collate

    def halve(self, batch: Batch) -> list[tuple[Batch, float]]:
        return halves_of(batch, len(batch["input_ids"]), mean=True)


class GrpoTrain(Train):
    """`train:` with the keys of GRPO."""

    num_generations: int = 4
    max_completion_length: int = 6
    beta: float = 0.0
    steps_per_generation: int = 4  # two optimizer steps from one sampling


# ------------------------------------------------------------------ what happens in a step
class At(TrainerCallback):
    """Does something at the end, or the beginning, of a step."""

    def __init__(self, step: int, do: Any, begins: bool = False) -> None:
        self.step, self.do, self.begins = step, do, begins

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        if self.begins and state.global_step == self.step - 1:
            self.do(model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if not self.begins and state.global_step == self.step:
            self.do(model)


def crash(model: Any) -> None:
    raise ZeroDivisionError


# ------------------------------------------------------------------ kinds
def tokenized() -> list[dict[str, Any]]:
    encoded = [tokenizer()(text)["input_ids"] for text in texts()]
    return [{"input_ids": ids, "labels": ids, "label": n % 3} for n, ids in enumerate(encoded)]


def pairs() -> Dataset:
    halves = [(text[: len(text) // 2], text[len(text) // 2 :]) for text in texts()]
    rows = [
        {"prompt": prompt, "chosen": end, "rejected": " no no" * (1 + n % 3)}
        for n, (prompt, end) in enumerate(halves)
    ]
    return Dataset.from_list(rows)


def reward(completions: list[str], **_: Any) -> list[float]:
    return [len(completion) % 5 + completion.count("e") for completion in completions]


@dataclass(frozen=True)
class Kind:
    """One way to train: `rows` for training and evaluation alike, further trainer arguments."""

    task: Task
    rows: Callable[[], Any]
    options: dict[str, Any] = field(default_factory=dict)
    train: type[Train] = Train
    labels: int | None = None

    def model(self) -> Any:
        return language_model(self.labels)


KINDS = {
    "language model": Kind(Text(), lambda: Rows.of(tokenized())),
    "classifier": Kind(Labels(), lambda: Rows.of(tokenized()), labels=3),
    "SFT": Kind(
        Library(trl.SFTTrainer, trl.SFTConfig),
        lambda: Dataset.from_dict({"text": texts()}),
        {"processing_class": tokenizer},
    ),
    "DPO": Kind(Pairs(trl.DPOTrainer, trl.DPOConfig), pairs, {"processing_class": tokenizer}),
    "GRPO": Kind(
        Rollouts(trl.GRPOTrainer, trl.GRPOConfig),
        lambda: Dataset.from_list([{"prompt": text[:12]} for text in texts()]),
        {"processing_class": tokenizer, "reward_funcs": lambda: reward},
        GrpoTrain,
    ),
    "a user's": Kind(
        UsersOwn(Penalized, TrainingArguments), lambda: Dataset.from_list(tokenized())
    ),
}
SETTINGS = {
    "max_length": 64,
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-2,
    "warmup_steps": 0,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
}


def make(
    kind: str,
    folder: Path,
    stop: StopSignal | None = None,
    callbacks: Sequence[Any] = (),
    task: Task | None = None,
    groups: dict[str, Callable[[str], bool]] | None = None,
    model: Any = None,
    guards: bool = True,
    speed: str = "plain",
    **train: Any,
) -> Guards:
    """A trainer of a kind, guarded unless told; its files are below `folder`."""
    made = KINDS[kind]
    task = task or made.task
    run = Run(
        recipe="test",
        name="test",
        base={"model": "x", "dtype": "float32"},  # type: ignore[arg-type]
        data={"train": "x"},  # type: ignore[arg-type]
        train=made.train(**{**SETTINGS, **train}),
        speed=speed,  # type: ignore[arg-type]
    )
    folder.mkdir(parents=True, exist_ok=True)
    trainer_class, arguments_class = task.classes()
    options: dict[str, Any] = {name: value() for name, value in made.options.items()}
    if collate := task.collate(tokenizer()):
        options["data_collator"] = collate
    options |= {
        "model": model or made.model(),
        "args": training_arguments(run, folder / "checkpoints", None, arguments_class),
        "train_dataset": made.rows(),
        "eval_dataset": made.rows().select(range(8)) if run.train.eval_steps else None,
        "callbacks": [Metrics(folder / "metrics.jsonl"), *callbacks],
    }
    if not guards:
        return trainer_class(**options)  # type: ignore[return-value]
    fresh = ("score",) if made.labels else ()
    return guarded(trainer_class)(
        task, run, folder, stop or StopSignal(), groups or task.groups(fresh), **options
    )


def main(kind: str, folder: str, stops: str) -> None:
    """Train as one of several ranks; with `stops` break off in that step, then go on."""
    settings: dict[str, Any] = {"save_steps": 1, "eval_steps": 2}
    if stops:
        broken = [At(int(stops), crash, begins=True)]
        with contextlib.suppress(ZeroDivisionError):
            fit(make(kind, Path(folder), callbacks=broken, **settings), resume=False)
    fit(make(kind, Path(folder), **settings), resume=bool(stops))


if __name__ == "__main__":
    main(*sys.argv[1:])
