"""A folder is there whole, or not at all."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from lora_kit.errors import UserError
from lora_kit.folders import new_folder

# Writes and waits, until it is killed.
WRITER = """
import sys, time
from pathlib import Path
from lora_kit.folders import new_folder
with new_folder(Path(sys.argv[1]), 0) as partial:
    (partial / "half").write_text("x")
    print("written", flush=True)
    time.sleep(3600)
"""


def test_it_appears_when_it_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with new_folder(out, 0) as partial:
        (partial / "file").write_text("x")
        assert not out.exists()
    assert [f.name for f in out.iterdir()] == ["file"]
    assert [f.name for f in out.parent.iterdir()] == ["out"]


def test_after_an_error_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(KeyError), new_folder(tmp_path / "deep" / "out", 0) as partial:
        (partial / "file").write_text("x")
        raise KeyError
    with pytest.raises(UserError, match="No space left"), new_folder(tmp_path / "out", 0):
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_a_file_system_that_does_not_sync_folders_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, code = os.fsync, errno.EINVAL

    def synced(opened: int) -> None:
        if stat.S_ISDIR(os.fstat(opened).st_mode):
            raise OSError(code, "of a folder")
        fsync(opened)

    monkeypatch.setattr(os, "fsync", synced)
    with new_folder(tmp_path / "out", 0) as partial:
        (partial / "file").write_text("x")
    assert (tmp_path / "out" / "file").read_text() == "x"
    code = errno.EIO
    with pytest.raises(UserError, match="of a folder"), new_folder(tmp_path / "other", 0):
        pass
    assert not (tmp_path / "other").exists()


def test_what_exists_is_not_touched_and_room_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists"), new_folder(tmp_path / "out", 0):
        pass
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="exists"), new_folder(tmp_path / "link", 0):
        pass
    with pytest.raises(UserError, match="MiB are free"), new_folder(tmp_path / "x" / "y", 2**60):
        pass
    assert not (tmp_path / "x").exists()


def test_what_a_killed_process_left_is_replaced_and_a_living_one_is_left_alone(
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(out)], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout and writer.stdout.readline() == "written\n"
    with pytest.raises(UserError, match="another process"), new_folder(out, 0):
        pass
    writer.kill()
    writer.wait()
    assert not out.exists() and len(list(tmp_path.iterdir())) == 1
    with new_folder(out, 0) as partial:
        assert not list(partial.iterdir())
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_only_leftovers_of_its_own_are_removed(tmp_path: Path) -> None:
    out, around = tmp_path / "out", tmp_path / ".out.lora-kit-partial"
    around.mkdir()
    (around / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"thesis\.txt is not from lora-kit"), new_folder(out, 0):
        pass
    assert (around / "thesis.txt").read_text() == "years of work" and not out.exists()


def test_the_lock_is_of_the_name_and_not_of_a_folder_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl
    import shutil

    out, lock = tmp_path / "out", fcntl.flock
    opened = []

    def lock_late(held: int, how: int) -> None:
        if not opened:  # another process ends, and a third begins, before this one locks
            opened.append(held)
            partial = next(tmp_path.iterdir())
            shutil.rmtree(partial)
            partial.mkdir()
        lock(held, how)

    monkeypatch.setattr(fcntl, "flock", lock_late)
    with new_folder(out, 0) as partial:
        (partial / "file").write_text("x")
        with pytest.raises(UserError, match="another process"), new_folder(out, 0):
            pass
    assert [f.name for f in out.iterdir()] == ["file"]
