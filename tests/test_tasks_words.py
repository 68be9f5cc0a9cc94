"""Word by word or by the tokenizer itself: the same tokens, and the same labels."""

from __future__ import annotations

import random
from typing import Any

import pytest
from conftest import CHATML, sentences
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lora_kit.data.formats import Example
from lora_kit.tasks.chat import ChatEncoder
from lora_kit.tasks.words import WordEncoder

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How three families cut text into words; None: what ByteLevel has built in.
PATTERNS = {"gpt2": None, "llama3": _WORDS % "{1,3}", "qwen": _WORDS % ""}
PIECES = [
    *("the", "fox", "DON'T", "I'll", "'s", "1234567", "3.14", "x = f(a)\n    return y", "!!!"),
    *(" ", "   ", "\n", "\n\n", "\t", "\r\n", "\r", "#", "{'a': 1}", "<|im_end", "</s>", "://"),
]
OTHERS = ["größe", "日本語", "👩‍💻", "\u00a0", "'ſ", "\u2028", "e\u0301", "\u0085", "½"]


def make(pattern: str | None, trim_offsets: bool = True) -> Any:
    """A byte-level BPE of 600 tokens with a ChatML template."""
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(
        add_prefix_space=False, trim_offsets=trim_offsets, use_regex=pattern is None
    )
    tokenizer.pre_tokenizer = byte_level
    if pattern:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["</s>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*sentences(200), *PIECES * 9, *OTHERS * 9], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", chat_template=CHATML
    )


def said(chooser: random.Random, others: bool) -> str:
    pieces = PIECES + OTHERS if others else PIECES
    return "a" + "".join(chooser.choices(pieces, k=chooser.randint(1, 12)))


@pytest.mark.parametrize("family", PATTERNS)
def test_words_are_encoded_as_the_tokenizer_does(family: str) -> None:
    backend = make(PATTERNS[family]).backend_tokenizer
    encode = WordEncoder(backend)
    chooser = random.Random(0)
    texts = [said(chooser, others=n % 3 == 0) for n in range(300)] + ["", "zero\0byte", "\x1c a"]
    found = encode(texts)
    assert encode.words is not None and len(encode.words) > 50
    expected = backend.encode_batch(texts, add_special_tokens=False)
    assert [each.ids for each in found] == [each.ids for each in expected]


@pytest.mark.parametrize("trim_offsets", [True, False])
@pytest.mark.parametrize("family", PATTERNS)
def test_the_same_is_learned_on_both_ways(family: str, trim_offsets: bool) -> None:
    tokenizer = make(PATTERNS[family], trim_offsets)
    chooser = random.Random(1)
    rows = [
        Example(
            "rows:1",
            messages=tuple(
                {"role": role, "content": said(chooser, others=n % 4 == 0)}
                for role in ("user", "assistant") * 2
            ),
        )
        for n in range(100)
    ]
    for supervise in ("assistant", "last", "all"):
        words, itself = (ChatEncoder(tokenizer, supervise, 200) for _ in range(2))
        itself.encode.words = None
        found = [str(row) for row in words(rows)]  # a row that is left out says why
        assert words.encode.words is not None
        assert found == [str(row) for row in itself(rows)]


@pytest.mark.parametrize(
    "pattern",
    [
        r"(\p{L}+)|(\p{N}+)|[^\p{L}\p{N}]",  # `re.findall` would give its groups
        r"\p{Lu}?\p{Ll}+|.",  # a class that `re` does not know
        r"\p{L}+",  # leaves text between its words
    ],
)
def test_what_re_cuts_otherwise_goes_through_the_tokenizer(pattern: str) -> None:
    backend = make(pattern).backend_tokenizer
    texts = ["It is 12 o'clock.", "DON'T </s> know"]
    expected = backend.encode_batch(texts, add_special_tokens=False)
    assert [each.ids for each in WordEncoder(backend)(texts)] == [each.ids for each in expected]


def test_a_normalizer_that_changes_ascii_goes_through_the_tokenizer() -> None:
    backend = make(None).backend_tokenizer
    backend.normalizer = normalizers.Lowercase()
    encode = WordEncoder(backend)
    assert encode.words is None
    assert encode(["THE FOX"])[0].ids == backend.encode("the fox").ids
