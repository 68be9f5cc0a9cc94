"""Tiny bases of random weights for tasks that give them a head, one for each family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conftest import make_tokenizer

# transformers' class of the body, and what its config has besides SHAPE. Widths of 64: NF4
# quantizes in blocks of 64.
SHAPE = {"vocab_size": 400, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"intermediate_size": 128, "max_position_embeddings": 130, "pad_token_id": 1}
LLAMA = {"num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": 0}
DISTIL = {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128}
FAMILIES: dict[str, dict[str, Any]] = {
    "Bert": {},
    "Roberta": {},
    "DistilBert": DISTIL,
    "DebertaV2": {"pooler_hidden_size": 64, "relative_attention": True},
    "Electra": {"embedding_size": 64},
    "ModernBert": {"bos_token_id": None, "cls_token_id": 2, "sep_token_id": 0, "eos_token_id": 0},
    "Llama": LLAMA,
    "Qwen3": LLAMA | {"head_dim": 16},
    "GPT2": {"eos_token_id": 0, "bos_token_id": 0},
}


def make_body(folder: Path, family: str = "Bert", kind: str = "Model", **config: Any) -> Path:
    """A base folder of a family, with a tokenizer.

    Args:
        kind: the class's ending: `Model` (a Bert has a pooling layer then), `ForMaskedLM`.
    """
    import torch
    import transformers

    make_tokenizer(folder)
    shape = {} if family == "DistilBert" else SHAPE
    if family == "DistilBert":
        shape = {"vocab_size": 400, "max_position_embeddings": 130, "pad_token_id": 1}
    values = {"initializer_range": 0.1, **shape, **FAMILIES[family], **config}
    torch.manual_seed(0)
    made = getattr(transformers, f"{family}Config")(**values)
    getattr(transformers, f"{family}{kind}")(made).save_pretrained(folder)
    return folder
