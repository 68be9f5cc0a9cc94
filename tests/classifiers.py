"""Tiny bases of random weights for tasks that give them a head, one for each family."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from conftest import WORDS, make_tokenizer

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
OTHERS = {"Mixtral": LLAMA | {"num_local_experts": 4}}  # not made for classification here


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
    values = {"initializer_range": 0.1, **shape, **(FAMILIES | OTHERS)[family], **config}
    torch.manual_seed(0)
    made = getattr(transformers, f"{family}Config")(**values)
    getattr(transformers, f"{family}{kind}")(made).save_pretrained(folder)
    return folder


SIGNS = {"animals": ["fox", "dog"], "food": ["bread", "brew"], "time": ["morning", "while"]}


def texts(rows: int, seed: int = 0, labels: tuple[str, ...] = tuple(SIGNS)) -> list[dict[str, str]]:
    """Different texts of seven words. Two signs in each tell its label, but for one text in eight,
    so that no classifier has all of them right."""
    chooser = random.Random(seed)
    signs = [word for some in SIGNS.values() for word in some]
    plain = [word for word in WORDS if word not in signs]
    found = []
    for number in range(rows):
        label = labels[number % len(labels)]
        sign = SIGNS[label if number % 8 else labels[(number // 8) % len(labels)]]
        words = [*chooser.choices(plain, k=4), *chooser.choices(sign, k=2)]
        chooser.shuffle(words)
        words.append(f"{number}")
        found.append({"text": " ".join(words), "label": label})
    return found


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def classify_file(folder: Path, base: Path, **changes: Any) -> Path:
    """run.yaml of a `classify` run with 160 rows of three labels; dotted keys replace settings."""
    write_rows(folder / "rows.jsonl", texts(160))
    values: dict[str, Any] = {
        "recipe": "classify",
        "name": "test",
        "base": {"model": str(base), "dtype": "float32"},
        "adapter": {"r": 4, "lora_alpha": 8},
        "data": {"train": "rows.jsonl", "eval": 0.4},
        "train": {
            "max_steps": 4,
            "max_length": 64,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-2,
            "warmup_steps": 0,
            "logging_steps": 1,
        },
        "prove": {"budget": None},
    }
    for key, value in changes.items():
        *sections, last = key.split(".")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    file = folder / "run.yaml"
    file.write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML
    return file
