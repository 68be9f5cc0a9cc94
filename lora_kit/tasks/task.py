"""The contract between a kind of work and the rest of the house.

A task says what a row is, what is trained on, and how the result is scored. Everything else
(reading, splitting, caching, quantizing, adapting, training, saving, comparing, merging) is the
same for all tasks and asks the task. A task holds no state, knows no training loop and no file, and
is handed down from its recipe; nothing looks it up.

Three tasks to read: `causal.py` (text and conversations), `sequence.py` (a class for a text),
`preference.py` (pairs of completions). How to write one of your own: recipes/README.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lora_kit.data.examples import Examples
from lora_kit.data.formats import Example
from lora_kit.data.rows import Row, Rows
from lora_kit.errors import UserError
from lora_kit.schema import Section

if TYPE_CHECKING:
    import torch
    from transformers import Trainer, TrainingArguments

    from lora_kit.base.head import Head
    from lora_kit.base.pin import Pinned
    from lora_kit.schema import Run
    from lora_kit.tasks.encode import Prepared

Batch = dict[str, Any]  # what `collate` returns: tensors by name, and plain values beside them
Collate = Callable[[Sequence[Row]], Batch]
Facts = dict[str, Any]  # plain JSON: label names and the like, taken from training rows
Processor = Any  # a tokenizer; for images and speech their processor


class Dropped(NamedTuple):
    """In place of an example's rows: why it is not used, and what of it shows that.

    `reason` completes "42 rows dropped: rows ...": `longer than train.max_length (512 tokens)`.
    """

    reason: str
    detail: str = ""


class Shown(NamedTuple):
    """One sequence of a row as `preview` shows it: token ids, and which of them are trained on; or
    a `text` that is no sequence of tokens, such as the name of a class."""

    name: str
    ids: Sequence[int] = ()
    trained: Sequence[bool] = ()
    text: str = ""


def ratio(sums: np.ndarray) -> np.ndarray:
    """The first sum over the second: a mean loss, an accuracy. (..., 2) -> (...)"""
    return sums[..., 0] / sums[..., 1]


@dataclass(frozen=True)
class Score:
    """A figure of one model on held-out rows, in parts that can be resampled.

    Attributes:
        name: as in report.json: `loss`, `accuracy`, `macro_f1`.
        sums: float64 (units, k): numbers that add up over units. A unit is what is held out as one:
            a document, a conversation, a pair.
        value: what a sum of them means, (..., k) -> (...).
        better: `lower` or `higher`.
        units: int64 (units,): the numbers of the units among the held-out rows; None: all of them.
        about: plain values that belong to it in the report, such as `labels` and `confusion`.
    """

    name: str
    sums: np.ndarray
    value: Callable[[np.ndarray], np.ndarray] = ratio
    better: str = "higher"
    units: np.ndarray | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.sums.ndim != 2 or self.better not in ("lower", "higher"):
            raise UserError(
                f"TASK.score: {self.name}: sums of the shape (units, k) and better: lower or "
                f"higher, not {self.sums.shape} and {self.better}"
            )

    @property
    def figure(self) -> float:
        """Its value over all units."""
        return float(self.value(self.sums.sum(0)))


@dataclass(frozen=True)
class Contender:
    """Something that the adapted model is compared with.

    Attributes:
        name: as in report.json: `base`, `few_shot`, `majority`, `linear_probe`.
        enter: a context manager; inside it, what it yields is the model to score. A task may let it
            yield something of its own that its `score` knows.
        rows: turns held-out rows into those that this contender is scored on (examples in the
            prompt); the units stay the same. None: the rows as they are.
        about: plain values for the report, such as `shots`.
    """

    name: str
    enter: Callable[[], AbstractContextManager[Any]]
    rows: Callable[[Rows], Rows] | None = None
    about: Mapping[str, Any] = field(default_factory=dict)


class Task:
    """A kind of work. `run` is the whole run file; its sections `base`, `data` and `train` have the
    keys of `settings` as well.

    Attributes:
        formats: row formats of `data.formats.FORMATS` that it reads.
        scores: names of the scores that `score` returns for every run, the deciding one first. It
            may return others, those of `prove.metrics`, after them.
        settings: {section: pydantic class}: sections of the run file with this task's own keys,
            each derived from the section's class in `schema`.
        unread: keys such as `data.packing` that this task does not read; setting one is an error.
            Without a list of its own a task reads none of those that are about generated text.
        auto: the class of transformers that loads the model; in the lock, for merge and load.
        general: the task that reads and scores `data.general`; None: forgetting is not measured.
        flat: whether `collate(..., flat=True)` concatenates rows without padding.
    """

    formats: tuple[str, ...] = ()
    scores: tuple[str, ...] = ()
    settings: Mapping[str, type[Section]] = {}
    unread: tuple[str, ...] = (
        "data.chat_template",
        "data.general",
        "data.labels",
        "data.packing",
        "data.replay",
        "data.supervise",
        "prove.answers",
        "prove.harness",
        "prove.shots",
        "ship.target",
    )
    auto = "AutoModelForCausalLM"
    general: Task | None = None
    flat = False

    # ------------------------------------------------------------------ examples
    def key(self, example: Example) -> str:
        """The text by which repeated and leaked rows are found."""
        return example.key

    def group(self, example: Example) -> str | None:
        """Examples of the same group stay in the same split; None: only repeated ones do."""
        return None

    def processor(self, pinned: Pinned, run: Run) -> Processor:
        """The base's tokenizer or processor, found without loading the model."""
        from lora_kit.base.head import CAUSAL
        from lora_kit.base.load import load_tokenizer

        return load_tokenizer(pinned, generates=self.auto == CAUSAL)

    def facts(self, train: Examples, run: Run) -> Facts:
        """What the training examples say about the model: label names and the like, as plain JSON.

        Raises:
            UserError: the examples cannot be trained on, such as those of one class only.
        """
        return {}

    def notes(self, formats: set[str], facts: Facts) -> list[str]:
        """What a person should know of how rows of these formats are used, and of `facts`."""
        return []

    # ------------------------------------------------------------------ rows
    def encode(
        self, examples: Sequence[Example], processor: Processor, facts: Facts, run: Run
    ) -> Iterable[list[Row] | Dropped]:
        """For each example its rows, all of one unit; or why it is dropped.

        A row has columns by the names of transformers and TRL (`input_ids`, `labels`): arrays of
        integers, numbers or texts; every row of a task has the same ones. Some are read by the
        house where they are there: `length`, the tokens that this row adds to those trained on, by
        which shares of a mixture are drawn (default: those of `tokens`); `truncated`, the reason if
        something was cut off, else ""; `end_markers`, how many end-of-turn tokens are trained on.
        """
        raise NotImplementedError

    def arrange(
        self, rows: Rows, replayed: Rows | None, processor: Processor, facts: Facts, run: Run
    ) -> Iterable[Row] | None:
        """Training rows made of the encoded ones, such as chunks of running text; None: as they
        are. `replayed` are rows of `general` that are trained on as well (`data.replay`)."""
        return None

    def pack(self, rows: Rows, run: Run) -> Any:
        """The training rows as the trainer sees them: several in one, or `rows` as they are."""
        return rows

    def packing(self, run: Run) -> str:
        """How rows are made of examples: `none`, `documents` or `running` (see `data.packing`)."""
        return "none"

    def annotate(self, rows: Rows, model: torch.nn.Module, processor: Processor, run: Run) -> Rows:
        """Rows with the columns that need a model, computed once before the first step."""
        return rows

    def tokens(self, rows: Rows) -> np.ndarray:
        """int64 (rows,): the tokens that the model sees of each row, padding not counted."""
        return rows.sizes("input_ids")

    def supervised(self, rows: Rows) -> int:
        """How many labels a loss is computed for."""
        return len(rows)

    # ------------------------------------------------------------------ model
    def model(self, pinned: Pinned, facts: Facts, run: Run) -> tuple[Any, tuple[str, ...]]:
        """The frozen base, and the names of its fresh modules: those that the base's files have no
        weights for, such as a new head. Fresh modules are trained and saved whole, without LoRA.
        The outputs of a head are named by `facts["labels"]`."""
        from lora_kit.base.head import CAUSAL, load_with_head
        from lora_kit.base.load import check_causal

        model, fresh = load_with_head(run.base, pinned, self._head(facts, run), run.seed)
        if self.auto == CAUSAL:
            check_causal(model, pinned)
        return model, fresh

    def skeleton(self, pinned: Pinned, facts: Facts, run: Run) -> tuple[Any, tuple[str, ...]]:
        """`model` as shapes alone, on torch's meta device, in the type that is computed in: what
        memory and time are planned with."""
        from lora_kit.base.head import with_head_on_meta

        return with_head_on_meta(run.base, pinned, self._head(facts, run))

    def _head(self, facts: Facts, run: Run) -> Head:
        from lora_kit.base.head import Head

        labels = tuple(facts.get("labels", ()))
        if self.auto.endswith("Classification") and not labels:
            # transformers would make a head of two outputs.
            raise UserError(
                f"TASK.facts: no `labels`: name the outputs of {self.auto}, such as the classes, "
                "or one for a number"
            )
        return Head(self.auto, labels, getattr(run.base, "pooling", None))

    # ------------------------------------------------------------------ training
    def classes(self) -> tuple[type[Trainer], type[TrainingArguments]]:
        """The trainer to guard and its arguments: transformers', TRL's or a subclass."""
        from transformers import Trainer, TrainingArguments

        return Trainer, TrainingArguments

    def options(self, processor: Processor, facts: Facts, run: Run) -> dict[str, Any]:
        """Further arguments of the trainer, such as reward functions."""
        return {}

    def collate(self, processor: Processor, flat: bool = False) -> Collate | None:
        """What makes a batch of rows; None: the trainer's own."""
        raise NotImplementedError

    def items(self, batch: Batch) -> Any:
        """What the loss of a batch is divided by, an int or a tensor (): labels, pairs, or its
        rows."""
        return len(next(iter(batch.values())))

    def loss(self, model: torch.nn.Module, batch: Batch, items: Any, run: Run) -> torch.Tensor:
        """The loss of a micro-batch, () float32: a sum over it, divided by the `items` of the whole
        optimizer step, all its micro-batches and processes together. So it does not depend on how a
        step is cut. A task that does not override this method leaves the loss to its trainer."""
        raise NotImplementedError

    def halve(self, batch: Batch) -> list[tuple[Batch, float]]:
        """A batch in two parts, each with the factor that its loss is multiplied by (1 where `loss`
        divides by the items of the step); [] where it cannot be halved."""
        return []

    def groups(self, fresh: Sequence[str]) -> dict[str, Callable[[str], bool]]:
        """{group: whether a parameter's name belongs to it}: each must be reached by gradients and
        must move; all other parameters must not."""
        groups: dict[str, Callable[[str], bool]] = {"adapter": lambda name: ".lora_" in name}
        if fresh:
            groups["head"] = lambda name: ".modules_to_save." in name
        return groups

    # ------------------------------------------------------------------ evaluation
    def score(
        self, model: Any, rows: Rows, processor: Processor, facts: Facts, run: Run
    ) -> list[Score]:
        """Figures of a model on rows: those of `scores`, then those of `prove.metrics` that are
        none of them. The first one decides, or the first of `prove.metrics` if that is set.
        Rows of the same `unit` count as one.
        The model is in evaluation mode, without gradients. Only `model(**batch)` and, where there
        is one, `model.generate` are called."""
        raise NotImplementedError

    def deciding(self, run: Run) -> str:
        """The score that decides the verdict: the first of `prove.metrics`, else of `scores`."""
        return (run.prove.metrics or self.scores)[0]

    def rivals(
        self, model: Any, data: Prepared, processor: Processor, facts: Facts, run: Run
    ) -> list[Contender]:
        """What the adapted model is compared with, besides the base: a majority class, a linear
        probe, examples in the prompt. Where the base has fresh modules the best of them by the
        `deciding` score is what the verdict is against, chosen on training rows: the first of the
        list is the best one."""
        return []

    def check(self, data: Prepared, processor: Processor, facts: Facts, run: Run) -> list[str]:
        """What of `prove:` cannot be measured on these rows, a line each; asked before training.
        By default `prove.metrics` may name `scores` and no others."""
        known = ", ".join(self.scores)
        return [
            f"prove.metrics: {name}: the scores of this recipe are {known}"
            for name in run.prove.metrics
            if name not in self.scores
        ]

    def examine(
        self,
        model: Any,
        data: Prepared,
        scores: Mapping[str, list[Score]],
        processor: Processor,
        facts: Facts,
        run: Run,
    ) -> dict[str, Any]:
        """Further entries of report.json, such as generated samples.

        Args:
            model: with the adapter; `model.disable_adapter()` is the base.
            scores: of every contender, and of `adapted`, by name.
        """
        return {}

    def objection(self, report: dict[str, Any]) -> str | None:
        """Why a result that scores better is not called better; None: nothing speaks against it."""
        return None

    # ------------------------------------------------------------------ for people
    def show(self, row: Row, processor: Processor, facts: Facts) -> list[Shown]:
        """The sequences of a row, for `preview`."""
        raise NotImplementedError
