"""`lora-kit train`: prints the `accelerate launch` command, runs it as a child process, forwards
signals, and leaves no process behind."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import yaml

from lora_kit.errors import CheckFailed, Interrupted, LoraKitError, UserError
from lora_kit.launch import OUTCOME_VARIABLE, gpu_count, read_run, send, worker_ids
from lora_kit.run import WORLD_SIZE_VARIABLE, check_free, nearest, recipe_file, shipped
from lora_kit.schema import Json
from lora_kit.train.interrupt import die_with_parent
from lora_kit.trust import run_module

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


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
        ids = worker_ids(folder)
        last = len(received) > 1
        for pid in ids:
            send(os.kill, pid, signal.SIGKILL if last else signum)
        if last or len(ids) < workers:
            # SIGTERM instead of SIGINT, for which accelerate prints a traceback.
            send(os.killpg, child.pid, signal.SIGKILL if last else signal.SIGTERM)

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
        while _alive(child.pid, worker_ids(folder)):
            time.sleep(0.05)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code, received[0] if received else None


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
