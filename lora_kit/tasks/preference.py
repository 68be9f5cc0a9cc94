"""Preference tuning: raise the likelihood of the chosen over the rejected completion of a prompt,
relative to a reference model (DPO; Rafailov et al. 2023, arXiv:2305.18290).

With c and r the log-probabilities of the two completions, summed over their tokens, and c', r'
those under the reference, which is the model before the first step (the base, or the base with
`adapter.start`):

    margin = beta * ((c - c') - (r - r'))        loss = -log sigmoid(margin)

Loss is computed on the last assistant turn and its end-of-turn token. Nothing is truncated: a pair
with a conversation over train.max_length is dropped and counted.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from lora_kit import cache
from lora_kit.base.load import base_is_sharded
from lora_kit.base.templates import set_template
from lora_kit.data.census import NO_SUPERVISION
from lora_kit.data.formats import Example, message_text, normalised
from lora_kit.data.rows import Row, Rows
from lora_kit.errors import NotUsable, UserError
from lora_kit.schema import Json, Section, Train
from lora_kit.tasks.batches import IGNORED, collator, halves, in_one_row, labels_with_loss
from lora_kit.tasks.causal import Text, chat_encoder
from lora_kit.tasks.chat import Encoded
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
    mean_score,
)

if TYPE_CHECKING:
    import torch

    from lora_kit.adapter.load import PeftModel
    from lora_kit.base.pin import Pinned
    from lora_kit.data.examples import Examples
    from lora_kit.schema import Data, Run
    from lora_kit.tasks.encode import Prepared

SIDES = ("chosen", "rejected")
_PAIRS_AT_ONCE = 4  # the longest pairs per forward pass without gradients; more of shorter ones
_PROMPTS = 64  # most held-out prompts to generate for; also limited by prove.answers
_ROOM = 32  # tokens of a generation beyond the longest completion in the rows
_MOST_TOKENS = 512  # of a generation
# Degenerate generations: this much more of them are unfinished than the reference's; or their mean
# length is below this share of that of the chosen completions and of the reference's generations.
_MORE_UNFINISHED = 0.2
_TOO_SHORT = 0.5
REFERENCE = "reference"
_VERSION = 1  # increased whenever the same model and rows give different references


class PreferenceTrain(Train):
    """`train:` of a preference run."""

    learning_rate: float = Field(
        2e-5, ge=0, description="Peak; about a tenth of that for supervised fine-tuning."
    )
    beta: float = Field(
        0.1, gt=0, description="Strength of the pull towards the reference: higher stays closer."
    )
    loss_type: Literal["sigmoid"] = Field(
        "sigmoid", description="sigmoid: DPO's loss, -log sigmoid(margin)."
    )


class Preference(Task):
    """DPO on pairs of completions.

    | rows | columns | trained on |
    |---|---|---|
    | strings | `prompt`, `chosen`, `rejected` | both completions, in the chat template |
    | conversations | `prompt`, `chosen`, `rejected`, lists of turns | the last turn of each |
    | without `prompt` | `chosen`, `rejected` that both begin with it | the last turn of each |

    Scores on held-out pairs: `accuracy`, the share of pairs with a margin above 0 (0 counts half),
    and `margin`. The reference has 0.5 and 0 by definition. To train on the chosen completions
    only: `Conversations` in causal.py.

    Rows: `chosen_input_ids`, `chosen_labels`, `rejected_input_ids`, `rejected_labels`: int32
    (tokens,), -100 for no loss; `reference`: float64 (2,), c' and r', after `annotate`.
    """

    formats: tuple[str, ...] = ("preference",)
    scores = ("accuracy", "margin")
    settings: Mapping[str, type[Section]] = {"train": PreferenceTrain}
    unread = ("data.supervise", "data.packing", "data.replay", "data.labels", "prove.shots")
    general = Text()
    flat = True

    # ------------------------------------------------------------------ examples
    def key(self, example: Example) -> str:
        turns = [*example.messages, *example.rejected[-1:]]
        return normalised("\0".join(message_text(m) for m in turns if m["role"] != "system"))

    def group(self, example: Example) -> str | None:
        """Pairs of one prompt stay in the same split."""
        return example.group or normalised(example.question)

    def processor(self, pinned: Pinned, data: Data) -> Processor:
        tokenizer = super().processor(pinned, data)
        set_template(tokenizer, data.chat_template)
        return tokenizer

    def facts(self, train: Examples, data: Data) -> Facts:
        return {"kind": "chat", "joiner": next(iter(train)).joiner}

    # ------------------------------------------------------------------ rows
    def encode(
        self, examples: Sequence[Example], processor: Processor, facts: Facts, run: Run
    ) -> Iterator[list[Row] | Dropped]:
        encoder = chat_encoder(processor, "last", run.train.max_length)
        chosen = encoder(list(examples))
        rejected = encoder([dataclasses.replace(e, messages=e.rejected) for e in examples])
        for example, one, other in zip(examples, chosen, rejected, strict=True):
            yield _pair(example, one, other)

    def tokens(self, rows: Rows) -> np.ndarray:
        """int64 (rows,): tokens of both conversations."""
        return rows.sizes("chosen_input_ids") + rows.sizes("rejected_input_ids")

    def supervised(self, rows: Rows) -> int:
        """Number of labels with a loss, of both sides."""
        return sum(labels_with_loss(rows, f"{side}_labels") for side in SIDES)

    def annotate(self, rows: Rows, model: torch.nn.Module, processor: Processor, run: Run) -> Rows:
        """Adds `reference`, the log-probabilities under the current model, with the arithmetic of
        training. Cached under a key of everything that they depend on, which excludes `train.beta`.

        Raises:
            UserError: the base is sharded.
        """
        import torch.distributed as dist

        if base_is_sharded():
            raise UserError(
                "preference tuning needs the whole base in each process: use --accelerate "
                "multi_gpu, or base.quantize=nf4, instead of FSDP or DeepSpeed"
            )

        def compute(folder: Path) -> None:
            np.save(folder / "reference.npy", self._log_probabilities(model, rows, processor))

        if dist.is_initialized() and dist.get_world_size() > 1:
            # All ranks must compute: none may wait for another's cache file.
            found = self._log_probabilities(model, rows, processor)
        else:
            folder = cache.prepared(_reference_key(model, rows, run), compute)
            found = np.load(folder / "reference.npy")
        return rows.with_column(REFERENCE, found)

    # ------------------------------------------------------------------ training
    def collate(self, processor: Processor, flat: bool = False) -> Collate:
        """A batch alternates chosen and rejected: 2 * pairs rows, or with `flat` as many documents
        in one row. `counts`: supervised labels of each. `reference`: float64 (pairs, 2)."""
        join = in_one_row if flat else collator(processor.pad_token_id)

        def collate(rows: Sequence[Row]) -> Batch:
            import torch

            sides = [
                {"input_ids": row[f"{side}_input_ids"], "labels": row[f"{side}_labels"]}
                for row in rows
                for side in SIDES
            ]
            batch: Batch = join(sides)
            batch["counts"] = [int((side["labels"][1:] != IGNORED).sum()) for side in sides]
            if flat:
                batch["numbers"] = [int(row["row"]) for row in rows if "row" in row]
            if REFERENCE in rows[0]:
                references = np.stack([row[REFERENCE] for row in rows])
                batch[REFERENCE] = torch.from_numpy(references)
            return batch

        return collate

    def items(self, batch: Batch) -> int:
        """The number of pairs."""
        return len(batch["counts"]) // 2

    def loss(
        self, model: torch.nn.Module, batch: Batch, items: int | torch.Tensor, train: Train
    ) -> torch.Tensor:
        """-log sigmoid(margin), summed over the pairs of the batch, divided by the pairs of the
        step. On the meta device (memory plan) there is no reference."""
        import torch

        ratios = log_probabilities(model, batch)  # (pairs, 2)
        if not ratios.is_meta:
            ratios = ratios - batch[REFERENCE]
        margins = _beta(train) * (ratios[:, 0] - ratios[:, 1])
        losses = -torch.nn.functional.logsigmoid(margins)
        total: torch.Tensor = losses.sum() / items
        return total.float()

    def halve(self, batch: Batch) -> list[tuple[Batch, float]]:
        """Split by pairs; a pair is never split."""
        parts = []
        for part, sides in halves(batch, together=2):
            part["counts"] = [batch["counts"][side] for side in sides]
            if REFERENCE in batch:
                part[REFERENCE] = batch[REFERENCE][[side // 2 for side in sides[::2]]]
            parts.append((part, 1.0))
        return parts

    # ------------------------------------------------------------------ evaluation
    def score(
        self, model: Any, rows: Rows, processor: Processor, facts: Facts, run: Run
    ) -> list[Score]:
        """`accuracy` and `margin`. `model`: None for the reference itself, whose margins are 0."""
        from lora_kit.adapter.start import as_at_start

        margins = np.zeros(len(rows))
        if model is not None:
            if REFERENCE not in rows.columns:
                with as_at_start(model, run.adapter.start):
                    rows = self.annotate(rows, model, processor, run)
            found = self._log_probabilities(model, rows, processor)
            ratios = found - np.stack([rows.cell(REFERENCE, n) for n in range(len(rows))])
            margins = _beta(run.train) * (ratios[:, 0] - ratios[:, 1])
        right = (margins > 0) + (margins == 0) / 2
        units = rows.column("unit")
        return [
            mean_score("accuracy", right, units=units),
            mean_score("margin", margins, units=units),
        ]

    def rivals(
        self, model: PeftModel, data: Prepared, processor: Processor, facts: Facts, run: Run
    ) -> list[Contender]:
        """The reference, which is the base unless the run starts from an adapter."""
        if run.adapter.start is None:
            return [Contender("base", contextlib.nullcontext)]
        return [
            Contender(REFERENCE, contextlib.nullcontext),
            Contender("base", model.disable_adapter),
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
        """`generation`: greedy completions of held-out prompts by the reference (`base`) and the
        adapted model.

        `length`: tokens without the end-of-turn token. `unfinished`: share without an end-of-turn
        token within `room` tokens. `kl`: KL(adapted || reference) over the vocabulary, in nats, at
        each token that the adapted model generates. `chosen_length`: of the chosen completions.
        """
        from lora_kit.adapter.load import end_tokens
        from lora_kit.adapter.start import as_at_start
        from lora_kit.tasks.bootstrap import compared
        from lora_kit.tasks.measure import generate_ids

        most = min(_PROMPTS, run.prove.answers)
        prompts, completions = _prompts(data.eval, most, run.seed)
        chosen_length = np.mean([len(tokens) - 1 for tokens in completions["chosen"]])
        longest = max(len(completion) for some in completions.values() for completion in some)
        room = min(_MOST_TOKENS, longest + _ROOM)
        adapted = generate_ids(model, processor, prompts, room)
        with as_at_start(model, run.adapter.start):
            reference = generate_ids(model, processor, prompts, room)
        ends = set(end_tokens(model, processor))
        divergence = _divergence(model, run, processor.pad_token_id, prompts, adapted)

        def compare(name: str, better: str, before: np.ndarray, after: np.ndarray) -> Json:
            base, tuned = mean_score(name, before, better), mean_score(name, after, better)
            return compared(base, tuned, run.seed)

        # Of the reference to itself: 0 at each token.
        zero = Score("kl", divergence * [0.0, 1.0], better="lower")
        found = {
            "prompts": len(prompts),
            "room": room,
            "chosen_length": round(float(chosen_length), 2),
            "length": compare(
                "length", "higher", _lengths(reference, ends), _lengths(adapted, ends)
            ),
            "unfinished": compare(
                "unfinished", "lower", _unfinished(reference, ends), _unfinished(adapted, ends)
            ),
            "kl": compared(zero, Score("kl", divergence, better="lower"), run.seed),
        }
        return {"generation": found}

    def objection(self, report: Json) -> str | None:
        """Accuracy alone is not enough: a model that always stops immediately, or never, can have
        an accuracy of 1."""
        if (report.get("verdict") or {}).get("general") == "forgot":
            return "general text was forgotten"
        generation = report.get("generation")
        if not generation:
            return None
        unfinished, length = generation["unfinished"], generation["length"]
        if unfinished["difference"] >= _MORE_UNFINISHED and unfinished["ci95"][0] > 0:
            return (
                f"{unfinished['adapted']:.0%} of its generations are unfinished, "
                f"and {unfinished['base']:.0%} of the reference's"
            )
        if length["adapted"] < _TOO_SHORT * min(length["base"], generation["chosen_length"]):
            return (
                f"its generations have {length['adapted']:.1f} tokens, the chosen completions "
                f"{generation['chosen_length']:.1f}"
            )
        return None

    # ------------------------------------------------------------------ for people
    def show(self, row: Row, processor: Processor, facts: Facts) -> list[Shown]:
        return [
            Shown(
                side,
                row[f"{side}_input_ids"].tolist(),
                [False, *(row[f"{side}_labels"][1:] != IGNORED).tolist()],
            )
            for side in SIDES
        ]

    def _log_probabilities(
        self, model: torch.nn.Module, rows: Rows, processor: Processor
    ) -> np.ndarray:
        """Log-probabilities of both completions, float64 (rows, 2), on every rank."""
        from lora_kit.speed.fast import takes_flat
        from lora_kit.tasks.measure import each_row

        collate = self.collate(processor, flat=takes_flat(model))
        sizes = 2 * np.maximum(rows.sizes("chosen_input_ids"), rows.sizes("rejected_input_ids"))
        what = "the log-probability of pair"
        return each_row(model, rows, collate, sizes, _PAIRS_AT_ONCE, log_probabilities, what)


def _beta(train: Train) -> float:
    assert isinstance(train, PreferenceTrain)  # `Preference.settings`
    return train.beta


def log_probabilities(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Log-probabilities of both completions, summed over tokens: float64 (pairs, 2)."""
    import torch

    from lora_kit.speed.fast import label_nats

    inputs = {k: v for k, v in batch.items() if k not in ("counts", REFERENCE)}
    nats = label_nats(model, inputs).double()  # float32 sums of 500 nats have 4 decimals
    sums = [side.sum() for side in nats.split(batch["counts"])]
    return -torch.stack(sums).view(-1, 2)


def _pair(
    example: Example, chosen: Encoded | NotUsable, rejected: Encoded | NotUsable
) -> list[Row] | Dropped:
    """The row of a pair, or why it is dropped."""
    if example.messages[:-1] != example.rejected[:-1]:
        return Dropped("whose chosen and rejected conversations have different prompts")
    if message_text(example.messages[-1]) == message_text(example.rejected[-1]):
        return Dropped("whose chosen and rejected completions are equal")
    row: Row = {"end_markers": 0}
    for side, found in zip(SIDES, (chosen, rejected), strict=True):
        if isinstance(found, NotUsable):
            both = [other.length for other in (chosen, rejected) if isinstance(other, NotUsable)]
            where = f"{side}: {found.detail}" if found.detail else side
            return Dropped(found.reason, where, max(both) if found.length else 0)
        ids, labels = found.ids_and_labels()
        if not (labels[1:] != IGNORED).any():
            return Dropped(NO_SUPERVISION, side)
        row |= {f"{side}_input_ids": ids, f"{side}_labels": labels}
        row["end_markers"] += found.completions
    if np.array_equal(row["chosen_input_ids"], row["rejected_input_ids"]):
        return Dropped("whose chosen and rejected completions are equal as tokens")
    return [row]


def _reference_key(model: torch.nn.Module, rows: Rows, run: Run) -> str:
    """A cache key of everything that the reference of the rows depends on."""
    from lora_kit.speed.fast import takes_flat
    from lora_kit.speed.prefix import described

    columns = [f"{side}_{name}" for side in SIDES for name in ("input_ids", "labels")]
    # A fresh adapter has no effect, whatever its A is.
    tensors = [
        tensor
        for tensor in model.state_dict(keep_vars=True).values()
        if run.adapter.start is not None or not tensor.requires_grad
    ]
    return cache.key_of(
        _VERSION,
        described(model, tensors),
        run.adapter.model_dump(mode="json"),
        run.speed,
        takes_flat(model),
        rows.content(*columns).hex(),
    )


def _prompts(
    rows: Rows, most: int, seed: int
) -> tuple[list[list[int]], dict[str, list[list[int]]]]:
    """A random sample of at most `most` distinct prompts, and {side: completions}, as tokens."""
    prompts: list[list[int]] = []
    completions: dict[str, list[list[int]]] = {side: [] for side in SIDES}
    known: set[tuple[int, ...]] = set()
    for number in np.random.default_rng(seed).permutation(len(rows)).tolist():
        row = rows[number]
        trained = [np.flatnonzero(row[f"{side}_labels"] != IGNORED) for side in SIDES]
        prompt = row["chosen_input_ids"][: trained[0][0]].tolist()
        if not prompt or tuple(prompt) in known:
            continue
        known.add(tuple(prompt))
        prompts.append(prompt)
        for side, places in zip(SIDES, trained, strict=True):
            completions[side].append(row[f"{side}_input_ids"][places].tolist())
        if len(prompts) == most:
            break
    return prompts, completions


def _lengths(generated: Sequence[Sequence[int]], ends: set[int]) -> np.ndarray:
    """Tokens without the end token: int64 (generations,)."""
    return np.array([len(ids) - (ids[-1] in ends) if ids else 0 for ids in generated])


def _unfinished(generated: Sequence[Sequence[int]], ends: set[int]) -> np.ndarray:
    """1 if there is no end token, else 0: float64 (generations,)."""
    return np.array([float(not ids or ids[-1] not in ends) for ids in generated])


def _divergence(
    model: PeftModel,
    run: Run,
    pad_id: int,
    prompts: Sequence[Sequence[int]],
    generated: Sequence[Sequence[int]],
) -> np.ndarray:
    """KL(adapted || reference) over the vocabulary at each generated token, summed per prompt, and
    the number of tokens: float64 (prompts, 2)."""
    import torch

    from lora_kit.adapter.start import as_at_start
    from lora_kit.tasks.measure import each_row

    def divergence(_: torch.nn.Module, batch: Batch) -> torch.Tensor:
        row, place = (batch.pop("labels")[:, 1:] != IGNORED).nonzero().unbind(1)
        adapted = model(**batch).logits[row, place].float().log_softmax(-1)
        with as_at_start(model, run.adapter.start):
            reference = model(**batch).logits[row, place].float().log_softmax(-1)
        each = (adapted.exp() * (adapted - reference)).sum(-1).double()  # (tokens,)
        sums = each.new_zeros(len(batch["input_ids"]), 2)
        return sums.index_add_(0, row, torch.stack([each, torch.ones_like(each)], dim=1))

    rows = [
        {
            "input_ids": np.array([*prompt, *ids]),
            "labels": np.array([*[IGNORED] * len(prompt), *ids]),
        }
        for prompt, ids in zip(prompts, generated, strict=True)
    ]
    sizes = 2 * np.array([len(row["input_ids"]) for row in rows])
    what = "the divergence of generation"
    return each_row(model, rows, collator(pad_id), sizes, _PAIRS_AT_ONCE, divergence, what)
