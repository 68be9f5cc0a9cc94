"""Replace the `forward` of single modules, and restore it; saved models are unaffected."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType

import torch

_without_gradients = False


@contextmanager
def also_without_gradients() -> Iterator[None]:
    """Use the fast paths also without gradients.

    By default they are for training only: evaluation and generation use the standard arithmetic
    that other programs have. A loss with a reference model (DPO) needs the same arithmetic for
    both.
    """
    global _without_gradients
    before, _without_gradients = _without_gradients, True
    try:
        yield
    finally:
        _without_gradients = before


def is_fast() -> bool:
    """Whether the fast paths are in use now."""
    return _without_gradients or torch.is_grad_enabled()


def put_in(module: torch.nn.Module, forward: Callable[..., object], part: str) -> None:
    """Replace a module's forward, tagged with the name of a fast path."""
    forward.part = part  # type: ignore[attr-defined]
    module.forward = MethodType(forward, module)


def part_of(module: torch.nn.Module) -> str | None:
    """The fast path whose forward a module has; "": another library's; None: its class's."""
    forward = vars(module).get("forward")
    return None if forward is None else getattr(forward, "part", "")


def take_out(model: torch.nn.Module, part: str) -> None:
    """Restore the class's forward of all modules with this fast path."""
    for module in model.modules():
        if part_of(module) == part:
            del module.forward
