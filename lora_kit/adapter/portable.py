"""Portable adapters, which every runtime loads correctly: one rank, scale 1, no patterns.

Several loaders read only r and lora_alpha, or handle rsLoRA and patterns incorrectly. So B is
replaced by s B, both factors are padded to the largest rank, and lora_alpha = r:
dW = s B A = (s B | 0) (A ; 0).
"""

from __future__ import annotations

import math
from pathlib import Path

from lora_kit import nano
from lora_kit.adapter.files import Adapter, write_standard
from lora_kit.adapter.loaders import loader_issues
from lora_kit.base.tensors import torch_dtype
from lora_kit.errors import UserError
from lora_kit.run import is_hub_id


def write_portable(adapter: Adapter, folder: Path) -> None:
    """Fill an empty folder with adapter_model.safetensors and adapter_config.json.

    All tensors get one dtype, since loaders expect that: the adapter's, if it has one in which the
    scales fold into B exactly; else float32, or float64 if any tensor has it.

    Raises:
        UserError: the adapter has features that A and B cannot express.
    """
    import torch

    check_portable(adapter)
    settings = {module: adapter.rank_and_scale(module) for module in adapter.factors}
    kinds = {stored.dtype for pair in adapter.factors.values() for stored in pair.values()}
    kept = all(_exact(pair["B"].dtype, settings[m][1]) for m, pair in adapter.factors.items())
    dtype = torch.float64 if "F64" in kinds else torch.float32
    if kept and len(kinds) == 1:
        dtype = torch_dtype(kinds.pop())
    factors = {}
    for module, pair in adapter.factors.items():
        for letter, stored in pair.items():
            scale = settings[module][1] if letter == "B" else 1.0
            factors[stored.name] = (stored.read().double() * scale).to(dtype)
    rank = max(rank for rank, _ in settings.values())
    # Without local paths.
    base, revision = adapter.base["model"] or "", adapter.base["revision"]
    if not is_hub_id(base):
        base, revision = "nano" if base == str(nano.MODEL) else Path(base).name, None
    write_standard(
        folder,
        factors,
        (base, revision),
        rank,
        adapter.targets,
        task_type=adapter.config.get("task_type"),
        fan_in_fan_out=bool(adapter.config.get("fan_in_fan_out")),
    )


def check_portable(adapter: Adapter) -> None:
    """Raises UserError if the adapter has more than LoRA's A and B."""
    # Unsupported target modules and large ranks do not prevent a portable adapter.
    found = loader_issues(adapter.config, adapter.factors, adapter.others)
    names = {one.key for one in found if one.fix in ("merge", "train")} - {"r", "target_modules"}
    if adapter.config.get("ensure_weight_tying"):
        names.add("ensure_weight_tying")
    if not names:
        # With LoRA on embeddings PEFT saves a frozen copy of the base's embeddings.
        names = {name for name in adapter.others if not name.endswith(".base_layer.weight")}
    if names:
        raise UserError(
            f"{adapter.folder}: {', '.join(sorted(names))}: not expressible as A and B: write the "
            f"merged model with lora-kit merge {adapter.folder} --out FOLDER"
        )


def _exact(dtype: str, scale: float) -> bool:
    """Whether storing B times the scale in this dtype loses no more than float32 would."""
    power_of_two = dtype == "BF16" and math.frexp(scale)[0] == 0.5  # F16 has few exponents
    return scale == 1 or dtype in ("F32", "F64") or power_of_two
