"""The model before its first training step: the reference of preference training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lora_kit.adapter import files
from lora_kit.errors import UserError
from lora_kit.schema import Adapter

if TYPE_CHECKING:
    from peft import PeftModel


@contextmanager
def as_at_start(model: PeftModel, adapter: Adapter) -> Iterator[None]:
    """Inside, a PEFT model is as before its first step: the base, or the base with the adapter of
    `adapter.start`.

    Args:
        model: with the adapter that `adapter` describes, trained or not; the adapter may be
            disabled.

    Raises:
        UserError: the start adapter is missing or corrupt.
    """
    if adapter.start is None:
        with model.disable_adapter():
            yield
        return
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    disabled = any(layer.disable_adapters for layer in layers)
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    kept = {name: tensor.detach().clone() for name, tensor in own.items()}
    try:
        started = files.open_adapter(adapter.start).tensors()
    except UserError as error:
        raise UserError(f"adapter.start: {error}") from None
    try:
        set_peft_model_state_dict(model, started)
        model.enable_adapter_layers()
        yield
    finally:
        set_peft_model_state_dict(model, kept)
        if disabled:
            model.disable_adapter_layers()
