"""Models and adapters written as GGUF say in llama.cpp what they say in transformers and PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gguf_models import FAMILIES, change, difference, make_model

from lora_kit.adapter.files import open_adapter
from lora_kit.errors import CheckFailed, UserError
from lora_kit.ship.gguf import needs_untied, open_source, write_adapter, write_model
from lora_kit.ship.llama_cpp import run

# ggml looks GELU's values up in a table of float16 on CPU; SiLU it computes.
TOLERANCE = {"gemma": 3e-3, "gemma2": 3e-3, "gemma3": 3e-3}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ALL},
    "rsLoRA": {"target_modules": ALL, "use_rslora": True},
    "patterns": {
        "target_modules": ALL,
        "rank_pattern": {"q_proj": 8, "layers.0.mlp.down_proj": 2},
        "alpha_pattern": {"k_proj": 32, "up_proj": 3},
    },
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head", "k_proj"]},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_says_the_same(family: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", family)
    write_model(tmp_path / "model", tmp_path / "model.gguf", "f32")
    assert difference(model, tmp_path / "model.gguf") <= TOLERANCE.get(family, 1e-3)


def _adapted(folder: Path, family: str, **config: Any) -> tuple[Any, Any, Any]:
    """A tiny model with a loud adapter: (PEFT's model, the adapter, its opened base)."""
    import torch
    from peft import LoraConfig, get_peft_model

    model = make_model(folder / "model", family)
    peft = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **config))
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.2)
    peft.eval().save_pretrained(str(folder / "adapter"))
    return peft, open_adapter(folder / "adapter"), open_source(folder / "model")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, of tied ends
@pytest.mark.parametrize(
    ("family", "kind"),
    [("llama", kind) for kind in ADAPTERS] + [("qwen3", "patterns"), ("gemma3", "embeddings")],
)
def test_adapters_are_exact_whatever_scales_them(family: str, kind: str, tmp_path: Path) -> None:
    model, adapter, source = _adapted(tmp_path, family, **ADAPTERS[kind])
    base, file = tmp_path / "base.gguf", tmp_path / "adapter.gguf"
    write_model(tmp_path / "model", base, "f32", untie=needs_untied(adapter, source))
    write_adapter(adapter, tmp_path / "model", file)
    assert difference(model, base, [file]) <= TOLERANCE.get(family, 1e-3)
    # Nearly the same without the adapter would prove nothing.
    with model.disable_adapter():
        assert difference(model, base) <= TOLERANCE.get(family, 1e-3)
        assert difference(model, base, [file]) > 0.5


@pytest.mark.parametrize(("kind", "allowed"), [("f16", 0.01), ("bf16", 0.1), ("q8_0", 0.15)])
def test_narrow_types_are_near_and_said_where_they_do_not_fit(
    kind: Any, allowed: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import gguf

    model = make_model(tmp_path / "model", "llama", intermediate_size=172)  # no multiple of 32
    file = tmp_path / "model.gguf"
    write_model(tmp_path / "model", file, kind)
    assert 1e-5 < difference(model, file, tokens=1) <= allowed
    types = {t.name: t.tensor_type.name.lower() for t in gguf.GGUFReader(file).tensors}
    assert types["blk.0.attn_q.weight"] == kind
    assert types["blk.0.attn_norm.weight"] == "f32"
    assert types["blk.0.ffn_down.weight"] == ("f16" if kind == "q8_0" else kind)
    said = "3 tensors as f16, not q8_0: their rows do not divide by 32"
    assert (said in capsys.readouterr().err) == (kind == "q8_0")


def test_bfloat16_is_kept_to_the_bit(tmp_path: Path) -> None:
    import gguf
    import torch
    from safetensors.torch import load_file

    make_model(tmp_path / "model", "qwen3").bfloat16().save_pretrained(tmp_path / "model")
    write_model(tmp_path / "model", tmp_path / "model.gguf", "bf16")
    stored = load_file(tmp_path / "model" / "model.safetensors")["model.embed_tokens.weight"]
    tensors = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    written = torch.from_numpy(tensors["token_embd.weight"].copy()).view(torch.bfloat16)
    assert torch.equal(written, stored)


def test_shards_and_a_text_model_inside_another_are_read(tmp_path: Path) -> None:
    """Gemma 3 as it is published: sharded, under language_model, with a vision tower beside."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    model = make_model(folder, "gemma3")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {name: f"language_model.{name}" for name in tensors}
    files = {n: f"model-{i % 2}.safetensors" for i, n in enumerate(names.values())}
    for file in set(files.values()):
        some = {new: tensors[old] for old, new in names.items() if files[new] == file}
        if file == "model-0.safetensors":
            some["vision_tower.embeddings.weight"] = tensors["model.norm.weight"].clone()
            files["vision_tower.embeddings.weight"] = file
        save_file(some, folder / file)
    index = {"weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    text = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    whole = {"model_type": "gemma3", "text_config": text}
    (folder / "config.json").write_text(json.dumps(whole), encoding="utf-8")
    write_model(folder, tmp_path / "model.gguf", "f32")
    assert difference(model, tmp_path / "model.gguf") <= TOLERANCE["gemma3"]


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("llama", {"model_type": "mixtral"}, "'mixtral' is not written as GGUF"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act gelu"),
        ("llama", {"rope_parameters": {"rope_type": "longrope"}}, "rope_type longrope"),
        ("qwen2", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type yarn"),
        ("llama", {"num_attention_heads": None}, "config.json has no num_attention_heads: copy"),
        ("gemma2", {"query_pre_attn_scalar": 100}, "query_pre_attn_scalar 100"),
        ("gemma", {"tie_word_embeddings": False}, "a head of its own"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    family: str, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    make_model(tmp_path, family)
    change(tmp_path / "config.json", **changes)
    with pytest.raises(UserError, match=reason):
        write_model(tmp_path, tmp_path / "model.gguf", "f32")
    assert not (tmp_path / "model.gguf").exists()


def test_a_window_without_a_counterpart_becomes_the_context(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import gguf

    make_model(tmp_path, "mistral", sliding_window=48)
    write_model(tmp_path, tmp_path / "model.gguf", "f32")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["llama.context_length"].contents() == 48
    assert "48 tokens of context" in capsys.readouterr().err


def test_adapters_that_llama_cpp_does_not_take_are_refused(tmp_path: Path) -> None:
    _, adapter, _ = _adapted(tmp_path, "llama", target_modules=["q_proj"], use_dora=True)
    with pytest.raises(UserError, match=r"use_dora.*lora-kit merge"):
        write_adapter(adapter, tmp_path / "model", tmp_path / "adapter.gguf")
    _, adapter, _ = _adapted(tmp_path, "llama", target_modules=["q_proj"])
    make_model(tmp_path / "other", "llama untied")
    with pytest.raises(UserError, match=r"q_proj is 64 x 64, .* name the base"):
        write_adapter(adapter, tmp_path / "other", tmp_path / "adapter.gguf")


def test_an_adapter_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    _adapted(tmp_path, "llama", target_modules=["q_proj"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    next(t for n, t in tensors.items() if "layers.1" in n)[0, 0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.q_proj is not finite"):
        write_adapter(open_adapter(file.parent), tmp_path / "model", tmp_path / "adapter.gguf")
    assert not (tmp_path / "adapter.gguf").exists()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_ends_that_are_always_one_matrix_do_not_part(tmp_path: Path) -> None:
    _, adapter, source = _adapted(tmp_path, "gemma2", target_modules=["embed_tokens"])
    with pytest.raises(UserError, match=r"one matrix in .* gemma2"):
        needs_untied(adapter, source)
    with pytest.raises(UserError, match="one matrix"):
        write_adapter(adapter, tmp_path / "model", tmp_path / "adapter.gguf")


def test_only_our_files_are_run_and_an_end_is_one_line(tmp_path: Path) -> None:
    import gguf

    _, adapter, _ = _adapted(tmp_path, "llama", target_modules=["q_proj"])
    write_adapter(adapter, tmp_path / "model", tmp_path / "adapter.gguf")
    make_model(tmp_path / "other", "qwen3")
    write_model(tmp_path / "other", tmp_path / "other.gguf", "f32")
    with pytest.raises(CheckFailed, match=r"arch mismatch|failed to load lora") as caught:
        run(tmp_path / "other.gguf", [tmp_path / "adapter.gguf"], prompts=[[5]])
    assert "\n" not in str(caught.value)
    writer = gguf.GGUFWriter(tmp_path / "foreign.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (tmp_path / "text.gguf").write_text("no GGUF at all", encoding="utf-8")
    for name in ("foreign.gguf", "text.gguf", "absent.gguf"):
        with pytest.raises(UserError, match="no GGUF that lora-kit wrote"):
            run(tmp_path / name, prompts=[[5]])


def test_a_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'lora-kit\[llamacpp\]'"):
        run(tmp_path / "absent.gguf", prompts=[[5]])
