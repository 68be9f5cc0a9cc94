"""An adapter that was trained on a quantized base has two bases to be merged into: the dequantized
weights, on which it was trained and evaluated, and the original ones. Which is better is measured.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lora_kit.adapter.finished import FinishedRun
from lora_kit.adapter.names import CONV1D, tensor_of
from lora_kit.base.tensors import Stored, stored_in
from lora_kit.prove.scores import better
from lora_kit.run import read_json
from lora_kit.schema import Json
from lora_kit.speed.patch import put_in, take_out

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

Weights = Literal["base", "dequantized"]  # the original ones, or the dequantized ones


@contextmanager
def original_weights(model: PeftModel) -> Iterator[PeftModel]:
    """Within the block, the quantized layers of a model use the base's original weights.

    Each is read when its layer is called, and dropped again: there is no second model in memory.

    Raises:
        UserError: the base's files have no such weight.
    """
    base: Any = model.get_base_model()
    tensors = stored_in(Path(base.config._name_or_path))  # the folder that it was loaded from
    turned = base.config.model_type in CONV1D
    try:
        for name, module in base.named_modules():
            # PEFT's layers have the same names as those of bitsandbytes inside them.
            if hasattr(module, "weight") and type(module).__module__.startswith("bitsandbytes"):
                source = tensors[tensor_of(name.removesuffix(".base_layer"), tensors)]
                put_in(module, _product_with(source, turned), "original")
        yield model
    finally:
        take_out(base, "original")


def _product_with(source: Stored, turned: bool) -> Callable[..., torch.Tensor]:
    """The forward of a linear layer with a stored weight; `turned`: it is (in, out)."""
    import torch

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        weight = source.read().to(x.device, x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return torch.nn.functional.linear(x, weight.T if turned else weight, bias)

    return forward


def choose(run: FinishedRun, into: Literal["auto", "base", "dequantized"]) -> tuple[Weights, str]:
    """The weights to merge into, and a note for the user, which may be empty.

    Args:
        into: `auto`: those on which the run's report has the better score; else these.
    """
    quantize, measured = run.base.quantize, measured_of(run)
    chosen: Weights = "base" if into == "auto" else into
    if quantize == "none":
        return chosen, ""
    if measured is None:
        why = f"trained on {quantize}, and its report has no scores of both bases"
        how = "; lora-kit check --fidelity measures both" if quantize == "nf4" else ""
        return chosen, "" if into != "auto" else f"{why}: merged into the original one{how}"
    if into == "auto" and quantize == "nf4":  # int8 weights are not merged into
        chosen = better_base(measured)
    name = "original" if chosen == "base" else "dequantized"
    return chosen, f"{in_words(measured)}: merged into the {name} one"


def cost_of_original(run: FinishedRun) -> str | None:
    """What an adapter loses on the original base, which inference engines load it onto; None:
    nothing, or it was not measured."""
    measured = measured_of(run)
    if measured is None or better_base(measured) == "base":
        return None
    merge = f"lora-kit merge {shlex.quote(run.path)} --into dequantized --out merged"
    return f"{in_words(measured)}, which it is loaded onto: merge it with {merge}"


def measured_of(run: FinishedRun) -> Json | None:
    """`into` of the run's report, if both bases were measured."""
    found = read_json(run.home / "report.json").get("into")
    whole = isinstance(found, dict) and found.get("base") and found.get("dequantized")
    return found if whole else None


def better_base(into: Json) -> Weights:
    """The base with the better score, by the loss if there is one."""
    name, base, dequantized = _deciding(into)
    lower = better(name, {}) == "lower"
    return "dequantized" if (dequantized < base if lower else dequantized > base) else "base"


def in_words(into: Json) -> str:
    """`into` of report.json in words."""
    name, base, dequantized = _deciding(into)
    return f"{name} {dequantized:.4f} on the quantized base, {base:.4f} on the original one"


def _deciding(into: Json) -> tuple[str, float, float]:
    """A score's name, its value on the original base, and on the dequantized one."""
    name = "loss" if "loss" in into["base"] else next(iter(into["base"]))
    return name, into["base"][name], into["dequantized"][name]
