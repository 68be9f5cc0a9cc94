"""Cross entropy with a frozen head, in chunks, with the gradient computed in the forward pass.

The logits of a whole batch never exist at once: for each chunk of labelled tokens they are
computed, turned into the loss and the gradient of the hidden states, and dropped. The backward pass
only scales that gradient. This takes two products with the head instead of three, since a frozen
head needs no gradient.
"""

from __future__ import annotations

from typing import Any

import torch

from lora_kit.speed.runtime import on_gpu

# Per device: logits of a chunk, and how many of them are in float32 at once. On a CPU 16 MiB in
# 16 bits and 2 MiB in float32, which fit its caches; a GPU needs large products.
_AT_ONCE = {"cpu": (2**23, 2**19), "cuda": (2**27, 2**27)}
_MULTIPLE = 32  # chunk sizes are multiples of this


class FrozenHeadLoss(torch.autograd.Function):
    """The cross entropy of each label in nats, float32 (count,).

    Args (of `apply`):
        hidden: (tokens, width), the head's input at labelled positions. head: (vocabulary, width).
        targets: int64 (tokens,), the labels to predict.
        count: number of tokens with a loss; the rest is padding.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, count: int
    ) -> torch.Tensor:
        losses = torch.empty(len(hidden), 1, dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        most, most_wide = _AT_ONCE["cuda" if on_gpu(hidden) else "cpu"]
        rows = max(1, most // len(head) // _MULTIPLE) * _MULTIPLE
        for first in range(0, len(hidden), rows):
            chunk = slice(first, first + rows)
            logits, labels = hidden[chunk] @ head.t(), targets[chunk, None]
            parts = (
                x.split(max(1, most_wide // len(head))) for x in (logits, labels, losses[chunk])
            )
            for some, right, loss in zip(*parts, strict=True):
                p = torch.softmax(some, -1, dtype=torch.float32)
                # Relative to the likeliest token: the label's probability may underflow.
                behind = some.amax(-1, keepdim=True).float() - some.gather(1, right)
                torch.sub(behind, p.amax(-1, keepdim=True).log_(), out=loss)
                if gradient is not None:  # overwrite the logits with their gradient
                    some.copy_(p.scatter_add_(1, right, p.new_full(right.shape, -1)))
            if gradient is not None:
                torch.mm(logits.to(head.dtype), head, out=gradient[chunk])
        if gradient is not None:
            gradient[count:] = 0
            ctx.save_for_backward(gradient)
        return losses[:count, 0]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        scale = gradient.new_zeros(len(gradient), 1)  # one per label
        scale[: len(grads[0]), 0] = grads[0]
        return gradient * scale, None, None, None


def causal_nats(
    hidden: torch.Tensor,
    head: torch.Tensor,
    labels: torch.Tensor,
    places: torch.Tensor | None = None,
) -> torch.Tensor:
    """The loss of each label in nats, predicted from the position before it: float32 (count,).

    Args:
        hidden: (rows, length, width), the head's input. head: (vocabulary, width).
        labels: int64 (rows, length); -100 is ignored.
        places: int64 (count,), from `labelled_places`; None: computed here, which synchronizes a
            GPU.
    """
    targets = labels[:, 1:].reshape(-1)
    places = labelled_places(labels) if places is None else places
    before = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    count = len(places)
    # Padded to a multiple: oneDNN prepares for each new shape.
    places = torch.cat([places, places[:1].expand(-count % _MULTIPLE)])
    nats: torch.Tensor = FrozenHeadLoss.apply(
        before.index_select(0, places), head, targets[places], count
    )
    return nats


def causal_loss(
    hidden: torch.Tensor,
    head: torch.Tensor,
    labels: torch.Tensor,
    items: int | torch.Tensor | None = None,
    places: torch.Tensor | None = None,
) -> torch.Tensor:
    """The mean of `causal_nats`, as transformers computes it: float32 ().

    Args:
        items: number of labels in the whole optimizer step; None: in this batch.
    """
    nats = causal_nats(hidden, head, labels, places)
    loss: torch.Tensor = nats.sum() / (len(nats) if items is None else items)
    return loss


def labelled_places(labels: torch.Tensor) -> torch.Tensor:
    """Positions of supervised labels: int64 (count,), into labels[:, 1:] flattened."""
    return (labels[:, 1:].reshape(-1) != -100).nonzero().squeeze(1)
