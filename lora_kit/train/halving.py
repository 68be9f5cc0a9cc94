"""Splits micro-batches that run out of memory; losses and gradients of the parts add up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from lora_kit.errors import UserError, out_of_memory
from lora_kit.tasks.task import Batch
from lora_kit.train.directory import say

MOST = 3  # a micro-batch is halved at most 3 times: 8 parts


class MicroBatch(dict[str, Any]):
    """The inputs of a micro-batch, or of a part of one.

    Attributes:
        factor: scales a part's loss, so that the losses of all parts sum to the whole's.
    """

    def __init__(self, inputs: Batch, factor: float = 1.0) -> None:
        super().__init__(inputs)
        self.factor = factor


Step = Callable[[MicroBatch], torch.Tensor]  # forward and backward of a part; returns its loss


class Halving:
    """Runs micro-batches; in 2, 4 or 8 parts after one ran out of memory.

    Args:
        halve: `Task.halve`: batch -> two halves, each with the factor on its loss; [] if it cannot
            be halved.
        trained: the trainable parameters, whose gradients are restored after an aborted pass.
        allowed: False if several processes would have to halve together.
        by_length: also split batches that are a third or more padding, to compute less of it;
            `halve` must sort rows by length.

    Attributes:
        times: how often each micro-batch is halved now.
    """

    def __init__(
        self,
        halve: Callable[[Batch], Sequence[tuple[Batch, float]]],
        trained: Sequence[torch.nn.Parameter],
        allowed: bool,
        by_length: bool,
    ) -> None:
        self._halve, self._allowed = halve, allowed
        self._by_length = by_length and allowed
        self._trained = trained if allowed else []
        self.times = 0

    def run(self, batch: MicroBatch, step: Step) -> torch.Tensor:
        """The loss of a micro-batch; its gradients are accumulated.

        Raises:
            UserError: it runs out of memory even after the last halving.
        """
        parts = [batch]
        for _ in range(self.times):
            parts = [half for part in parts for half in self._halves(part) or [part]]
        if self._by_length:
            parts = [narrow for part in parts for narrow in self._narrow(part)]
        return _total([self._part(part, step, self.times) for part in parts])

    def _part(self, part: MicroBatch, step: Step, halved: int) -> torch.Tensor:
        """Run a part that was halved `halved` times; on out-of-memory, its two halves."""
        before = [parameter.grad for parameter in self._trained]
        for parameter in self._trained:
            parameter.grad = None  # an aborted backward pass leaves partial gradients
        loss = None
        try:
            loss = step(part)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        # Retried outside of the handler, since its traceback keeps activations alive.
        if loss is None:
            for parameter, grad in zip(self._trained, before, strict=True):
                parameter.grad = grad
            return self._in_halves(part, step, halved)
        for parameter, grad in zip(self._trained, before, strict=True):
            if grad is not None:
                parameter.grad = grad if parameter.grad is None else grad.add_(parameter.grad)
        return loss

    def _in_halves(self, part: MicroBatch, step: Step, halved: int) -> torch.Tensor:
        """Run a part that ran out of memory in two halves; halve later micro-batches beforehand."""
        halves = self._halves(part)
        if halved == MOST or not halves:
            parts = f"even with the micro-batch in {2**halved} parts"
            tried = parts if halved else "and the micro-batch cannot be halved"
            raise UserError(
                f"out of memory, {tried}: lower train.max_length or adapter.r, set "
                "train.gradient_checkpointing=true, or base.quantize=nf4"
            )
        halved += 1
        if halved > self.times:
            self.times = halved
            say(f"out of memory: each micro-batch now runs in {2**halved} parts")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return _total([self._part(half, step, halved) for half in halves])

    def _halves(self, part: MicroBatch) -> list[MicroBatch]:
        if not self._allowed:
            return []
        return [MicroBatch(half, part.factor * factor) for half, factor in self._halve(part)]

    def _narrow(self, part: MicroBatch) -> list[MicroBatch]:
        """Split a padded part into parts of similar length: the same sum, less padding."""
        halves = self._halves(part) if _wasteful(part) else []
        return [narrow for half in halves for narrow in self._narrow(half)] or [part]


def _total(losses: list[torch.Tensor]) -> torch.Tensor:
    return sum(losses, start=torch.zeros(()))


def _wasteful(batch: Batch) -> bool:
    """Whether a batch of several rows is at least a third padding."""
    mask = batch.get("attention_mask")
    if mask is None or mask.device.type != "cpu":  # on a GPU this would synchronize
        return False
    return len(mask) > 1 and float(mask.float().mean()) < 2 / 3
