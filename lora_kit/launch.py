"""Three ways to start a recipe, with the same result.

`start` is `lora-kit train`: it prints the `accelerate launch` command, runs it as a child process,
forwards signals, and leaves no process behind. `recipe_main` is the entry point of a recipe under
accelerate. `train` runs a recipe in the calling process.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

import yaml

from lora_kit.errors import CheckFailed, Interrupted, LoraKitError, UserError, redact
from lora_kit.run import WORLD_SIZE_VARIABLE, check_free, load_run, nearest, recipe_file, shipped
from lora_kit.schema import Json, Run
from lora_kit.tasks.recipe import Main, Recipe, load_recipe
from lora_kit.tasks.task import Task
from lora_kit.train.interrupt import StopSignal, die_with_parent
from lora_kit.trust import run_module

# The folder in which a worker writes its exit code and message for `start`: accelerate reports
# every failure as 1, with a traceback.
OUTCOME_VARIABLE = "LORA_KIT_OUTCOME"
DEBUG_VARIABLE = "LORA_KIT_DEBUG"
_WAIT_FOR_RANKS_S = 5
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
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
            for pid in _worker_ids(folder):
                if pid != os.getpid():
                    _send(os.kill, pid, signal.SIGKILL)
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


def start(
    path: str | Path,
    overrides: Sequence[str] = (),
    accelerate: str | None = None,
    processes: int | None = None,
    resume: bool = False,
    script: Path | None = None,
) -> None:
    """Check the run file, print the command, and run it.

    Args:
        accelerate: a config of accelerate_configs/ by name, or a path; None: by the devices.
        processes: number of processes on all machines; None: the config's, or one per GPU if the
            config is chosen by the devices.
        resume: continue an interrupted run: its directory may exist.
        script: a script to run instead of the recipe.

    Raises:
        LoraKitError: the worker's error, with its exit code.
    """
    run, _ = read_run(path, overrides)
    config = accelerate_config(accelerate)
    if not resume:
        check_free(run.directory)
    values = _check_devices(config)
    if processes is None and accelerate is None and gpu_count() > 1:
        processes = gpu_count()
    asked = processes or values["num_processes"]
    here = asked // values["num_machines"]  # processes on this machine
    cores = len(os.sched_getaffinity(0)) // max(1, here)
    threads = os.environ.get("OMP_NUM_THREADS") or max(1, cores)
    options = ["--config_file", str(config), "--num_cpu_threads_per_process", str(threads)]
    if processes:
        options += ["--num_processes", str(processes)]
    options += [str(script or recipe_file(run.recipe)), str(path), *overrides]
    if resume:
        options.append("--resume")
    print(shlex.join(["accelerate", "launch", *options]), file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, OUTCOME_VARIABLE: folder, WORLD_SIZE_VARIABLE: str(asked)}
        command = [*run_module("accelerate.commands.launch"), *options]
        code, received = _run_child(command, environment, Path(folder), here)
        files = sorted(Path(folder).glob("*.json"))
        outcomes = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    for outcome in outcomes:
        if outcome["code"]:
            raise _as_error(outcome["code"], outcome["message"])
    if outcomes and not code:
        return  # even after a signal, if training had already ended
    if received:
        raise Interrupted(received, f"stopped by {signal.Signals(received).name}")
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    raise CheckFailed(
        f"the training process exited without reporting an error ({how}); see its output above. "
        "If it was killed, memory may have run out: lower train.per_device_train_batch_size"
    )


def accelerate_config(name: str | None) -> Path:
    """The file of an accelerate config: shipped, by name; the user's, by path; or by the devices.

    Raises:
        UserError: there is no such config.
    """
    folder = shipped("accelerate_configs")
    if name is None:
        name = {0: "cpu", 1: "single_gpu"}.get(gpu_count(), "multi_gpu")
    if (folder / f"{name}.yaml").is_file():
        return folder / f"{name}.yaml"
    if Path(name).is_file():
        return Path(name)
    names = sorted(file.stem for file in folder.glob("*.yaml"))
    raise UserError(
        f"--accelerate {name}: no such config{nearest(name, names)}; shipped: {', '.join(names)}"
    )


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


def _check_devices(config: Path) -> Json:
    """A config's values. Raises UserError if it needs a missing GPU or package."""
    values = _read_config(config)
    if not values.get("use_cpu") and gpu_count() == 0:
        raise UserError(
            f"--accelerate {config.stem}: no GPU is visible: see `lora-kit doctor`, or remove it"
        )
    deepspeed = values.get("distributed_type") == "DEEPSPEED"
    if deepspeed and importlib.util.find_spec("deepspeed") is None:
        raise UserError(f"--accelerate {config.stem} needs deepspeed: pip install deepspeed")
    return values


def _read_config(config: Path) -> Json:
    """A config's values, with the defaults of `num_processes` and `num_machines`."""
    try:
        values = dict(yaml.safe_load(config.read_text(encoding="utf-8")).items())
        for key in ("num_processes", "num_machines"):
            values[key] = max(1, int(values.get(key, 1)))
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"--accelerate {config}: not an accelerate config ({reason})") from None
    return values


def _run_child(
    command: list[str], environment: dict[str, str], folder: Path, workers: int
) -> tuple[int, int | None]:
    """Run a command in its own process group; returns its exit code and the first signal received.

    The first SIGINT or SIGTERM is forwarded; a second one kills all processes. Until all workers
    have written their ids to `folder`, the launcher gets the signal; then only the workers do: they
    save and exit, and accelerate exits with them. accelerate itself forwards nothing to a single
    worker, and kills several after 30 s, which saving may exceed. The child always exits with this
    process.
    """
    received: list[int] = []

    def forward(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        ids = _worker_ids(folder)
        last = len(received) > 1
        for pid in ids:
            _send(os.kill, pid, signal.SIGKILL if last else signum)
        if last or len(ids) < workers:
            # SIGTERM instead of SIGINT, for which accelerate prints a traceback.
            _send(os.killpg, child.pid, signal.SIGKILL if last else signal.SIGTERM)

    # Block signals between the child's start and the installation of the handlers.
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        child = subprocess.Popen(
            command, env=environment, start_new_session=True, preexec_fn=_end_with_parent
        )
        before = {number: signal.signal(number, forward) for number in _SIGNALS}
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    try:
        code = child.wait()
        # accelerate may exit before its workers, which are still saving.
        while _alive(child.pid, _worker_ids(folder)):
            time.sleep(0.05)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code, received[0] if received else None


def _worker_ids(folder: Path) -> list[int]:
    """The process ids that the workers wrote."""
    texts = [file.read_text() for file in sorted(folder.glob(f"*{_PID}"))]
    return [int(text) for text in texts if text]


def _send(how: Callable[[int, int], None], pid: int, signum: int) -> None:
    """Send a signal with os.kill or os.killpg, to a process that may have exited."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        how(pid, signum)


def _end_with_parent() -> None:
    """In the child: unblock signals, and receive SIGTERM when the launcher exits (Linux)."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    die_with_parent()


def _alive(group: int, pids: list[int]) -> bool:
    """Whether a process of the group, or one of `pids`, is running. Zombies do not count: without
    an init process, as in a container, they are never reaped."""
    import psutil

    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            mine = process.pid in pids or os.getpgid(process.pid) == group
            if mine and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False


def _as_error(code: int, message: str) -> LoraKitError:
    """A worker's error, from its exit code and message."""
    if code > 128:
        return Interrupted(code - 128, message)
    return CheckFailed(message) if code == 1 else UserError(message)
