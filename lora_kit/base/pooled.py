"""A classifier for poolings that transformers' own class does not support.

It is saved as a sentence-transformers folder (modules.json, 1_Pooling, 2_Dense): `AutoModel` loads
the encoder; the rest is a pooling and a linear layer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from lora_kit.base.head import POOLING_MODES, pooling_of

DENSE = "2_Dense"
_MODULES = "sentence_transformers.models"  # class names that every version supports


def pool(hidden: torch.Tensor, mask: torch.Tensor | None, pooling: str) -> torch.Tensor:
    """Pool the hidden states of each text to one vector.

    Args:
        hidden: (texts, tokens, width), any floating dtype.
        mask: (texts, tokens), 0 on (right) padding; None: no padding.

    Returns:
        (texts, width) float32.
    """
    if mask is None:
        mask = torch.ones(hidden.shape[:2], device=hidden.device)
    if mask.dim() == 4:  # in the memory plan, where only shapes matter
        mask = mask[:, 0, 0]
    if pooling == "cls":
        return hidden[:, 0].float()
    if pooling == "last":
        last = mask.long().sum(1) - 1
        return hidden[torch.arange(len(hidden), device=hidden.device), last].float()
    weights = mask[..., None].float()
    return (hidden.float() * weights).sum(1) / weights.sum(1).clamp(min=1e-9)


class PooledClassifier(nn.Module):
    """`score(pool(encoder(text)))`.

    Other attributes are forwarded to the encoder, as in PEFT's models: config, device, embeddings,
    gradient checkpointing.

    Args:
        encoder: a model of `AutoModel`; its config has the label names.
        pooling: `mean`, `cls` or `last`.
    """

    base_model_prefix = "encoder"

    def __init__(self, encoder: PreTrainedModel, pooling: str) -> None:
        super().__init__()
        config: Any = encoder.config
        text = config.get_text_config()
        self.encoder = encoder
        self.score = nn.Linear(text.hidden_size, config.num_labels)
        self.pooling = pooling
        nn.init.normal_(self.score.weight, std=getattr(text, "initializer_range", 0.02))
        nn.init.zeros_(self.score.bias)

    def __getattr__(self, name: str) -> Any:  # whatever type the encoder's attribute has
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "encoder":  # not set yet
                raise
            return getattr(self.encoder, name)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **more: object
    ) -> SequenceClassifierOutput:
        """input_ids, attention_mask: (texts, tokens) int64. `logits`: (texts, labels) float32."""
        out = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **more)
        pooled = pool(out.last_hidden_state, attention_mask, self.pooling)
        return SequenceClassifierOutput(logits=self.score(pooled.to(self.score.weight.dtype)))


def write_parts(
    folder: Path, score: Mapping[str, torch.Tensor], pooling: str, max_length: int
) -> None:
    """Add pooling and head to the folder of a saved encoder, as a sentence-transformers model.

    `AutoModel` and sentence-transformers load it; `SentenceTransformer(folder).encode(texts)`
    returns the logits.

    Args:
        score: `weight` (labels, width) and `bias` (labels,) of the head.
        max_length: longer texts are truncated to so many tokens.
    """
    from safetensors.torch import save_file

    labels, width = score["weight"].shape
    modes = {mode: name == pooling for name, mode in POOLING_MODES.items()}
    _write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": width, **modes})
    dense = {"in_features": width, "out_features": labels, "bias": True}
    identity = {"activation_function": "torch.nn.modules.linear.Identity"}
    _write(folder / DENSE / "config.json", dense | identity)
    tensors = {f"linear.{name}": value for name, value in score.items()}
    save_file(tensors, folder / DENSE / "model.safetensors", metadata={"format": "pt"})
    parts = (("", "Transformer"), ("1_Pooling", "Pooling"), (DENSE, "Dense"))
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"{_MODULES}.{kind}"}
        for number, (path, kind) in enumerate(parts)
    ]
    _write(folder / "modules.json", modules)
    _write(folder / "sentence_bert_config.json", {"max_seq_length": max_length})


def guard_of(skeleton: PreTrainedModel | None) -> str | None:
    """The name of the output weight of transformers' own classifier.

    An empty tensor of this name in an encoder's folder makes `AutoModelForSequenceClassification`
    fail, instead of loading with a randomly initialised head and only a warning.

    Args:
        skeleton: transformers' classifier, on the meta device; None if there is none.
    """
    if skeleton is None:
        return None
    prefix = f"{skeleton.base_model_prefix}."
    return [n for n, _ in skeleton.named_parameters() if not n.startswith(prefix)][-1]


def read_folder(folder: Path, dtype: str = "float32") -> PooledClassifier:
    """Load a folder of `write_parts` with transformers alone, in evaluation mode."""
    from safetensors.torch import load_file
    from transformers import AutoModel

    encoder = AutoModel.from_pretrained(
        folder, dtype=dtype, local_files_only=True, trust_remote_code=False
    )
    model = PooledClassifier(encoder, str(pooling_of(folder)))
    score = load_file(folder / DENSE / "model.safetensors")
    model.score.load_state_dict({k.removeprefix("linear."): v for k, v in score.items()})
    return model.eval()


def _write(file: Path, values: object) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
