"""The run directory runs/<name>/: created before the model is loaded, completed by `save_run`.

run.yaml  run.lock.json  census.json  metrics.jsonl  report.json  report.html
adapter/  checkpoints/  tensorboard/ (with train.report_to: [tensorboard])
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lora_kit.adapter.finished import FinishedRun
from lora_kit.base.pin import Pinned
from lora_kit.errors import CheckFailed, UserError, redact
from lora_kit.run import WORLD_SIZE_VARIABLE, check_free, load_run, read_lock, write_run
from lora_kit.schema import Adapter, Run
from lora_kit.tasks.task import Task
from lora_kit.train import checkpoint

# Keys that may change on resume: they do not affect the training. eval_steps does: it determines
# the best adapter and early stopping.
FREE_TO_CHANGE = {
    *("train.logging_steps", "train.save_steps", "train.save_total_limit", "train.report_to"),
    *("train.dataloader_num_workers", "train.per_device_eval_batch_size", "data.workers"),
    "train.load_best_model_at_end",  # to use the last adapter if the best checkpoint is corrupt
}
# Keys that name files without a hash in the lock file.
_NOT_HASHED = ("recipe", "adapter.start", "data.labels")
_LIBRARIES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "lora-kit")


def is_first_rank() -> bool:
    """Whether this is rank 0, the rank that writes files and messages."""
    return os.environ.get("RANK", "0") == "0"


class RunDirectory:
    """Paths of one run's files. Every rank has one; only rank 0 writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.adapter = path / "adapter"
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.lock_file = path / "run.lock.json"

    def say(self, text: str) -> None:
        """Print a line to stderr, on rank 0 only."""
        if is_first_rank():
            print(redact(text), file=sys.stderr, flush=True)

    def lock(self, **entries: Any) -> None:
        """Add entries to run.lock.json."""
        if is_first_rank():
            checkpoint.write_json(self.lock_file, {**read_lock(self.path), **entries})

    def check_world(self, running: int) -> None:
        """Raises CheckFailed if the number of processes is not the requested one.

        `accelerate launch` silently starts a single process for some multi-process configs.
        """
        asked = int(os.environ.get(WORLD_SIZE_VARIABLE) or processes())
        if asked != running:
            raise CheckFailed(
                f"{asked} processes requested, {running} running: on CPU use --accelerate "
                "cpu_2proc; on GPUs check that `lora-kit doctor` lists them"
            )

    def checkpoint_to_resume(self) -> checkpoint.Checkpoint:
        """The newest intact checkpoint; problems of newer ones are reported.

        Raises:
            UserError: there is none.
        """
        problems = []
        for folder in checkpoint.newest_first(self.checkpoints):
            try:
                return checkpoint.read_seal(folder)
            except UserError as error:
                self.say(f"skipping a checkpoint: {error}")
                problems.append(str(error))
        raise UserError(
            f"{self.path}: no intact checkpoint to resume from "
            f"({'; '.join(problems) or 'none was saved'}): remove the folder and start again, or "
            "choose another with name=NAME"
        )


def batch_geometry(run: Run) -> dict[str, int]:
    """The batch of one optimizer step: processes x micro-batches x rows."""
    ranks = processes()
    rows, steps = run.train.per_device_train_batch_size, run.train.gradient_accumulation_steps
    return {
        "processes": ranks,
        "gradient_accumulation_steps": steps,
        "per_device_train_batch_size": rows,
        "rows_per_step": ranks * steps * rows,
        "max_length": run.train.max_length,
    }


def processes() -> int:
    """The world size that accelerate sets, before the process group is initialized."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def create(
    directory: RunDirectory,
    run: Run,
    pinned: Pinned,
    hashes: Mapping[str, str],
    lock: dict[str, Any],
) -> None:
    """Create the directory of a new run, with run.yaml and run.lock.json.

    Args:
        hashes: of the data, by source. lock: further entries of the lock file.

    Raises:
        UserError: it exists, or cannot be created.
    """
    check_free(run.directory)
    try:
        directory.path.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{directory.path}: cannot be created ({error.strerror})") from None
    write_run(_with_commit(run, pinned), directory.path / "run.yaml")
    versions = {name: version(name) for name in _LIBRARIES}
    directory.lock(
        **_pinned(run, pinned, hashes, directory.path),
        batch=batch_geometry(run),
        seed=run.seed,
        versions={"python": platform.python_version(), **versions},
        finished=False,
        **lock,
    )


def _pinned(run: Run, pinned: Pinned, hashes: Mapping[str, str], path: Path) -> dict[str, Any]:
    """Entries of the lock file: base and data with their hashes, named as in run.yaml."""
    base = {**pinned.to_lock(), **run.base.model_dump(include={"dtype", "quantize"})}
    base["model"] = run.written(pinned.model, path)
    data = {run.written(name, path): digest for name, digest in hashes.items()}
    return {"base": base, "data": data}


def reopen(directory: RunDirectory, run: Run, pinned: Pinned, hashes: Mapping[str, str]) -> None:
    """Rewrite run.yaml with the keys that may change, atomically, since other ranks read it. Also
    updates the paths in the lock file: data and base may have moved."""
    partial = directory.path / "run.yaml.partial"
    write_run(_with_commit(run, pinned), partial)
    partial.replace(directory.path / "run.yaml")
    directory.lock(**_pinned(run, pinned, hashes, directory.path))


def remove(directory: RunDirectory) -> None:
    """Remove the directory of a run that has not trained yet."""
    shutil.rmtree(directory.path, ignore_errors=True)
    for parent in directory.path.parents:  # also runs/ and folders in it, if empty
        if parent == Path(".") or any(parent.iterdir()):
            return
        parent.rmdir()


def _with_commit(run: Run, pinned: Pinned) -> Run:
    """The run with the base's commit, so that the file alone reproduces it."""
    base = run.base.model_copy(update={"revision": pinned.revision})
    return run.model_copy(update={"base": base})


def check_start(adapter: Adapter, pinned: Pinned, auto: str, labels: Sequence[str]) -> None:
    """Check that the adapter to start from is one of this base and of these classes: it fits any
    base of the same shapes, and a head any classes of the same number.

    Args:
        auto: the class of transformers that loads the model. labels: its classes, in order.

    Raises:
        UserError: it is not.
    """
    if not adapter.start:
        return
    start = FinishedRun(adapter.start)
    if start.auto != auto:
        raise UserError(
            f"adapter.start: {adapter.start}: an adapter for {start.auto}, and this recipe trains "
            f"{auto}"
        )
    if (known := start.head.labels) != tuple(labels):
        raise UserError(
            f"adapter.start: {adapter.start}: its classes are {', '.join(known)}, here they are "
            f"{', '.join(labels)}: name them as there, in that order, in data.labels"
        )
    if start.hashes and start.hashes != pinned.hashes:
        raise UserError(
            f"adapter.start: {adapter.start}: trained on another base "
            f"({start.lock['base'].get('model')}), not on {pinned.model}"
        )


def check_same(
    directory: RunDirectory, run: Run, task: Task, pinned: Pinned, hashes: Mapping[str, str]
) -> None:
    """Check that a run is resumed with the settings it was started with.

    Args:
        task: its keys are compared, too. hashes: of the data, by source.

    Raises:
        UserError: the run does not exist, is finished, or differs in seed, data, batch,
            learning rate, base or any other key that affects the result.
    """
    path = directory.path
    if not (path / "run.yaml").is_file():
        raise UserError(f"{path}: no such run to resume; remove --resume")
    lock = read_lock(path)
    if not lock.keys() >= {"base", "data", "batch"}:
        raise UserError(
            f"{directory.lock_file}: missing or incomplete, so the run cannot be resumed: remove "
            "the folder and start again, or choose another with name=NAME"
        )
    if lock.get("finished"):
        raise UserError(f"{path}: already finished; choose another with name=NAME")
    begun = load_run(path / "run.yaml", needs_sources=False, task_of=lambda _: task)
    before, now = (_flat(r.model_dump(mode="json")) for r in (begun, run))
    recorded: dict[str, str] = lock["data"]

    def moved(key: str) -> bool:
        """Whether a key names the same files under another path."""
        first, second = before.get(key), now.get(key)
        if key in _NOT_HASHED and isinstance(first, str) and isinstance(second, str):
            return Path(first).name == Path(second).name and not Path(first).exists()
        first = _by_content(first, lambda name: recorded.get(begun.written(name, path)))
        return key.startswith("data.") and first == _by_content(second, hashes.get)

    problems = [
        f"{key} was {before.get(key)!r}, is now {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
        and key not in FREE_TO_CHANGE
        and not key.startswith("prove.")  # it affects the evaluation only
        and key not in ("base.model", "base.revision")  # compared by the hashes below
        and not moved(key)
    ]
    if lock["batch"]["processes"] != processes():
        problems.append(f"processes were {lock['batch']['processes']}, are now {processes()}")
    if lock["base"]["hashes"] != pinned.hashes:
        problems.append(f"the files of the base {pinned.model} were changed")
    for source, digest in sorted(hashes.items()):
        # A moved source has a new name, but its content must be among what was read.
        known = recorded.get(run.written(source, path))
        if digest != known and (known is not None or digest not in recorded.values()):
            problems.append(f"{source} was changed")
    if problems:
        raise UserError(f"{path}: cannot be resumed with other settings: " + "; ".join(problems))


def _by_content(value: Any, hash_of: Callable[[str], str | None]) -> Any:
    """A value of `data:` with sources replaced by the hash of their content, if known."""
    if isinstance(value, list):
        return [_by_content(item, hash_of) for item in value]
    if isinstance(value, dict):
        return {key: _by_content(item, hash_of) for key, item in value.items()}
    return (hash_of(value) or value) if isinstance(value, str) else value


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
