"""Small data sets, and what `prepare` makes of them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lora_kit.data.prepare import prepare
from lora_kit.data.rows import Rows
from lora_kit.schema import Data, Run
from lora_kit.tasks.batches import IGNORED
from lora_kit.tasks.causal import Conversations, Text
from lora_kit.tasks.encode import Prepared, encode

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


def run_of(recipe: str = "sft", max_length: int = 512, seed: int = 0, **data: Any) -> Run:
    """A run file with these settings of `data:`; one process prepares unless told."""
    return Run.model_validate(
        {
            "recipe": recipe,
            "name": "test",
            "seed": seed,
            "base": {"model": "nano"},
            "data": Data(**{"train": "nano:topics", "workers": 1, **data}),
            "train": {"max_length": max_length},
        }
    )


def prepared(
    tokenizer: Any,
    kind: str = "chat",
    *,
    max_length: int = 512,
    seed: int = 0,
    check: bool = True,
    **data: Any,
) -> Prepared:
    """What a run of `cpt` (kind: text) or `sft` is trained and evaluated on."""
    task = Text() if kind == "text" else Conversations()
    run = run_of("cpt" if kind == "text" else "sft", max_length, seed, **data)
    split = prepare(run.data, task, run.seed)
    facts = task.facts(split.train, run.data)
    return encode(task, split, tokenizer, facts, run, limits=check)


def said(found: Prepared, use: str, tokenizer: Any) -> list[str]:
    """The rows of a use as text."""
    return [tokenizer.decode(row["input_ids"]) for row in found.rows(use)]


def unit_bytes(rows: Rows) -> list[int]:
    """The UTF-8 bytes that the labels of each unit spell."""
    sizes = [0] * rows.units
    for unit, size in zip(rows.column("unit").tolist(), rows.column("bytes").tolist(), strict=True):
        sizes[unit] += size
    return sizes


def tokens(rows: Rows) -> int:
    """How many there are, padding not counted."""
    return int(rows.sizes("input_ids").sum())


def supervised(rows: Rows) -> int:
    """Labels that a loss is computed for."""
    return Text().supervised(rows)


def ids_of(rows: Rows) -> list[int]:
    """The tokens of all rows, concatenated."""
    return [token for row in rows for token in row["input_ids"].tolist()]


def spans(*rows: tuple[list[int], list[tuple[int, int]]]) -> Rows:
    """Rows of tokens, of which spans (first, last + 1) are supervised, each a unit of its own."""
    made = []
    for number, (ids, supervised_spans) in enumerate(rows):
        labels = [IGNORED] * len(ids)
        for first, last in supervised_spans:
            labels[first:last] = ids[first:last]
        made.append({"input_ids": list(ids), "labels": labels, "unit": number, "bytes": 0})
    return Rows.of(made)
