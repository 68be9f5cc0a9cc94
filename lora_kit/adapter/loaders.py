"""Adapter features that runtimes reject or load incorrectly: one table, for `inspect`, `check` and
`ship.target`.

From the sources of vLLM 0.33 (lora/peft_helper.py, lora_model.py, config/lora.py), SGLang 0.5.23
(srt/lora) and mlx-lm 0.32.2 (tuner/utils.py); PEFT and llama.cpp were tested. llama.cpp means its
convert_lora_to_gguf.py, which uses lora_alpha / r as the scale.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

from lora_kit.schema import Json

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # values of --max-lora-rank; default 16
# Name endings with a buffer in SGLang (srt/lora/utils.py).
_SGLANG = re.compile(
    r"(q|k|v|qkv|o|out|gate|up|gate_up|down|in|q_a|q_b|kv_b)_proj|kv_a_proj_with_mqa|in_proj_qkvz"
    "|embed_tokens|lm_head|wq_b|wk|weights_proj"
)
# Parts of a model that are not its language model.
_OTHER_PARTS = re.compile(r"(.*\.)?(vision|visual|audio|multi_modal|image)\w*\.")
# How to fix an issue. portable: `export --to portable`; merge: serve the merged model; flag: a
# server flag; train: train again without the feature.
Fix = Literal["portable", "merge", "flag", "train"]


@dataclass(frozen=True)
class LoaderIssue:
    """Programs `who` do not support `what`, set by `key` of the config; `happens`: the result."""

    what: str
    key: str
    who: tuple[str, ...]
    happens: str
    fix: Fix


def loader_issues(
    config: Json, modules: Collection[str], beside: Iterable[str] = (), tied: bool = False
) -> list[LoaderIssue]:
    """The issues of an adapter in the programs that load it.

    Args:
        config: adapter_config.json, or `adapter:` of a run file.
        modules: the adapted modules, or name endings.
        beside: names of other tensors than A and B.
        tied: whether the base ties embeddings and head.
    """
    ends = {module.rsplit(".", 1)[-1] for module in modules}
    rank = max([config.get("r", 8), *(config.get("rank_pattern") or {}).values()])
    kind = str(config.get("init_lora_weights")).lower()
    start = kind.startswith(("pissa", "olora", "corda", "loftq"))
    targets = config.get("target_modules")
    expression = isinstance(targets, str) and targets not in ("all", "all-linear")
    # SGLang stacks the factors of q, k and v, and of gate and up: k needs q and v, and up needs
    # gate.
    qkv = ends & {"q_proj", "k_proj", "v_proj"}
    lone = ends & {"gate_proj", "up_proj"} == {"up_proj"}
    split = lone or (qkv and not {"q_proj", "v_proj"} <= qkv)
    unknown = ", ".join(sorted(end for end in ends if not _SGLANG.fullmatch(end)))
    outer = " and ".join(sorted(ends & {"embed_tokens", "lm_head"}))
    seen = "an adapter on the vision or audio part"
    beyond = any(_OTHER_PARTS.match(module) for module in modules)
    whole = [n for n in beside if re.search(r"(embed_tokens|lm_head)\.weight$", n)]
    lost, unscaled, dropped = "not loaded", "loaded with a wrong scale, silently", "lost, silently"
    flag = f"not loaded without --max-lora-rank {vllm_rank(rank)}"
    declared = "only loaded by classes that declare it, as Llama's and Mistral's do"
    one_matrix = "not loaded, or applied to both: the base ties them"
    experts = "only loaded for bases whose experts vLLM keeps in one tensor"
    vllm, sglang, others = ("vLLM",), ("SGLang",), ("llama.cpp", "MLX")
    all_of_them, but_sglang, but_vllm = (*vllm, *sglang, *others), (*vllm, *others), sglang + others
    incomplete = "only some of q, k and v, or up without gate"
    from_base = "an initialisation from the base's weights"
    another = "silently loaded onto a base that it was not trained on"

    # Columns: key of the config; whether the issue applies (None: if the key is set); programs;
    # what happens; fix; what it is called (empty: as the key).
    rows: list[tuple[str, object, tuple[str, ...], str, Fix, str]] = [
        ("use_dora", None, all_of_them, lost, "merge", ""),
        ("use_rslora", None, ("SGLang", "llama.cpp"), unscaled, "portable", ""),
        ("rank_pattern", None, sglang, lost, "portable", ""),
        ("alpha_pattern", None, ("SGLang", "llama.cpp"), unscaled, "portable", ""),
        ("lora_bias", None, all_of_them, lost, "merge", ""),
        ("bias", config.get("bias", "none") != "none", all_of_them, lost, "merge", "trained bias"),
        ("modules_to_save", config.get("modules_to_save") or whole, but_sglang, lost, "merge", ""),
        ("modules_to_save", config.get("modules_to_save") or whole, sglang, dropped, "merge", ""),
        ("trainable_token_indices", None, but_sglang, lost, "merge", ""),
        ("trainable_token_indices", None, sglang, dropped, "merge", ""),
        ("target_parameters", None, vllm, experts, "merge", ""),
        ("target_parameters", None, but_vllm, lost, "merge", ""),
        ("init_lora_weights", start, vllm, "not loaded before PEFT converts", "train", from_base),
        ("init_lora_weights", start, but_vllm, another, "train", from_base),
        ("r", 16 < rank <= VLLM_RANKS[-1], vllm, flag, "flag", "a rank over 16"),
        ("r", rank > VLLM_RANKS[-1], vllm, lost, "merge", f"a rank over {VLLM_RANKS[-1]}"),
        ("target_modules", beyond, all_of_them, "ignored, silently", "merge", seen),
        ("target_modules", outer, vllm, declared, "merge", f"an adapter on {outer}"),
        ("target_modules", outer and tied, others, one_matrix, "merge", f"an adapter on {outer}"),
        ("target_modules", expression, sglang, lost, "portable", "a regular expression"),
        ("target_modules", split, sglang, lost, "merge", incomplete),
        ("target_modules", unknown, sglang, lost, "merge", f"an adapter on {unknown}"),
    ]
    return [
        LoaderIssue(what or key, key, who, happens, fix)
        for key, applies, who, happens, fix, what in rows
        if (config.get(key) if applies is None else applies)
    ]


def vllm_rank(rank: int) -> int:
    """The smallest --max-lora-rank for a rank, or the largest one."""
    return next((one for one in VLLM_RANKS if one >= rank), VLLM_RANKS[-1])
