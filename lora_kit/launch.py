"""A recipe's process: `recipe_main` is its entry point under accelerate (`start.py` starts it for
`lora-kit train`), `train` runs it in the calling process, with the same result."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import inspect
import json
import linecache
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lora_kit.errors import (
    LoraKitError,
    RankLost,
    UserError,
    is_panic,
    out_of_memory,
    reason_of,
    redact,
    redact_tracebacks,
    report,
    unexpected,
)
from lora_kit.run import load_run
from lora_kit.schema import Json, Run
from lora_kit.tasks.recipe import Main, Recipe, load_recipe
from lora_kit.tasks.task import Task
from lora_kit.train.interrupt import OUTCOME_VARIABLE, StopSignal, die_with_parent

DEBUG_VARIABLE = "LORA_KIT_DEBUG"
_WAIT_FOR_RANKS_S, _WAIT_FOR_STACK_S = 5, 0.5
# Suffixes of a rank's files in the folder of OUTCOME_VARIABLE: its process id; a pipe for what a
# rank other than the first writes to stderr.
_PID, STDERR = ".pid", ".stderr"
# The comment before a step of a recipe, such as `# 6. Train.`, up to its first stop.
_STEP = re.compile(r"\s+# (\d+\. .+?)(?:[:;.]\s|$)").match
# {phase: what to lower when memory runs out}
NO_MEMORY = {
    "preparing the data": "lower data.workers",
    "loading the base": "set base.quantize=nf4, or use a smaller base",
    "training": "lower train.per_device_train_batch_size or train.max_length",
    "evaluation": "lower train.per_device_eval_batch_size or train.max_length",
}
# {function: its phase}
_PHASES = {
    "prepare": "preparing the data",
    "encode": "preparing the data",
    "from_files": "loading the base",
    "fit": "training",
    "evaluate": "evaluation",
    "prove": "evaluation",
}


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
    redact_tracebacks()
    folder = os.environ.get(OUTCOME_VARIABLE)
    rank = os.environ.get("LOCAL_RANK", "0")
    arguments = [a for a in sys.argv[1:] if a != "--resume"]
    run: Run | None = None
    failed: LoraKitError | None = None
    with StopSignal().listening() as stop:  # until the recipe handles signals itself
        try:
            if folder:
                _join(Path(folder), rank)
            if not arguments:
                raise UserError(f"usage: {sys.argv[0]} RUN.yaml [key=value ...] [--resume]")
            run, _ = read_run(arguments[0], arguments[1:])
            if not folder and _one_thread_of_many():
                print(
                    "using 1 CPU thread, accelerate's default: add "
                    f"--num_cpu_threads_per_process {len(os.sched_getaffinity(0))}",
                    file=sys.stderr,
                )
            prepare_process()
            gc.disable()  # `Journey` enables it: without it the libraries are imported 10% faster
            main(run, resume="--resume" in sys.argv[1:])
        except BaseException as error:
            if not (isinstance(error, Exception) or is_panic(error)):
                raise
            stop.saving = True  # torchrun sends SIGTERM when another rank fails: not now
            failed = error if isinstance(error, LoraKitError) else _in_one_line(error, main, run)
            if os.environ.get(DEBUG_VARIABLE):
                print(redact(traceback.format_exc()), file=sys.stderr)
        stop.saving = True
        if folder:
            return _leave_outcome(Path(folder), rank, failed)
    if failed:
        report(failed)
        return failed.exit_code
    _leave_group()
    return 0


def _join(folder: Path, rank: str) -> None:
    """Tell `start` this rank's process id, and send it what other ranks than the first write to
    stderr. SIGUSR1, and a crash, print the Python stack there."""
    with contextlib.suppress(OSError):  # the disk is full
        (folder / f"{rank}{_PID}").write_text(str(os.getpid()))
    with contextlib.suppress(OSError):  # there is no pipe, or nobody reads it
        pipe = os.open(folder / f"{rank}{STDERR}", os.O_WRONLY | os.O_NONBLOCK)
        os.set_blocking(pipe, True)
        os.dup2(pipe, 2)
        os.close(pipe)
    faulthandler.enable(all_threads=False)
    faulthandler.register(signal.SIGUSR1)


def _in_one_line(error: BaseException, main: Main, run: Run | None) -> LoraKitError:
    """What any other exception of a recipe is for the user, in one line."""
    frames = traceback.extract_tb(error.__traceback__)
    recipe = inspect.getsourcefile(main) or ""
    places = [(frame.filename, frame.name) for frame in frames]
    where = "the start"
    if (recipe, main.__name__) in places:
        line = frames[places.index((recipe, main.__name__))].lineno or 0
        steps = [found[1] for text in linecache.getlines(recipe)[:line] if (found := _STEP(text))]
        where = f"step {steps[-1]}, {recipe}:{line}" if steps else f"{recipe}:{line}"
    if out_of_memory(error):
        return no_memory(frames, where, run)
    if _is_of_another_rank(error):
        return RankLost(f"another rank died or does not respond ({where}): {reason_of(error)}")
    rank = os.environ.get("RANK", "0")
    name = "error.log" if rank == "0" else f"error-{rank}.log"
    log = run.directory / name if run is not None and run.directory.is_dir() else None
    return unexpected(error, where, log)


def no_memory(frames: traceback.StackSummary, where: str, run: Run | None = None) -> UserError:
    """The error for memory that ran out in the innermost of these calls."""
    phases = [_PHASES[frame.name] for frame in frames if frame.name in _PHASES]
    what = advice(phases[-1], run) if phases else "use a smaller base, or more memory"
    return UserError(f"out of memory (during {where}): {what}")


def advice(phase: str, run: Run | None) -> str:
    """What to do when memory ran out in a phase of a run."""
    text = NO_MEMORY[phase]
    if phase == "evaluation" and run and (run.directory / "adapter").is_dir():
        again = f"lora-kit compare {run.directory} train.per_device_eval_batch_size=1"
        text += f"; the adapter is saved: evaluate it with {again}"
    return text


def _is_of_another_rank(error: BaseException) -> bool:
    """Whether an exception says that the connection to another rank broke, or timed out."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not isinstance(error, RuntimeError):
        return False
    named = type(error).__name__.startswith("Dist")  # torch's DistBackendError and others
    return named or any(text in str(error) for text in ("gloo", "NCCL", "closed by peer"))


def _leave_outcome(folder: Path, rank: str, failed: LoraKitError | None) -> int:
    """Write this rank's outcome for `start`; returns the exit code for accelerate.

    That is 0 even for an error, since accelerate would only add a traceback. Other ranks may be
    inside a collective operation that waits for this one, where Python handles no signal: torchrun
    would kill them after 30 s, this rank does after 5 s.
    """
    code, message = (failed.exit_code, str(failed)) if failed else (0, "")
    outcome = {"code": code, "message": message, "lost": isinstance(failed, RankLost)}
    partial = folder / f"{rank}.partial"
    try:
        partial.write_text(json.dumps(outcome), encoding="utf-8")
        partial.replace(partial.with_suffix(".json"))
    except OSError:  # the disk is full; the exit code tells `start` whether the run is finished
        if failed:
            report(failed)
        _leave_group()
        return code
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    deadline = time.monotonic() + _WAIT_FOR_RANKS_S
    while code and len(list(folder.glob("*.json"))) < ranks:
        if time.monotonic() > deadline:
            first = int(os.environ.get("RANK", "0")) - int(rank)
            ids = worker_ids(folder).items()
            done = {file.stem for file in folder.glob("*.json")}
            kill({first + int(one): pid for one, pid in ids if one not in done})
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


def worker_ids(folder: Path) -> dict[str, int]:
    """{rank on this machine: process id}, as the workers wrote them."""
    texts = {file.stem: file.read_text() for file in sorted(folder.glob(f"*{_PID}"))}
    return {rank: int(text) for rank, text in texts.items() if text}


def kill(workers: Mapping[int, int]) -> None:
    """Kill workers that do not respond, {rank: process id}; each prints its Python stack first."""
    if not workers:
        return
    ranks = ", ".join(map(str, workers))
    print(f"rank {ranks} does not respond: killed", file=sys.stderr, flush=True)
    for number in (signal.SIGCONT, signal.SIGUSR1, signal.SIGKILL):
        if number is signal.SIGKILL:
            time.sleep(_WAIT_FOR_STACK_S)
        for pid in workers.values():
            send(os.kill, pid, number)


def send(how: Callable[[int, int], None], pid: int, signum: int) -> None:
    """Send a signal with os.kill or os.killpg, to a process that may have exited."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        how(pid, signum)
