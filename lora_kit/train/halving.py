"""A micro-batch that does not fit into memory runs in parts, whose losses and gradients add up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from lora_kit.errors import UserError

MOST = 3  # times that a micro-batch is halved: 8 parts
_NO_MEMORY = (
    "out of memory, the micro-batch halved {times} times: lower train.max_length or adapter.r, "
    "set train.gradient_checkpointing=true, or base.quantize=nf4"
)
# What torch's CPU allocator and oneDNN say, which have no exception of their own.
_NO_MEMORY_TEXTS = ("DefaultCPUAllocator", "could not create a primitive")


class Batch(dict[str, Any]):
    """A micro-batch as the model gets it, or a part of one.

    Attributes:
        factor: on the loss of a part, so that the losses of all parts add up to that of the whole.
    """

    factor = 1.0


Step = Callable[[Batch], torch.Tensor]  # forward and backward of a part; returns its loss


class Halving:
    """Runs micro-batches, in 2, 4 or 8 parts once one did not fit into memory.

    Args:
        halve: the task's: a batch -> its two halves, each with the factor on its loss; [] where it
            cannot be halved.
        trained: the parameters that get gradients.
        say: told once for each halving.
        allowed: False where several processes would have to halve together.
        by_length: also split batches of which a third or more is padding. `halve` has to sort by
            length then.

    Attributes:
        times: how often each micro-batch is halved so far.
    """

    def __init__(
        self,
        halve: Callable[[dict[str, Any]], Sequence[tuple[dict[str, Any], float]]],
        trained: Sequence[torch.nn.Parameter],
        say: Callable[[str], None],
        allowed: bool = True,
        by_length: bool = False,
    ) -> None:
        self._halve, self._say = halve, say
        self._allowed, self._by_length = allowed, allowed and by_length
        self._trained = trained if allowed else []
        self.times = 0

    def run(self, batch: Batch, step: Step) -> Any:
        """The loss of a micro-batch, its gradients added to those there.

        Raises:
            UserError: it does not fit, halved as often as it can be.
        """
        parts = [batch]
        for _ in range(self.times):
            parts = [half for part in parts for half in self._halves(part) or [part]]
        if self._by_length:
            parts = [narrow for part in parts for narrow in self._narrow(part)]
        return sum(self._part(part, step, self.times) for part in parts)

    def _part(self, part: Batch, step: Step, halved: int) -> Any:
        """A part that was halved so often; where it does not fit, its two halves, from now on."""
        before = [parameter.grad for parameter in self._trained]
        for parameter in self._trained:
            parameter.grad = None  # a backward pass that breaks off leaves incomplete sums
        loss = None
        try:
            loss = step(part)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
        # Out of the handler, whose traceback keeps the activations alive.
        if loss is None:
            halves = self._halves(part)
            if halved == MOST or not halves:
                raise UserError(_NO_MEMORY.format(times=halved))
            for parameter, grad in zip(self._trained, before, strict=True):
                parameter.grad = grad
            halved += 1
            if halved > self.times:
                self.times = halved
                self._say(f"out of memory: from here on {2**halved} passes for each batch")
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            return sum(self._part(half, step, halved) for half in halves)
        for parameter, grad in zip(self._trained, before, strict=True):
            if grad is not None:
                parameter.grad = grad if parameter.grad is None else grad.add_(parameter.grad)
        return loss

    def _halves(self, part: Batch) -> list[Batch]:
        halves = []
        for half, factor in self._halve(part) if self._allowed else []:
            halves.append(Batch(half))
            halves[-1].factor = part.factor * factor
        return halves

    def _narrow(self, part: Batch) -> list[Batch]:
        """A padded part in parts of about one length: the same sum, less of it padding."""
        halves = self._halves(part) if wasteful(part) else []
        return [narrow for half in halves for narrow in self._narrow(half)] or [part]


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or in the CPU's allocator."""
    texts = any(text in str(error) for text in _NO_MEMORY_TEXTS)
    return texts or isinstance(error, torch.OutOfMemoryError)


def wasteful(batch: dict[str, Any]) -> bool:
    """Whether a third or more of a padded batch of several rows is padding."""
    mask = batch.get("attention_mask")
    if mask is None or mask.device.type != "cpu":  # on a GPU the question would wait for it
        return False
    return len(mask) > 1 and float(mask.float().mean()) < 2 / 3
