"""Small runs, trained for real in the test's process.

Most tests only look at a finished run: they take `cpt_run` or `sft_run` of conftest.py, which are
trained once, and change what `copied` gives.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import RunMaker

import lora_kit

# Loud enough that the adapter changes what the model says, not only its digits.
LOUD = {"train.learning_rate": 3e-2, "train.max_steps": 8, "train.lr_scheduler_type": "constant"}


def finish(run_file: RunMaker, recipe: str = "cpt", **changes: Any) -> Path:
    """Train a run to its end; returns its directory."""
    file = run_file(recipe, **{**LOUD, **changes})
    lora_kit.train(file)
    return (file.parent / "runs" / changes.get("name", "test")).resolve()


def finish_in(folder: Path, base: Path, recipe: str = "cpt", **changes: Any) -> Path:
    """`finish` for a fixture that outlives a test, in a working folder of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return finish(folder_maker(folder, base), recipe, **changes)


def copied(run: Path, folder: Path) -> Path:
    """A copy of a run in a new folder, with its data, to be changed; returns its directory."""
    shutil.copytree(run.parents[1], folder / "copied")
    return folder / "copied" / "runs" / run.name


def edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(file.read_text(encoding="utf-8"))
    change(values)
    file.write_text(json.dumps(values), encoding="utf-8")


def labelled(rows: list[tuple[list[int], list[int]]], units: list[int], sizes: list[int]) -> Any:
    """`Labelled` rows of (ids, labels) in units of any order; `sizes`: bytes of each unit."""
    import numpy as np

    from lora_kit.tasks.batches import IGNORED, LabelledWriter

    writer = LabelledWriter()
    for ids, labels in rows:
        assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
        writer.add(ids, [(n, n + 1) for n, label in enumerate(labels) if label != IGNORED])
    made = writer.finish()
    made.units, made.unit_bytes = np.array(units), np.array(sizes)
    return made


def prepared(run: Any, kind: Any = "chat") -> Any:
    """What a run would learn from."""
    from lora_kit.base.load import load_tokenizer
    from lora_kit.base.pin import pin
    from lora_kit.data.prepare import prepare

    tokenizer = load_tokenizer(pin(run.base))
    return prepare(run.data, kind, tokenizer, run.train.max_length, run.seed)


def folder_maker(folder: Path, base: Path) -> RunMaker:
    """`run_file` for a fixture that outlives a test: it writes into `folder` and goes there."""
    import conftest

    os.chdir(folder)
    return conftest.run_file.__wrapped__(folder, base)  # type: ignore[attr-defined]
