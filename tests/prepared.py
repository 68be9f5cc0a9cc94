"""Small data sets, and what `prepare` makes of them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lora_kit.data.prepare import Kind, Prepared, prepare
from lora_kit.schema import Data

_SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]


def texts(count: int, words: int = 12, seed: int = 0) -> list[str]:
    """Texts of invented words, none of them like another."""
    chooser = random.Random(seed)
    lexicon = [
        "".join(chooser.choices(_SYLLABLES, k=chooser.choice([1, 2, 3]))) for _ in range(500)
    ]
    return [" ".join(chooser.choices(lexicon, k=words)) for _ in range(count)]


def chats(count: int, words: int = 12, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of a prompt and a completion."""
    both = texts(2 * count, words, seed)
    return [{"prompt": p, "completion": c} for p, c in zip(both[::2], both[1::2], strict=True)]


def put(file: Path, rows: Iterable[dict[str, Any]]) -> str:
    """Write rows as jsonl; returns the file's name."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def put_texts(file: Path, parts: Iterable[str]) -> str:
    """Write documents as text, each of them from a line of its own."""
    file.write_text("<|endoftext|>\n".join(parts), encoding="utf-8")
    return str(file)


def prepared(
    tokenizer: Any,
    kind: Kind | None = "chat",
    *,
    max_length: int = 512,
    seed: int = 0,
    check: bool = True,
    **data: Any,
) -> Prepared:
    """`prepare` with these settings of `data:`; one process unless told."""
    return prepare(Data(**{"workers": 1, **data}), kind, tokenizer, max_length, seed, check)


def said(found: Prepared, use: str, tokenizer: Any) -> list[str]:
    """The rows of a use as text."""
    rows = found.rows(use)
    return [tokenizer.decode(rows[n]["input_ids"]) for n in range(len(rows))]
