"""What `check` says of a target holds in the target, where it runs here."""
# ruff: noqa: F811 - fixtures

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from conftest import RunMaker, make_base
from gguf_models import difference, make_model
from test_adapter_portable import in_peft, loud, portable
from test_cli import Shell, run  # noqa: F401 - a fixture
from trained import edit

import lora_kit
from lora_kit.adapter.files import open_adapter
from lora_kit.adapter.finished import FinishedRun
from lora_kit.adapter.inspect import inspect
from lora_kit.adapter.loaders import loader_issues
from lora_kit.errors import CheckFailed, UserError
from lora_kit.run import shipped
from lora_kit.schema import Adapter, Ship
from lora_kit.ship.check import check
from lora_kit.ship.merge import merge
from lora_kit.ship.targets import TARGETS, check_settings

# Of an adapter on all that is linear: what is set, and which targets do not take it as it is.
ODD: dict[str, tuple[dict[str, Any], set[str]]] = {
    "plain": ({}, set()),
    "rslora": ({"use_rslora": True}, {"sglang", "llama.cpp", "ollama"}),
    "alpha": ({"alpha_pattern": {"q_proj": 40}}, {"sglang", "llama.cpp", "ollama"}),
    "rank": ({"rank_pattern": {"q_proj": 2}}, {"sglang"}),
    "dora": ({"use_dora": True}, {"vllm", "sglang", "llama.cpp", "ollama", "mlx"}),
    "bias": ({"lora_bias": True}, {"vllm", "sglang", "llama.cpp", "ollama", "mlx"}),
    "saved": ({"modules_to_save": ["lm_head"]}, {"vllm", "sglang", "llama.cpp", "ollama", "mlx"}),
    "tokens": (
        {"trainable_token_indices": [3, 4, 5]},
        {"vllm", "sglang", "llama.cpp", "ollama", "mlx"},
    ),
    "pissa": ({"init_lora_weights": "pissa"}, {"vllm", "sglang", "llama.cpp", "ollama", "mlx"}),
    "head": ({"target_modules": ["lm_head", "q_proj", "v_proj"]}, {"vllm"}),
    "expression": ({"target_modules": ".*_proj"}, {"sglang"}),
    "wide": ({"r": 24}, {"vllm"}),
    "v alone": ({"target_modules": ["v_proj"]}, {"sglang"}),
    "up alone": ({"target_modules": ["up_proj"]}, {"sglang"}),
}
IN_LLAMA_CPP = (
    "plain",
    "rslora",
    "alpha",
    "rank",
    "dora",
    "bias",
    "saved",
    "tokens",
    "pissa",
    "head",
)


def as_llama_cpp_converts(folder: Path, base: Path, file: Path) -> None:
    """What llama.cpp's convert_lora_to_gguf.py makes of an adapter of a model whose rows it does
    not reorder: the tensors as they are, and lora_alpha. Where that stops, llama.cpp is asked."""
    import gguf

    from lora_kit.ship.gguf import open_source
    from lora_kit.ship.llama_cpp import WRITTEN_BY

    source, adapter = open_source(base), open_adapter(folder)
    writer = gguf.GGUFWriter(file, source.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(WRITTEN_BY, "a test")
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, adapter.config["lora_alpha"])
    for module, pair in adapter.factors.items():
        for half, tensor in pair.items():
            name, values = source.name(f"{module}.weight"), tensor.read().numpy()
            turned = half == "A" and name == "token_embd.weight"
            writer.add_tensor(f"{name}.lora_{half.lower()}", values.T.copy() if turned else values)
    for name, tensor in adapter.others.items():
        if not name.endswith(".base_layer.weight"):
            writer.add_tensor(name, tensor.read().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose rows llama.cpp does not reorder, and its GGUF."""
    from lora_kit.ship.gguf import write_model

    folder = tmp_path_factory.mktemp("qwen")
    make_model(folder, "qwen3 untied")
    write_model(folder, folder / "base.gguf", "f32")
    return folder


@pytest.mark.parametrize("name", ODD)
def test_what_is_said_of_each_target(qwen: Path, tmp_path: Path, name: str) -> None:
    config, tripping = ODD[name]
    after = loud(qwen, tmp_path / "a", **config)
    found = {target: check(FinishedRun(tmp_path / "a"), target) for target in TARGETS}
    # MLX takes no adapter of PEFT as it lies; whether there is a form of it for MLX, the fix says.
    said = {target for target, one in found.items() if not one["loads"]}
    assert said | {"mlx"} == tripping | {"mlx"}
    assert ("--to mlx" in found["mlx"]["problems"][0]["fix"]) == ("mlx" not in tripping)
    for target, one in found.items():
        assert one.keys() == {"target", "loads", "problems", "notes"} and one["target"] == target
        assert one["loads"] == (not one["problems"])
        assert all(set(p) == {"what", "where", "fix"} for p in one["problems"])
    # PEFT, which loads everything.
    assert (in_peft(qwen, tmp_path / "a") - after).abs().max() <= 1e-4
    # Where the fix is a portable adapter, that one loads.
    for target in said - {"mlx"}:
        if all("--to portable" in p["fix"] for p in found[target]["problems"]):
            assert check(FinishedRun(portable(tmp_path / "a")), target)["loads"]
            (tmp_path / "a-portable").rename(tmp_path / target)


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_LLAMA_CPP)
def test_llama_cpp_does_what_is_said(qwen: Path, tmp_path: Path, name: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config, tripping = ODD[name]
    loud(qwen, tmp_path / "a", **config)
    base = AutoModelForCausalLM.from_pretrained(qwen, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(tmp_path / "a")).eval()
    as_llama_cpp_converts(tmp_path / "a", qwen, tmp_path / "a.gguf")
    try:
        apart = difference(model, qwen / "base.gguf", [tmp_path / "a.gguf"], tokens=2)
    except CheckFailed:
        apart = 99.0
    assert check(FinishedRun(tmp_path / "a"), "llama.cpp")["loads"] == ("llama.cpp" not in tripping)
    assert apart > 0.05 if "llama.cpp" in tripping else apart < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_one_of_two_tied_matrices_alone(tmp_path: Path, module: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from lora_kit.ship.gguf import write_model

    base, folder = tmp_path / "base", tmp_path / "a"
    make_model(base, "qwen3")
    write_model(base, tmp_path / "base.gguf", "f32")
    loud(base, folder, target_modules=[module, "q_proj", "v_proj"])
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    as_llama_cpp_converts(folder, base, tmp_path / "a.gguf")
    with pytest.raises(CheckFailed, match="ended"):
        adapters = [tmp_path / "a.gguf"]
        difference(PeftModel.from_pretrained(plain, str(folder)), tmp_path / "base.gguf", adapters)
    for target in ("llama.cpp", "ollama", "mlx"):
        (problem,) = check(FinishedRun(folder), target)["problems"]
        assert "the base ties them" in problem["what"] and "--to mlx" not in problem["fix"]


def test_values_that_are_not_finite_load_nowhere(base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    loud(base, tmp_path / "a")
    weights = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors[min(tensors)][0, 0] = float("nan")
    save_file(tensors, weights)
    for target in TARGETS:
        (problem,) = [
            p
            for p in check(FinishedRun(tmp_path / "a"), target)["problems"]
            if "finite" in p["what"]
        ]
        assert problem["where"] == str(weights)
    assert check_settings(Adapter(start=str(tmp_path / "a")), "transformers")


def test_ranks_of_vllm(base: Path, tmp_path: Path) -> None:
    for rank, wanted in ((16, None), (17, 32), (100, 128), (513, None)):
        settings = Adapter(r=rank)
        assert bool(check_settings(settings, "vllm")) == (rank > 512)
        loud(base, tmp_path / str(rank), r=rank, least=0.01)
        problems = check(FinishedRun(tmp_path / str(rank)), "vllm")["problems"]
        assert bool(problems) == (rank > 16)
        assert not wanted or f"--max-lora-rank {wanted}" in problems[0]["fix"]
    assert "lora-kit merge" in problems[0]["fix"]


# --- The base

UNWRAPPED = "base_model.model."
RENAMED: dict[str, Any] = {
    "compiled": lambda n: n.replace(UNWRAPPED, f"{UNWRAPPED}_orig_mod."),
    "without prefix": lambda n: n.removeprefix(UNWRAPPED),
    "ddp": lambda n: n.replace(UNWRAPPED, f"{UNWRAPPED}module."),
    "twice": lambda n: UNWRAPPED + n,
    "fsdp": lambda n: n.replace(".self_attn.", "._fsdp_wrapped_module.self_attn."),
    "in part": lambda n: n.replace(f"{UNWRAPPED}model.layers.1", f"{UNWRAPPED}_orig_mod.1"),
    # Found only by comparing with the base.
    "other names": lambda n: n.replace(".self_attn.", ".attention."),
    "a layer more": lambda n: n.replace(".layers.1.", ".layers.7."),
}


def renamed(folder: Path, change: Callable[[str], str]) -> None:
    from safetensors.torch import load_file, save_file

    weights = folder / "adapter_model.safetensors"
    save_file({change(name): t for name, t in load_file(weights).items()}, weights)


@pytest.mark.parametrize("case", RENAMED)
def test_tensors_that_peft_loads_into_nothing_are_refused(
    base: Path, tmp_path: Path, case: str
) -> None:
    folder = tmp_path / "a"
    after = loud(base, folder)
    renamed(folder, RENAMED[case])
    assert (in_peft(base, folder) - after).abs().max() > 0.05
    for target in TARGETS:
        found = check(FinishedRun(folder), target)
        assert not found["loads"]
        assert any("PEFT ignores" in p["what"] or "does not fit" in p["what"]
                   for p in found["problems"])  # fmt: skip
    with pytest.raises(UserError, match=r"PEFT ignores|no such weight|does not fit"):
        merge(FinishedRun(folder), tmp_path / "merged")
    # Without the base the names that no base has are still seen; the others are not vouched for.
    edit(folder / "adapter_config.json", lambda c: c.update(base_model_name_or_path="gone/away"))
    found = check(FinishedRun(folder), "vllm")
    if case in ("other names", "a layer more"):
        assert found["loads"] and "the base is not on this machine" in found["notes"][0]
    else:
        assert not found["loads"]
        issues = inspect(FinishedRun(folder))["loaders"]
        assert any("PEFT ignores" in one["what"] for one in issues)  # type: ignore[attr-defined]


def test_an_adapter_of_another_base_is_refused(base: Path, tmp_path: Path) -> None:
    loud(base, tmp_path / "a")
    for name, changes in (("wide", {"hidden_size": 96}), ("short", {"num_hidden_layers": 1})):
        make_base(tmp_path / name, **changes)
        for target in TARGETS:
            found = check(FinishedRun(tmp_path / "a", str(tmp_path / name)), target)
            assert any("does not fit the base" in p["what"] for p in found["problems"]), target
    # A base that names and shapes say nothing against, but the lock file does.
    folder = tmp_path / "a"
    lock = {"base": {"model": str(base), "hashes": {"config.json": "0" * 64}}}
    (folder / "run.lock.json").write_text(json.dumps(lock))
    with pytest.raises(UserError, match="trained on another base"):
        check(FinishedRun(folder), "vllm")


def test_what_gguf_and_mlx_have_no_place_for(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 32, "n_head": 2, "n_layer": 2, "vocab_size": 400, "n_positions": 64}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path / "gpt2")
    loud(tmp_path / "gpt2", tmp_path / "a", 0, target_modules=["c_attn"], fan_in_fan_out=True)
    found = {target: check(FinishedRun(tmp_path / "a"), target) for target in TARGETS}
    assert found["transformers"]["loads"] and found["vllm"]["loads"]
    assert "'gpt2' is not written as GGUF" in found["llama.cpp"]["problems"][0]["what"]
    assert "mlx-lm's names" in found["mlx"]["problems"][-1]["what"]


def test_an_adapter_on_what_sees_or_hears_is_ignored() -> None:
    module = "model.vision_tower.encoder.layers.0.self_attn.q_proj"
    found = [one for one in loader_issues({}, [module]) if "vision" in one.what]
    assert found[0].happens == "ignored, silently" and "vLLM" in found[0].who
    assert not loader_issues({}, ["model.layers.0.mlp.down_proj"])


# --- The verb


def test_the_verb_tells_and_ends_with_its_code(run: Shell, base: Path, tmp_path: Path) -> None:
    loud(base, tmp_path / "a", use_rslora=True)
    folder = str(tmp_path / "a")
    done = run("check", folder, "--target", "vllm")
    assert done.code == 0 and "vllm loads it correctly" in done.out and not done.err
    done = run("check", folder, "--target", "sglang")
    (line,) = done.err.splitlines()
    assert done.code == 1 and f"{folder}/adapter_config.json: use_rslora): " in line
    command = line.rpartition(": ")[2].split()
    assert command[:2] == ["lora-kit", "export"] and command[2] == folder
    done = run("check", folder, "--target", "sglang", "--json")
    assert done.code == 1 and json.loads(done.out) == check(FinishedRun(folder), "sglang")
    for arguments in ([folder], [folder, "--target", "vlm"], [str(base), "--target", "vllm"]):
        done = run("check", *arguments)
        assert done.code == 2 and len(done.err.splitlines()) == 1
    assert "vllm" in run("check", folder, "--target", "vlm").err


# --- ship.target


def test_every_target_of_the_schema_is_checked() -> None:
    literal = get_args(Ship.model_fields["target"].annotation)[0]
    assert set(get_args(literal)) == set(TARGETS)


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_stops_what_it_would_not_take(
    run_file: RunMaker, base: Path, tmp_path: Path, target: str
) -> None:
    """And lets the same run begin without it."""
    changes: dict[str, Any] = {"adapter.use_dora": True}
    if target == "transformers":  # it takes all settings, and no NaN
        loud(base, tmp_path / "start")
        edit_weights(tmp_path / "start" / "adapter_model.safetensors")
        changes = {"adapter": {"start": str(tmp_path / "start")}}
    file = run_file(**changes, **{"ship.target": target})
    with pytest.raises(UserError) as raised:
        lora_kit.train(file)
    assert str(raised.value).startswith(f"ship.target: {target}: ")
    assert not (file.parent / "runs").exists()


def edit_weights(file: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    tensors[min(tensors)].fill_(float("inf"))
    save_file(tensors, file)


def test_all_problems_come_at_once_with_a_setting_that_mends_them(run_file: RunMaker) -> None:
    odd = {"use_rslora": True, "alpha_pattern": {"q_proj": 2}, "target_modules": ["k_proj"]}
    file = run_file(adapter=odd, **{"ship.target": "sglang"})
    with pytest.raises(UserError) as raised:
        lora_kit.train(file)
    lines = str(raised.value).splitlines()
    fixes = [line.rpartition(": set ")[2] for line in lines]
    wanted = ["use_rslora=false", "alpha_pattern={}", "target_modules=all-linear"]
    assert fixes == [f"adapter.{setting}" for setting in wanted]
    edit(file, lambda values: values["train"].update(max_steps=1))
    lora_kit.train(file, *fixes)


def test_it_is_checked_however_a_run_is_started(run: Shell, run_file: RunMaker) -> None:
    file = run_file(**{"adapter.use_dora": True, "ship.target": "vllm"})
    done = run("train", str(file))
    assert done.code == 2 and done.err.startswith("error: ship.target: vllm: use_dora: not")
    recipe = [sys.executable, str(shipped("recipes") / "cpt.py"), str(file)]
    started = subprocess.run(recipe, capture_output=True, text=True)
    assert started.returncode == 2 and "ship.target: vllm: use_dora: not" in started.stderr
    assert not (file.parent / "runs").exists()
