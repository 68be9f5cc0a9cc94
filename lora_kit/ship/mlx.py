"""A LoRA adapter in mlx-lm's layout (from tuner/utils.py and tuner/lora.py of 0.31.3 and 0.32.2).

A module of mlx-lm adds scale · x a b, with a (in, r) and b (r, out): PEFT's A and B transposed.
It has one rank and one scale for all modules, so the adapter is made portable first. `keys` names
modules within a layer, or by their whole name; a named module without tensors keeps b = 0.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from lora_kit.adapter.files import Adapter, open_adapter, write_json
from lora_kit.adapter.portable import write_portable
from lora_kit.errors import UserError
from lora_kit.schema import Json

_LAYER = re.compile(r"^model\.layers\.([0-9]+)\.(.+)$")


def write_mlx(adapter: Adapter, base: Json, out: Path) -> None:
    """Write adapters.safetensors and adapter_config.json into an existing empty folder.

    Args:
        base: the base's config.json.

    Raises:
        UserError: the adapter is not portable, or changes one of two tied matrices, or a module
            that dense language models do not have.
    """
    from safetensors.torch import save_file

    check_mlx(adapter, base)
    keys = {_LAYER.sub(r"\2", module) for module in adapter.factors}
    with tempfile.TemporaryDirectory(dir=out) as folder:
        write_portable(adapter, Path(folder))
        portable = open_adapter(folder)
        rank = int(portable.config["r"])
        tensors = {
            f"{module}.lora_{half.lower()}": tensor.read().T.contiguous()
            for module, pair in portable.factors.items()
            for half, tensor in pair.items()
        }
        save_file(tensors, out / "adapters.safetensors")
    config = {
        "fine_tune_type": "lora",
        "num_layers": base["num_hidden_layers"],
        "lora_parameters": {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": sorted(keys)},
    }
    write_json(out / "adapter_config.json", config)


def check_mlx(adapter: Adapter, base: Json) -> None:
    """Raises UserError if the adapter changes one of two tied matrices, or a module that dense
    language models do not have; or the base's config.json names code."""
    outer = [module for module in adapter.factors if not _LAYER.fullmatch(module)]
    known = {"model.embed_tokens", "lm_head"}
    where = f"{adapter.folder}: {', '.join(outer[:3])}"
    merge = "take export --to merged, which mlx-lm loads as it is"
    if base.get("model_file"):
        raise UserError("config.json of the base: model_file is code for mlx-lm to run: refused")
    if set(outer) - known or any(".experts" in module for module in adapter.factors):
        raise UserError(f"{where}: mlx-lm's names for such modules are others: {merge}")
    if outer and base.get("tie_word_embeddings", True):
        raise UserError(f"{where}: tied to the other in this base, and mlx-lm adapts both: {merge}")
