"""A merge needs weights and a config; a tokenizer is copied where there is one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_base
from typer.testing import CliRunner

from lora_kit.cli import app


def without_tokenizer(folder: Path) -> None:
    kept = {"config.json", "generation_config.json", "model.safetensors"}
    for file in folder.iterdir():
        if file.name not in kept:
            file.unlink()


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Path]:
    """A base without tokenizer files, and an adapter as PEFT alone saves it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base, adapter = make_base(tmp_path / "base"), tmp_path / "adapter"
    without_tokenizer(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"])
    peft = get_peft_model(model, config)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    peft.save_pretrained(str(adapter))
    return base, adapter


@pytest.mark.parametrize("verify", ["tensors", "logits"])
def test_base_and_adapter_without_a_tokenizer_are_merged(
    made: tuple[Path, Path], tmp_path: Path, verify: str
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, adapter = made
    stored = json.loads((base / "generation_config.json").read_text())
    out = tmp_path / "merged"
    command = ["merge", str(adapter), "--out", str(out), "--verify", verify, "--dtype", "float32"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert sorted(file.name for file in out.iterdir()) == [
        "config.json",
        "generation_config.json",
        "merge.json",
        "model.safetensors",
    ]
    # Where generation ends is what the base has it.
    generation = json.loads((out / "generation_config.json").read_text())
    assert {key: generation[key] for key in ("eos_token_id", "pad_token_id")} == {
        key: stored[key] for key in ("eos_token_id", "pad_token_id")
    }
    ids = torch.arange(5, 60)[None]
    plain: Any = AutoModelForCausalLM.from_pretrained(base)
    peft = PeftModel.from_pretrained(plain, str(adapter)).eval()
    merged: Any = AutoModelForCausalLM.from_pretrained(out).eval()
    with torch.inference_mode():
        wanted, got = peft(input_ids=ids).logits, merged(input_ids=ids).logits
        with peft.disable_adapter():
            assert (peft(input_ids=ids).logits - wanted).abs().max() > 0.01
    assert (got - wanted).abs().max() <= 1e-5
