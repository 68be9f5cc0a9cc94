"""Sources in, labelled tokens out: what each setting does, the same each time, and kept."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prepared import chats, prepared, put, put_texts, run_of, said, supervised, texts

from lora_kit.base.pin import Pinned
from lora_kit.base.templates import set_template
from lora_kit.data.rows import Rows
from lora_kit.errors import UserError
from lora_kit.hashes import file_hash
from lora_kit.schema import Data
from lora_kit.tasks import encode as module
from lora_kit.tasks.batches import IGNORED
from lora_kit.tasks.causal import Conversations
from lora_kit.tasks.encode import Prepared
from lora_kit.tasks.packing import Packed


@pytest.fixture(autouse=True)
def cache(own_cache: Path) -> Path:
    return own_cache


def rows(count: int = 60) -> list[dict[str, Any]]:
    """Pairs with more columns; one is broken."""
    other = texts(count, 6, seed=5)
    pairs = [
        {**row, "other": other[n], "doc": f"d{n % 12}"} for n, row in enumerate(chats(count, 6))
    ]
    return [*pairs, {**pairs[0], "completion": ""}]


def result(found: Prepared) -> str:
    """All that a run gets, as text: equal for equal runs."""
    parts: list[Any] = [found.facts, type(found.train).__name__, found.census.to_json()]
    for use in ("train", "eval", "general"):
        if getattr(found, use):
            parts += [
                [row["input_ids"].tolist(), row["labels"].tolist()] for row in found.rows(use)
            ]
    return json.dumps(parts)


def labelled_rows() -> list[dict[str, Any]]:
    return [{"text": text, "label": ("ham", "spam")[n % 2]} for n, text in enumerate(texts(60))]


# For each key of `data:` settings that differ by it alone; names of files are replaced.
CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "train": ({}, {"train": "more"}),
    "eval": ({"eval": 0.1}, {"eval": 0.4}),
    "general": ({}, {"general": "general"}),
    "replay": ({"general": "general"}, {"general": "general", "replay": 0.2}),
    "decontaminate": ({}, {"decontaminate": "more"}),
    "columns": ({}, {"columns": {"completion": "other"}}),
    "ignore": ({"train": "weighted"}, {"train": "weighted", "ignore": ["weight"]}),
    "labels": ({"train": "labelled"}, {"train": "labelled", "labels": ["spam"]}),
    "chat_template": ({}, {"chat_template": "alpaca"}),
    "supervise": ({}, {"supervise": "all"}),
    "packing": ({}, {"packing": "documents"}),
    "group": ({"eval": 0.5}, {"eval": 0.5, "group": "doc"}),
}


def files(folder: Path) -> dict[str, str]:
    return {
        "rows": put(folder / "rows.jsonl", rows()),
        "more": put(folder / "more.jsonl", rows()[:40]),
        "weighted": put(folder / "b.jsonl", [{**r, "weight": n % 2} for n, r in enumerate(rows())]),
        "labelled": put(folder / "labelled.jsonl", labelled_rows()),
        "general": put_texts(folder / "general.txt", texts(120, 12, seed=7)),
    }


def of_settings(folder: Path, plain: Any, settings: dict[str, Any], **more: Any) -> Prepared:
    """Prepared as the recipe does it."""
    named = files(folder)
    settings = {k: named.get(v, v) if isinstance(v, str) else v for k, v in settings.items()}
    tokenizer = copy.deepcopy(plain)
    tokenizer.chat_template = None
    set_template(tokenizer, settings.get("chat_template"))
    return prepared(tokenizer, **{"check": False, **more}, **{"train": named["rows"], **settings})


@pytest.mark.parametrize("key", CHANGES)
def test_each_key_of_data_changes_what_is_learned_or_judged(
    tmp_path: Path, tokenizer: Any, key: str
) -> None:
    before, after = (of_settings(tmp_path, tokenizer, settings) for settings in CHANGES[key])
    assert not before.cached and not after.cached
    assert result(before) != result(after)


def test_every_key_of_data_is_tried() -> None:
    """`limits` and `workers` change no result: one stops the run, the other is below."""
    assert CHANGES.keys() | {"limits", "workers"} == Data.model_fields.keys()


@pytest.mark.parametrize("change", [{"seed": 1}, {"max_length": 60}])
def test_other_settings_of_a_run_are_part_of_the_key(
    tmp_path: Path, tokenizer: Any, change: dict[str, Any]
) -> None:
    assert not of_settings(tmp_path, tokenizer, {}).cached
    assert of_settings(tmp_path, tokenizer, {}).cached
    assert not of_settings(tmp_path, tokenizer, {}, **change).cached


def test_limits_and_workers_prepare_nothing_again(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = []
    original = module.in_order

    def spy(*args: Any) -> Any:
        workers.append(args[-1])
        return original(*args)

    monkeypatch.setattr(module, "in_order", spy)
    before = of_settings(tmp_path, tokenizer, {"workers": 2})
    after = of_settings(
        tmp_path, tokenizer, {"workers": 3, "limits": {"dropped": 0.02}}, check=True
    )
    assert after.cached and result(after) == result(before) and workers == [2]
    with pytest.raises(UserError, match=r"data\.limits\.dropped"):
        of_settings(tmp_path, tokenizer, {"limits": {"dropped": 0.01}}, check=True)


def hashes(folder: Path) -> list[dict[str, str]]:
    return [
        {file.name: file_hash(file) for file in sorted(kept.iterdir())}
        for kept in sorted(folder.iterdir())
        if kept.is_dir()
    ]


def test_the_same_is_prepared_to_the_same_bytes_and_only_once(
    tmp_path: Path, tokenizer: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"general": "general", "replay": 0.2, "eval": 0.3}
    first = of_settings(tmp_path, tokenizer, settings)
    again = of_settings(tmp_path, tokenizer, settings)
    assert (first.cached, again.cached) == (False, True) and result(first) == result(again)
    assert again.files == first.files
    monkeypatch.setenv("LORA_KIT_CACHE", str(tmp_path / "other"))
    assert not of_settings(tmp_path, tokenizer, settings).cached
    kept = hashes(cache)
    assert kept == hashes(tmp_path / "other")
    # Two tables of examples, the split, meta.json, the seal; three of rows, the census, the seal.
    assert sorted(map(len, kept)) == [5, 5]


def test_a_changed_file_is_prepared_again_and_a_damaged_cache_too(
    tmp_path: Path, tokenizer: Any, cache: Path
) -> None:
    train = put(tmp_path / "a.jsonl", chats(30))
    first = result(prepared(tokenizer, train=train))
    for name in ("train.arrow", "train.examples"):
        (file,) = cache.glob(f"*/{name}")
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
        repaired = prepared(tokenizer, train=train)
        assert repaired.cached == (name == "train.examples") and result(repaired) == first
    put(tmp_path / "a.jsonl", [*chats(29), {"prompt": "another", "completion": "row"}])
    assert not prepared(tokenizer, train=train).cached


def test_a_source_that_is_no_use_leaves_the_cache_empty(
    tmp_path: Path, tokenizer: Any, cache: Path
) -> None:
    train = put(tmp_path / "a.jsonl", [{"prompt": "a", "completion": ""}] * 9)
    with pytest.raises(UserError, match=r"data\.train: no rows left; dropped: .*a\.jsonl:1"):
        prepared(tokenizer, train=train)
    assert [file.suffix for file in cache.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("kind", "train", "packing", "packed"),
    [
        ("chat", "rows", None, False),
        ("chat", "rows", "none", False),
        ("chat", "rows", "documents", True),
        ("text", "general", None, False),
        ("text", "general", "running", False),
        ("text", "general", "documents", True),
        ("text", "general", "none", False),
    ],
)
def test_rows_are_packed_as_asked(
    tmp_path: Path, tokenizer: Any, kind: Any, train: str, packing: Any, packed: bool
) -> None:
    source = files(tmp_path)[train]
    found = prepared(tokenizer, kind, train=source, packing=packing, eval=0.2)
    assert isinstance(found.train, Packed) == packed and isinstance(found.eval, Rows)
    assert ("packing: " in "\n".join(found.summary())) == packed
    inside = found.rows("train")
    learned = int((np.concatenate([found.train[n]["labels"] for n in range(len(found.train))])
                   != IGNORED).sum())  # fmt: skip
    if packed:
        assert learned == supervised(inside) and len(found.train) < len(inside)
    running = packing == "running" or (kind == "text" and packing is None)
    assert (inside.sizes("input_ids")[:-1] == 512).all() == running
    assert found.eval.units == (24 if train == "general" else 12)


def test_conversations_are_never_running_text(tmp_path: Path, tokenizer: Any) -> None:
    run = run_of(train=put(tmp_path / "a.jsonl", chats(9)), packing="running")
    with pytest.raises(UserError, match=r"data\.packing: running is for text"):
        Conversations().processor(Pinned("", str(tmp_path)), run.data)


def test_places_lead_back_to_the_file(tmp_path: Path, tokenizer: Any) -> None:
    train = put(tmp_path / "a.jsonl", chats(40))
    other = put(tmp_path / "b.jsonl", chats(9, seed=1))
    found = prepared(tokenizer, train=[train, other])
    originals = {f"{train}:{n}": row for n, row in enumerate(chats(40), 1)}
    originals |= {f"{other}:{n}": row for n, row in enumerate(chats(9, seed=1), 1)}
    places = []
    for use in ("train", "eval"):
        for n, text in enumerate(said(found, use, tokenizer)):
            places.append(found.place(found.rows(use), n))
            assert originals[places[-1]]["completion"] in text
    assert sorted(places) == sorted(originals)
    assert found.hashes.keys() == {train, other}
