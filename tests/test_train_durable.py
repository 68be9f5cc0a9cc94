"""What a run calls saved is on disk, in the order that a power cut needs; one process writes it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from processes import LIMIT_S, lora_kit
from trained import copied

import lora_kit as package
from lora_kit.errors import UserError
from lora_kit.folders import new_folder, only_writer, writer_of
from lora_kit.hashes import file_hash
from lora_kit.run import check_free, read_lock
from lora_kit.train.directory import write_json
from lora_kit.train.save import SEAL, read_seal, seal

RUN = Path("runs/test")
Events = list[tuple[str, str]]


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Events:
    """("fsync", path) and ("rename", target) in the order in which they happen."""
    found: Events = []
    fsync = os.fsync

    def synced(opened: int) -> None:
        fsync(opened)
        found.append(("fsync", os.readlink(f"/proc/self/fd/{opened}")))

    monkeypatch.setattr(os, "fsync", synced)
    for name in ("rename", "replace"):
        rename = getattr(os, name)

        def renamed(source: Any, target: Any, rename: Any = rename) -> None:
            rename(source, target)
            found.append(("rename", os.path.abspath(target)))

        monkeypatch.setattr(os, name, renamed)
    return found


def assert_durable(events: Events, name: Path, files: list[Path]) -> None:
    """Before the last rename to `name`, these files and their folders are on disk, and the name's
    folder is after it."""
    target = str(name.absolute())
    at = max(place for place, event in enumerate(events) if event == ("rename", target))
    before, after = events[:at], events[at:]
    for file in files:
        for path in (file.absolute(), file.absolute().parent):
            assert ("fsync", str(path)) in before, path
    assert ("fsync", str(name.absolute().parent)) in after


def checkpoint(run: Path, step: int = 1) -> Path:
    folder = run / "checkpoints" / f"checkpoint-{step}"
    (folder / "sub").mkdir(parents=True)
    for name in ("adapter_model.safetensors", "optimizer.pt", "sub/state"):
        (folder / name).write_text(name)
    return folder


def test_a_checkpoint_is_on_disk_before_its_seal(tmp_path: Path, events: Events) -> None:
    write_json(tmp_path / "run.lock.json", {"id": "this"})
    folder = checkpoint(tmp_path)
    events.clear()
    seal(folder, 1, 2, 3.0)
    files = [folder / name for name in json.loads((folder / SEAL).read_text())["files"]]
    assert len(files) == 3
    # Also the lock file, which names the seal, and the folders that are new.
    assert_durable(events, folder / SEAL, [*files, folder, folder.parent])
    lock = ("rename", str(tmp_path / "run.lock.json"))
    assert events.index(lock) < events.index(("rename", str(folder / SEAL)))
    assert read_seal(folder).tokens == 2


def test_a_new_folder_is_on_disk_before_it_has_its_name(tmp_path: Path, events: Events) -> None:
    with new_folder(tmp_path / "a" / "b" / "out", 0) as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "file").write_text("x")
        inside = [partial / "sub" / "file", partial / "sub"]
    assert_durable(events, tmp_path / "a" / "b" / "out", inside)
    for parent in (tmp_path, tmp_path / "a"):  # they hold folders that are new
        assert ("fsync", str(parent)) in events


@pytest.mark.slow
def test_a_run_is_on_disk_when_it_is_finished(run_file: Any, work: Path, events: Events) -> None:
    package.train(run_file("cpt", **{"train.save_steps": 2}))
    for folder in (RUN / "checkpoints").iterdir():
        assert_durable(
            events, folder / SEAL, [file for file in folder.iterdir() if file.name != SEAL]
        )
    files = [file for file in RUN.rglob("*") if file.is_file()]
    files = [file for file in files if file.name not in (".writer", "run.lock.json")]
    assert {"run.yaml", "report.json", "report.html", "metrics.jsonl"} <= {f.name for f in files}
    assert_durable(events, RUN / "run.lock.json", files)
    saved = ("rename", str((RUN / "adapter").absolute()))
    before = events[: events.index(saved)]
    weights = str((RUN / "adapter.partial" / "adapter_model.safetensors").absolute())
    assert ("fsync", weights) in before
    for parent in (work, work / "runs"):
        assert ("fsync", str(parent)) in events


# ------------------------------------------------------------------ one writer
HOLDER = """
import sys, time
from pathlib import Path
from lora_kit.folders import only_writer
with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(3600)
"""


@contextmanager
def held(run: Path) -> Iterator[subprocess.Popen[str]]:
    """A run directory that another process writes into."""
    command = [sys.executable, "-c", HOLDER, str(run)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        yield holder
    finally:
        holder.kill()
        holder.communicate(timeout=LIMIT_S)


def test_a_second_writer_is_told_who_the_first_is(tmp_path: Path) -> None:
    with held(tmp_path) as holder:
        named = rf"in use by process {holder.pid} on \S+ since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d"
        with pytest.raises(UserError, match=named) as caught, only_writer(tmp_path):
            pass
        assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
        assert str(writer_of(tmp_path)).startswith(f"process {holder.pid} on ")
        with pytest.raises(UserError, match=named) as caught:
            check_free(tmp_path)
        assert "remove" not in str(caught.value)
    # Killed: the next one takes over.
    assert writer_of(tmp_path) is None
    with only_writer(tmp_path):
        assert str(writer_of(tmp_path)).startswith(f"process {os.getpid()} on ")
    with only_writer(tmp_path):
        pass
    assert writer_of(tmp_path) is None and writer_of(tmp_path / "missing") is None


def test_without_locks_on_the_disk_a_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("lora_kit.folders.fcntl.flock", flock)
    with only_writer(tmp_path):
        assert writer_of(tmp_path) is None
    assert "cannot be locked (Function not implemented)" in capsys.readouterr().err


@pytest.mark.slow
def test_what_writes_into_a_run_is_refused_while_another_does(
    cpt_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copied(cpt_run, tmp_path)
    monkeypatch.chdir(run.parents[1])
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    lock = read_lock(run)
    with held(run) as holder:
        holds = {file: file.read_bytes() for file in before if file.name != ".writer"}
        for refused in (
            lambda: package.compare(run),
            lambda: package.train(run / "run.yaml", resume=True),
            lambda: package.train(run / "run.yaml"),
        ):
            with pytest.raises(UserError, match=f"in use by process {holder.pid} "):
                refused()
        code, said = lora_kit("train", run / "run.yaml", "--resume")
        assert code == 2, said
        assert f"in use by process {holder.pid} " in said.splitlines()[-1]
        assert {file: file.read_bytes() for file in holds} == holds
    assert read_lock(run) == lock
    with pytest.raises(UserError, match="already finished"):
        package.train(run / "run.yaml", resume=True)


# ------------------------------------------------------------------ whose checkpoint it is
def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "run.lock.json", {"id": name})
        for step in (1, 2):
            seal(checkpoint(tmp_path / name, step), step, 2, 3.0)
    one, two = (tmp_path / name / "checkpoints" for name in ("one", "two"))
    assert list(read_lock(tmp_path / "one")["checkpoints"]) == ["checkpoint-1", "checkpoint-2"]
    shutil.rmtree(one / "checkpoint-1")
    shutil.copytree(two / "checkpoint-1", one / "checkpoint-1")
    with pytest.raises(UserError, match=r"checkpoint-1: a checkpoint of another run$"):
        read_seal(one / "checkpoint-1")
    # The same, which says that it is of this run; and a step under the name of another.
    content = json.loads((one / "checkpoint-1" / SEAL).read_text())
    (one / "checkpoint-1" / SEAL).write_text(json.dumps({**content, "run": "one"}))
    with pytest.raises(UserError, match=r"not the one that the run's run\.lock\.json names"):
        read_seal(one / "checkpoint-1")
    shutil.copytree(one / "checkpoint-2", one / "checkpoint-3")
    with pytest.raises(UserError, match=r"not the one that the run's run\.lock\.json names"):
        read_seal(one / "checkpoint-3")
    read_seal(one / "checkpoint-2")


def test_a_file_that_the_seal_does_not_name_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "run.lock.json", {"id": "this"})
    folder = checkpoint(tmp_path)
    seal(folder, 1, 2, 3.0)
    (folder / "scaler.pt").write_bytes(b"a pickle that transformers would read")
    with pytest.raises(UserError, match=r"scaler\.pt was added after it was saved"):
        read_seal(folder)


def test_a_run_of_an_older_version_has_no_names_of_its_seals(tmp_path: Path) -> None:
    write_json(tmp_path / "run.lock.json", {"seed": 0})
    folder = checkpoint(tmp_path)
    seal(folder, 1, 2, 3.0)
    assert read_lock(tmp_path) == {"seed": 0}
    content = json.loads((folder / SEAL).read_text())
    del content["run"]
    (folder / SEAL).write_text(json.dumps(content))
    assert read_seal(folder).step == 1


def test_hashes_of_a_checkpoint_are_of_its_content(tmp_path: Path) -> None:
    write_json(tmp_path / "run.lock.json", {"id": "this"})
    folder = checkpoint(tmp_path)
    seal(folder, 1, 2, 3.0)
    content = json.loads((folder / SEAL).read_text())
    assert content["run"] == "this"
    assert content["files"]["sub/state"] == file_hash(folder / "sub" / "state")
