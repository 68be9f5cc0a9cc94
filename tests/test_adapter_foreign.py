"""Adapters of other libraries are named, in one line, with what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lora_kit import nano
from lora_kit.adapter.files import WEIGHTS, open_adapter
from lora_kit.errors import UserError

PEFTS = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
Q = "model.layers.0.self_attn.q_proj"
UNET = "down_blocks.0.attentions.0.to_q"
# {case: (file of tensors, their names, adapter_config.json, library)}
CASES: dict[str, tuple[str, list[str], dict[str, Any] | None, str]] = {
    "mlx": ("adapters.safetensors", [f"{Q}.lora_a"], {"fine_tune_type": "lora"}, "mlx-lm"),
    "mlx renamed": (WEIGHTS, [f"{Q}.lora_a", f"{Q}.lora_b"], PEFTS, "mlx-lm"),
    "mlx config": (WEIGHTS, [f"{Q}.lora_a"], {"lora_parameters": {"rank": 8}}, "mlx-lm"),
    "diffusers": ("pytorch_lora_weights.safetensors", [f"unet.{UNET}.lora_A.weight"], None, "diff"),
    "diffusers mapped": (
        WEIGHTS,
        [f"base_model.model.{UNET}.lora_A.weight"],
        {**PEFTS, "auto_mapping": {"parent_library": "diffusers.models.unets"}},
        "diffusers",
    ),
    "kohya": ("last.safetensors", ["lora_unet_down_blocks_0_to_q.lora_down.weight"], None, "kohya"),
    "kohya renamed": (WEIGHTS, ["lora_te1_text_model_q.lora_up.weight"], PEFTS, "kohya"),
    "lycoris": (WEIGHTS, ["lora_x.hada_w1_a", "lora_x.hada_w1_b"], PEFTS, "LyCORIS"),
    "lokr": ("lokr.safetensors", [f"lycoris_{Q}.lokr_w1"], None, "LyCORIS"),
    "state_dict": (WEIGHTS, [f"base_model.model.{Q}.lora_A.default.weight"], PEFTS, "state_dict"),
    "adapterhub": ("x.safetensors", ["a"], {"model_class": "X", "config": {}}, "AdapterHub"),
    "reward": (WEIGHTS, [f"base_model.model.{Q}.lora_{x}.weight" for x in "AB"], PEFTS, "value"),
    "gguf": ("my-lora.gguf", [], None, "GGUF"),
    "gguf beside": ("my-lora.gguf", [], PEFTS, "GGUF"),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_named(tmp_path: Path, case: str) -> None:
    file, names, config, library = CASES[case]
    if names:
        save_file({name: torch.ones(2, 2) for name in names}, tmp_path / file)
    else:
        (tmp_path / file).write_bytes(b"GGUF\3\0\0\0" + b"\0" * 40)
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    if case == "reward":
        save_file({"v_head.summary.weight": torch.ones(1)}, tmp_path / "value_head.safetensors")
    with pytest.raises(UserError) as raised:
        open_adapter(tmp_path)
    message = str(raised.value)
    assert library in message and "\n" not in message and str(tmp_path) in message


def test_a_file_is_named_as_well_and_what_is_none_is_not(tmp_path: Path) -> None:
    (tmp_path / "my.gguf").write_bytes(b"GGUF\3\0\0\0")
    with pytest.raises(UserError, match="GGUF adapter"):
        open_adapter(tmp_path / "my.gguf")
    for folder in (nano.MODEL, tmp_path / "none"):
        with pytest.raises(UserError, match="neither a run directory nor an adapter folder"):
            open_adapter(folder)
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "adapter_config.json").write_text('{"peft_type": "LOKR"}')
    with pytest.raises(UserError, match="peft_type is 'LOKR': only LoRA"):
        open_adapter(tmp_path / "none")
