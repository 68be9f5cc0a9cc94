"""The contract between a task and the rest of the package.

A task defines what a row is, what is trained on, and how the result is scored. Everything else
(reading, splitting, caching, quantizing, adapting, training, saving, comparing, merging) is the
same for all tasks. A task is stateless, knows no training loop and no files, and is passed down
from its recipe.

Examples: `causal.py` (text and conversations), `sequence.py` (a class per text), `preference.py`
(pairs of completions). How to write your own: recipes/README.md.
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
from lora_kit.schema import Data, Json, Prove, Section, Train

if TYPE_CHECKING:
    import torch
    from transformers import Trainer, TrainingArguments

    from lora_kit.adapter.load import PeftModel
    from lora_kit.base.head import Head
    from lora_kit.base.load import Model
    from lora_kit.base.pin import Pinned
    from lora_kit.schema import Run
    from lora_kit.tasks.encode import Prepared

Batch = dict[str, Any]  # what `collate` returns: tensors and plain values by name
Collate = Callable[[Sequence[Row]], Batch]
Facts = Json  # from the training rows, such as label names; in the lock
Processor = Any  # a tokenizer; for images and speech their processor


class Dropped(NamedTuple):
    """Returned instead of an example's rows: the reason why it is dropped, and a detail of it.

    `reason` completes "42 rows dropped: rows ...": `longer than train.max_length (512 tokens)`.
    `length`: the train.max_length that would keep it; 0: none would.
    """

    reason: str
    detail: str = ""
    length: int = 0


class Shown(NamedTuple):
    """One sequence of a row for `preview`: token ids and which of them are trained on; or a `text`
    without tokens, such as a class name."""

    name: str
    ids: Sequence[int] = ()
    trained: Sequence[bool] = ()
    text: str = ""


def ratio(sums: np.ndarray) -> np.ndarray:
    """The first sum over the second: a mean loss, an accuracy. (..., 2) -> (...)"""
    return sums[..., 0] / sums[..., 1]


@dataclass(frozen=True)
class Score:
    """A score of one model on held-out rows, as sums that can be resampled.

    Attributes:
        name: as in report.json: `loss`, `accuracy`, `macro_f1`.
        sums: float64 (units, k): numbers that add up over units. A unit is held out as a whole: a
            document, a conversation, a pair.
        value: the score from a sum of them, (..., k) -> (...).
        better: `lower` or `higher`.
        units: int64 (units,): indices of the units among the held-out rows; None: all of them.
        about: further plain values for the report, such as `labels` and `confusion`.
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
                f"TASK.score: {self.name}: expected sums of shape (units, k) and better: lower or "
                f"higher, not {self.sums.shape} and {self.better}"
            )

    @property
    def figure(self) -> float:
        """The value over all units."""
        return float(self.value(self.sums.sum(0)))


def mean_score(
    name: str, each: np.ndarray, better: str = "higher", units: np.ndarray | None = None
) -> Score:
    """The mean of a number per unit, float64 (units,), as a `Score`."""
    return Score(name, np.stack([each, np.ones(len(each))], axis=1), better=better, units=units)


@dataclass(frozen=True)
class Contender:
    """Something that the adapted model is compared with.

    Attributes:
        name: as in report.json: `base`, `few_shot`, `majority`, `linear_probe`.
        enter: a context manager that yields the model to score, or another object that the task's
            `score` supports.
        rows: transforms held-out rows for this contender (such as examples in the prompt), keeping
            the units. None: unchanged rows.
        about: further plain values for the report, such as `shots`.
    """

    name: str
    enter: Callable[[], AbstractContextManager[Any]]
    rows: Callable[[Rows], Rows] | None = None
    about: Mapping[str, Any] = field(default_factory=dict)


class Task:
    """A task.

    Methods get the section of the run file that they need, or the whole `run` if it is several. A
    section also has the task's own keys (`settings`).

    Attributes:
        formats: row formats of `data.formats.FORMATS` that it reads.
        scores: names of the scores that `score` returns for every run, the deciding one first;
            those of `prove.metrics` may follow.
        settings: {section: pydantic class}: sections of the run file with this task's own keys,
            each derived from the section's class in `schema`.
        unread: keys such as `data.packing` that this task does not read; setting one is an error.
            The default lists the keys of language models.
        auto: the auto class of transformers for the model; in the lock, for merge and load.
        general: the task for `data.general`; None: retention is not measured.
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
        """The text by which duplicates and leaks are found."""
        return example.key

    def group(self, example: Example) -> str | None:
        """Examples of the same group stay in the same split; None: only duplicates do."""
        return None

    def processor(self, pinned: Pinned, data: Data) -> Processor:
        """The base's tokenizer or processor; the model is not loaded."""
        from lora_kit.base.head import CAUSAL
        from lora_kit.base.load import load_tokenizer

        return load_tokenizer(pinned.folder, generates=self.auto == CAUSAL)

    def facts(self, train: Examples, data: Data) -> Facts:
        """Facts from the training examples that encoding or the model needs, such as label names;
        plain JSON.

        Raises:
            UserError: the examples cannot be trained on, for instance with only one class.
        """
        return {}

    def notes(self, formats: set[str], facts: Facts) -> list[str]:
        """Notes for the user about rows of these formats and about `facts`."""
        return []

    # ------------------------------------------------------------------ rows
    def encode(
        self, examples: Sequence[Example], processor: Processor, facts: Facts, run: Run
    ) -> Iterable[list[Row] | Dropped]:
        """For each example its rows, which form one unit, or why it is dropped.

        Columns have the names of transformers and TRL (`input_ids`, `labels`): arrays of integers,
        numbers or texts; all rows of a task have the same columns. Optional columns: `length`,
        training tokens of the row, for mixtures (default: `tokens`); `truncated`, the reason if the
        row was truncated, else "", and `cut_from`, its tokens before, else 0; `end_markers`, number
        of supervised end-of-turn tokens.
        """
        raise NotImplementedError

    def arrange(
        self, rows: Rows, replayed: Rows | None, processor: Processor, facts: Facts, run: Run
    ) -> Iterable[Row] | None:
        """Training rows made of the encoded ones, such as chunks of concatenated text; None:
        unchanged. `replayed`: rows encoded by `general`, to train on as well (`data.replay`)."""
        return None

    def packing(self, data: Data) -> str:
        """The packing in use: `none`, `documents` or `running` (see `data.packing`). With
        `documents`, rows of `input_ids` and `labels` are packed after `arrange`."""
        return "none"

    def annotate(self, rows: Rows, model: torch.nn.Module, processor: Processor, run: Run) -> Rows:
        """Add columns that need a model, computed once before the first step. Not called for packed
        rows."""
        return rows

    def tokens(self, rows: Rows) -> np.ndarray:
        """int64 (rows,): tokens of each row, without padding."""
        return rows.sizes("input_ids")

    def supervised(self, rows: Rows) -> int:
        """Number of labels with a loss; by default one per row."""
        return len(rows)

    # ------------------------------------------------------------------ model
    def model(self, pinned: Pinned, facts: Facts, run: Run) -> tuple[Model, tuple[str, ...]]:
        """The frozen base and the names of its fresh modules: those without weights in the base's
        files, such as a new head. Fresh modules are fully trained and saved, without LoRA.
        `facts["labels"]` are the names of a head's outputs."""
        from lora_kit.base.head import CAUSAL, load_with_head
        from lora_kit.base.load import check_causal

        model, fresh = load_with_head(run.base, pinned, self._head(facts, run), run.seed)
        if self.auto == CAUSAL:
            check_causal(model, pinned)
        return model, fresh

    def skeleton(self, pinned: Pinned, facts: Facts, run: Run) -> tuple[Model, tuple[str, ...]]:
        """`model` on torch's meta device, in the compute dtype, for planning memory and time."""
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
        """The trainer class and its arguments class: transformers', TRL's or a subclass."""
        from transformers import Trainer, TrainingArguments

        return Trainer, TrainingArguments

    def options(self, processor: Processor, facts: Facts, run: Run) -> dict[str, object]:
        """Further arguments for the trainer, such as reward functions."""
        return {}

    def collate(self, processor: Processor, flat: bool = False) -> Collate | None:
        """The collator; None: the trainer's own."""
        raise NotImplementedError

    def items(self, batch: Batch) -> int | torch.Tensor:
        """The divisor of a batch's loss, an int or a tensor (): number of labels, pairs or rows. By
        default the length of the batch's first value."""
        return len(next(iter(batch.values())))

    def loss(
        self, model: torch.nn.Module, batch: Batch, items: int | torch.Tensor, train: Train
    ) -> torch.Tensor:
        """The loss of a micro-batch, () float32: its sum divided by the `items` of the whole
        optimizer step, over all micro-batches and processes, so that it does not depend on the
        batch layout. Not overridden: the trainer computes the loss."""
        raise NotImplementedError

    def halve(self, batch: Batch) -> list[tuple[Batch, float]]:
        """A batch in two parts, each with a factor for its loss (1 if `loss` divides by the items
        of the step); [] if it cannot be halved. Used if a micro-batch runs out of memory."""
        return []

    def groups(self, fresh: Sequence[str]) -> dict[str, Callable[[str], bool]]:
        """{group: whether a parameter's name belongs to it}: each group must receive gradients and
        change; all other parameters must not change."""
        groups: dict[str, Callable[[str], bool]] = {"adapter": lambda name: ".lora_" in name}
        if fresh:
            groups["head"] = lambda name: ".modules_to_save." in name
        return groups

    # ------------------------------------------------------------------ evaluation
    def score(
        self, model: Any, rows: Rows, processor: Processor, facts: Facts, run: Run
    ) -> list[Score]:
        """Score a model on rows: `scores`, then further ones of `prove.metrics`. The first one
        decides, or the first of `prove.metrics` if set. Rows of the same `unit` count as one.
        The model is in evaluation mode, without gradients. Call only `model(**batch)` and, if it
        exists, `model.generate`."""
        raise NotImplementedError

    def deciding(self, prove: Prove) -> str:
        """The score that decides the verdict: the first of `prove.metrics`, else of `scores`."""
        return (prove.metrics or self.scores)[0]

    def rivals(
        self, model: PeftModel, data: Prepared, processor: Processor, facts: Facts, run: Run
    ) -> list[Contender]:
        """Baselines besides the base: a majority class, a linear probe, examples in the prompt. If
        the base has fresh modules, the verdict is against the first of the list, which must be the
        best by the `deciding` score on training rows."""
        return []

    def check(self, data: Prepared, processor: Processor, facts: Facts, run: Run) -> list[str]:
        """Settings of `prove:` that cannot be measured on these rows, one line each; called before
        training. By default `prove.metrics` may only name `scores`."""
        known = ", ".join(self.scores)
        return [
            f"prove.metrics: {name}: unknown; this recipe's scores: {known}"
            for name in run.prove.metrics
            if name not in self.scores
        ]

    def examine(
        self,
        model: PeftModel,
        data: Prepared,
        scores: Mapping[str, list[Score]],
        processor: Processor,
        facts: Facts,
        run: Run,
    ) -> Json:
        """Further entries of report.json, such as generated samples.

        Args:
            model: with the adapter; `model.disable_adapter()` is the base.
            scores: of every contender, and of `adapted`, by name.
        """
        return {}

    def objection(self, report: Json) -> str | None:
        """Why a better score does not count as `better`; None: it does."""
        return None

    # ------------------------------------------------------------------ for people
    def show(self, row: Row, processor: Processor, facts: Facts) -> list[Shown]:
        """The sequences of a row, for `preview`."""
        raise NotImplementedError
