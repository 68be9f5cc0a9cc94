"""The cross entropy of a frozen head: in chunks, its gradient taken in the forward pass.

All logits of a batch are never there at once: for each chunk of labelled tokens they are made,
turned into the loss and at once into the gradient of the hidden states, and dropped. The backward
pass only scales that gradient. Two products with the head, as in the plain way; no third one,
because a frozen head needs no gradient of its own.
"""

from __future__ import annotations

from typing import Any

import torch

# Logits in float32 that are there at once: 32 MiB on a CPU, whose caches they should stay near,
# 512 MiB on a GPU, which wants long products.
_VALUES_AT_ONCE = {"cpu": 2**23, "cuda": 2**27}


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
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        rows = max(1, _VALUES_AT_ONCE.get(hidden.device.type, 2**23) // len(head))
        for first in range(0, len(hidden), rows):
            some, labels = hidden[first : first + rows], targets[first : first + rows, None]
            logs = torch.log_softmax(some @ head.t(), -1, dtype=torch.float32)
            total -= logs.gather(1, labels).sum()
            if gradient is not None:
                logs.exp_().scatter_add_(1, labels, logs.new_full(labels.shape, -1))
                torch.mm(logs.to(head.dtype), head, out=gradient[first : first + rows])
        ctx.save_for_backward(*[] if gradient is None else [gradient])
        return total

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
