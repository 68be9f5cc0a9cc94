"""RMSNorm with a frozen weight as one autograd function (Zhang & Sennrich, arXiv:1910.07467).

transformers' version saves three float32 tensors for the backward pass; this one saves the
normalised states in the model's dtype.
"""

from __future__ import annotations

from typing import Any

import torch

from lora_kit.speed.patch import is_fast, part_of, put_in


class FrozenRMSNorm(torch.autograd.Function):
    """weight * (x / rms(x)), computed in float32: x (..., width), weight (width,)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        wide = x.float() if x.dtype != torch.float32 else x.clone()
        # Not vecdot, which autocast computes in 16 bits.
        square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        scale = square.div_(x.shape[-1]).add_(epsilon).rsqrt_()  # (..., 1)
        normal = wide.mul_(scale).to(x.dtype)
        ctx.save_for_backward(normal, scale, weight)
        return normal * weight

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        normal, scale, weight = ctx.saved_tensors
        grad, wide = (grads[0] * weight).float(), normal.float()
        along = torch.linalg.vecdot(grad, wide).unsqueeze(-1).div_(normal.shape[-1])
        grad_x = torch.addcmul(grad, wide, along, value=-1).mul_(scale)
        return grad_x.to(grads[0].dtype), None, None


def install(model: torch.nn.Module) -> int:
    """Replace the forward of a model's RMSNorm layers; `is_fast` decides on each call whether it is
    used. Returns how many were replaced.

    Only modules whose class is named ...RMSNorm, with a frozen weight, and whose output on random
    states is the same up to rounding.
    """
    changed = 0
    for module in model.modules():
        weight = getattr(module, "weight", None)
        free = part_of(module) is None  # not patched by another library
        if type(module).__name__.endswith("RMSNorm") and weight is not None and free:
            epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
            if epsilon is not None and not weight.requires_grad and _same(module, weight, epsilon):
                put_in(module, _forward(module.forward, epsilon), "norm")
                changed += 1
    return changed


def _same(module: Any, weight: torch.Tensor, epsilon: float) -> bool:
    if weight.is_meta:  # planning: nothing to compare
        return True
    noise = torch.randn(8, len(weight), generator=torch.Generator().manual_seed(0)).to(weight)
    with torch.no_grad():
        expected = module(noise)
        found = FrozenRMSNorm.apply(noise, weight, epsilon)
    return expected.dtype == found.dtype and torch.allclose(expected, found, rtol=1e-2, atol=1e-5)


def _forward(plain: Any, epsilon: float) -> Any:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if not is_fast():
            return plain(x)
        out: torch.Tensor = FrozenRMSNorm.apply(x, self.weight, epsilon)
        return out

    return forward
