"""lora_kit: adapt a language model to your field, prove that it got better, ship it.

The public names are `train`, `load` and `compare`; each is imported when it is first used, so that
`import lora_kit` and `lora-kit --help` stay quick.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["compare", "load", "train"]

if TYPE_CHECKING:
    from lora_kit.adapter.load import load
    from lora_kit.launch import train
    from lora_kit.prove.compare import compare

_HOMES = {
    "train": "lora_kit.launch",
    "load": "lora_kit.adapter.load",
    "compare": "lora_kit.prove.compare",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lora_kit' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
