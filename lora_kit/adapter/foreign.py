"""Adapters of other libraries, recognised by names: of files, of tensors, of keys in the config."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from lora_kit.base.tensors import stored
from lora_kit.errors import UserError
from lora_kit.trust import read_json

_EXTRACT = "and make an adapter of the result with lora-kit extract BASE TUNED --out ADAPTER"
_IMAGES = "is for an image model: load it with diffusers"
VALUE_HEAD = "value_head.*"
# A pattern of a name (of a key: `config: KEY`) -> what the adapter is, and what to do.
_SIGNS = {
    r".*\.gguf": "a GGUF adapter of llama.cpp is not read: name the adapter that it was made of",
    r"adapters\.(safetensors|npz)|config: (fine_tune_type|lora_parameters)|.*\.lora_[ab]": (
        f"an adapter of mlx-lm: fuse it with mlx_lm.fuse, {_EXTRACT}"
    ),
    r"pytorch_lora_weights\..*|config: diffusers|(unet|text_encoder\w*|transformer)\..*lora.*": (
        f"an adapter of diffusers {_IMAGES}"
    ),
    r"lora_(unet|te\d?|transformer)_.*|.*\.lora_(down|up)\.weight": (
        f"an adapter of kohya-ss {_IMAGES}"
    ),
    r".*\.(hada|lokr|oft)_\w*(\.weight)?": (
        f"an adapter of LyCORIS (LoHa, LoKr or OFT): merge it there, {_EXTRACT}"
    ),
    r"pytorch_adapter\.bin|config: model_class": (
        f"an adapter of AdapterHub's library: merge it there, {_EXTRACT}"
    ),
    VALUE_HEAD: (
        "a reward model of LLaMA-Factory, whose value head (value_head.*) PEFT does not load: use "
        "it there, or remove that file to use the rest"
    ),
    r".*\.lora_[AB]\.\w+\.weight": (
        "a state_dict of PEFT's model, not what PEFT saves: use model.save_pretrained"
    ),
}


def other_library(path: Path) -> str | None:
    """Which library an adapter is of, and what to do with it; None: no sign of any.

    Args:
        path: its folder, or its file.
    """
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    names = [file.name for file in files]
    for file in files:
        with contextlib.suppress(OSError, ValueError, AttributeError, UserError):
            if file.name == "adapter_config.json":
                config = read_json(file)
                names += [f"config: {key}" for key in config if "peft_type" not in config]
                library = (config.get("auto_mapping") or {}).get("parent_library")
                names.append(f"config: {str(library).partition('.')[0]}")
            elif file.suffix == ".safetensors":
                names += stored(file)
    for pattern, found in _SIGNS.items():
        if any(map(re.compile(pattern).fullmatch, names)):
            return found
    return None
