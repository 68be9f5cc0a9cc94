"""Starting a recipe: which command runs, what becomes of its signals, errors and processes."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import pty
import shlex
import signal
import subprocess
import sys
import termios
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import processes
import psutil
import pytest
from forked import two_ranks
from processes import left_over, lora_kit, send_when, until

from lora_kit import launch, start
from lora_kit.errors import CheckFailed, Interrupted, UserError
from lora_kit.run import shipped
from lora_kit.tasks.causal import Text
from lora_kit.train.callbacks import read_metrics
from lora_kit.train.directory import check_sharded
from lora_kit.train.journey import Journey
from lora_kit.trust import run_module

CONFIGS = {
    "cpu": 1,
    "cpu_2nodes": 2,
    "cpu_2proc": 2,
    "fsdp_qlora": 2,
    "multi_gpu": 2,
    "multi_node": 16,
    "single_gpu": 1,
    "zero3": 2,
}
METRICS = Path("runs/test/metrics.jsonl")


def steps() -> list[int]:
    return [row["step"] for row in read_metrics(METRICS)]


def long_run(run_file: Any, max_steps: int = 200) -> Path:
    """A run of many small steps, to be stopped."""
    changes = {"max_steps": max_steps, "per_device_train_batch_size": 1, "max_length": 32}
    return run_file("cpt", **{f"train.{key}": value for key, value in changes.items()})


def write_recipe(file: Path, body: str) -> None:
    """A recipe whose `main` has these lines."""
    file.write_text(
        "import os, signal, sys, time\nfrom lora_kit.launch import recipe_main\n"
        "from lora_kit.tasks.causal import Text\nTASK = Text()\n\n"
        f"def main(run, resume=False):\n{body}\n"
        'if __name__ == "__main__":\n    sys.exit(recipe_main(main))\n',
        encoding="utf-8",
    )


def test_configs_are_the_ones_of_the_house() -> None:
    assert {file.stem for file in shipped("accelerate_configs").glob("*.yaml")} == set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_loads_each_config(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    file = start.accelerate_config(name)
    loaded = load_config_from_file(str(file))
    assert loaded.num_processes == CONFIGS[name] == start._read_config(file)["num_processes"]
    assert f"--accelerate {name}" in file.read_text() or "my_multi_node.yaml" in file.read_text()
    # Every key of the nested sections is one that the command knows: others are dropped in silence.
    known = set(vars(launch_command_parser().parse_args(["script.py"])))
    for key in ("fsdp_config", "deepspeed_config"):
        nested = getattr(loaded, key) or {}
        assert set(nested) <= known


def test_config_that_fits_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    for visible, name in (("", "cpu"), ("-1", "cpu"), ("0", "single_gpu"), ("0,1", "multi_gpu")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert start.accelerate_config(None).stem == name
    with pytest.raises(UserError, match="did you mean `cpu_2proc`"):
        start.accelerate_config("cpu_2procs")


def test_own_config_by_path(work: Path) -> None:
    (work / "mine.yaml").write_text("num_processes: 3\nnum_machines: 1\n")
    values = start._read_config(start.accelerate_config("mine.yaml"))
    assert (values["num_processes"], values["num_machines"]) == (3, 1)
    (work / "mine.yaml").write_text("a list of words")
    with pytest.raises(UserError, match=r"mine\.yaml: not an accelerate config"):
        start._read_config(start.accelerate_config("mine.yaml"))


def test_printed_command_is_the_one_that_runs(
    run_file: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[Any] = []

    def child(command: list[str], environment: dict[str, str], *_: Any) -> tuple[int, None]:
        ran.append((command, environment))
        (Path(environment[launch.OUTCOME_VARIABLE]) / "0.json").write_text('{"code": 0}')
        return 0, None

    monkeypatch.setattr(start, "_run_child", child)
    file = run_file()
    start.start(file, ["data.columns={prompt: b}"], accelerate="cpu", processes=1)
    printed = shlex.split(capsys.readouterr().err.splitlines()[0])
    command, environment = ran[0]
    assert printed[:2] == ["accelerate", "launch"]
    module = run_module("lora_kit.quiet_launch")
    assert command[: len(module)] == module
    assert printed[2:] == command[len(module) :]
    assert printed[-3:] == [
        str(shipped("recipes") / "cpt.py"),
        str(file),
        "data.columns={prompt: b}",
    ]
    assert environment["LORA_KIT_WORLD_SIZE"] == "1"


@pytest.mark.slow
def test_fewer_processes_than_asked_for(run_file: Any, work: Path) -> None:
    (work / "mine.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nuse_cpu: true\n"
        "num_machines: 1\nnum_processes: 2\nmachine_rank: 0\n"
    )
    code, said = lora_kit("train", run_file(), "--accelerate", "mine.yaml")
    assert code == 1, said
    assert "error: 2 processes requested, 1 running" in said
    assert "Traceback" not in said, said
    assert not Path("runs").exists()  # the mended command finds the place free


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "number", "expected"),
    [
        ("cpu", signal.SIGINT, 130),
        ("cpu", signal.SIGTERM, 143),
        ("cpu_2proc", signal.SIGTERM, 143),
        ("cpu_2proc", signal.SIGHUP, 129),
    ],
)
def test_signal_saves_and_leaves_no_process(
    run_file: Any, work: Path, config: str, number: signal.Signals, expected: int
) -> None:
    file = long_run(run_file)
    process = processes.start([*processes.LORA_KIT, "train", str(file), "--accelerate", config])
    send_when(process, lambda: len(steps()) >= 3, number)
    code, said = processes.finish(process)
    assert code == expected, said
    assert "Traceback" not in said, said
    assert said.splitlines()[-1].startswith("stopped after step")
    assert not left_over(str(work))
    (checkpoint,) = Path("runs/test/checkpoints").iterdir()
    stopped_at = int(checkpoint.name.removeprefix("checkpoint-"))
    assert (checkpoint / "seal.json").is_file()
    assert stopped_at == steps()[-1] < 200
    assert not Path("runs/test/adapter").exists()
    if number is not signal.SIGTERM:
        return  # going on is the same after each
    if config == "cpu":
        code, said = lora_kit("train", file, "--resume")
    else:
        code, said = two_ranks("cpt", file, "--resume")
    assert code == 0, said
    assert f"resuming after step {stopped_at}" in said
    assert steps() == list(range(1, 201))
    assert Path("runs/test/report.json").is_file()


@pytest.mark.slow
def test_a_closed_terminal_saves_and_ends(run_file: Any, work: Path) -> None:
    """As where an ssh session breaks off: a signal, and nowhere left to write to."""
    file = long_run(run_file)
    ours, theirs = pty.openpty()

    def as_its_terminal() -> None:
        processes.as_in_a_terminal()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        [*processes.LORA_KIT, "train", str(file), "--accelerate", "cpu"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=as_its_terminal,
    )
    os.close(theirs)
    os.set_blocking(ours, False)

    def trained() -> bool:
        with contextlib.suppress(BlockingIOError):
            os.read(ours, 1 << 16)
        return len(steps()) >= 3

    assert until(lambda: trained() or process.poll() is not None) and process.poll() is None
    os.close(ours)
    assert process.wait(processes.LIMIT_S) == 129
    assert not left_over(str(work))
    (checkpoint,) = Path("runs/test/checkpoints").iterdir()
    assert (checkpoint / "seal.json").is_file()


@pytest.mark.slow
def test_nohup_is_kept(run_file: Any, work: Path) -> None:
    file = run_file("cpt", **{"train.max_steps": 8})
    command = [*processes.LORA_KIT, "train", str(file), "--accelerate", "cpu"]
    process = processes.start(["nohup", *command])
    # The parent and the process that trains.
    send_when(process, lambda: len(steps()) >= 1 and hang_up(str(work)), signal.SIGHUP)
    code, said = processes.finish(process)
    assert code == 0, said
    assert steps()[-1] == 8


def hang_up(mark: str) -> bool:
    """SIGHUP to all processes that name `mark`."""
    for process in psutil.process_iter(["cmdline"]):
        if any(mark in word for word in process.info["cmdline"] or []):
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGHUP)
    return True


STOPPED: dict[str, Any] = {"code": 143, "message": "stopped after step 3: resume with X --resume"}
OUTCOMES: dict[str, tuple[dict[str, dict[str, Any]], int, int | None, type[Exception], str]] = {
    # A rank died with a traceback, and torchrun stopped the other.
    "died": (
        {"0": {"code": 143, "message": "stopped after step 3"}},
        1,
        None,
        CheckFailed,
        "the process of rank 1 exited without reporting an error during loading the base (exit co",
    ),
    "interrupted": (
        {n: {"code": 143, "message": "stopped after step 3"} for n in "01"},
        0,
        signal.SIGTERM,
        Interrupted,
        "stopped after step 3",
    ),
    "a worker was sent the signal": (
        dict.fromkeys("01", STOPPED),
        0,
        None,
        Interrupted,
        STOPPED["message"],
    ),
    "error of rank 1": (
        {
            "0": {"code": 143, "message": "stopped by SIGTERM"},
            "1": {"code": 2, "message": "text.txt: no such file"},
        },
        0,
        None,
        UserError,
        "text.txt: no such file",
    ),
    "error of rank 1 after Ctrl-C": (
        {
            "0": {"code": 130, "message": "stopped by SIGINT"},
            "1": {"code": 1, "message": "the adapter's weights are not finite"},
        },
        0,
        signal.SIGINT,
        CheckFailed,
        "the adapter's weights are not finite\nstopped by SIGINT",
    ),
    "two errors": (
        {"0": {"code": 2, "message": "first"}, "1": {"code": 1, "message": "second"}},
        0,
        None,
        UserError,
        "first\nsecond",
    ),
    "a rank was sent the signal alone": (
        {"0": {"code": 1, "message": "rank 1 is lost", "lost": True}, "1": STOPPED},
        0,
        None,
        CheckFailed,
        "rank 1 is lost; resume with lora-kit train runs/test/run.yaml --resume",
    ),
    "an exit code that is no signal": (
        {"0": {"code": 0, "message": ""}},
        255,
        None,
        CheckFailed,
        "the process of rank 1 exited without reporting an error during loading the base (exit co",
    ),
    "the launcher was killed": (
        {"0": {"code": 0, "message": ""}},
        -9,
        None,
        CheckFailed,
        "during loading the base (killed by SIGKILL)",
    ),
    "the same error twice": (
        {n: {"code": 2, "message": "both"} for n in "01"},
        0,
        None,
        UserError,
        "both",
    ),
}


@pytest.mark.parametrize("what", OUTCOMES)
def test_what_the_processes_end_with(
    what: str, run_file: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes, code, received, kind, words = OUTCOMES[what]

    def child(command: list[str], environment: dict[str, str], *_: Any) -> tuple[int, int | None]:
        folder = Path(environment[launch.OUTCOME_VARIABLE])
        for rank in "01":
            (folder / f"{rank}.pid").write_text("1")
        for rank, outcome in outcomes.items():
            (folder / f"{rank}.json").write_text(json.dumps(outcome), encoding="utf-8")
        return code, received

    monkeypatch.setattr(start, "_run_child", child)
    seal = Path("runs/test/checkpoints/checkpoint-3/seal.json")
    file = run_file()
    with pytest.raises(kind) as caught:
        monkeypatch.setattr(start, "check_free", lambda directory: None)
        seal.parent.mkdir(parents=True)
        seal.touch()
        start.start(file, accelerate="cpu_2proc")
    assert str(caught.value) == words or words in str(caught.value).splitlines()[0]
    assert str(caught.value).count("resume with") < 2


@pytest.mark.parametrize(("code", "received"), [(143, signal.SIGTERM), (134, None)])
def test_a_finished_run_stays_one(
    code: int, received: int | None, run_file: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal, or a crash of a library, while the processes exit."""

    def child(command: list[str], environment: dict[str, str], *_: Any) -> tuple[int, int | None]:
        for rank in "01":
            file = Path(environment[launch.OUTCOME_VARIABLE]) / f"{rank}.json"
            file.write_text('{"code": 0, "message": ""}')
        return code, received

    monkeypatch.setattr(start, "_run_child", child)
    start.start(run_file(), accelerate="cpu_2proc")


def test_a_rank_that_computes_does_not_hang(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after another one, which had used more, has handled the signal."""
    used = {1: 500.0, 2: 400.0}
    ended: list[dict[int, int]] = []
    clock = iter(range(5, 1000, 5))
    for rank, pid in (("0", 1), ("1", 2)):
        (work / f"{rank}.pid").write_text(str(pid))
    monkeypatch.setattr(start, "_cpu_seconds", used.__getitem__)
    monkeypatch.setattr(start, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(start, "kill", ended.append)
    hang = start._Hang(work, range(2))
    hang.end()
    (work / f"0{start.CONFIRMED}").touch()
    for _ in range(9):
        used[2] += 5
        hang.end()
    assert not ended
    for _ in range(9):
        hang.end()
    assert ended[0] == {1: 2}


@pytest.mark.slow
def test_a_rank_that_dies_is_no_interruption(run_file: Any, work: Path) -> None:
    write_recipe(
        work / "mine.py",
        "    if os.environ['RANK'] == '1':\n        raise ZeroDivisionError('of rank 1')\n"
        "    time.sleep(3600)\n",
    )
    code, said = lora_kit("train", run_file(), "recipe=mine.py", "--accelerate", "cpu_2proc")
    assert "ZeroDivisionError: of rank 1" in said
    assert code not in (0, 143), said
    assert "SIGTERM" not in said.splitlines()[-1]
    assert not left_over(str(work))


@pytest.mark.slow
def test_signal_before_training_leaves_nothing(run_file: Any, work: Path) -> None:
    file = long_run(run_file)
    process = processes.start([*processes.LORA_KIT, "train", str(file), "--accelerate", "cpu"])
    send_when(process, lambda: len(left_over(str(work))) >= 3, signal.SIGINT)
    code, said = processes.finish(process)
    assert code == 130, said
    assert "Traceback" not in said, said
    assert not left_over(str(work))
    assert not Path("runs").exists()


@pytest.mark.slow
def test_killed_launcher_takes_its_workers_along(run_file: Any, work: Path) -> None:
    file = long_run(run_file)
    process = processes.start(
        [*processes.LORA_KIT, "train", str(file), "--accelerate", "cpu_2proc"]
    )
    send_when(process, lambda: len(steps()) >= 2, signal.SIGKILL)
    process.wait()
    assert until(lambda: not left_over(str(work))), left_over(str(work))
    assert (next(Path("runs/test/checkpoints").iterdir()) / "seal.json").is_file()


@pytest.mark.slow
def test_mistake_comes_through_as_one_line(run_file: Any, work: Path) -> None:
    write_recipe(
        work / "mine.py",
        "    import gc\n    from lora_kit.errors import UserError\n    assert not gc.isenabled()\n"
        "    raise UserError('q_prj: no such module')\n",
    )
    code, said = lora_kit("train", run_file(), "recipe=mine.py", "--accelerate", "cpu_2proc")
    assert code == 2, said
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert errors == ["error: q_prj: no such module"]
    assert "Traceback" not in said, said
    assert not Path("runs").exists()
    assert not left_over(str(work))


@pytest.mark.slow
def test_a_module_that_is_not_there_leaves_nothing(run_file: Any) -> None:
    with pytest.raises(UserError, match=r"did you mean `q_proj`"):
        launch.train(run_file("cpt", **{"adapter.target_modules": ["q_prj"]}))
    pattern = "|".join(f".*{number}.q_prj" for number in range(200))  # PEFT's error begins with it
    with pytest.raises(UserError, match=r"adapter\.target_modules: .*matches no module"):
        launch.train(run_file("cpt", **{"adapter.target_modules": pattern}))
    assert not Path("runs").exists()


def test_importing_the_libraries_collects_no_garbage(run_file: Any) -> None:
    """In a recipe's own process, where `Journey` then enables it; elsewhere nothing changes."""
    run = launch.read_run(run_file(), [])[0]
    frozen = gc.get_freeze_count()
    with Journey(run, Text()):
        assert gc.isenabled() and gc.get_freeze_count() == frozen
    gc.disable()
    try:
        with Journey(run, Text()):
            assert gc.isenabled() and gc.get_freeze_count() > frozen
    finally:
        gc.enable()


@pytest.mark.slow
def test_mistake_of_one_rank_ends_the_others(run_file: Any, work: Path) -> None:
    """The first rank alone makes the run directory: the other one must not wait for it."""
    file = run_file()
    (work / "runs").write_text("a file where the folder should be")
    code, said = lora_kit("train", file, "--accelerate", "cpu_2proc")
    assert code == 2, said
    assert "error: runs/test: cannot be created" in said
    assert not left_over(str(work))


def test_ended_process_that_nobody_reaps_is_not_awaited() -> None:
    """In a container without an init process the group would seem alive for ever."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1, start_new_session=True)
    assert start._alive(child.pid, [])
    assert start._alive(-1, [child.pid])
    os.kill(child.pid, signal.SIGKILL)
    assert until(lambda: not start._alive(child.pid, [child.pid]))
    os.kill(child.pid, 0)  # it is still there, as a zombie
    child.communicate()


@pytest.mark.slow
def test_second_signal_kills(run_file: Any, work: Path) -> None:
    write_recipe(
        work / "deaf.py",
        "    signal.signal(signal.SIGTERM, lambda *_: open('heard', 'w').close())\n"
        "    open('ready', 'w').close()\n    time.sleep(3600)\n",
    )
    command = [*processes.LORA_KIT, "train", str(run_file()), "recipe=deaf.py"]
    process = processes.start(command)
    send_when(process, Path("ready").exists, signal.SIGTERM)
    send_when(process, Path("heard").exists, signal.SIGTERM)
    code, said = processes.finish(process)
    assert code == 143, said
    assert not left_over(str(work))


@pytest.mark.slow
def test_worker_that_dies_without_a_word(run_file: Any, work: Path) -> None:
    write_recipe(work / "mine.py", "    os.kill(os.getpid(), 9)\n")
    code, said = lora_kit("train", run_file(), "recipe=mine.py")
    assert code == 1
    assert "error: the training process exited without reporting an error" in said
    assert "killed by SIGKILL" in said
    assert "Traceback" not in said, said


@pytest.mark.parametrize("name", ["fsdp_qlora", "zero3"])
def test_sharding_on_a_cpu_is_refused(name: str, run_file: Any, work: Path) -> None:
    """accelerate would silently train with a whole base in each process."""
    text = start.accelerate_config(name).read_text().replace("use_cpu: false", "use_cpu: true")
    (work / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match="use_cpu: true: accelerate shards nothing on a CPU"):
        start.start(run_file(), accelerate="mine.yaml")


def test_sharding_that_accelerate_does_not_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a recipe is started by `accelerate launch`."""
    check_sharded(False)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    check_sharded(True)
    with pytest.raises(CheckFailed, match="told to shard the base and does not"):
        check_sharded(False)


def killed(environment: dict[str, str], *_: Any) -> tuple[int, None]:
    """Instead of the child: its worker began, and was killed."""
    (Path(environment[launch.OUTCOME_VARIABLE]) / "0.pid").write_text("1")
    return 137, None


@pytest.mark.parametrize("phase", launch.NO_MEMORY)
def test_the_kernels_kill_for_memory_is_recognized(
    phase: str, run_file: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if phase == "preparing the data":
        return  # the same process as loading the base, to whoever looks from outside

    def child(command: list[str], *given: Any) -> tuple[int, None]:
        run = Path("runs/test")
        run.mkdir(parents=True)
        if phase != "loading the base":
            (run / "metrics.jsonl").touch()
        if phase == "evaluation":
            (run / "adapter").mkdir()
        return killed(*given)

    counts = iter([3, 4])
    monkeypatch.setattr(start, "_killed_for_memory", lambda: next(counts))
    monkeypatch.setattr(start, "_run_child", child)
    with pytest.raises(UserError) as caught:
        start.start(run_file(), accelerate="cpu")
    found = f"out of memory: the kernel killed the training process during {phase}"
    assert str(caught.value).startswith(f"{found}: {launch.NO_MEMORY[phase]}")
    again = "lora-kit compare runs/test train.per_device_eval_batch_size=1"
    assert (again in str(caught.value)) == (phase == "evaluation")


@pytest.mark.parametrize(
    ("own", "file", "text"),
    [
        ("0::/user/run\n", "user/run/memory.events", "low 0\noom 1\noom_kill 7\n"),
        ("0::/\n", "memory.events", "oom_kill 7\noom_group_kill 1\n"),
        (
            "5:cpu,memory:/a\n0::/\n",
            "memory/a/memory.oom_control",
            "oom_kill_disable 0\nunder_oom 0\noom_kill 7\n",
        ),
        ("0::/elsewhere\n", "other/memory.events", "oom_kill 7\n"),
    ],
)
def test_kills_are_read_in_the_own_cgroup(
    own: str, file: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own").write_text(own)
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(text)
    monkeypatch.setattr(start, "_OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(start, "_CGROUPS", tmp_path)
    assert start._killed_for_memory() == (0 if "elsewhere" in own else 7)
    monkeypatch.setattr(start, "_OWN_CGROUPS", tmp_path / "none")
    assert start._killed_for_memory() == 0


def test_a_full_disk_for_temporary_files_fails_no_finished_run(
    run_file: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = Path("a/folder/that/cannot/be/written")
    assert launch._leave_outcome(nowhere, "0", None) == 0
    assert launch._leave_outcome(nowhere, "0", UserError("a mistake")) == 2
    assert capsys.readouterr().err == "error: a mistake\n"
    monkeypatch.setattr(start, "_run_child", lambda *_: (0, None))  # and no outcome
    start.start(run_file(), accelerate="cpu")


def test_a_gpu_config_without_a_gpu_is_refused(
    run_file: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_kit.start.gpu_count", lambda: 0)
    with pytest.raises(UserError, match="--accelerate single_gpu: no GPU is visible"):
        start.start(run_file(), accelerate="single_gpu")
    monkeypatch.setattr("lora_kit.start.gpu_count", lambda: 2)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match="--accelerate zero3 needs deepspeed"):
        start.start(run_file(), accelerate="zero3")
    assert not Path("runs").exists()
