"""The cross entropy of a frozen head: in chunks, its gradient taken in the forward pass.

All logits of a batch are never there at once: for each chunk of labelled tokens they are made,
turned into the loss and at once into the gradient of the hidden states, and dropped. The backward
pass only scales that gradient. Two products with the head, as in the plain way; no third one,
because a frozen head needs no gradient of its own.
"""

from __future__ import annotations

from typing import Any

import torch

# Logits at once: 16 MiB of 16 bits on a CPU, 512 MiB in float32 on a GPU for its long products.
_VALUES_AT_ONCE = {"cpu": 2**23, "cuda": 2**27}
_MULTIPLE = 32  # of which the length of a chunk is, where there are as many
# Of these in float32, so that a CPU finds them in its caches again.
_FLOATS_AT_ONCE = {"cpu": 2**19, "cuda": 2**27}


class FrozenHeadLoss(torch.autograd.Function):
    """Summed cross entropy in nats, float32 ().

    Args (of `apply`):
        hidden: (tokens, width), what the head sees at labelled places. head: (vocabulary, width).
        targets: int64 (tokens,), the labels to be predicted there.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        losses = torch.empty(len(hidden), 1, dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        kind = hidden.device.type
        rows = _VALUES_AT_ONCE.get(kind, 2**23) // len(head) // _MULTIPLE * _MULTIPLE or _MULTIPLE
        cached = max(1, _FLOATS_AT_ONCE.get(kind, 2**19) // len(head))
        for first in range(0, len(hidden), rows):
            last = min(first + rows, len(hidden))
            # The rest begins a little earlier, again: no new length each time.
            chunk = slice(max(0, last - -(-(last - first) // _MULTIPLE) * _MULTIPLE), last)
            logits, labels = hidden[chunk] @ head.t(), targets[chunk, None]
            parts = (x.split(cached) for x in (logits, labels, losses[chunk]))
            for some, right, loss in zip(*parts, strict=True):
                p = torch.softmax(some, -1, dtype=torch.float32)
                # By the likeliest token: the right one's may be too small for a logarithm.
                log_sum = some.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log_()
                torch.sub(log_sum, some.gather(1, right), out=loss)
                if gradient is not None:  # that of the logits takes their place
                    some.copy_(p.scatter_add_(1, right, p.new_full(right.shape, -1)))
            if gradient is not None:
                torch.mm(logits.to(head.dtype), head, out=gradient[chunk])
        ctx.save_for_backward(*[] if gradient is None else [gradient])
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].to(gradient.dtype), None, None


def causal_loss(
    hidden: torch.Tensor,
    head: torch.Tensor,
    labels: torch.Tensor,
    items: Any = None,
    places: torch.Tensor | None = None,
) -> torch.Tensor:
    """The mean loss over labels, each predicted from the place before it, as transformers has it.

    Args:
        hidden: (rows, length, width), the head's input. head: (vocabulary, width).
        labels: int64 (rows, length); -100 is not learned from.
        items: labels of the whole step, all its batches together; None: of this one.
        places: int64, where in the flattened labels without the first column there is one, as
            `labelled_places` finds them: on a GPU looking for them would wait for it.

    Returns:
        float32 ().
    """
    targets = labels[:, 1:].reshape(-1)
    places = labelled_places(labels) if places is None else places
    before = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    total = FrozenHeadLoss.apply(before.index_select(0, places), head, targets[places])
    loss: torch.Tensor = total / (len(places) if items is None else items)
    return loss


def labelled_places(labels: torch.Tensor) -> torch.Tensor:
    """Where there is something to learn: int64, into labels[:, 1:] of (rows, length), flattened."""
    return (labels[:, 1:].reshape(-1) != -100).nonzero().squeeze(1)
