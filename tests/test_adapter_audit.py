"""What an adapter covers, and the checks of a training, on models of many families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from lora_kit.adapter.attach import attach, describe
from lora_kit.adapter.audit import Audit, _checksum, _zero_block, coverage
from lora_kit.errors import CheckFailed
from lora_kit.schema import Adapter

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 32}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gemma2": {},
    "gpt2": GPT2,
    "mixtral": {"num_local_experts": 4},
    "gpt_oss": {"num_local_experts": 4},
}
EMBEDDINGS = {"gpt2": "wte"}
GROUPS = {"adapter": lambda name: ".lora_" in name}


def adapted(family: str, adapter: dict[str, Any], **sizes: Any) -> Any:
    torch.manual_seed(0)
    own = FAMILIES[family] if family == "gpt2" else {**SIZES, **FAMILIES[family], **sizes}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **own))
    return attach(model.requires_grad_(False), Adapter(r=4, **adapter), (), 0)


def trained(model: Any, steps: int = 3, rate: float = 1e-3, damage: Any = None) -> Audit:
    """Trained by hand; `damage` is done to the model between the last step and the checks."""
    audit = Audit(model, Accelerator(cpu=True), GROUPS)
    audit.begin()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    model.train()
    for _ in range(steps):
        ids = torch.randint(3, 96, (2, 24))
        model(input_ids=ids, labels=ids).loss.backward()
        audit.observe()
        optimizer.step()
        optimizer.zero_grad()
    if damage:
        with torch.no_grad():
            damage(model)
    audit.end(steps)
    return audit


def named(model: Any, ending: str) -> torch.Tensor:
    """The first tensor of that ending."""
    return next(p for name, p in model.named_parameters() if name.endswith(ending))


def failed(audit: Audit) -> list[str]:
    return [check["name"] for check in audit.checks if check["passed"] is not True]


KINDS = ("plain", "use_dora", "use_rslora", "embeddings", "lm_head")
# PEFT has no DoRA for fused experts.
CASES = [(f, k) for f in FAMILIES for k in KINDS if (f, k) != ("mixtral", "use_dora")]


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_no_false_alarm(family: str, kind: str, tmp_path: Path) -> None:
    adapter: dict[str, Any] = {kind: True} if kind.startswith("use_") else {}
    if kind == "embeddings":
        adapter = {"target_modules": [EMBEDDINGS.get(family, "embed_tokens")]}
    elif kind == "lm_head":
        adapter = {"target_modules": ["lm_head"]}
    audit = trained(adapted(family, adapter))
    audit.model.save_pretrained(tmp_path)
    audit.check_saved(tmp_path / "adapter_model.safetensors")
    audit.effect(0.1)
    assert audit.problems == []
    assert failed(audit) == []
    assert [check["name"] for check in audit.checks] == [
        *("coverage", "gradients", "moved", "lora_B", "frozen", "saved", "effect")
    ]


@pytest.mark.parametrize("steps", [1, 2])
def test_few_steps_are_no_alarm(steps: int) -> None:
    """After one, A is where it began, as it must be."""
    assert trained(adapted("llama", {}), steps=steps).problems == []


def test_coverage_counts_parameters() -> None:
    model = adapted("llama", {"target_modules": ["q_proj", "down_proj"]})
    found = coverage(model)
    base = sum(p.numel() for n, p in model.named_parameters() if ".lora_" not in n)
    on = 3 * (32 * 32 + 32 * 48)
    assert found.modules == {"q_proj": 3, "down_proj": 3}
    assert found.share == pytest.approx(on / base, abs=1e-4)
    rest = found.not_covered
    assert rest["gate_proj"] == pytest.approx(3 * 32 * 48 / base, abs=1e-4)
    assert "input_layernorm" not in rest  # below one percent
    assert "adapter on 3 q_proj, 3 down_proj" in describe(model)
    assert (
        f"adapted modules hold {on / base:.0%} of the base's parameters, not gate_proj"
        in describe(model)
    )


def test_coverage_counts_four_bits_as_one_parameter(base: Path) -> None:
    from lora_kit.base.load import load_base
    from lora_kit.base.pin import pin
    from lora_kit.schema import Base

    shares = []
    for kind in ("none", "nf4"):
        chosen = Base(model=str(base), quantize=kind)  # type: ignore[arg-type]
        shares.append(coverage(attach(load_base(chosen, pin(chosen)), Adapter(), (), 0)))
    assert shares[0] == shares[1]
    assert shares[0].share > 0.5


def test_experts_are_named() -> None:
    left_out = coverage(adapted("gpt_oss", {}))
    assert left_out.not_covered["experts.gate_up_proj"] > 0.3
    assert "the experts do not train" in str(left_out)
    taken_in = coverage(adapted("mixtral", {}))
    assert taken_in.modules["experts.gate_up_proj"] == 3
    assert taken_in.share > 0.8
    assert "experts" not in str(taken_in)


def test_all_linear_of_some_layers_finds_the_linear_modules_of_gpt2() -> None:
    model = adapted("gpt2", {"target_modules": "all-linear", "layers_to_transform": [1]})
    assert coverage(model).modules == {"c_attn": 1, "c_proj": 2, "c_fc": 1}


def test_one_layer_of_eight_is_a_problem() -> None:
    pattern = r".*layers\.1\.self_attn\.q_proj"
    model = adapted("llama", {"target_modules": pattern}, num_hidden_layers=8)
    (problem,) = coverage(model).problems
    assert problem["what"] == "q_proj is adapted in 1 of 8 layers"
    assert repr(pattern) in problem["cause"]
    assert "adapter.layers_to_transform" in problem["fix"]
    assert "warning: q_proj is adapted in 1 of 8 layers: " in describe(model)
    assert "coverage" in failed(Audit(model, Accelerator(cpu=True), GROUPS))


@pytest.mark.parametrize(
    "adapter",
    [
        {"layers_to_transform": [1]},
        {"exclude_modules": r".*layers\.[01]\..*"},
        {"target_modules": r".*self_attn\.q_proj"},
    ],
)
def test_fewer_layers_on_purpose_are_none(adapter: dict[str, Any]) -> None:
    assert coverage(adapted("llama", adapter)).problems == []


def zero_b(model: Any) -> None:
    named(model, "1.self_attn.v_proj.lora_B.default.weight").zero_()


def lose_rows(model: Any) -> None:
    named(model, "1.self_attn.v_proj.lora_B.default.weight")[8:].zero_()


def change_base(model: Any) -> None:
    named(model, "2.mlp.up_proj.base_layer.weight")[0, 0] += 1e-6


DAMAGES = {
    "lora_B": (zero_b, "layers.1.self_attn.v_proj.lora_B.default.weight is zero"),
    "a shard of it": (lose_rows, "layers.1.self_attn.v_proj.lora_B.default.weight is zero"),
    "frozen": (change_base, "layers.2.mlp.up_proj.base_layer.weight changed during training"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_planted_damage_is_found(what: str) -> None:
    damage, words = DAMAGES[what]
    audit = trained(adapted("llama", {}), damage=damage)
    (problem,) = audit.problems
    assert words in problem["what"]
    assert failed(audit) == ["frozen" if what == "frozen" else "lora_B"]


def test_scattered_rows_of_zeros_are_no_lost_shard() -> None:
    """As a ReLU leaves them, whose unit never fires."""

    def scatter(model: Any) -> None:
        named(model, "lora_B.default.weight")[::3] = 0

    assert trained(adapted("llama", {}), damage=scatter).problems == []


def test_nothing_moves_at_a_rate_of_zero() -> None:
    audit = trained(adapted("llama", {}), rate=0.0)
    audit.effect(0.0)
    (problem,) = audit.problems  # and not one for every check that follows from it
    assert problem["what"] == "the adapter did not change"
    assert "the learning rate was 0" in problem["cause"]
    assert failed(audit) == ["moved", "effect"]


def test_an_adapter_that_changes_nothing() -> None:
    audit = trained(adapted("llama", {}))
    audit.effect(0.0)
    assert audit.problems[0]["what"] == "the adapter changes no score"


@pytest.mark.parametrize("module", ["lm_head", "layers.1.self_attn.q_proj"])
def test_a_frozen_adapter_is_found(module: str) -> None:
    model = adapted("llama", {"target_modules": ["q_proj", "lm_head"]})
    for name, parameter in model.named_parameters():
        if f"{module}.lora_" in name:
            parameter.requires_grad_(False)
    (problem,) = trained(model).problems
    assert problem["what"].endswith(f"{module} got no gradient in the first steps")
    assert "frozen" in problem["cause"]


def test_a_frozen_half_of_an_adapter_is_found() -> None:
    model = adapted("llama", {})
    named(model, "0.mlp.up_proj.lora_A.default.weight").requires_grad_(False)
    (problem,) = trained(model).problems
    assert problem["what"].endswith("0.mlp.up_proj.lora_A.default.weight did not change")


def test_nothing_trainable_stops() -> None:
    with pytest.raises(CheckFailed, match="nothing trains"):
        Audit(adapted("llama", {}).requires_grad_(False), Accelerator(cpu=True), GROUPS)


def test_no_gradient_by_the_second_step_stops() -> None:
    audit = Audit(adapted("llama", {}), Accelerator(cpu=True), GROUPS)
    audit.observe()
    with pytest.raises(CheckFailed, match="no gradient reaches the adapter"):
        audit.observe()


@pytest.mark.parametrize("how", ["zeros", "half", "missing"])
def test_a_shard_lost_in_saving_is_found(how: str, tmp_path: Path) -> None:
    audit = trained(adapted("llama", {}))
    audit.model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(n for n in weights if n.endswith("1.mlp.up_proj.lora_B.weight"))
    if how == "zeros":
        weights[name][24:] = 0
    elif how == "half":
        weights[name] = weights[name][:24].clone()
    else:
        del weights[name]
    save_file(weights, file)
    audit.check_saved(file)
    (problem,) = audit.problems
    assert "1.mlp.up_proj.lora_B.default.weight is incomplete or zero" in problem["what"]
    assert "accelerate#4206" in problem["cause"]


def test_the_longest_block_of_zero_rows() -> None:
    matrix = torch.ones(8, 2)
    matrix[[0, 3, 4, 5]] = 0
    assert _zero_block(matrix).item() == 0.375
    assert _zero_block(torch.zeros(4, 2)).item() == 1.0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint8", "int8", "bool"])
def test_checksum_sees_any_change(dtype: str) -> None:
    torch.manual_seed(0)
    tensor = torch.randint(0, 2, (1024, 33)).to(getattr(torch, dtype))
    before = int(_checksum(tensor))
    assert int(_checksum(tensor.clone())) == before
    for row, column in ((0, 0), (500, 7), (1023, 32)):
        changed = tensor.clone()
        changed[row, column] = not changed[row, column]
        assert int(_checksum(changed)) != before
    swapped = tensor.flip(0)
    assert int(_checksum(swapped)) != before
    part = tensor[1:]  # begins inside of a word
    assert int(_checksum(part)) == int(_checksum(part.clone()))
