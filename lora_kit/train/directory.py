"""The run directory runs/<name>/: created before the model is loaded, completed by `save_run`.

run.yaml  run.lock.json  census.json  metrics.jsonl  report.json  report.html
adapter/  checkpoints/  tensorboard/ (with train.report_to: [tensorboard])

Only rank 0 writes files and messages.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

from lora_kit.adapter.files import WEIGHTS
from lora_kit.adapter.finished import FinishedRun
from lora_kit.base.load import base_is_sharded, gpu_is_used
from lora_kit.base.pin import Pinned
from lora_kit.errors import CheckFailed, UserError, redact
from lora_kit.folders import sync, write_whole
from lora_kit.hashes import file_hash
from lora_kit.run import (
    FREE_TO_CHANGE,
    WORLD_SIZE_VARIABLE,
    check_free,
    check_settings,
    load_run,
    read_lock,
    settings_hashes,
    write_run,
)
from lora_kit.schema import Adapter, Json, Run, Train
from lora_kit.tasks.task import Task

# Keys that name files without a hash in the lock file.
_NOT_HASHED = ("recipe", "adapter.start", "data.labels")
# Keys that may differ between ranks; the base, the recipe and the adapter are compared by hash.
_OF_ONE_RANK = {
    "base.model", "base.revision", "recipe", "adapter.start", "data.workers",
    "train.dataloader_num_workers", "train.ddp_timeout",
}  # fmt: skip
_MOST_NAMED = 5
_START_S = 1800  # for all processes to connect
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


def check_sharded(sharded: bool) -> None:
    """Raises CheckFailed if the base is not divided among the processes, although accelerate was
    told so: on a CPU, or with one process, it silently is not."""
    if base_is_sharded() and not sharded:
        raise CheckFailed(
            "accelerate was told to shard the base and does not: it needs GPUs, and several "
            "processes; on CPU use --accelerate cpu_2proc"
        )


def connect(facts: Mapping[str, object], timeout_s: int) -> None:
    """Connect the processes of a run, if there are several, and check that they `agree`. From then
    on, one that waits for another longer than `timeout_s` raises an error.

    Raises:
        UserError: they were not given the same.
    """
    import torch.distributed as dist
    from accelerate import PartialState

    # Another machine may still be downloading the base.
    patience = timedelta(seconds=max(timeout_s, _START_S))
    PartialState(cpu=not gpu_is_used(), timeout=patience)
    if dist.is_initialized():
        agree(facts)
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s))


def agree(facts: Mapping[str, object]) -> None:
    """Check that all ranks are given the same facts. All ranks must call it, once connected.

    Args:
        facts: {name: a plain value}

    Raises:
        UserError: on all ranks, if one differs: it names the fact, both values and their ranks.
    """
    from accelerate.utils import gather_object

    if processes() == 1:
        return
    every: list[Mapping[str, object]] = gather_object([dict(facts)])
    problems = []
    for name in sorted({name for one in every for name in one}):
        values = [one.get(name) for one in every]
        for rank, value in enumerate(values):
            if value != values[0]:
                found = f"{name} is {_short(values[0])} on rank 0, {_short(value)} on rank {rank}"
                problems.append(found)
                break
    if problems:
        more = f"; and {len(problems) - _MOST_NAMED} more" if len(problems) > _MOST_NAMED else ""
        raise UserError(f"the processes differ: {'; '.join(problems[:_MOST_NAMED])}{more}")


def _short(value: object) -> str:
    """A value in a message; of a hash, its beginning."""
    text = repr(value)
    return text[1:13] if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else text


def facts_of(run: Run, pinned: Pinned, hashes: Mapping[str, str], entries: Json) -> Json:
    """What all ranks must agree on: settings, versions, and hashes of data, code, base and adapter.
    Paths may differ.

    Args:
        hashes: of the data, by source. entries: further facts.
    """

    def name_of(text: str) -> str | None:
        return Path(text).name if text in hashes or Path(text).is_absolute() else None

    settings = _flat(run.model_dump(mode="json"))
    facts = {k: _by_content(v, name_of) for k, v in settings.items() if k not in _OF_ONE_RANK}
    # Several sources can have the same name.
    for source in sorted(hashes, key=lambda source: hashes[source]):
        name = f"data {Path(source).name}"
        facts[name] = hashes[source] if name not in facts else f"{facts[name]}, {hashes[source]}"
    if run.adapter.start:
        places = [Path(run.adapter.start) / folder / WEIGHTS for folder in ("adapter", "")]
        facts["adapter.start"] = [file_hash(place) for place in places if place.is_file()]
    facts |= {f"base.model {name}": digest for name, digest in pinned.hashes.items()}
    facts |= {f"version of {name}": number for name, number in versions().items()}
    package = Path(__file__).resolve().parents[1]
    code = [file_hash(f) for f in sorted(package.rglob("*")) if f.suffix in (".py", ".jinja")]
    facts["code of lora_kit"] = hashlib.sha256("".join(code).encode()).hexdigest()
    return {**facts, "device": "GPU" if gpu_is_used() else "CPU", **entries}


def versions() -> dict[str, str]:
    """The versions of Python and of the libraries that affect a run."""
    return {"python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}}


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
    new = [path for path in (run.directory, *run.directory.parents) if not path.exists()]
    try:
        run.directory.mkdir(parents=True)
        for folder in new:
            sync(folder.parent)
    except OSError as error:
        raise UserError(f"{run.directory}: cannot be created ({error.strerror})") from None
    fixed = {
        "id": uuid.uuid4().hex,
        "batch": batch_geometry(run.train),
        "seed": run.seed,
        "versions": versions(),
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
    sync(partial)
    partial.replace(path / "run.yaml")
    locked = {**pinned.to_lock(), **run.base.model_dump(include={"dtype", "quantize"})}
    locked["model"] = run.written(pinned.model, path)
    data = {run.written(name, path): digest for name, digest in hashes.items()}
    settings = settings_hashes(path / "run.yaml")
    add_to_lock(path, base=locked, data=data, settings=settings, **entries)


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
    _ = start.adapter  # verified
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
    check_settings(path)
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
