"""An adapter in MLX's form, run by mlx-lm itself, on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_models import make_model
from safetensors.torch import load_file
from test_adapter_portable import ALL, loud

from lora_kit.adapter.files import open_adapter
from lora_kit.errors import UserError
from lora_kit.ship.mlx import write_mlx

pytestmark = pytest.mark.slow

IDS = list(range(4, 60, 3))
# PEFT's shapes: A (r, in), B (out, r); a rank for each, and a scale.
CONFIG = {
    "r": 3,
    "lora_alpha": 7,
    "use_rslora": True,
    "rank_pattern": {"k_proj": 2},
    "alpha_pattern": {"layers.1.mlp.up_proj": 20},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A base, an adapter as PEFT saves it, and the same for MLX."""
    folder = tmp_path_factory.mktemp("mlx")
    base, adapter, out = folder / "base", folder / "adapter", folder / "out"
    make_model(base, "qwen3 untied")  # Llama, tied: see test_ship_export
    loud(base, adapter, target_modules=[*ALL, "embed_tokens", "lm_head"], **CONFIG)
    out.mkdir()
    write_mlx(open_adapter(adapter), json.loads((base / "config.json").read_text()), out)
    return base, adapter, out


def test_mlx_says_what_peft_says(made: tuple[Path, Path, Path]) -> None:
    pytest.importorskip("mlx_lm", reason="no MLX here: pip install 'lora-kit[mlx]'")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from lora_kit.ship.reload import TOKENS, continued, reloaded, torch_step

    base, adapter, out = made
    never = [100_000]  # so that no answer ends early
    answer = reloaded("mlx", base, out, [IDS], never)
    assert answer
    (got,) = answer["answers"]
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model: Any = PeftModel.from_pretrained(plain, str(adapter)).eval()
    wanted = continued(torch_step(model), IDS, never)
    assert len(got["tokens"]) == TOKENS and got["tokens"] == wanted.tokens
    for top, row in zip(got["top"], wanted.log_probabilities, strict=True):
        assert len(top) == 64 and max(abs(value - row[int(n)]) for n, value in top.items()) <= 1e-3
    with model.disable_adapter():
        assert continued(torch_step(model), IDS, never).tokens != got["tokens"]


def test_the_format_is_that_of_mlx_lm(made: tuple[Path, Path, Path]) -> None:
    _, adapter, out = made
    assert sorted(f.name for f in out.iterdir()) == ["adapter_config.json", "adapters.safetensors"]
    config = json.loads((out / "adapter_config.json").read_text())
    lora = config["lora_parameters"]
    assert (config["fine_tune_type"], config["num_layers"]) == ("lora", 3)
    assert (lora["rank"], lora["scale"], lora["dropout"]) == (3, 1.0, 0.0)
    assert {"self_attn.q_proj", "mlp.down_proj"} <= set(lora["keys"])
    tensors = load_file(out / "adapters.safetensors")
    update = open_adapter(adapter).update("model.layers.1.mlp.up_proj")
    a = tensors["model.layers.1.mlp.up_proj.lora_a"].double()
    b = tensors["model.layers.1.mlp.up_proj.lora_b"].double()
    assert a.shape == (64, 3) and b.shape == (3, 96)
    whole = (update.scale * update.b @ update.a)[0]
    assert torch.allclose((a @ b).T, whole, rtol=1e-5, atol=1e-7)
    assert tensors["model.layers.0.self_attn.k_proj.lora_a"].shape == (64, 3)  # zeros added


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"target_modules": ["lm_head", "q_proj"]}, "tied to the other"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "tied to the other"),
        ({"use_dora": True}, "use_dora"),
    ],
)
def test_what_mlx_would_do_otherwise_is_refused(
    base: Path, tmp_path: Path, config: Any, words: str
) -> None:
    loud(base, tmp_path / "a", least=0.01, **config)
    (tmp_path / "out").mkdir()
    known = json.loads((base / "config.json").read_text())
    with pytest.raises(UserError, match=words) as raised:
        write_mlx(open_adapter(tmp_path / "a"), known, tmp_path / "out")
    assert "merge" in str(raised.value) and "\n" not in str(raised.value)


def test_a_base_that_brings_code_is_refused(base: Path, tmp_path: Path) -> None:
    loud(base, tmp_path / "a")
    known = json.loads((base / "config.json").read_text())
    with pytest.raises(UserError, match="model_file is code"):
        write_mlx(open_adapter(tmp_path / "a"), {**known, "model_file": "m.py"}, tmp_path)
    assert not (tmp_path / "adapters.safetensors").exists()
