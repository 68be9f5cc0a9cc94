"""Tiny random models of the families that are written as GGUF, and what both engines say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conftest import make_tokenizer

from lora_kit.ship.llama_cpp import run

_SHAPE = {
    "vocab_size": 416,  # more than the tokenizer has tokens
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
_SCALED = {"original_max_position_embeddings": 32, "factor": 4.0, "rope_theta": 10000.0}
_LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **_SCALED}
_LOCAL = {"rope_type": "default", "rope_theta": 5000.0}
_FULL = {"rope_type": "linear", "rope_theta": 20000.0, "factor": 4.0}
_GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8}
# name -> transformers' model_type, and what differs from the shape above.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "llama untied": ("llama", {"tie_word_embeddings": False, "head_dim": 32}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama 3.1": ("llama", {"rope_parameters": _LLAMA3}),
    "mistral": ("mistral", {"head_dim": 24, "sliding_window": None}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3 untied": ("qwen3", {"head_dim": 32}),
    "gemma": ("gemma", {"head_dim": 32}),
    "gemma2": ("gemma2", {**_GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0}),
    "gemma3": (
        "gemma3_text",
        {
            **_GEMMA,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {"sliding_attention": _LOCAL, "full_attention": _FULL},
        },
    ),
}


def make_model(folder: Path, family: str, chat_template: str | None = None, **more: Any) -> Any:
    """A random model whose norms and biases matter too, saved with a tokenizer; float32."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, changes = FAMILIES[family]
    config = AutoConfig.for_model(kind, **{**_SHAPE, **changes, **more})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    make_tokenizer(folder, chat_template)
    return model


def difference(model: Any, file: Path, adapters: Sequence[Path] = (), tokens: int = 8) -> float:
    """The largest between the log-probabilities of transformers and those of llama.cpp, of all
    tokens, after a prompt and after each token that follows; 9 if a greedy token differs."""
    import torch

    vocabulary = model.config.vocab_size
    ids = torch.randint(4, 390, (24,), generator=torch.Generator().manual_seed(1)).tolist()
    ask: dict[str, Any] = {"prompts": [ids], "tokens": tokens, "top": vocabulary}
    (answer,) = run(file, adapters, **ask)["answers"]
    chosen = answer["tokens"]
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids + chosen])).logits[0, len(ids) - 1 :].float()
    wanted = logits.log_softmax(-1)
    if logits[: len(chosen)].argmax(-1).tolist() != chosen:
        return 9.0
    got = torch.full((len(answer["top"]), vocabulary), float("nan"))
    for step, top in enumerate(answer["top"]):
        for token, value in top.items():
            got[step, int(token)] = value
    return float((got - wanted[: len(got)]).abs().max())


def change(file: Path, **values: Any) -> None:
    """Change values of a JSON file."""
    known = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**known, **values}), encoding="utf-8")
