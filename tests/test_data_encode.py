"""Any number of workers: the same files, and the same mistakes named."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from prepared import chats, prepared, put, put_texts, texts
from processes import until

from lora_kit.data import duplicates, readers, workers
from lora_kit.errors import UserError
from lora_kit.hashes import file_hash


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; and batches so small that a few rows are enough for a pool."""
    monkeypatch.setattr(readers, "BATCH_ROWS", 20)
    return use_cache(tmp_path / "cache", monkeypatch)


def use_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORA_KIT_CACHE", str(folder))
    return folder


def hashes(cache: Path) -> dict[str, str]:
    kept = sorted(folder for folder in cache.iterdir() if folder.is_dir())
    assert len(kept) == 2  # the split, and the encoded rows
    return {
        f"{folder.name}/{file.name}": file_hash(file)
        for folder in kept
        for file in sorted(folder.iterdir())
    }


@pytest.mark.slow
def test_any_number_of_workers_writes_the_same_bytes(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all that depends on several batches: samples, fractions, duplicates, dropped rows."""
    monkeypatch.setattr(duplicates, "LARGEST_SAMPLE", 60)
    rows = chats(400, 5)
    bad: list[dict[str, Any]] = [{"prompt": "?", "completion": None}] * 9
    mixed = [*rows, *bad, *rows[:30]]
    random.Random(0).shuffle(mixed)
    data = {
        "train": [
            {"source": put(tmp_path / "a.jsonl", mixed), "fraction": 0.7},
            {"source": put(tmp_path / "b.jsonl", chats(150, 5, seed=1)), "fraction": 0.3},
        ],
        "eval": 0.1,
        "general": put_texts(tmp_path / "general.txt", texts(120, seed=2)),
        "replay": 0.1,
        "decontaminate": put(tmp_path / "benchmark.jsonl", [{"q": r["prompt"]} for r in rows[:50]]),
    }
    batches = 439 // 20 + 150 // 20 + 120 // 20
    assert batches >= workers.FEWEST_FOR_WORKERS
    found = []
    for count in (1, 2, 3):
        folder = use_cache(tmp_path / f"cache-{count}", monkeypatch)
        census = prepared(tokenizer, check=False, workers=count, **data).census
        found.append(hashes(folder))
    assert found[0] == found[1] == found[2]
    assert 0 < census.compared <= 60 and census.duplicates["exact"] == 30


def alive(pid: int) -> bool:
    """Whether a process runs. One that has ended may stay, as in a container nobody reaps it."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def workers_of_this_process() -> list[int]:
    return [
        child.pid
        for child in psutil.Process().children(recursive=True)
        if alive(child.pid) and "LokyProcess" in Path(f"/proc/{child.pid}/cmdline").read_text()
    ]


def test_a_mistake_that_a_worker_finds_is_the_users(
    tmp_path: Path, tokenizer: Any, cache: Path
) -> None:
    lines = [json.dumps(row) for row in chats(300, 3)]
    lines[229] = '{"prompt": "a", "completion": '
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.jsonl:230: not JSON"):
        prepared(tokenizer, train=str(tmp_path / "a.jsonl"), workers=2)
    assert [file.suffix for file in cache.iterdir()] == [".lock"]
    assert not workers_of_this_process()


def test_few_rows_are_encoded_in_this_process(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "loky", None)  # importing it would fail
    train = put(tmp_path / "a.jsonl", chats(20 * (workers.FEWEST_FOR_WORKERS - 1), 3))
    assert len(prepared(tokenizer, train=train, workers=4).eval) == 14


WORKS_AND_IS_KILLED = """
import os, psutil, sys
from lora_kit.data import workers
results = workers.in_order(str, range(workers.FEWEST_FOR_WORKERS), 2)
next(results)
print(*[p.pid for p in psutil.Process().children() if "LokyProcess" in " ".join(p.cmdline())])
sys.stdout.flush()
os.kill(os.getpid(), 9)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks the kernel of Linux for it")
def test_workers_end_with_a_killed_parent() -> None:
    """They would wait for ever, and `lora-kit train` with them: it awaits its whole group."""
    command = [sys.executable, "-c", WORKS_AND_IS_KILLED]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        workers = [int(pid) for pid in process.stdout.readline().split()]
    assert len(workers) == 2
    try:
        assert until(lambda: not any(map(alive, workers)))
    finally:
        for pid in filter(alive, workers):
            os.kill(pid, signal.SIGKILL)
