"""A portable adapter says what the other said, in PEFT, and nothing is left to misread in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_base
from trained import edit

from lora_kit.adapter.files import open_adapter
from lora_kit.adapter.portable import write_portable
from lora_kit.base.tensors import stored
from lora_kit.errors import UserError

IDS = torch.arange(64)[None] * 5
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="session")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("untied"), tie_word_embeddings=False)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits.float()


def loud(base: Path, folder: Path, least: float = 0.2, **config: Any) -> torch.Tensor:
    """Save an adapter that changes a logit of the base by `least`, and more; returns its logits."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    settings = {"r": 4, "lora_alpha": 12, "target_modules": ALL, "task_type": "CAUSAL_LM"}
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    before = logits(plain)
    model: Any = get_peft_model(plain, LoraConfig(**{**settings, **config})).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "_B." in name:
                # The columns differ: their order, and where zeros stand, is seen.
                tensor.normal_(std=0.1)
            elif tensor.requires_grad and "lora_" not in name:
                tensor.add_(torch.randn_like(tensor) * 0.1)
    model.save_pretrained(folder)
    after = logits(model)
    assert (after - before).abs().max() > least
    return after


def in_peft(base: Path, folder: Path) -> torch.Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return logits(PeftModel.from_pretrained(model, str(folder)).eval())


def portable(folder: Path) -> Path:
    out = folder.with_name(folder.name + "-portable")
    out.mkdir()
    write_portable(open_adapter(folder), out)
    return out


@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True},
        {"rank_pattern": {"k_proj": 2, r"layers\.1\..*proj": 6}, "alpha_pattern": {"up_proj": 3}},
        {"alpha_pattern": {"layers.0.mlp.up_proj": 5, "up_proj": 7}, "use_rslora": True},
        {"target_modules": ["embed_tokens", "lm_head", "v_proj"], "rank_pattern": {"lm_head": 2}},
        {"target_modules": r".*\.layers\.1\..*_proj", "use_rslora": True},
        {"layers_to_transform": [1], "lora_alpha": 7},
    ],
    ids=["rslora", "patterns", "both", "embeddings", "expression", "layers"],
)
def test_it_says_the_same_in_peft(untied: Path, tmp_path: Path, config: Any) -> None:
    wanted = loud(untied, tmp_path / "a", **config)
    out = portable(tmp_path / "a")
    assert (in_peft(untied, out) - wanted).abs().max() <= 2e-6 * max(1, wanted.abs().max())
    known = json.loads((out / "adapter_config.json").read_text())
    assert known["r"] == known["lora_alpha"] and isinstance(known["target_modules"], list)
    assert known.keys() == {
        *("peft_type", "task_type", "base_model_name_or_path", "revision", "r", "lora_alpha"),
        *("target_modules", "fan_in_fan_out", "bias", "inference_mode"),
    }
    adapter = open_adapter(out)
    assert not adapter.others
    assert {adapter.rank_and_scale(m) for m in adapter.factors} == {(known["r"], 1.0)}
    # And no path of this machine.
    assert known["base_model_name_or_path"] == untied.name


@pytest.mark.parametrize(
    ("dtype", "alpha", "stays"),
    [
        (torch.bfloat16, 16, True),  # scales of 8 and 4
        (torch.bfloat16, 12, False),
        (torch.float16, 2**20, False),  # B would be infinite
        (torch.float16, 2**-20, False),  # and nothing
    ],
)
def test_narrow_types_stay_where_nothing_is_rounded(
    base: Path, tmp_path: Path, dtype: torch.dtype, alpha: float, stays: bool
) -> None:
    from safetensors.torch import load_file, save_file

    loud(base, tmp_path / "a", -1, rank_pattern={"q_proj": 2}, lora_alpha=alpha)
    weights = tmp_path / "a" / "adapter_model.safetensors"
    save_file({n: t.to(dtype) for n, t in load_file(weights).items()}, weights)
    before, after = load_file(weights), load_file(portable(tmp_path / "a") / weights.name)
    assert before.keys() == after.keys()
    q = next(n for n in after if "q_proj.lora_B" in n)
    assert {t.dtype for t in after.values()} == {dtype if stays else torch.float32}
    assert after[q].shape[1] == 4 and not after[q][:, 2:].any()
    # r is 2 for q, and 4 for the others; every product is one of float32.
    assert torch.equal(after[q][:, :2].float(), before[q].float() * (alpha / 2))
    v = next(n for n in after if "v_proj.lora_B" in n)
    assert torch.equal(after[v].float(), before[v].float() * (alpha / 4))
    assert after[v].isfinite().all() and after[v].any()


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [3, 4]}, "trainable_token_indices"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}, "tying"),
    ],
)
def test_more_than_a_and_b_is_refused_by_name(
    base: Path, tmp_path: Path, config: Any, word: str
) -> None:
    loud(base, tmp_path / "a", **config)
    with pytest.raises(UserError, match=word) as raised:
        portable(tmp_path / "a")
    assert f"lora-kit merge {tmp_path / 'a'}" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_tensor_that_no_key_explains_is_refused(base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    loud(base, tmp_path / "a")
    weights = tmp_path / "a" / "adapter_model.safetensors"
    save_file({**load_file(weights), "base_model.model.score.weight": torch.ones(2)}, weights)
    with pytest.raises(UserError, match=r"score\.weight"):
        portable(tmp_path / "a")


@pytest.mark.parametrize(
    ("name", "revision", "written"),
    [
        ("owner/name", "a" * 40, ("owner/name", "a" * 40)),
        ("some/where/else/base", None, ("base", None)),
        (None, None, ("", None)),
    ],
)
def test_the_base_is_named_without_this_machines_paths(
    base: Path, tmp_path: Path, name: Any, revision: Any, written: Any
) -> None:
    loud(base, tmp_path / "a")
    values = {"base_model_name_or_path": name, "revision": revision}
    edit(tmp_path / "a" / "adapter_config.json", lambda c: c.update(values))
    out = portable(tmp_path / "a")
    known = json.loads((out / "adapter_config.json").read_text())
    assert (known["base_model_name_or_path"], known["revision"]) == written
    assert stored(out / "adapter_model.safetensors")


@pytest.mark.parametrize(("widest", "alpha"), [("float64", 12), ("float32", 4), ("float16", 12)])
def test_mixed_types_become_one(base: Path, tmp_path: Path, widest: str, alpha: int) -> None:
    from safetensors.torch import load_file, save_file

    loud(base, tmp_path / "a", -1, lora_alpha=alpha)
    weights = tmp_path / "a" / "adapter_model.safetensors"
    before = load_file(weights)
    for n, name in enumerate(before):
        before[name] = before[name].to(getattr(torch, widest if n % 3 else "bfloat16"))
    # More than float32 has: it is not lost on the way.
    before = {n: t * (1 + 2**-40) if t.dtype == torch.float64 else t for n, t in before.items()}
    save_file(before, weights)
    after = load_file(portable(tmp_path / "a") / weights.name)
    wanted = torch.float64 if widest == "float64" else torch.float32
    assert {tensor.dtype for tensor in after.values()} == {wanted}
    for name, tensor in before.items():
        scale = alpha / 4 if "_B." in name else 1
        assert torch.equal(after[name], (tensor.double() * scale).to(wanted))
