"""An adapter that every loader takes as it was trained: one rank, a scale of 1, no patterns.

Several loaders read r and lora_alpha alone, and some of them wrongly with rsLoRA or patterns. With
s B in place of B, zeros up to the largest rank and lora_alpha = r there is nothing left to misread:
dW = s B A = (s B | 0) (A ; 0).
"""

from __future__ import annotations

import math
from pathlib import Path

from lora_kit import nano
from lora_kit.adapter.files import WEIGHTS, Adapter, write_config
from lora_kit.adapter.loaders import oddities
from lora_kit.base.tensors import DTYPES, Writer
from lora_kit.errors import UserError
from lora_kit.run import is_hub_id


def write_portable(adapter: Adapter, folder: Path) -> None:
    """Fill an empty folder with adapter_model.safetensors and adapter_config.json.

    The scale is folded into B in float32. Narrow types are kept where that rounds nothing; else all
    are stored in float32, for loaders want one type.

    Raises:
        UserError: the adapter holds what A and B cannot express.
    """
    import torch

    check_portable(adapter)
    rank = max(adapter.rank_and_scale(module)[0] for module in adapter.halves)
    scales = {module: adapter.rank_and_scale(module)[1] for module in adapter.halves}
    kept = all(_exact(pair["B"].dtype, scales[m]) for m, pair in adapter.halves.items())
    found = [
        (tensor, half, scales[module] if half == "B" else 1.0)
        for module, pair in adapter.halves.items()
        for half, tensor in sorted(pair.items())
    ]
    entries = {}
    for tensor, half, _ in found:
        shape = tensor.shape
        padded = (rank, *shape[1:]) if half == "A" else (shape[0], rank, *shape[2:])
        entries[tensor.name] = (tensor.dtype if kept or tensor.dtype == "F64" else "F32", padded)
    with Writer(folder / WEIGHTS, entries) as writer:
        for tensor, _, scale in found:
            dtype, padded = entries[tensor.name]
            value = torch.zeros(padded, dtype=getattr(torch, DTYPES[dtype][0]))
            value[: tensor.shape[0], : tensor.shape[1]] = tensor.read().float() * scale
            writer.put(tensor.name, value)
    # Only what decides the result; no path of this machine.
    base, revision = adapter.base["model"] or "", adapter.base["revision"]
    if not is_hub_id(base):
        base, revision = "nano" if base == str(nano.MODEL) else Path(base).name, None
    more = {"task_type": adapter.config.get("task_type")}
    more["fan_in_fan_out"] = bool(adapter.config.get("fan_in_fan_out"))
    write_config(folder, (base, revision), rank, adapter.targets, **more)


def check_portable(adapter: Adapter) -> None:
    """Raises UserError if the adapter holds more than LoRA's A and B."""
    # What only some loaders miss, and a rank too large for one, is portable all the same.
    found = oddities(adapter.config, adapter.halves, adapter.others)
    names = {one.key for one in found if one.mend in ("merge", "train")} - {"r", "target_modules"}
    if adapter.config.get("ensure_weight_tying"):
        names.add("ensure_weight_tying")
    if not names:
        # Beside the LoRA of embeddings PEFT keeps a copy of them, frozen: that is the base's own.
        names = {name for name in adapter.others if not name.endswith(".base_layer.weight")}
    if names:
        raise UserError(
            f"{adapter.folder}: {', '.join(sorted(names))}: A and B cannot express it: write the "
            f"whole model with lora-kit merge {adapter.folder} --out FOLDER"
        )


def _exact(dtype: str, scale: float) -> bool:
    """Whether values times the scale are still of this type, up to float32's own rounding."""
    power_of_two = dtype == "BF16" and math.frexp(scale)[0] == 0.5  # F16 has few exponents
    return scale == 1 or dtype in ("F32", "F64") or power_of_two
