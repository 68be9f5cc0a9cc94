"""A fast path for byte-level BPE tokenizers: ASCII text is tokenized word by word, with a cache.

Most tokenizers (GPT-2's, Llama 3's, Qwen's) split text into words by a regular expression and merge
bytes within each word. Splitting takes most of the time, and words repeat: here Python's `re`
splits, and a dictionary caches the tokens of each word. The tokens are the same, in less than half
the time. Non-ASCII text and other tokenizers use the tokenizer itself.
"""

from __future__ import annotations

import json
import re
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from lora_kit.schema import Json

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from tokenizers.models import Model

# The pattern built into ByteLevel.
_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Control characters: Python's `re` and tokenizers differ in which of them are white space.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_MOST_WORDS = 100_000  # 25 MB
_CHECKED = 256  # one in so many texts is compared with the tokenizer
_PROBES = ["I'll say: it's  2,048   tabs\t\tand\n\n lines\r\n\n  x = f(a)\n", " ", "\n", "DON'T'S"]


class WordEncoding:
    """Tokens with the methods of tokenizers.Encoding that are used here.

    A byte-level token of ASCII text has as many characters as its name.
    """

    def __init__(self, ids: list[int], sizes: np.ndarray) -> None:
        self.ids = ids
        self._ends = np.cumsum(sizes[ids]) if ids else np.zeros(0, np.int64)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def characters(self) -> int:
        """Length of the text that the tokens spell."""
        return int(self._ends[-1]) if self.ids else 0

    def char_to_token(self, position: int) -> int | None:
        token = int(np.searchsorted(self._ends, position, side="right"))
        return token if token < len(self.ids) else None

    def token_to_chars(self, token: int) -> tuple[int, int]:
        return int(self._ends[token - 1]) if token else 0, int(self._ends[token])


class WordEncoder:
    """Encodes texts without adding special tokens, like `tokenizer.encode_batch`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.words = _words_of(tokenizer)
        self.count = 0
        if self.words and any(not self._agrees(text) for text in _PROBES):
            self.words = None

    def __call__(self, texts: list[str]) -> list[WordEncoding | Encoding]:
        """Encodings with `ids`, `len`, `char_to_token`, `token_to_chars`."""
        fast = [self._fast(text) for text in texts]
        others = [text for text, found in zip(texts, fast, strict=True) if found is None]
        encoded = iter(self.tokenizer.encode_batch(others, add_special_tokens=False))
        return [next(encoded) if found is None else found for found in fast]

    def _fast(self, text: str) -> WordEncoding | None:
        if self.words is None or not text.isascii() or _CONTROL.search(text):
            return None
        self.count += 1
        if self.count % _CHECKED == 1 and not self._agrees(text):
            self.words = None
            return None
        encoding = self.words.encode(text)
        return encoding if encoding.characters == len(text) else None

    def _agrees(self, text: str) -> bool:
        assert self.words is not None
        expected = self.tokenizer.encode(text, add_special_tokens=False).ids
        return self.words.encode(text).ids == expected


class _Words(dict[str, list[int]]):
    """A cache: word -> its tokens."""

    def __init__(
        self, model: Model, pattern: str, added: dict[str, int], sizes: np.ndarray
    ) -> None:
        super().__init__()
        self.model = model
        self.sizes = sizes
        self.cut = re.compile(pattern, re.ASCII).findall
        self.added = added
        longest_first = sorted(added, key=len, reverse=True)
        self.split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")").split

    def __missing__(self, word: str) -> list[int]:
        if len(self) > _MOST_WORDS:
            self.clear()
        ids = [token.id for token in self.model.tokenize(word.translate(_BYTES))]
        self[word] = ids
        return ids

    def encode(self, text: str) -> WordEncoding:
        ids: list[int] = []
        for n, part in enumerate(self.split(text) if self.added else [text]):
            if n % 2:
                ids.append(self.added[part])
            elif part:
                ids += chain.from_iterable(map(self.__getitem__, self.cut(part)))
        return WordEncoding(ids, self.sizes)


# Byte-level BPE represents bytes that are not printable ASCII as characters from U+0100 on.
_BYTES = {code: chr(256 + code) for code in range(33)} | {127: chr(256 + 33)}


def _words_of(tokenizer: Tokenizer) -> _Words | None:
    """The word cache for a tokenizer; None if it is not supported (see above)."""
    parts = json.loads(tokenizer.to_str())
    model, added = parts["model"], parts["added_tokens"] or []
    if model["type"] != "BPE" or model.get("dropout") or model.get("byte_fallback"):
        return None
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return None
    if parts["normalizer"] not in (None, {"type": "NFC"}):  # NFC leaves ASCII as it is
        return None
    pattern = _pattern_of(parts["pre_tokenizer"])
    strips = any(t["lstrip"] or t["rstrip"] or t["single_word"] for t in added)
    # Normalized and unnormalized added tokens would need two passes.
    pattern = pattern and _ascii_pattern(pattern)
    if not pattern or strips or len({t["normalized"] for t in added}) > 1:
        return None
    names = tokenizer.get_vocab(with_added_tokens=True)
    sizes = np.zeros(max(names.values(), default=0) + 1, dtype=np.int64)
    for name, number in names.items():
        sizes[number] = len(name)
    return _Words(tokenizer.model, pattern, {t["content"]: t["id"] for t in added}, sizes)


def _ascii_pattern(pattern: str) -> str | None:
    """An equivalent pattern for ASCII text that `re` supports, or None."""
    classes = {r"\p{L}": "A-Za-z", r"\p{N}": "0-9"}
    inside, parts = False, []
    for part in re.findall(r"\\p\{\w+\}|\\.|.", pattern, re.DOTALL):
        if part.startswith((r"\p", r"\P")):
            if part not in classes:
                return None
            part = classes[part] if inside else f"[{classes[part]}]"
        inside = part == "[" or (inside and part != "]")
        parts.append(part)
    try:
        groups = re.compile("".join(parts), re.ASCII).groups
    except re.error:
        return None
    return None if groups else "".join(parts)  # `findall` would return groups, not words


def _pattern_of(pre_tokenizer: Json | None) -> str | None:
    """The regular expression that splits text into words; None if another rule splits it."""
    if pre_tokenizer is None:
        return None
    parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    for part in parts:
        part.pop("trim_offsets", None)  # changes no token
    bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    if parts == [bytes_only | {"use_regex": True}]:
        return _GPT2
    if len(parts) != 2 or parts[1] != bytes_only or parts[0]["type"] != "Split":
        return None
    if parts[0]["behavior"] != "Isolated" or parts[0]["invert"]:
        return None
    pattern: str | None = parts[0]["pattern"].get("Regex")
    return pattern
