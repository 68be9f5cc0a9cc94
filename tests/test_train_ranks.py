"""Ranks that differ stop before step 1; when one dies or hangs, all end."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import processes
import psutil
import pytest
import yaml
from accelerate.utils.other import get_free_port
from processes import left_over, send_when
from test_launch import long_run, steps

from lora_kit.adapter.files import WEIGHTS
from lora_kit.base.pin import Pinned
from lora_kit.errors import UserError
from lora_kit.run import load_run, shipped
from lora_kit.train import directory


# ------------------------------------------------------------------ what they agree on
def gathered(everyone: Sequence[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> str:
    """What `agree` raises on a rank where these are the facts of all; "" for nothing."""
    monkeypatch.setenv("WORLD_SIZE", str(len(everyone)))
    monkeypatch.setattr("accelerate.utils.gather_object", lambda _: list(everyone))
    try:
        directory.agree(everyone[-1])
    except UserError as error:
        return str(error)
    return ""


def test_a_difference_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    first = {"train.learning_rate": 0.1, "data x.txt": "a" * 64, "seed": 0}
    assert gathered([first, dict(first), dict(first)], monkeypatch) == ""
    other = {**first, "train.learning_rate": 0.2, "data x.txt": "b" * 64}
    assert gathered([first, dict(first), other], monkeypatch) == (
        "the processes differ: data x.txt is aaaaaaaaaaaa on rank 0, bbbbbbbbbbbb on rank 2; "
        "train.learning_rate is 0.1 on rank 0, 0.2 on rank 2"
    )
    assert "seed is 0 on rank 0, None on rank 1" in gathered(
        [first, {k: v for k, v in first.items() if k != "seed"}], monkeypatch
    )
    many = [{str(n): rank for n in range(9)} for rank in range(2)]
    assert gathered(many, monkeypatch).endswith("; and 4 more")


def test_one_process_agrees_with_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr("accelerate.utils.gather_object", None)
    directory.agree({"seed": 0})


CHANGES = {
    "train.learning_rate": lambda given: given | {"overrides": ["train.learning_rate=0.5"]},
    "train.max_length": lambda given: given | {"overrides": ["train.max_length=64"]},
    "prove.shots": lambda given: given | {"overrides": ["prove.shots=0"]},
    "data text.txt": lambda given: given | {"hashes": {"text.txt": "f" * 64}},
    "base.model model.safetensors": lambda given: given | {"base": {"model.safetensors": "f"}},
    "adapter.start": lambda given: given | {"weights": b"other"},
    "version of torch": lambda given: given | {"torch": "9.9"},
    "recipe": lambda given: given | {"entries": {"recipe": "f" * 64}},
}


@pytest.mark.parametrize("key", CHANGES)
def test_every_difference_that_matters_is_among_the_facts(
    key: str, run_file: Any, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the place where the files lie is not."""

    def facts(place: str, **given: Any) -> dict[str, Any]:
        folder = Path(shutil.copytree(work, work.with_name(f"{work.name}-{place}")))
        start = folder / "first"
        start.mkdir()
        (start / WEIGHTS).write_bytes(given["weights"])
        overrides = [f"data.train={folder / 'text.txt'}", "data.workers=2", *given["overrides"]]
        run = load_run(folder / "run.yaml", [*overrides, f"adapter.start={start}"])
        hashes = {str(folder / name): digest for name, digest in given["hashes"].items()}
        pinned = Pinned(str(folder), str(folder), hashes=given["base"])
        installed = {"torch": given["torch"]}
        monkeypatch.setattr(directory, "version", lambda name: installed.get(name, "1.0"))
        return directory.facts_of(run, pinned, hashes, given["entries"])

    run_file(adapter={"lora_dropout": 0.0})
    given: dict[str, Any] = {
        "overrides": [],
        "hashes": {"text.txt": "a" * 64},
        "base": {"model.safetensors": "a"},
        "weights": b"some",
        "torch": "2.13",
        "entries": {"recipe": "a" * 64},
    }
    first, same = facts("a", **given), facts("b", **given)
    assert gathered([first, same], monkeypatch) == ""
    assert f"{key} is " in gathered([first, facts("c", **CHANGES[key](given))], monkeypatch)


def nodes(folders: Sequence[Path], *arguments: Sequence[str]) -> list[tuple[int, str]]:
    """Train on two machines, which are two folders; returns exit code and stderr of each."""
    port = get_free_port()
    values = yaml.safe_load((shipped("accelerate_configs") / "cpu_2nodes.yaml").read_text())
    started = []
    for rank, folder in enumerate(folders):
        file = folder / f"node{rank}.yaml"
        own = {"machine_rank": rank, "main_process_port": port}
        file.write_text(yaml.safe_dump({**values, **own}))
        os.chdir(folder)
        words = ["train", "run.yaml", "--accelerate", str(file), *arguments[rank]]
        started.append(processes.start([*processes.LORA_KIT, *words]))
    return [processes.finish(process) for process in started]


@pytest.mark.slow
def test_nodes_that_differ_stop_before_the_first_step(run_file: Any, work: Path) -> None:
    run_file()
    other = Path(shutil.copytree(work, work.with_name(f"{work.name}-other")))
    text = (other / "text.txt").read_text()
    (other / "text.txt").write_text(text[:100] + "X" + text[101:])
    for code, said in nodes([work, other], [], ["train.learning_rate=0.02"]):
        assert code == 2, said
        (line,) = (line for line in said.splitlines() if line.startswith("error: "))
        assert "train.learning_rate is 0.01 on rank 0, 0.02 on rank 1" in line
        assert "data text.txt is " in line
        assert "Traceback" not in said, said
    assert not Path(work, "runs").exists() and not Path(other, "runs").exists()


EXIT_BARRIER = """
import os, sys
from types import SimpleNamespace
from lora_kit.quiet_launch import quiet_agent
if sys.argv[1] == "quiet":
    quiet_agent()
from torch.distributed import TCPStore
from torch.distributed.elastic.agent.server.api import SimpleElasticAgent
server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
store = TCPStore("127.0.0.1", server.port)
del server
group = SimpleNamespace(state="SUCCEEDED", group_world_size=2)
agent = SimpleNamespace(_store=store, _exit_barrier_timeout=60, _worker_group=group)
SimpleElasticAgent._exit_barrier(agent)
assert "TORCH_CPP_LOG_LEVEL" not in os.environ
"""


def test_a_launcher_that_ends_last_does_not_complain(work: Path) -> None:
    given = [sys.executable, "-c", EXIT_BARRIER]
    loud, quiet = processes.run([*given, "loud"]), processes.run([*given, "quiet"])
    assert loud.returncode == quiet.returncode == 0, quiet.stderr
    assert "Traceback" in loud.stderr
    assert "Failed to recv" in loud.stderr
    assert quiet.stderr == ""


# ------------------------------------------------------------------ a rank that dies or hangs
IMPATIENT = (
    "import lora_kit.start as s; s._UNRESPONSIVE_S = 2.0; from lora_kit.cli import main; main()"
)


def rank_1(work: Path) -> psutil.Process:
    """Its process, in a run of this folder."""
    for process in psutil.process_iter():
        try:
            if process.environ().get("LOCAL_RANK") == "1" and process.cwd() == str(work):
                return process
        except psutil.Error:
            continue
    raise AssertionError("there is no rank 1")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["dies", "hangs", "hangs, Ctrl-C"])
def test_a_rank_that_dies_or_hangs_ends_all(how: str, run_file: Any, work: Path) -> None:
    file = long_run(run_file, max_steps=5000)
    limit = "train.ddp_timeout=600" if "Ctrl-C" in how else "train.ddp_timeout=5"
    command = ["train", str(file), "--accelerate", "cpu_2proc", "train.save_steps=2", limit]
    process = processes.start([sys.executable, "-c", IMPATIENT, *command])
    assert processes.until(lambda: len(steps()) >= 3 or process.poll() is not None)
    rank_1(work.resolve()).send_signal(signal.SIGKILL if how == "dies" else signal.SIGSTOP)
    if "Ctrl-C" in how:
        send_when(process, lambda: True, signal.SIGINT)
    code, said = processes.finish(process)
    assert "Traceback" not in said, said
    assert not left_over(str(work))
    last = said.splitlines()[-1]
    assert f"lora-kit train {Path('runs/test/run.yaml')} --resume" in last
    if how == "dies":
        assert code == 1, said
        assert "error: the process of rank 1 exited without reporting an error" in last
        return
    assert code == (130 if "Ctrl-C" in how else 1), said
    assert re.search("rank (0, )?1 does not respond", said), said  # the other may wait for it
    stack = [line for line in said.splitlines() if line.startswith("[rank 1]   File ")]
    assert stack, said  # where it stood
