"""Sequence classification: one class per text.

The class is predicted from the pooled hidden states (`base.pooling`). Encoders (BERT) and decoders
(Llama) are trained alike; newly initialised modules, at least the head, are fully trained.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from lora_kit.base.head import SEQUENCE, Pooling
from lora_kit.base.load import LARGEST_COUNTS
from lora_kit.data.examples import Examples
from lora_kit.data.formats import Example
from lora_kit.data.prepare import label_names
from lora_kit.data.rows import Row, Rows
from lora_kit.errors import UserError
from lora_kit.schema import Base
from lora_kit.tasks import probe
from lora_kit.tasks.batches import halves, padded
from lora_kit.tasks.task import (
    Batch,
    Collate,
    Contender,
    Dropped,
    Facts,
    Processor,
    Score,
    Shown,
    Task,
)

if TYPE_CHECKING:
    import torch

    from lora_kit.adapter.load import PeftModel
    from lora_kit.schema import Data, Run, Train
    from lora_kit.tasks.encode import Prepared

_ROWS_AT_ONCE = 32
_NAMED = 3  # labels listed in a note


class SequenceBase(Base):
    pooling: Pooling | None = Field(
        None,
        description="How hidden states are pooled: mean, first token (cls) or last token. null: "
        "mean for a sentence-transformers model with mean pooling, else the architecture's own.",
    )


@dataclass(frozen=True)
class Rule:
    """A classifier that is not a model, for baselines: scored in place of one.

    Attributes:
        classes: rows -> int64 (rows,), the predicted classes.
    """

    classes: Callable[[Rows], np.ndarray]


class Classification(Task):
    """One of several classes per text.

    Rows: `input_ids`, int32 (tokens,), with special tokens; `labels`, the index of the class in
    `facts["labels"]`, ordered as in `data.labels`, else alphabetically. A text over
    `train.max_length` tokens is truncated.

    Loss: cross entropy. Scores: `accuracy` and `macro_f1`, the mean over the classes that occur in
    the held-out rows. Baselines: the majority class, and logistic regression on the mean of the
    frozen base's last hidden states.
    """

    formats = ("text-label",)
    scores = ("accuracy", "macro_f1")
    settings = {"base": SequenceBase}  # noqa: RUF012 - read only
    auto = SEQUENCE
    unread = tuple(key for key in Task.unread if key != "data.labels")

    # ------------------------------------------------------------------ examples and rows
    def facts(self, train: Examples, data: Data) -> Facts:
        """`labels`: class names in order; `rows`: number of training rows per class."""
        counts = train.labels
        named = label_names(data.labels)
        labels = named or tuple(counts)
        _check_names(labels, "data.labels" if named else "data.train")
        if len(counts) < 2:
            only = f", {next(iter(counts))!r:.60}" if counts else ""
            lost = f"; dropped: {train.dropped}" if train.dropped else ""
            raise UserError(
                f"data.train: {len(counts)} class in the rows{only}: a classifier needs at least "
                f"two{lost}"
            )
        return {"labels": list(labels), "rows": [counts.get(label, 0) for label in labels]}

    def notes(self, formats: set[str], facts: Facts) -> list[str]:
        notes = []
        counts = dict(zip(facts["labels"], facts["rows"], strict=True))
        for rows, what in ((0, "no training row"), (1, "one training row")):
            names = [label for label, count in counts.items() if count == rows]
            if names:
                more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
                which = f"{', '.join(names[:_NAMED])}{more}"
                verb = "class has" if len(names) == 1 else "classes have"
                notes.append(f"{len(names)} {verb} {what}: {which}")
        return notes

    def encode(
        self, examples: Sequence[Example], processor: Processor, facts: Facts, run: Run
    ) -> Iterator[list[Row] | Dropped]:
        numbers = {label: number for number, label in enumerate(facts["labels"])}
        length = run.train.max_length
        texts = [example.text or "" for example in examples]
        encoded = processor(texts, return_attention_mask=False, verbose=False)["input_ids"]
        for example, whole in zip(examples, encoded, strict=True):
            ids = whole
            if not ids:
                yield Dropped("without any token")
                continue
            if example.label not in numbers:  # a held-out row
                yield Dropped("whose label is in no training row")
                continue
            cut = ""
            if len(ids) > length:  # truncate before the special tokens at the end
                cut = f"cut to train.max_length ({length} tokens)"
                ids = processor(example.text, truncation=True, max_length=length)["input_ids"]
            row = {
                "input_ids": np.array(ids, dtype=np.int32),
                "labels": numbers[example.label],
                "truncated": cut,
                "cut_from": len(whole) if cut else 0,
            }
            yield [row]

    # ------------------------------------------------------------------ training
    def collate(self, processor: Processor, flat: bool = False) -> Collate:
        """Right-pads to the longest row: `input_ids` and `attention_mask`, int64 (rows, longest);
        `labels`, int64 (rows,)."""

        def collate(rows: Sequence[Row]) -> Batch:
            import torch

            ids = [row["input_ids"] for row in rows]
            return {
                "input_ids": padded(ids, processor.pad_token_id).long(),
                "attention_mask": padded([np.ones(len(row), np.int64) for row in ids], 0),
                "labels": torch.tensor([int(row["labels"]) for row in rows]),
            }

        return collate

    def loss(
        self, model: torch.nn.Module, batch: Batch, items: int | torch.Tensor, train: Train
    ) -> torch.Tensor:
        """Cross entropy in nats, from float32 logits.

        Not transformers' own, which is a mean over the micro-batch: its gradients are N times too
        large with N accumulation steps (transformers#47688).
        """
        import torch

        logits = model(**_inputs(batch)).logits.float()
        nats = torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="sum")
        return nats / items

    def halve(self, batch: Batch) -> list[tuple[Batch, float]]:
        return [(part, 1.0) for part, _ in halves(batch)]

    # ------------------------------------------------------------------ evaluation
    def score(
        self, model: Any, rows: Rows, processor: Processor, facts: Facts, run: Run
    ) -> list[Score]:
        count = len(facts["labels"])
        if isinstance(model, Rule):
            predicted = model.classes(rows)
        else:
            predicted = self._each(model, _logits, rows, processor).argmax(1)
        true, units = rows.column("labels"), rows.column("unit")
        hit = predicted == true
        hits = np.zeros((rows.units, 2))
        np.add.at(hits, units, np.stack([hit, np.ones(len(true))], axis=1))
        by_class = np.zeros((rows.units, 3, count))  # hits, predicted, true
        np.add.at(by_class[:, 0], (units, true), hit)
        np.add.at(by_class[:, 1], (units, predicted), 1)
        np.add.at(by_class[:, 2], (units, true), 1)
        confusion = np.zeros((count, count), dtype=np.int64)
        np.add.at(confusion, (true, predicted), 1)
        about = {"labels": facts["labels"], "confusion": confusion.tolist()}
        return [
            Score("accuracy", hits, about=about),
            Score("macro_f1", by_class.reshape(rows.units, -1), value=macro_f1),
        ]

    def rivals(
        self, model: PeftModel, data: Prepared, processor: Processor, facts: Facts, run: Run
    ) -> list[Contender]:
        """The majority class and the linear probe, the better one first by the deciding score in
        cross-validation on training rows."""
        rows = data.rows("train")
        rows = rows.select(probe.draw(len(rows), run.seed))
        classes = rows.column("labels")
        counts = np.bincount(classes, minlength=len(facts["labels"]))
        most = int(counts.argmax())

        def features(some: Rows) -> np.ndarray:
            with model.disable_adapter():
                return self._each(model, _mean_of_body, some, processor)

        fitted = probe.fit(features(rows), classes, len(counts), run.seed)
        regression = Rule(lambda some: fitted.classes(features(some)))
        majority = Rule(lambda some: np.full(len(some), most))
        baselines = [
            Contender("linear_probe", lambda: contextlib.nullcontext(regression)),
            Contender("majority", lambda: contextlib.nullcontext(majority)),
        ]
        held_out = rows.select(fitted.compared)  # training rows, held out in cross-validation

        def figure(predicted: np.ndarray) -> float:
            scores = self.score(Rule(lambda _: predicted), held_out, processor, facts, run)
            return next(score.figure for score in scores if score.name == self.deciding(run.prove))

        of_probe, of_majority = figure(fitted.predicted), figure(majority.classes(held_out))
        return baselines if of_probe > of_majority else baselines[::-1]

    def _each(
        self,
        model: torch.nn.Module,
        of: Callable[[torch.nn.Module, Batch], torch.Tensor],
        rows: Rows,
        processor: Processor,
    ) -> np.ndarray:
        """`of` applied to all rows, in batches: see `each_row`."""
        from lora_kit.tasks.measure import each_row

        collate, lengths = self.collate(processor), rows.sizes("input_ids")
        return each_row(model, rows, collate, lengths, _ROWS_AT_ONCE, of, "the output of row")

    # ------------------------------------------------------------------ for people
    def show(self, row: Row, processor: Processor, facts: Facts) -> list[Shown]:
        ids = row["input_ids"].tolist()
        return [
            Shown("text", ids, [False] * len(ids)),
            Shown("label", text=facts["labels"][row["labels"]]),
        ]


def _check_names(labels: Sequence[str], key: str) -> None:
    """Raises UserError if there are too many class names, or some are empty or equal up to white
    space."""
    most = LARGEST_COUNTS["labels"]
    if len(labels) > most:
        raise UserError(f"{key}: {len(labels):,} classes: at most {most:,} are supported")
    counts = Counter(label.strip() for label in labels)
    for name, count in counts.items():
        if count > 1 or not name:
            raise UserError(
                f"{key}: the label {name!r:.60} is empty or duplicate (ignoring white space)"
            )


def _inputs(batch: Batch) -> Batch:
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def _logits(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    logits: torch.Tensor = model(**_inputs(batch)).logits.float()
    return logits


def _mean_of_body(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """The mean of the last hidden states of each text: float32 (rows, width)."""
    from lora_kit.base.pooled import pool
    from lora_kit.speed.prefix import causal_model

    body: Any = causal_model(model).base_model
    if body.config.is_encoder_decoder:
        body = body.get_encoder()
    found: list[Any] = []
    hook = body.register_forward_hook(lambda module, given, out: found.append(out))
    try:
        model(**_inputs(batch))  # the full model, since a sharded one cannot run in part
    finally:
        hook.remove()
    return pool(found[0].last_hidden_state, batch["attention_mask"], "mean")


def macro_f1(sums: np.ndarray) -> np.ndarray:
    """The mean F1 of classes that occur, each 2 · hits / (predicted + true). Sums of hits,
    predicted and true rows per class, (..., 3 · classes) -> (...)"""
    hits, predicted, true = np.split(sums, 3, axis=-1)
    occurs = true > 0
    f1 = np.where(occurs, 2 * hits / np.maximum(predicted + true, 1), 0.0)
    mean: np.ndarray = f1.sum(-1) / np.maximum(occurs.sum(-1), 1)
    return mean
