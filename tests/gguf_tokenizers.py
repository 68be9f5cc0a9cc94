"""Tokenizers of the kinds that llama.cpp knows, small, trained on text with digits and lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from conftest import sentences
from families import sentence_piece

_END = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# name -> the expression, and whether whole words are taken without their merges.
BYTE_LEVEL: dict[str, tuple[str, bool]] = {
    "gpt-2": ("", False),
    "smollm": ("digits", False),
    "llama-bpe": (_WORDS + r"\p{N}{1,3}|" + _END, True),
    "smaug-bpe": (_WORDS + r"\p{N}{1,3}|" + _END, False),
    "qwen2": (_WORDS + r"\p{N}|" + _END, False),
    "tekken": (_TEKKEN, True),
}
SENTENCE_PIECE = ("prepend", "metaspace always", "metaspace first", "metaspace never", "replace")
TEXT = [
    *sentences(100),
    *(f"{n} {n * 7} 10{n}0 year's they'll\n\n  x = [{n}]\n\t\tif a:\r\n" for n in range(60)),
    *("Übergröße café 日本語 Русский слово HelloWorld fooBAR...!!! // -- ==" for _ in range(20)),
]


def byte_level(folder: Path, name: str, bos: bool) -> None:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    expression, whole = BYTE_LEVEL[name]
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole))
    first: Any = pre_tokenizers.Split(Regex(expression), "isolated")
    if expression == "digits":
        first = pre_tokenizers.Digits(individual_digits=True)
    own = expression in ("", "digits")
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, last]) if expression else last
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=900,
            special_tokens=["<eos>", "<pad>", "<s>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 2)]
        )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        pad_token="<pad>",
        bos_token="<s>" if bos else None,
    ).save_pretrained(str(folder))


def with_spaces(folder: Path, kind: str) -> None:
    """Llama 2's, Mistral's and Gemma's kind. As in theirs, any two tokens that make one merge."""
    made = sentence_piece(markers=False)
    parts = json.loads(made.backend_tokenizer.to_str())
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    if kind.startswith("metaspace"):
        parts["normalizer"] = None
        scheme = {"prepend_scheme": kind.split()[1], "split": False}
        parts["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", **scheme}
    elif kind == "replace":
        parts["normalizer"] = space
        split = {"pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
        parts["pre_tokenizer"] = {"type": "Split", **split}
    model = parts["model"]
    model["merges"] = [
        [text[:cut], text[cut:]]
        for text in model["vocab"]
        for cut in range(1, len(text))
        if not text.startswith("<") and {text[:cut], text[cut:]} <= model["vocab"].keys()
    ]
    made.save_pretrained(str(folder))
    (folder / "tokenizer.json").write_text(json.dumps(parts), encoding="utf-8")
