"""lora_kit: adapt a language model to your field, prove that it got better, ship it.

The public names are `train`, `load` and `compare`; each is imported when it is first used, so that
`import lora_kit` and `lora-kit --help` stay quick.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import lora_kit.train as _room

__version__ = "0.1.0"
__all__ = ["compare", "load", "train"]


class _CallableRoom(ModuleType):
    """`lora_kit.train` is a folder of this package and the function that runs a run file. Python
    binds the folder to the name as soon as one of its modules is imported; so it is callable."""

    def __call__(self, path: Any, *overrides: str, resume: bool = False) -> dict[str, Any]:
        """See `lora_kit.launch.train`."""
        from lora_kit.launch import train

        return train(path, *overrides, resume=resume)


_room.__class__ = _CallableRoom
train = sys.modules["lora_kit.train"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from lora_kit.adapter.load import load

        return load
    if name == "compare":
        from lora_kit.prove.compare import compare

        return compare
    raise AttributeError(f"module 'lora_kit' has no attribute {name!r}")
