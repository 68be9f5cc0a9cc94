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
from collections.abc import Collection, Sequence
from pathlib import Path
from types import FrameType

import yaml

from lora_kit.errors import (
    CheckFailed,
    Interrupted,
    LoraKitError,
    UnexpectedError,
    UserError,
    harmless,
    reason_of,
    redact,
)
from lora_kit.launch import STDERR, advice, gpu_count, kill, read_run, send, worker_ids
from lora_kit.run import WORLD_SIZE_VARIABLE, check_free, nearest, recipe_file, shipped
from lora_kit.schema import Json, Run
from lora_kit.train.interrupt import (
    CONFIRMED,
    OUTCOME_VARIABLE,
    die_with_parent,
    leave_terminal,
    stop_signals,
)
from lora_kit.trust import run_module

_OWN_CGROUPS, _CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_POLL_S = 0.1
# A rank that does not handle a signal, and computes nothing for this long, hangs.
_UNRESPONSIVE_S = 20.0


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
    here = max(1, asked // values["num_machines"])  # processes on this machine
    ranks = range(here * values["machine_rank"], here * (values["machine_rank"] + 1))
    cores = len(os.sched_getaffinity(0)) // here
    threads = os.environ.get("OMP_NUM_THREADS") or max(1, cores)
    options = ["--config_file", str(config), "--num_cpu_threads_per_process", str(threads)]
    if processes:
        options += ["--num_processes", str(processes)]
    options += [str(script or recipe_file(run.recipe)), str(path), *overrides]
    if resume:
        options.append("--resume")
    print(shlex.join(["accelerate", "launch", *options]), file=sys.stderr, flush=True)
    killed_before = _killed_for_memory()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = {**os.environ, OUTCOME_VARIABLE: name, WORLD_SIZE_VARIABLE: str(asked)}
        command = [*run_module("lora_kit.quiet_launch"), *options]
        code, received = _run_child(command, environment, folder, ranks)
        outcomes = {
            file.stem: json.loads(file.read_text(encoding="utf-8"))
            for file in sorted(folder.glob("*.json"))
        }
        joined = worker_ids(folder).keys() - outcomes.keys()
        dead = [ranks[int(local)] for local in sorted(joined, key=int)]
    codes = [outcome["code"] for outcome in outcomes.values()]
    # If all ranks finished, a signal or a crash while they exited changes nothing.
    if any(codes) or (code and len(codes) < here):
        killed = _killed_for_memory() > killed_before
        raise _failure(run, list(outcomes.values()), received, dead, code, killed)


def _failure(
    run: Run, outcomes: list[Json], received: int | None, dead: list[int], code: int, killed: bool
) -> LoraKitError:
    """The error of a run, from what its ranks on this machine reported.

    Args:
        received: the signal that this process received. dead: the ranks that reported nothing.
        code: of accelerate, by the rank that failed first.
        killed: the kernel killed a process for lack of memory.
    """
    failed = [outcome for outcome in outcomes if outcome["code"]]
    # torchrun interrupts the ranks that are left, and these lose the others.
    causes = [
        outcome
        for outcome in failed
        if not (outcome.get("lost") or (outcome["code"] > 128 and not received))
    ]
    if causes:
        causes.sort(key=lambda outcome: outcome["code"] > 128)  # errors before interruptions
        messages = dict.fromkeys(outcome["message"] for outcome in causes)
        return _as_error(causes[0]["code"], "\n".join(messages))
    more = ""
    if any((run.directory / "checkpoints").glob("*/seal.json")):
        more = f"; resume with lora-kit train {run.directory / 'run.yaml'} --resume"
    if received:
        return Interrupted(received, f"stopped by {signal.Signals(received).name}{more}")
    if failed and not dead:
        # An interrupted rank names the command itself.
        more = more if failed[0].get("lost") else ""
        return _as_error(failed[0]["code"], f"{failed[0]['message']}{more}")
    phase = "loading the base"
    if (run.directory / "adapter").is_dir():
        phase = "evaluation"
    elif (run.directory / "metrics.jsonl").is_file():
        phase = "training"
    who = "the training process"
    if len(outcomes) + len(dead) > 1:
        who = f"the process of rank {', '.join(map(str, dead))}"
    what = f"{advice(phase, run)}{more}"
    if killed:
        return UserError(f"out of memory: the kernel killed {who} during {phase}: {what}")
    number = -code if code < 0 else code - 128
    names = [one.name for one in signal.Signals if one == number]
    how = f"killed by {names[0]}" if names else f"exit code {code}"
    return CheckFailed(
        f"{who} exited without reporting an error during {phase} ({how}); see its output above. "
        f"If it was killed, memory may have run out: {what}"
    )


def _killed_for_memory() -> int:
    """How many processes of this process's own cgroup the kernel has killed for lack of memory."""
    found = 0
    with contextlib.suppress(OSError, ValueError):  # not Linux, or an older one
        for line in _OWN_CGROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            # The second version of cgroups names no controllers here.
            root = _CGROUPS / "memory" if controllers else _CGROUPS
            name = "memory.oom_control" if controllers else "memory.events"
            # A container may see its own cgroup as the root only.
            for folder in {root, root / path.lstrip("/")}:
                if (folder / name).is_file():
                    words = (folder / name).read_text().split()
                    found += int(words[words.index("oom_kill") + 1])
    return found


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
    sharded = values.get("distributed_type") in ("FSDP", "DEEPSPEED")
    if sharded and values.get("use_cpu"):
        raise UserError(
            f"--accelerate {config.stem}: use_cpu: true: accelerate shards nothing on a CPU: use "
            "cpu_2proc, or a GPU"
        )
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
        values["machine_rank"] = int(values.get("machine_rank", 0))
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        reason = reason_of(error)
        raise UserError(f"--accelerate {config}: not an accelerate config ({reason})") from None
    return values


def _run_child(
    command: list[str], environment: dict[str, str], folder: Path, workers: range
) -> tuple[int, int | None]:
    """Run a command in its own process group; returns its exit code and the first signal received.

    The first of `stop_signals` is forwarded; a second one kills all processes. Until all workers
    have written their ids to `folder`, the launcher gets the signal; then only the workers do: they
    save and exit, and accelerate exits with them. accelerate itself forwards nothing to a single
    worker, and kills several after 30 s, which saving may exceed. Workers that hang are killed. The
    child always exits with this process.

    Args:
        workers: the ranks of this machine.
    """
    received: list[int] = []

    def forward(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        leave_terminal()
        ids = worker_ids(folder).values()
        last = len(received) > 1
        for pid in ids:
            send(os.kill, pid, signal.SIGKILL if last else signum)
        if last or len(ids) < len(workers):
            # SIGTERM instead of SIGINT, for which accelerate prints a traceback.
            send(os.killpg, child.pid, signal.SIGKILL if last else signal.SIGTERM)

    output, hang = _Output(folder, workers), _Hang(folder, workers)
    # Block signals between the child's start and the installation of the handlers.
    signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals())
    try:
        child = subprocess.Popen(
            command, env=environment, start_new_session=True, preexec_fn=_end_with_parent
        )
        before = {number: signal.signal(number, forward) for number in stop_signals()}
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, stop_signals())
    try:
        # accelerate may exit before its workers, which are still saving.
        while (code := child.poll()) is None or _alive(child.pid, worker_ids(folder).values()):
            output.show()
            if received:
                hang.end()
            time.sleep(_POLL_S)
    finally:
        output.close()
        for number, handler in before.items():
            signal.signal(number, handler)
    return code, received[0] if received else None


class _Output:
    """Prints what ranks other than the first write to stderr, each line with its rank."""

    def __init__(self, folder: Path, workers: range) -> None:
        self._pipes: dict[int, int] = {}
        self._begun: dict[int, bytes] = {}  # lines without an end yet
        for local, rank in enumerate(workers):
            if local:
                os.mkfifo(folder / f"{local}{STDERR}")
                pipe = os.open(folder / f"{local}{STDERR}", os.O_RDONLY | os.O_NONBLOCK)
                self._pipes[rank], self._begun[rank] = pipe, b""

    def show(self) -> None:
        for rank, pipe in self._pipes.items():
            text = self._begun[rank]
            with contextlib.suppress(BlockingIOError):
                while part := os.read(pipe, 1 << 16):
                    text += part
            *lines, self._begun[rank] = text.split(b"\n")
            for line in lines:
                words = harmless(redact(line.decode(errors="replace")))
                print(f"[rank {rank}] {words}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Print what is left, also without an end of line."""
        self.show()
        self._begun = {rank: text + b"\n" * bool(text) for rank, text in self._begun.items()}
        self.show()
        for pipe in self._pipes.values():
            os.close(pipe)


class _Hang:
    """Kills the workers of this machine if, after a signal, those that have not handled it compute
    nothing: they wait for each other in a collective operation, where Python handles no signal."""

    def __init__(self, folder: Path, workers: range) -> None:
        self._folder, self._workers = folder, workers
        self._since, self._used = 0.0, 0.0

    def end(self) -> None:
        waiting = {
            rank: pid
            for rank, pid in worker_ids(self._folder).items()
            if not any((self._folder / f"{rank}{end}").exists() for end in (CONFIRMED, ".json"))
        }
        used = sum(map(_cpu_seconds, waiting.values()))
        now = time.monotonic()
        # Less than before: one of them has handled it.
        if not self._since or used < self._used or used - self._used > _UNRESPONSIVE_S / 20:
            self._since, self._used = now, used
        elif waiting and now - self._since > _UNRESPONSIVE_S:
            kill({self._workers[int(rank)]: pid for rank, pid in waiting.items()})
            self._since = now


def _cpu_seconds(pid: int) -> float:
    """CPU time that a process has used; 0 if it has ended."""
    import psutil

    with contextlib.suppress(psutil.Error):
        times = psutil.Process(pid).cpu_times()
        return float(times.user + times.system)
    return 0.0


def _end_with_parent() -> None:
    """In the child: unblock signals, and receive SIGTERM when the launcher exits (Linux)."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, stop_signals())
    die_with_parent()


def _alive(group: int, pids: Collection[int]) -> bool:
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
    return {1: CheckFailed, 3: UnexpectedError}.get(code, UserError)(message)
