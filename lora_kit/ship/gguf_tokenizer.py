"""A fast tokenizer -> the vocabulary, token types and merges that llama.cpp splits text with."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lora_kit.errors import UserError
from lora_kit.schema import Json
from lora_kit.ship.reload import template_ids
from lora_kit.tasks.task import Processor

if TYPE_CHECKING:
    from gguf import GGUFWriter, TokenType

# llama.cpp selects a pre-tokenizer by name; the name stands for regular expressions in
# src/llama-vocab.cpp. It is found here by the tokenizer's own expressions, and by whether a word
# that is a token skips the merges (ignore_merges).
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = (f"{_CONTRACTIONS}|{_WORD}|\\p{{N}}{{1,3}}|{_REST}",)
_QWEN2 = (f"{_CONTRACTIONS}|{_WORD}|\\p{{N}}|{_REST}",)
_PRE = {
    (("GPT-2",), False): "gpt-2",
    (("digits", "GPT-2"), False): "smollm",
    (_LLAMA3, True): "llama-bpe",
    (_LLAMA3, False): "smaug-bpe",
    (_QWEN2, False): "qwen2",
    ((_CASED,), True): "tekken",
}


def add_tokenizer(
    writer: GGUFWriter, tokenizer: Processor, vocab_size: int, ends: Sequence[int]
) -> None:
    """Add a transformers tokenizer to a `gguf.GGUFWriter`.

    Args:
        vocab_size: rows of the embeddings; rows without a token get a placeholder.
        ends: ids at which generation stops.

    Raises:
        UserError: llama.cpp does not support this type of tokenizer.
    """
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    model = parts["model"]
    if model["type"] != "BPE":
        raise UserError(f"a tokenizer of kind {model['type']} is not written as GGUF: only BPE is")
    vocab: dict[str, int] = model["vocab"]
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(vocab, merges, vocab_size))
        writer.add_add_space_prefix(_space_prefix(parts, tokenizer))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre(parts))
        writer.add_token_merges([" ".join(merge) for merge in merges])
    texts = {n: text for text, n in vocab.items()}
    texts |= {token["id"]: token["content"] for token in parts["added_tokens"]}
    writer.add_token_list([texts.get(n, f"[PAD{n}]") for n in range(vocab_size)])
    writer.add_token_types(_kinds(parts, vocab_size))
    before, after = _added_tokens(tokenizer)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
    # Without these ids llama.cpp assumes token 11, or 1 and 2.
    bos = [*before, tokenizer.bos_token_id, tokenizer.eos_token_id]
    writer.add_bos_token_id(next(n for n in bos if n is not None))
    writer.add_eos_token_id(tokenizer.eos_token_id)
    # llama.cpp would add the token to conversations, too, whose template may not write it.
    writer.add_add_bos_token(bool(before) and _first(tokenizer) in (None, *before))
    writer.add_add_eos_token(bool(after))
    if tokenizer.unk_token_id is not None:
        writer.add_unk_token_id(tokenizer.unk_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    others = [n for n in ends if n != tokenizer.eos_token_id]
    for n, add in zip(others, (writer.add_eot_token_id, writer.add_eom_token_id), strict=False):
        add(n)


def _first(tokenizer: Processor) -> int | None:
    """The token that conversations begin with; None if there is no chat template."""
    return next(iter(template_ids(tokenizer, [{"role": "user", "content": "a"}])), None)


def _steps(part: Json | None, several: str) -> list[Json]:
    """The steps of the normalizer or pre-tokenizer in tokenizer.json; a Sequence has them under the
    key `several`."""
    if part is None:
        return []
    return part[several] if part["type"] == "Sequence" else [part]


def _pre(parts: Json) -> str:
    """llama.cpp's name of a byte-level tokenizer's pre-tokenizer."""
    steps: list[str] = []
    for step in _steps(parts["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            steps += ["GPT-2"] if step["use_regex"] else []
        elif step["type"] == "Digits" and step["individual_digits"]:
            steps.append("digits")
        elif step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            steps.append(step["pattern"].get("Regex", ""))
        else:
            steps.append(step["type"])
    key = (tuple(steps), bool(parts["model"].get("ignore_merges")))
    cleaned = [step["type"] for step in _steps(parts["normalizer"], "normalizers")]
    if key not in _PRE or cleaned not in ([], ["NFC"]):
        how = " then ".join([*cleaned, *steps]) or "nothing"
        raise UserError(
            f"the tokenizer splits text by {how[:160]}, which is none of llama.cpp's "
            f"{', '.join(_PRE.values())}: export it with --to merged"
        )
    if cleaned:
        print("llama.cpp does not normalize text (NFC): letters that are written as two characters "
              "become other tokens there", file=sys.stderr)  # fmt: skip
    return _PRE[key]


def _space_prefix(parts: Json, tokenizer: Processor) -> bool:
    """Whether a tokenizer of SentencePiece's type adds a space before a text."""
    cleaned = _steps(parts["normalizer"], "normalizers")
    steps = [*cleaned, *_steps(parts["pre_tokenizer"], "pretokenizers")]
    prefix, spaces, specials = False, False, {token["id"] for token in parts["added_tokens"]}
    for step in steps:
        if step["type"] == "Prepend" and step["prepend"] == "▁":
            prefix = True
        elif step["type"] == "Replace" and step["content"] == "▁":
            spaces = True
        elif step["type"] == "Metaspace" and step["replacement"] == "▁":
            spaces, prefix = True, prefix or step["prepend_scheme"] == "always"
            # llama.cpp also adds it after a special token, with which conversations begin.
            prefix |= step["prepend_scheme"] == "first" and _first(tokenizer) not in specials
        elif step["type"] != "Split" or step["pattern"] != {"String": " "}:
            raise UserError(
                f"the tokenizer's step {step['type']} is not known to llama.cpp: export it with "
                "--to merged"
            )
    if not spaces:
        raise UserError("the tokenizer does not write spaces as ▁: export it with --to merged")
    return prefix


def _scores(vocab: dict[str, int], merges: list[tuple[str, ...]], vocab_size: int) -> list[float]:
    """A score for each token, by the rank of its merge: llama.cpp merges neighbours whose union is
    a token, the highest score first. (SentencePiece merges all such pairs, too.)"""
    scores = [0.0] * vocab_size
    for rank, (left, right) in enumerate(merges):
        token = vocab.get(left + right)
        if token is not None and scores[token] == 0:
            scores[token] = -1.0 - rank
    return scores


def _kinds(parts: Json, vocab_size: int) -> list[TokenType]:
    """The type of each token: normal, byte, control, ..."""
    from gguf import TokenType

    fallback, kinds = parts["model"].get("byte_fallback"), [TokenType.UNUSED] * vocab_size
    for text, n in parts["model"]["vocab"].items():
        byte = fallback and len(text) == 6 and text.startswith("<0x")
        kinds[n] = TokenType.BYTE if byte else TokenType.NORMAL
    for token in parts["added_tokens"]:
        kinds[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    unknown = parts["model"]["vocab"].get(parts["model"].get("unk_token") or "")
    if fallback and unknown is not None:
        kinds[unknown] = TokenType.UNKNOWN
    return kinds


def _added_tokens(tokenizer: Processor) -> tuple[list[int], list[int]]:
    """The special tokens that are added before and after each text, at most one each."""
    encoded = tokenizer.backend_tokenizer.encode("a")
    first = encoded.special_tokens_mask.index(0)
    end = first + encoded.special_tokens_mask.count(0)
    before, after = encoded.ids[:first], encoded.ids[end:]
    if max(len(before), len(after)) > 1:
        raise UserError("the tokenizer adds several tokens to a text: llama.cpp, one")
    return before, after
