"""A recipe's process: `recipe_main` is its entry point under accelerate (`start.py` starts it for
`lora-kit train`), `train` runs it in the calling process, with the same result."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from lora_kit.errors import LoraKitError, UserError, redact
from lora_kit.run import load_run
from lora_kit.schema import Json, Run
from lora_kit.tasks.recipe import Main, Recipe, load_recipe
from lora_kit.tasks.task import Task
from lora_kit.train.interrupt import StopSignal, die_with_parent

# The folder in which a worker writes its exit code and message for `start`: accelerate reports
# every failure as 1, with a traceback.
OUTCOME_VARIABLE = "LORA_KIT_OUTCOME"
DEBUG_VARIABLE = "LORA_KIT_DEBUG"
_WAIT_FOR_RANKS_S = 5
_PID = ".pid"  # suffix of the files with each rank's process id, in the same folder


def train(path: str | Path, *overrides: str, resume: bool = False) -> Json:
    """Run a run file's recipe in this process.

    >>> lora_kit.train("run.yaml", "train.max_steps=200")  # doctest: +SKIP

    Args:
        overrides: `key=value` settings, as on the command line.
        resume: continue an interrupted run, with the same settings.

    Returns:
        The content of report.json.

    Raises:
        LoraKitError: one line with cause, place and fix.
    """
    run, recipe = read_run(path, overrides)
    prepare_process()
    return recipe.main(run, resume=resume)


def read_run(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Run, Recipe]:
    """Load a run file, checked with the keys of its recipe's task, and the recipe.

    Raises:
        UserError: the file or the recipe is invalid; or the runtime of `ship.target` would reject
            the adapter.
    """
    found: list[Recipe] = []

    def task_of(file: Path) -> Task:
        found.append(load_recipe(file))
        return found[0].task

    run = load_run(path, tuple(overrides), task_of=task_of)
    if run.ship.target:
        from lora_kit.ship.targets import refuse_settings

        refuse_settings(run.adapter, run.ship.target)
    return run, found[0]


def recipe_main(main: Main) -> int:
    """`recipes/NAME.py RUN.yaml [key=value ...] [--resume]`, as accelerate starts it.

    Args:
        main: of the script that was started. The run file is checked with the keys of the recipe
            that it names, which may be another file.

    Returns:
        The process's exit code.
    """
    die_with_parent()
    folder = os.environ.get(OUTCOME_VARIABLE)
    rank = os.environ.get("LOCAL_RANK", "0")
    arguments = [a for a in sys.argv[1:] if a != "--resume"]
    try:
        with StopSignal().listening():  # until the recipe handles signals itself
            if folder:
                (Path(folder) / f"{rank}{_PID}").write_text(str(os.getpid()))
            if not arguments:
                name = Path(sys.argv[0]).name
                raise UserError(f"usage: {name} RUN.yaml [key=value ...] [--resume]")
            run, _ = read_run(arguments[0], arguments[1:])
            if not folder and _one_thread_of_many():
                print(
                    "using 1 CPU thread, accelerate's default: add "
                    f"--num_cpu_threads_per_process {len(os.sched_getaffinity(0))}",
                    file=sys.stderr,
                )
            prepare_process()
            main(run, resume="--resume" in sys.argv[1:])
        code, message = 0, ""
    except LoraKitError as error:
        code, message = error.exit_code, str(error)
        if os.environ.get(DEBUG_VARIABLE):
            print(redact(traceback.format_exc()), file=sys.stderr)
    if not folder:
        if code:
            print(f"error: {redact(message)}", file=sys.stderr)
        else:
            _leave_group()
        return code
    return _leave_outcome(Path(folder), rank, code, message)


def _leave_outcome(folder: Path, rank: str, code: int, message: str) -> int:
    """Write this rank's outcome for `start`; returns the exit code for accelerate.

    That is 0 even for an error, since accelerate would only add a traceback. Other ranks may be
    inside a collective operation that waits for this one, where Python handles no signal: torchrun
    would kill them after 30 s, this rank does after 5 s.
    """
    partial = folder / f"{rank}.partial"
    partial.write_text(json.dumps({"code": code, "message": message}), encoding="utf-8")
    partial.replace(partial.with_suffix(".json"))
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    deadline = time.monotonic() + _WAIT_FOR_RANKS_S
    while code and len(list(folder.glob("*.json"))) < ranks:
        if time.monotonic() > deadline:
            for pid in worker_ids(folder):
                if pid != os.getpid():
                    send(os.kill, pid, signal.SIGKILL)
            return code
        time.sleep(0.1)
    _leave_group()
    return 0


def _leave_group() -> None:
    """Destroy the process group: otherwise gloo's threads abort about one in ten exits, and a
    successful training is reported as failed (torch 2.13)."""
    if "torch" not in sys.modules:
        return
    import torch.distributed as dist

    if dist.is_initialized():
        gc.collect()  # the trainer's model also references the group
        dist.destroy_process_group()


def prepare_process() -> None:
    """Set up a process that will load a model, before libraries are imported."""
    from lora_kit.base.load import quiet_libraries
    from lora_kit.speed.runtime import keep_freed_memory

    keep_freed_memory()
    quiet_libraries()


def _one_thread_of_many() -> bool:
    """Whether a CPU run uses one thread only, although there are more cores."""
    cores = len(os.sched_getaffinity(0))
    return os.environ.get("OMP_NUM_THREADS") == "1" and cores > 1 and not gpu_count()


def gpu_count() -> int:
    """The number of visible GPUs, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([n for n in visible.split(",") if n.strip() not in ("", "-1")])
    if found := list(Path("/proc/driver/nvidia/gpus").glob("*")):
        return len(found)
    # Under WSL2 the driver is outside of /proc.
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def worker_ids(folder: Path) -> list[int]:
    """The process ids that the workers wrote."""
    texts = [file.read_text() for file in sorted(folder.glob(f"*{_PID}"))]
    return [int(text) for text in texts if text]


def send(how: Callable[[int, int], None], pid: int, signum: int) -> None:
    """Send a signal with os.kill or os.killpg, to a process that may have exited."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        how(pid, signum)
