"""The run directory runs/<name>/: created before the model is loaded, completed by `save_run`.

run.yaml  run.lock.json  census.json  metrics.jsonl  report.json  report.html
adapter/  checkpoints/  tensorboard/ (with train.report_to: [tensorboard])

Only rank 0 writes files and messages.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from lora_kit.adapter.finished import FinishedRun
from lora_kit.base.pin import Pinned
from lora_kit.errors import CheckFailed, UserError, redact
from lora_kit.folders import write_whole
from lora_kit.run import WORLD_SIZE_VARIABLE, check_free, load_run, read_lock, write_run
from lora_kit.schema import Adapter, Json, Run, Train
from lora_kit.tasks.task import Task

# Keys that may change on resume: they do not affect the training. eval_steps does: it determines
# the best adapter and early stopping.
FREE_TO_CHANGE = {
    "train.logging_steps",
    "train.save_steps",
    "train.save_total_limit",
    "train.report_to",
    "train.dataloader_num_workers",
    "train.per_device_eval_batch_size",
    "train.load_best_model_at_end",  # to use the last adapter if the best checkpoint is corrupt
    "data.workers",
    "base.model",  # the base is compared by the hashes of its files
    "base.revision",
}
# Keys that name files without a hash in the lock file.
_NOT_HASHED = ("recipe", "adapter.start", "data.labels")
_LIBRARIES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "lora-kit")


def is_first_rank() -> bool:
    """Whether this is rank 0, the rank that writes files and messages."""
    return os.environ.get("RANK", "0") == "0"


def processes() -> int:
    """The world size that accelerate sets, before the process group is initialized."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_processes(running: int) -> None:
    """Raises CheckFailed if the number of processes is not the requested one.

    `accelerate launch` silently starts a single process for some multi-process configs.
    """
    asked = int(os.environ.get(WORLD_SIZE_VARIABLE) or processes())
    if asked != running:
        raise CheckFailed(
            f"{asked} processes requested, {running} running: on CPU use --accelerate "
            "cpu_2proc; on GPUs check that `lora-kit doctor` lists them"
        )


def say(text: str) -> None:
    """Print a line to stderr, on rank 0 only."""
    if is_first_rank():
        print(redact(text), file=sys.stderr, flush=True)


def write_json(path: Path, content: object) -> None:
    """Write a JSON file atomically."""
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def add_to_lock(directory: Path, **entries: object) -> None:
    """Add entries to run.lock.json, on rank 0 only."""
    if is_first_rank():
        write_json(directory / "run.lock.json", {**read_lock(directory), **entries})


def batch_geometry(train: Train) -> dict[str, int]:
    """The batch of one optimizer step: processes x micro-batches x rows."""
    rows, accumulation = train.per_device_train_batch_size, train.gradient_accumulation_steps
    return {
        "processes": processes(),
        "gradient_accumulation_steps": accumulation,
        "per_device_train_batch_size": rows,
        "rows_per_step": processes() * accumulation * rows,
        "max_length": train.max_length,
    }


def create(run: Run, pinned: Pinned, hashes: Mapping[str, str], entries: Json) -> None:
    """Create the directory of a new run, with run.yaml and run.lock.json.

    Args:
        hashes: of the data, by source. entries: further ones of the lock file.

    Raises:
        UserError: it exists, or cannot be created.
    """
    check_free(run.directory)
    try:
        run.directory.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{run.directory}: cannot be created ({error.strerror})") from None
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        versions[name] = version(name)
    fixed = {
        "batch": batch_geometry(run.train),
        "seed": run.seed,
        "versions": versions,
        "finished": False,
    }
    write_run_files(run, pinned, hashes, {**fixed, **entries})


def write_run_files(run: Run, pinned: Pinned, hashes: Mapping[str, str], entries: Json) -> None:
    """Write run.yaml and these entries of run.lock.json. Called again on resume: some keys may have
    changed, and data and base may have moved. Atomic, since other ranks read the files."""
    path = run.directory
    # With the base's commit, so that the file alone reproduces the run.
    base = run.base.model_copy(update={"revision": pinned.revision})
    partial = path / "run.yaml.partial"
    write_run(run.model_copy(update={"base": base}), partial)
    partial.replace(path / "run.yaml")
    locked = {**pinned.to_lock(), **run.base.model_dump(include={"dtype", "quantize"})}
    locked["model"] = run.written(pinned.model, path)
    data = {run.written(name, path): digest for name, digest in hashes.items()}
    add_to_lock(path, base=locked, data=data, **entries)


def remove(directory: Path) -> None:
    """Remove the directory of a run that has not trained yet, and parents that are empty then."""
    shutil.rmtree(directory, ignore_errors=True)
    for parent in directory.parents:  # runs/, and folders in it for a name such as a/b
        if parent == Path(".") or any(parent.iterdir()):
            return
        parent.rmdir()


def check_start(adapter: Adapter, pinned: Pinned, auto: str, labels: Sequence[str]) -> None:
    """Check that the adapter to start from was trained on this base, for these classes. Without the
    check it would load into any base of the same shapes, with any classes of the same number.

    Args:
        auto: the auto class of transformers. labels: the names of the classes, in order.

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
    known = start.head.labels
    if known != tuple(labels):
        raise UserError(
            f"adapter.start: {adapter.start}: its classes are {', '.join(known)}, here they are "
            f"{', '.join(labels)}: name them as there, in that order, in data.labels"
        )
    if start.hashes and start.hashes != pinned.hashes:
        raise UserError(
            f"adapter.start: {adapter.start}: trained on another base "
            f"({start.lock['base'].get('model')}), not on {pinned.model}"
        )


def check_same(run: Run, task: Task, pinned: Pinned, hashes: Mapping[str, str]) -> None:
    """Check that a run is resumed with the settings it was started with.

    Args:
        task: for its own keys of the run file. hashes: of the data, by source.

    Raises:
        UserError: the run does not exist, is finished, or differs in seed, data, batch,
            learning rate, base or any other key that affects the result.
    """
    path = run.directory
    if not (path / "run.yaml").is_file():
        raise UserError(f"{path}: no such run to resume; remove --resume")
    lock = read_lock(path)
    if not lock.keys() >= {"base", "data", "batch"}:
        raise UserError(
            f"{path / 'run.lock.json'}: missing or incomplete, so the run cannot be resumed: "
            "remove the folder and start again, or choose another with name=NAME"
        )
    if lock.get("finished"):
        raise UserError(f"{path}: already finished; choose another with name=NAME")
    begun = load_run(path / "run.yaml", needs_sources=False, task_of=lambda _: task)
    before, now = _flat(begun.model_dump(mode="json")), _flat(run.model_dump(mode="json"))
    recorded: dict[str, str] = lock["data"]

    def recorded_hash(source: str) -> str | None:
        return recorded.get(begun.written(source, path))

    problems = []
    for key in sorted(before.keys() | now.keys()):
        first, second = before.get(key), now.get(key)
        if first == second or key in FREE_TO_CHANGE:
            continue
        if key.startswith("prove."):  # it affects the evaluation only
            continue
        if key in _NOT_HASHED:
            same = _moved(first, second)
        else:
            old, new = _by_content(first, recorded_hash), _by_content(second, hashes.get)
            same = key.startswith("data.") and old == new
        if not same:
            problems.append(f"{key} was {first!r}, is now {second!r}")
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


def _moved(first: object, second: object) -> bool:
    """Whether a file was moved: both paths have the same name, and the first no longer exists."""
    if not isinstance(first, str) or not isinstance(second, str):
        return False
    return Path(first).name == Path(second).name and not Path(first).exists()


def _by_content(value: object, hash_of: Callable[[str], str | None]) -> object:
    """A value of `data:` with sources replaced by the hash of their content, if known."""
    if isinstance(value, list):
        return [_by_content(item, hash_of) for item in value]
    if isinstance(value, dict):
        return {key: _by_content(item, hash_of) for key, item in value.items()}
    return (hash_of(value) or value) if isinstance(value, str) else value


def _flat(values: Json, prefix: str = "") -> Json:
    """{"train": {"seed": 0}} -> {"train.seed": 0}"""
    flat: Json = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
