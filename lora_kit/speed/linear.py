"""A frozen linear layer with LoRA as a single autograd function.

y = x W' + b + s (x A') B'. PEFT computes the two terms separately: it casts x for each target
module, adds into a new tensor and, with 4-bit weights, clones. Here both products accumulate into
one tensor in the base's dtype, and only x and x A' are saved. A and B stay float32 parameters.
LoRA: Hu et al. 2021 (arXiv:2106.09685).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lora_kit.speed.patch import is_fast, part_of, put_in

Dense = Callable[[torch.dtype], torch.Tensor]


class LoraLinear(torch.autograd.Function):
    """Has gradients of x, A and B; none of the frozen weight (4N instead of 6N FLOP per token).

    Args (of `apply`):
        x: (..., in), in the compute dtype. seen: the input of A: x, or x after dropout.
        dense: returns the frozen weight (out, in); called again in the backward pass, so that a
            dequantized weight is never kept.
        bias: (out,) or None. A: (r, in). B: (out, r). scale: for instance lora_alpha / r.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        seen: torch.Tensor,
        dense: Dense,
        bias: torch.Tensor | None,
        A: torch.Tensor,
        B: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        seen = rows if seen is x else seen.reshape(rows.shape)
        # Products of rank r are memory-bound: A is laid out in the order it is read, and the large
        # product accumulates into the small one.
        A = x.new_empty(A.shape[::-1]).copy_(A.t()).t()
        B = B.to(x.dtype)
        inner = (seen @ A.t()).mul_(scale)  # (rows, r)
        y = inner @ B.t() if bias is None else torch.addmm(bias.to(x.dtype), inner, B.t())
        y.addmm_(rows, dense(x.dtype).t())
        ctx.save_for_backward(seen, inner, A, B)
        ctx.dense, ctx.scale, ctx.shape, ctx.same = dense, scale, x.shape, seen is rows
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        seen, inner, A, B = ctx.saved_tensors
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        inward = (grad @ B).mul_(ctx.scale)  # (rows, r)
        grad_b = (inner.t() @ grad).t().float()
        grad_a = (inward.t() @ seen).float()
        grad_x = grad_seen = None
        if ctx.needs_input_grad[0]:
            weight = ctx.dense(grad.dtype)
            if ctx.same:
                grad_x = (inward @ A).addmm_(grad, weight).view(ctx.shape)
            else:
                grad_x, grad_seen = (grad @ weight).view(ctx.shape), (inward @ A).view(ctx.shape)
        return grad_x, grad_seen, None, None, grad_a, grad_b, None


def install(model: torch.nn.Module) -> int:
    """Replace the forward of PEFT's LoRA layers; `is_fast` decides on each call whether it is used.
    Returns how many were replaced.

    Unchanged: DoRA, several adapters, a bias of B, int8, and NF4 of a width that bitsandbytes' CPU
    code cannot unpack (not a multiple of 64).
    """
    from peft.tuners.lora import LoraLayer

    changed = 0
    modules: list[Any] = [m for m in model.modules() if isinstance(m, LoraLayer)]
    for module in modules:
        if part_of(module) is not None:  # patched by another library
            continue
        dense = _dense(module)
        if dense is not None:
            put_in(module, _forward(module.forward, dense), "linear")
            changed += 1
    return changed


def _dense(layer: Any) -> Dense | None:
    """A function that returns a LoRA layer's frozen weight (out, in); None if unsupported."""
    base = layer.get_base_layer()
    # Several adapters; DoRA and other variants; a bias of B.
    if len(layer.lora_A) != 1 or layer.lora_variant or any(layer.lora_bias.values()):
        return None
    kind = type(base).__name__
    if type(base) is torch.nn.Linear:
        return lambda dtype: base.weight.to(dtype)
    if kind == "Conv1D" and type(base).__module__.startswith("transformers"):
        return lambda dtype: base.weight.t().to(dtype)
    if kind == "Linear4bit" and (base.in_features % 64 == 0 or base.weight.device.type == "cuda"):
        from bitsandbytes.functional import dequantize_4bit

        return lambda dtype: dequantize_4bit(base.weight.data, base.weight.quant_state).to(dtype)
    return None


def _forward(plain: Callable[..., Any], dense: Dense) -> Callable[..., torch.Tensor]:
    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        name = self.active_adapters[0]
        if not is_fast() or self.disable_adapters or self.merged or args or kwargs:
            return plain(x, *args, **kwargs)
        kind = x.device.type
        if kind != "meta" and torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        dropout = self.lora_dropout[name]
        seen = dropout(x) if self.training and getattr(dropout, "p", 0) else x
        A, B = self.lora_A[name].weight, self.lora_B[name].weight
        bias = self.get_base_layer().bias
        return LoraLinear.apply(x, seen, dense, bias, A, B, self.scaling[name])

    return forward
