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
from lora_kit.adapter.files import fingerprint
from lora_kit.data.rows import Rows

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


def on_own_base(run: Path, base: Path, own: Path) -> None:
    """Let a copied run be one of a copy of its base, `own`, that may be changed."""
    shutil.copytree(base, own)
    for name in ("run.yaml", "run.lock.json", "adapter/adapter_config.json"):
        text = (run / name).read_text(encoding="utf-8")
        (run / name).write_text(text.replace(str(base), str(own)), encoding="utf-8")


def edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(file.read_text(encoding="utf-8"))
    change(values)
    file.write_text(json.dumps(values), encoding="utf-8")


def relock(run: Path) -> None:
    """Let the lock file of a run name the files of its adapter as they are now."""
    edit(run / "run.lock.json", lambda c: c.update(adapter=fingerprint(run / "adapter")))


def labelled(rows: list[tuple[list[int], list[int]]], units: list[int], sizes: list[int]) -> Rows:
    """Rows of (ids, labels) in units of any order; `sizes`: bytes of each unit."""
    first = {unit: units.index(unit) for unit in units}
    return Rows.of(
        {
            "input_ids": ids,
            "labels": labels,
            "unit": unit,
            "bytes": sizes[unit] if first[unit] == number else 0,
        }
        for number, ((ids, labels), unit) in enumerate(zip(rows, units, strict=True))
    )


def prepared(run: Any, task: Any = None) -> Any:
    """What a run is trained on; by default one of `sft`."""
    from lora_kit.base.pin import pin
    from lora_kit.tasks.causal import Conversations
    from lora_kit.tasks.encode import rows_of

    return rows_of(task or Conversations(), run, pin(run.base), limits=False)[1]


def folder_maker(folder: Path, base: Path) -> RunMaker:
    """`run_file` for a fixture that outlives a test: it writes into `folder` and goes there."""
    import conftest

    os.chdir(folder)
    return conftest.run_file.__wrapped__(folder, base)  # type: ignore[attr-defined]
