"""Another `forward` for single modules, and back: what is saved of a model stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch

_without_gradients = False


@contextmanager
def also_without_gradients() -> Iterator[None]:
    """Take the quick paths also where no gradients are recorded.

    Otherwise they are for training only: evaluation and generation use the arithmetic with which
    others load the adapter. A loss against a reference (DPO) needs both computed alike.
    """
    global _without_gradients
    before, _without_gradients = _without_gradients, True
    try:
        yield
    finally:
        _without_gradients = before


def is_quick() -> bool:
    """Whether the quick paths are taken now."""
    return _without_gradients or torch.is_grad_enabled()


def put_in(module: Any, forward: Callable[..., Any], part: str) -> None:
    """Give a module another forward, known as that of a part."""
    forward.part = part  # type: ignore[attr-defined]
    module.forward = MethodType(forward, module)


def part_of(module: Any) -> str | None:
    """The part whose forward a module has; "" of another library's, None of its own class's."""
    forward = vars(module).get("forward")
    return None if forward is None else getattr(forward, "part", "")


def take_out(model: Any, part: str) -> None:
    """Give the modules of a part their class's own forward back."""
    for module in model.modules():
        if part_of(module) == part:
            del module.forward
