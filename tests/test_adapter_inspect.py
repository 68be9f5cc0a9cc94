"""What an adapter's two files tell: the same figures as the whole matrices, and PEFT's, give."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from trained import edit

from lora_kit.adapter.files import Update, open_adapter
from lora_kit.adapter.finished import FinishedRun
from lora_kit.adapter.inspect import compare_updates, difference, inspect
from lora_kit.errors import UserError

Maker = Callable[..., tuple[Any, Path]]
WEIGHTS = "adapter_model.safetensors"
ALL = ["q_proj", "k_proj", "up_proj", "down_proj"]


@pytest.fixture
def made(base: Path, tmp_path: Path) -> Maker:
    """A PEFT model whose adapter is random in A and B, and the folder PEFT saved it in."""

    def make(name: str = "a", seed: int = 0, **config: Any) -> tuple[Any, Path]:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        settings = {"r": 4, "lora_alpha": 12, "target_modules": ALL, "task_type": "CAUSAL_LM"}
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        torch.manual_seed(seed)
        model = get_peft_model(model, LoraConfig(**{**settings, **config}))
        with torch.no_grad():
            for tensor in (p for n, p in model.named_parameters() if "lora_" in n):
                tensor.normal_()
        model.save_pretrained(tmp_path / name)
        return model, tmp_path / name

    return make


def deltas(model: Any) -> dict[str, np.ndarray]:
    """{module: dW as PEFT adds it to the base}"""
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach().numpy()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight") and len(module.scaling)
    }


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def near(value: float) -> Any:
    return pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"k_proj": 2, r"layers\.1\..*proj": 6}, "alpha_pattern": {"up_proj": 3}},
        {"alpha_pattern": {"layers.0.mlp.up_proj": 5, "up_proj": 7}, "use_rslora": True},
        {"target_modules": ["embed_tokens", "lm_head", "v_proj"]},
        {"target_modules": "all-linear", "lora_bias": True},
    ],
)
def test_figures_are_those_of_the_matrix_that_peft_adds(made: Maker, config: Any) -> None:
    model, folder = made(**config)
    whole = deltas(model)
    found = open_adapter(folder).figures()
    assert {one["module"] for one in found} == whole.keys() and len(found) >= 4
    for one in found:
        values = np.linalg.svd(whole[one["module"]].astype(float), compute_uv=False)[: one["r"]]
        shares = values / values.sum()
        assert one["norm"] == near(float(np.linalg.norm(whole[one["module"]])))
        assert one["effective_rank"] == near(math.exp(-(shares * np.log(shares)).sum()))
        layer = model.get_submodule(f"base_model.model.{one['module']}")
        assert (one["r"], one["scale"]) == (layer.r["default"], layer.scaling["default"])


@pytest.mark.parametrize("rank", [4, 2])
def test_experts_in_one_parameter_are_matrices_of_their_own(tmp_path: Path, rank: int) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    small = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 50, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "moe_intermediate_size": 16}
    model: Any = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**small, **heads, num_experts=3, num_experts_per_tok=1)
    )
    # PEFT matches the patterns with the parameter's name, which is not in the names of its tensors.
    patterns: Any = {"rank_pattern": {"gate_up_proj": 2}, "alpha_pattern": {"gate_up_proj": 5}}
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(
        r=4,
        target_modules=["q_proj"],
        target_parameters=parameters[: 1 if rank == 4 else 2],
        **(patterns if rank == 2 else {}),
    )
    model = get_peft_model(model, config)
    for name, tensor in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(tensor)
    model.save_pretrained(tmp_path)
    found = {one["module"]: one for one in open_adapter(tmp_path).figures()}
    whole = deltas(model)
    assert found.keys() == whole.keys()
    experts = max((name for name in found if "experts" in name), key=len)
    spectra = [np.linalg.svd(matrix, compute_uv=False)[:rank] for matrix in whole[experts]]
    assert len(spectra) == 3 and found[experts]["r"] == rank
    assert found[experts]["norm"] == near(float(np.linalg.norm(whole[experts])))
    ranks = [np.exp(-(p * np.log(p)).sum()) for p in (s / s.sum() for s in spectra)]
    assert found[experts]["effective_rank"] == near(float(np.mean(ranks)))


@pytest.mark.parametrize(
    ("rotation", "cosine", "apart"), [(0.0, 1.0, 0.0), (90.0, 0.0, 2**0.5), (180.0, -1.0, 2.0)]
)
def test_a_known_rotation(rotation: float, cosine: float, apart: float) -> None:
    """B turned in a plane: dW of rank one, and the angle is the rotation."""
    a, turn = torch.ones(1, 1, 3).double(), math.radians(rotation)
    b, turned = torch.zeros(2, 1, 5, 1).double()
    b[0, 0] = 1
    turned[0, :2, 0] = torch.tensor([math.cos(turn), math.sin(turn)])
    found = compare_updates(Update("x", 2.0, a, b), Update("x", 1.0, 2 * a, turned))
    assert found["cosine"] == pytest.approx(cosine, abs=1e-12)
    assert found["relative"] == pytest.approx(apart, abs=1e-12)


def test_the_difference_of_two_is_that_of_their_matrices(made: Maker) -> None:
    (one, first), (two, second) = made("a", 0), made("b", 1, r=6, use_rslora=True)
    ours, theirs = deltas(one), deltas(two)
    found = difference(FinishedRun(first), FinishedRun(second))
    assert found["same_base"] and not found["same"]
    for module in found["modules"]:
        a, b = (whole[module["module"]].astype(float) for whole in (ours, theirs))
        assert module["difference"] == near(float(np.linalg.norm(a - b)))
        wanted = (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
        assert module["cosine"] == pytest.approx(wanted, abs=1e-6)
    a, b = (np.concatenate([w.ravel() for w in whole.values()]) for whole in (ours, theirs))
    assert found["whole"]["difference"] == near(float(np.linalg.norm(a - b)))


def test_an_adapter_is_the_same_as_itself_and_not_as_a_changed_one(made: Maker) -> None:
    _, first = made()
    found = difference(FinishedRun(first), FinishedRun(first))
    assert found["same"] and found["whole"]["difference"] == 0
    assert all(module["cosine"] == pytest.approx(1) for module in found["modules"])
    second = shutil.copytree(first, first.parent / "b")
    edit(second / "adapter_config.json", lambda c: c.update(lora_alpha=24))
    found = difference(FinishedRun(first), FinishedRun(second))
    assert not found["same"] and found["whole"]["relative"] == pytest.approx(0.5)
    edit(second / "adapter_config.json", lambda c: c.update(base_model_name_or_path="other/base"))
    rewrite(second, lambda t: [t.pop(n) for n in list(t) if "layers.1" in n])
    found = difference(FinishedRun(first), FinishedRun(second))
    assert not found["same_base"] and found["bases"][1]["model"] == "other/base"
    assert len(found["only_first"]) == 4 and not found["only_second"]


def test_bfloat16_zeros_and_values_that_are_not_finite(made: Maker) -> None:
    _, folder = made()
    exact = {one["module"]: one["norm"] for one in open_adapter(folder).figures()}
    rewrite(folder, lambda t: t.update({n: v.bfloat16() for n, v in t.items()}))
    for one in open_adapter(folder).figures():
        assert one["norm"] == pytest.approx(exact[one["module"]], rel=1e-2)
    q, k = (f"base_model.model.model.layers.0.self_attn.{n}_proj.lora_B.weight" for n in "qk")

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[q].zero_()
        tensors[k][0, 0] = math.nan

    rewrite(folder, spoil)
    found = {one["module"].rpartition(".")[2]: one for one in open_adapter(folder).figures()[:4]}
    assert found["q_proj"]["norm"] == found["q_proj"]["effective_rank"] == 0
    assert found["k_proj"]["norm"] is found["k_proj"]["effective_rank"] is None
    odd = {line["what"] for line in inspect(FinishedRun(folder))["loaders"]}
    assert {"NaN or infinite values", "a zero update"} <= odd
    with pytest.raises(UserError, match="NaN or infinite"):
        difference(FinishedRun(folder), FinishedRun(folder))
