"""Evaluating in batches on all ranks: loss per unit, any function of rows, greedy generation."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from lora_kit.adapter.load import end_tokens
from lora_kit.data.rows import Row, Rows
from lora_kit.errors import CheckFailed
from lora_kit.speed.prefix import causal_model
from lora_kit.tasks.batches import IGNORED, collator
from lora_kit.tasks.task import Batch, Collate, Score

if TYPE_CHECKING:
    import torch
    from rich.progress import Progress as Bar
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lora_kit.adapter.load import PeftModel

# Most logits of one batch, by device; a single row may have more. On a CPU 64 MiB in float32, less
# than training holds; on a GPU 1,700 tokens of a vocabulary of 152k, which fill it.
LOGITS_AT_ONCE = {"cpu": 2**24, "cuda": 2**28}
ROWS_AT_ONCE = 8  # of the longest rows, but not more than training has in a micro-batch
TOKENS_AT_ONCE = 2**14  # prompt and completion tokens of a batch, for the KV cache
# For the progress bar: generating a completion takes about as long as scoring so many tokens.
COMPLETION_TOKENS = 400
_PROMPTS_AT_ONCE = 16  # fewer if they are long
PIECE = {"cpu": 2**22, "cuda": 2**25}  # float32 logits at a time for the loss: 16 or 128 MiB


@dataclass(frozen=True)
class Losses:
    """Per unit, arrays of shape (units,): loss in nats, predicted labels, bytes of their text."""

    nats: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray

    def scores(self) -> list[Score]:
        """Nats per token and bits per byte; units without a label, or without text, are dropped."""
        some = np.flatnonzero(self.tokens > 0)
        sums = np.stack([self.nats[some], self.tokens[some]], axis=1)
        loss = Score("loss", sums, better="lower", units=some)
        some = np.flatnonzero((self.tokens > 0) & (self.bytes > 0))
        sums = np.stack([self.nats[some] / np.log(2), self.bytes[some]], axis=1)
        return [loss, Score("bits_per_byte", sums, better="lower", units=some)]


class EvaluationBar:
    """A progress bar with the time left of an evaluation, which is made of phases.

    Attributes:
        total: size of all phases.
    """

    def __init__(self, bar: Bar) -> None:
        self.bar, self.total = bar, 0
        self.task = bar.add_task("evaluating", total=None)
        self._done, self._end = 0.0, 0

    @contextlib.contextmanager
    def phase(self, size: int) -> Iterator[None]:
        """A phase, within which `advance` moves the bar up to `size`."""
        self._end += size
        yield
        self.advance(size)

    def advance(self, done: float) -> None:
        self._done = min(self._end, self._done + done)
        total = max(self.total, self._end) or None
        self.bar.update(self.task, completed=self._done, total=total)


_bars: list[EvaluationBar] = []  # the bar in use, if there is one


@contextlib.contextmanager
def evaluation_bar() -> Iterator[EvaluationBar | None]:
    """Inside the block the scoring functions below advance a bar; None without a terminal."""
    bar = terminal_bar("{task.percentage:>3.0f}%") if rank_and_ranks()[0] == 0 else None
    if bar is None:
        yield None
        return
    with bar:
        _bars.append(EvaluationBar(bar))
        try:
            yield _bars[-1]
        finally:
            _bars.pop()


def terminal_bar(*columns: str) -> Bar | None:
    """A progress bar on stderr: description, bar, these columns, time left; None without a
    terminal."""
    if not sys.stderr.isatty():
        return None
    from rich import progress
    from rich.console import Console

    return progress.Progress(
        "{task.description}",
        progress.BarColumn(),
        *columns,
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def _advance(done: float) -> None:
    """Move the bar, of which every rank does an equal part."""
    for bar in _bars:
        bar.advance(done * rank_and_ranks()[1])


@contextlib.contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Inside the block the model is in evaluation mode; afterwards, also after an error, in the
    mode that it had."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def measure(
    model: torch.nn.Module, rows: Rows, pad_id: int, rows_at_once: int = ROWS_AT_ONCE
) -> Losses:
    """The loss of all labels, summed per unit.

    Args:
        model: a causal language model, on its device.
        rows_at_once: rows of the longest length per batch; fewer if their logits would exceed
            LOGITS_AT_ONCE.

    Raises:
        CheckFailed: a loss is NaN or infinite.
    """
    import torch

    parameters = inspect.signature(causal_model(model).forward).parameters

    def nats_and_tokens(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        labels = batch.pop("labels")
        # Logits before the first label are not needed.
        supervised = (labels[:, 1:] != IGNORED).any(0).nonzero()
        first = int(supervised[0]) if len(supervised) else labels.shape[1] - 2
        targets = labels[:, max(first, 0) + 1 :]
        keep = targets.shape[1] + 1
        saving = {"logits_to_keep": keep, "use_cache": False}  # memory
        some = {name: value for name, value in saving.items() if name in parameters}
        logits = model(**batch, **some).logits[:, -keep:-1]
        tokens = (targets != IGNORED).sum(1).double()
        return torch.stack([_row_nats(logits, targets), tokens], dim=1)

    lengths, units = rows.sizes("input_ids"), rows.column("unit")
    what = "the loss of held-out row"
    found = each_row(model, rows, collator(pad_id), lengths, rows_at_once, nats_and_tokens, what)
    nats, tokens, size = (
        np.bincount(units, values, minlength=rows.units).astype(np.float64)
        for values in (*found.T, rows.column("bytes"))
    )
    return Losses(nats, tokens, size)


def each_row(
    model: torch.nn.Module,
    rows: Rows | Sequence[Row],
    collate: Collate,
    lengths: np.ndarray,
    rows_at_once: int,
    of: Callable[[torch.nn.Module, Batch], torch.Tensor],
    what: str,
) -> np.ndarray:
    """Apply a function to all rows in batches, in evaluation mode: (rows, width) in its dtype. Rows
    are sorted by length, to reduce padding, and distributed over the ranks; every rank returns all
    results, in the order of the rows.

    Args:
        lengths, rows_at_once: as in `batches_of`.
        of: (model, batch) -> (rows of the batch, width).
        what: name of the value, for the error message.

    Raises:
        CheckFailed: a value is NaN or infinite.
    """
    import torch
    import torch.distributed as dist
    from accelerate.utils import send_to_device

    batches = batches_of(model, lengths, rows_at_once)
    device = next(model.parameters()).device
    rank, ranks = rank_and_ranks()
    found: torch.Tensor | None = None
    with torch.no_grad(), evaluation_mode(model):
        for turn in range(-(-len(batches) // ranks)):
            mine = turn * ranks + rank
            # Every rank runs the same number of batches, as a sharded model needs.
            some = batches[min(mine, len(batches) - 1)]
            batch = send_to_device(collate([rows[n] for n in some]), device)
            values = of(model, batch)
            if found is None:
                found = values.new_zeros(len(rows), values.shape[1])
            if mine < len(batches):
                found[some] = values
            _advance(int(lengths[some].sum()))
    assert found is not None  # there are rows
    if ranks > 1:
        dist.all_reduce(found)
    broken = (~torch.isfinite(found).all(1)).nonzero()
    if len(broken):
        raise CheckFailed(
            f"{what} {int(broken[0]) + 1} of {len(rows)} is not finite: check for NaN or infinite "
            "weights in base and adapter"
        )
    return np.asarray(found.cpu().numpy())


def rank_and_ranks() -> tuple[int, int]:
    """Rank of this process, and the world size."""
    import torch.distributed as dist

    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _row_nats(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Summed loss per row, float64 (rows,), from logits (rows, length, vocabulary) and targets
    (rows, length). In pieces, since float32 logits of the whole batch would triple its memory."""
    import torch

    nats = torch.zeros(len(targets), dtype=torch.float64, device=targets.device)
    most = PIECE["cuda" if logits.is_cuda else "cpu"]
    # Pieces of (labels, 2): row and position of each label.
    for places in (targets != IGNORED).nonzero().split(max(1, most // logits.shape[-1])):
        row, place = places.unbind(1)
        some = torch.nn.functional.cross_entropy(
            logits[row, place].float(), targets[row, place], reduction="none"
        )
        nats.index_add_(0, row, some.double())
    return nats


def batches_of(model: torch.nn.Module, lengths: np.ndarray, rows_at_once: int) -> list[list[int]]:
    """Row indices in batches, longest first: `rows_at_once` of the longest rows, more of shorter
    ones; fewer if their logits would exceed LOGITS_AT_ONCE.

    Args:
        lengths: int64 (rows,), tokens per row.
    """
    order = np.argsort(-lengths, kind="stable").tolist()
    budget = rows_at_once * int(lengths[order[0]])  # tokens, padding counted
    budget = min(
        budget, logits_at_once(model) // causal_model(model).config.get_text_config().vocab_size
    )
    batches: list[list[int]] = []
    width = 0
    for n in order:
        if batches and (len(batches[-1]) + 1) * width <= budget:
            batches[-1].append(n)
        else:
            batches.append([n])
            width = int(lengths[n])
    return batches


def logits_at_once(model: torch.nn.Module) -> int:
    """LOGITS_AT_ONCE of the model's device."""
    return LOGITS_AT_ONCE["cuda" if next(model.parameters()).is_cuda else "cpu"]


def positions(model: torch.nn.Module) -> int:
    """Context length of the base, in tokens; a large number if its config states none."""
    return (
        getattr(causal_model(model).config.get_text_config(), "max_position_embeddings", None)
        or 2**31
    )


def generate(
    model: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
) -> list[str]:
    """`generate_ids` as text, without special tokens."""
    found = generate_ids(model, tokenizer, prompts, max_new_tokens)
    return list(tokenizer.batch_decode(found, skip_special_tokens=True))


def generate_ids(
    model: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
) -> list[list[int]]:
    """Greedy completions as tokens, in the order of the prompts, each with its end token, if one
    was generated.

    Prompts are padded on the left, sorted by length and distributed over the ranks; every rank
    returns all completions.

    Args:
        prompts: token ids.
        max_new_tokens: at most; fewer if the base has too few positions.
    """
    import torch
    import torch.distributed as dist

    device = next(model.parameters()).device
    pad = tokenizer.pad_token_id
    ends = end_tokens(model, tokenizer)
    order = sorted(range(len(prompts)), key=lambda n: -len(prompts[n]))
    rank, ranks = rank_and_ranks()
    mine = order[rank::ranks]
    room = positions(model)
    found: dict[int, list[int]] = {n: [] for n in mine if len(prompts[n]) >= room}
    waiting = [n for n in mine if n not in found]
    with evaluation_mode(model):
        while waiting:
            width = len(prompts[waiting[0]])
            length = min(max_new_tokens, room - width)
            rows = max(1, min(_PROMPTS_AT_ONCE, TOKENS_AT_ONCE // (width + length)))
            chosen, waiting = waiting[:rows], waiting[rows:]
            ids = torch.full((len(chosen), width), pad, device=device)  # (prompts, longest prompt)
            mask = torch.zeros_like(ids)
            for row, n in enumerate(chosen):
                start = width - len(prompts[n])
                ids[row, start:] = torch.as_tensor(prompts[n], device=device)
                mask[row, start:] = 1
            with torch.inference_mode():
                out = cast(Any, model).generate(  # of transformers' GenerationMixin
                    input_ids=ids,
                    attention_mask=mask,
                    max_new_tokens=length,
                    # Override the base's generation_config.json.
                    do_sample=False,
                    num_beams=1,
                    repetition_penalty=1.0,
                    no_repeat_ngram_size=0,
                    use_cache=True,
                    pad_token_id=pad,
                    eos_token_id=ends,
                )
            for n, tokens in zip(chosen, out[:, width:].tolist(), strict=True):
                end = next((place for place, token in enumerate(tokens) if token in ends), length)
                found[n] = tokens[: end + 1]
            _advance(COMPLETION_TOKENS * len(chosen))
    if ranks > 1:
        parts: list[Any] = [None] * ranks
        dist.all_gather_object(parts, found)
        found = {n: tokens for part in parts for n, tokens in part.items()}
    return [found[n] for n in range(len(prompts))]
