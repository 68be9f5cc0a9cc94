"""What PEFT saves, merged from the files, is what PEFT itself makes of it: tensor by tensor."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tokenizer
from safetensors.torch import load_file

from lora_kit.adapter.files import open_adapter
from lora_kit.adapter.finished import FinishedRun
from lora_kit.base.tensors import stored_in
from lora_kit.errors import UserError
from lora_kit.ship.merge import Merged, merge

pytestmark = pytest.mark.slow

SIZES: dict[str, Any] = {
    "vocab_size": 416,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MOE = {"num_experts": 3, "num_local_experts": 3, "num_experts_per_tok": 2}
GPT2 = {"vocab_size": 416, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
ENDS = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1}


def causal(kind: str, **changes: Any) -> Any:
    """A random model of a family; its norms and biases are not all the same."""
    import transformers

    sizes = GPT2 if kind == "GPT2" else SIZES
    name = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **ENDS, **changes})
    model = getattr(transformers, name)(config).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.1)
        parameter.data += 1.0 * ("norm" in name or "ln_" in name)
    return model


def adapted(model: Any, folder: Path, dtype: str = "float32", **settings: Any) -> Any:
    """The PEFT model of a base in `folder`/base; its adapter, loud, is in `folder`/adapter."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    rows = settings.pop("rows", None)
    base = folder / "base"
    model.to(getattr(torch, dtype)).save_pretrained(
        base, max_shard_size=settings.pop("shard", "1GB")
    )
    make_tokenizer(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    if rows:
        model.resize_token_embeddings(rows)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **settings})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = get_peft_model(model, config).eval()
        for name, parameter in peft.named_parameters():
            if "magnitude" in name:
                parameter.data *= 1 + 0.3 * torch.rand_like(parameter)
            elif parameter.requires_grad:
                parameter.data += 0.2 * torch.randn_like(parameter)
        peft.save_pretrained(str(folder / "adapter"))
    return peft


def logits(model: Any) -> Any:
    with torch.inference_mode():
        return model(input_ids=torch.arange(40, 80)[None]).logits.float()


def check(peft: Any, folder: Path, dtype: str = "float32") -> Merged:
    """Merge; the model that transformers loads says what PEFT's says, and the adapter matters."""
    from transformers import AutoModelForCausalLM

    merged = merge(FinishedRun(folder / "adapter"), folder / "merged", dtype)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        merged.out, dtype=getattr(torch, dtype), output_loading_info=True
    )
    again, info = loaded
    assert not info["missing_keys"] and not info["unexpected_keys"]
    wanted = logits(peft)
    with peft.disable_adapter():
        effect = (logits(peft) - wanted).abs().max()
    assert effect > 0.1
    if dtype == "float32":
        assert (logits(again.eval()) - wanted).abs().max() <= 1e-4 * max(1.0, effect)
    return merged


def saved(peft: Any, folder: Path) -> dict[str, Any]:
    """PEFT's own merge, as transformers writes it."""
    peft.merge_and_unload().save_pretrained(folder / "theirs")
    return load_file(folder / "theirs" / "model.safetensors")


LINEAR = {"target_modules": "all-linear"}
PATTERNS = {"rank_pattern": {"q_proj": 2, "layers.1.mlp.*": 8}, "alpha_pattern": {"v_proj": 32}}
EXPERTS: dict[str, Any] = {
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
}
UNTIED = {"tie_word_embeddings": False}
BIASED = {"attention_bias": True, "mlp_bias": True, **UNTIED}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "plain": ("Llama", UNTIED, LINEAR),
    "rslora-patterns": ("Qwen2", UNTIED, {**LINEAR, **PATTERNS, "use_rslora": True}),
    "dora-ends": (
        "Llama",
        UNTIED,
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "use_dora": True},
    ),
    "whole-modules": (
        "Qwen3",
        {**UNTIED, "head_dim": 16},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head", "norm"]},
    ),
    "tokens": (
        "Llama",
        UNTIED,
        {"target_modules": ["q_proj"], "trainable_token_indices": [41, 399, 50]},
    ),
    "resized": ("Llama", UNTIED, {**LINEAR, "rows": 424}),
    "biases": ("Llama", BIASED, {**LINEAR, "bias": "all"}),
    "lora-bias": ("Llama", BIASED, {**LINEAR, "lora_bias": True}),
    "gpt2": ("GPT2", {}, {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "gpt2-dora": ("GPT2", {}, {"target_modules": ["c_attn", "attn.c_proj"], "use_dora": True}),
    "mixtral": ("Mixtral", {**MOE, **UNTIED}, {**EXPERTS, "target_modules": ["q_proj"]}),
    "mixtral-router": (
        "Mixtral",
        MOE,
        {"target_modules": [], "target_parameters": ["gate.weight"]},
    ),
    "qwen2-moe": (
        "Qwen2Moe",
        {**MOE, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
        {"target_modules": ["up_proj"], "target_parameters": ["mlp.experts.down_proj"]},
    ),
    "qwen3-moe": (
        "Qwen3Moe",
        {**MOE, "moe_intermediate_size": 32, "head_dim": 16},
        {**EXPERTS, "target_modules": [], "rank_pattern": {"experts.gate_up_proj": 8}},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_is_what_peft_makes_of_it(tmp_path: Path, name: str) -> None:
    kind, shape, settings = CASES[name]
    peft = adapted(causal(kind, **shape), tmp_path, **settings)
    merged = check(peft, tmp_path)
    theirs, before = saved(peft, tmp_path), load_file(tmp_path / "base" / "model.safetensors")
    ours = load_file(merged.out / "model.safetensors")
    assert ours.keys() == theirs.keys()
    changed = 0
    for tensor, wanted in theirs.items():
        torch.testing.assert_close(ours[tensor], wanted, rtol=1e-6, atol=1e-6)
        same = wanted.shape == before[tensor].shape and bool((ours[tensor] == before[tensor]).all())
        changed += not same
    assert 0 < changed <= merged.changed and merged.changed + merged.copied == len(ours)


@pytest.mark.parametrize("name", ["dora-ends", "tokens", "gpt2-dora", "lora-bias", "qwen3-moe"])
def test_large_matrices_are_merged_in_blocks_of_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    kind, shape, settings = CASES[name]
    adapted(causal(kind, **shape), tmp_path, **settings)
    whole = load_file(
        merge(FinishedRun(tmp_path / "adapter"), tmp_path / "whole").out / "model.safetensors"
    )
    # Blocks of 64 rows, pieces that end within a row, and a buffer that fills in between.
    monkeypatch.setattr("lora_kit.base.tensors.PIECE", 4096)
    merged = merge(FinishedRun(tmp_path / "adapter"), tmp_path / "merged")
    parts = load_file(merged.out / "model.safetensors")
    for tensor, wanted in whole.items():
        torch.testing.assert_close(parts[tensor], wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"target_modules": ["embed_tokens", "q_proj"]}, True),
        ({"target_modules": ["lm_head", "q_proj"]}, True),
        ({"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}, True),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, True),
        (
            {
                "target_modules": ["q_proj"],
                "modules_to_save": ["embed_tokens"],
                "ensure_weight_tying": True,
            },
            False,
        ),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [41, 399, 50]}, False),
        ({"target_modules": ["q_proj"], "rows": 424}, False),
        ({"target_modules": ["q_proj"], "rows": 424, "trainable_token_indices": [44]}, False),
        ({"target_modules": ["embed_tokens", "q_proj"], "rows": 424}, True),
    ],
    ids=[
        "embeddings",
        "head",
        "both",
        "whole",
        "both-whole",
        "tokens",
        "more",
        "added",
        "both-ways",
    ],
)
def test_tied_matrices_part_where_one_changes(
    tmp_path: Path, settings: dict[str, Any], parts: bool
) -> None:
    peft = adapted(causal("Llama", tie_word_embeddings=True), tmp_path, **settings)
    merged = check(peft, tmp_path)
    config = json.loads((merged.out / "config.json").read_text())
    assert config["tie_word_embeddings"] is not parts
    assert ("lm_head.weight" in stored_in(merged.out)) is parts
    assert config["vocab_size"] == settings.get("rows", 416)


def test_a_base_with_other_experts_is_refused(tmp_path: Path) -> None:
    shape = {**MOE, "moe_intermediate_size": 32, "head_dim": 16}
    adapted(causal("Qwen3Moe", **shape), tmp_path, target_modules=[], **EXPERTS)
    for experts in (2, 4):
        more = {"num_experts": experts, "num_local_experts": experts}
        causal("Qwen3Moe", **{**shape, **more}).save_pretrained(tmp_path / "base")
        with pytest.raises(UserError, match=r"another number of experts|no such weight"):
            merge(FinishedRun(tmp_path / "adapter"), tmp_path / "merged")


def test_gpt2_as_it_lies_on_the_hub_has_no_prefix(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    peft = adapted(causal("GPT2"), tmp_path, target_modules=["c_attn", "wte"])
    file = tmp_path / "base" / "model.safetensors"
    plain = {name.removeprefix("transformer."): t for name, t in load_file(file).items()}
    save_file(plain, file, {"format": "pt"})
    merged = check(peft, tmp_path)
    assert merged.changed == 4  # two layers, the embeddings, and the head that parts from them
    assert plain.keys() <= stored_in(merged.out).keys()


def test_in_bfloat16_it_is_rounded_once(tmp_path: Path) -> None:
    peft = adapted(causal("Llama", **UNTIED), tmp_path, "bfloat16", **LINEAR)
    exact = {
        f"{name}.weight": module.base_layer.weight.float() + module.get_delta_weight("default")
        for name, module in peft.get_base_model().named_modules()
        if hasattr(module, "lora_A")
    }
    merged = check(peft, tmp_path, "bfloat16")
    ours, theirs = load_file(merged.out / "model.safetensors"), saved(peft, tmp_path)
    assert len(exact) == 14
    for name, weight in exact.items():
        # Sums in another order may cross the middle between two bfloat16: one in thousands.
        assert (ours[name] != weight.bfloat16()).float().mean() < 1e-3
        worse = (theirs[name].float() - weight).norm()
        assert (ours[name].float() - weight).norm() <= worse


def test_shards_keep_their_names_and_sharp_tensors_their_type(tmp_path: Path) -> None:
    model = causal("Llama", **UNTIED)
    peft = adapted(model, tmp_path, "bfloat16", shard="100KB", **LINEAR)
    base = tmp_path / "base"
    shards = sorted(file.name for file in base.glob("*.safetensors"))
    assert len(shards) > 2
    from safetensors.torch import save_file

    one = next(
        f for f in sorted(base.glob("*.safetensors")) if any("norm" in n for n in load_file(f))
    )
    norms = {n: t.float() if "norm" in n else t for n, t in load_file(one).items()}
    save_file(norms, one, {"format": "pt"})
    merged = check(peft, tmp_path, "bfloat16")
    assert sorted(file.name for file in merged.out.glob("*.safetensors")) == shards
    index = json.loads((merged.out / "model.safetensors.index.json").read_text())
    found = stored_in(merged.out)
    assert index["weight_map"] == {name: tensor.file.name for name, tensor in found.items()}
    assert index["metadata"]["total_size"] == sum(tensor.size for tensor in found.values())
    kept = [name for name, tensor in found.items() if tensor.dtype == "F32"]
    assert kept == [name for name in norms if "norm" in name] != []


KINDS = {"F16": torch.float16, "F32": torch.float32, "BF16": torch.bfloat16, "F64": torch.float64}


@pytest.mark.parametrize("main", ["F16", "F32", "BF16", "F64", "mixed"])
def test_every_tensor_keeps_the_type_of_the_base(tmp_path: Path, main: str) -> None:
    """Those that the adapter changes, copies and replaces: the arithmetic is at least float32."""
    from safetensors.torch import save_file

    adapted(causal("Llama", **UNTIED), tmp_path, **LINEAR, modules_to_save=["lm_head"])
    file, adapter = tmp_path / "base" / "model.safetensors", open_adapter(tmp_path / "adapter")
    tensors = load_file(file)
    for n, name in enumerate(tensors):
        kind = list(KINDS)[n % 4] if main == "mixed" else main
        if main == "F16" and "norm" in name:  # as some bases keep their norms
            kind = "F32"
        tensors[name] = tensors[name].to(KINDS[kind])
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    merged = merge(FinishedRun(tmp_path / "adapter"), tmp_path / "merged")
    made = load_file(merged.out / "model.safetensors")
    assert {n: t.dtype for n, t in made.items()} == {n: t.dtype for n, t in tensors.items()}
    assert json.loads((merged.out / "config.json").read_text())["dtype"] == config["dtype"]
    record = json.loads((merged.out / "merge.json").read_text())
    assert main == "mixed" or KINDS[main] == getattr(torch, record["dtype"])
    changed = 0
    for module in adapter.factors:
        name, update = f"{module}.weight", adapter.update(module)
        whole = tensors[name].double() + update.scale * (update.b[0] @ update.a[0])
        eps = max(torch.finfo(made[name].dtype).eps, torch.finfo(torch.float32).eps)
        if made[name].dtype == torch.float64:
            eps = 1e-12
        assert (made[name].double() - whole).abs().max() <= eps * whole.abs().max()
        changed += 1
    assert changed == 14
    # Another type can be asked for.
    merge(FinishedRun(tmp_path / "adapter"), tmp_path / "half", "float16", verify="logits")
    half = load_file(tmp_path / "half" / "model.safetensors")
    kept = {n for n, t in tensors.items() if t.dtype == torch.float32} if main == "F16" else set()
    assert all(t.dtype == (torch.float32 if n in kept else torch.float16) for n, t in half.items())
    with pytest.raises(UserError, match="float64"):
        merge(FinishedRun(tmp_path / "adapter"), tmp_path / "no", "float64")


@pytest.mark.parametrize("main", ["F16", "BF16", "F32"])
def test_logits_are_compared_in_every_type(tmp_path: Path, main: str) -> None:
    from safetensors.torch import save_file

    adapted(causal("Llama", **UNTIED), tmp_path, **LINEAR)
    file = tmp_path / "base" / "model.safetensors"
    tensors = {name: tensor.to(KINDS[main]) for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    found = merge(FinishedRun(tmp_path / "adapter"), tmp_path / "merged", verify="logits")
    assert found.max_logit_difference is not None and found.adapter_effect is not None
    assert found.max_logit_difference < 0.25 * found.adapter_effect
