"""Small runs, trained for real in the test's process."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import RunMaker

import lora_kit

# Loud enough that the adapter changes what the model says, not only its digits.
LOUD = {"train.learning_rate": 3e-2, "train.max_steps": 8, "train.lr_scheduler_type": "constant"}


def finish(run_file: RunMaker, recipe: str = "cpt", **changes: Any) -> Path:
    """Train a run to its end; returns its directory."""
    file = run_file(recipe, **{**LOUD, **changes})
    lora_kit.train(file)
    return (file.parent / "runs" / changes.get("name", "test")).resolve()


def edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(file.read_text(encoding="utf-8"))
    change(values)
    file.write_text(json.dumps(values), encoding="utf-8")


def labelled(rows: list[tuple[list[int], list[int]]], units: list[int], sizes: list[int]) -> Any:
    """Rows of (ids, labels) in units of any order; `sizes`: bytes of each unit."""
    import numpy as np

    from lora_kit.data.rows import Rows

    written: set[int] = set()
    made = []
    for (ids, labels), unit in zip(rows, units, strict=True):
        size = 0 if unit in written else sizes[unit]  # in the unit's first row
        written.add(unit)
        tokens, targets = (np.array(some, np.int32) for some in (ids, labels))
        made.append({"input_ids": tokens, "labels": targets, "bytes": size, "unit": unit})
    return Rows.of(made)


def prepared(run: Any) -> Any:
    """What a run of `cpt` or `sft` would be trained and evaluated on."""
    from lora_kit.base.pin import pin
    from lora_kit.data.prepare import prepare
    from lora_kit.launch import load_recipe
    from lora_kit.run import recipe_path
    from lora_kit.tasks.encode import encode

    task = load_recipe(recipe_path(run)).task
    processor = task.processor(pin(run.base), run)
    split = prepare(run.data, task, run.seed)
    return encode(task, split, processor, task.facts(split.train, run), run)


def folder_maker(folder: Path, base: Path) -> RunMaker:
    """`run_file` for a fixture that outlives a test: it writes into `folder` and goes there."""
    import conftest

    os.chdir(folder)
    return conftest.run_file.__wrapped__(folder, base)  # type: ignore[attr-defined]
