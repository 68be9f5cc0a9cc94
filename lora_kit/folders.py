"""Atomic output: folders and files that appear under their name only when complete, and are on disk
then, also after a power cut. One writer per run directory."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from lora_kit.errors import UserError

_CONTENT = "content"  # of a partial folder: nothing else in it is ours
_WRITER = ".writer"  # of a run directory: locked by the process that writes into it, and names it


@contextmanager
def new_folder(out: Path, needed: int) -> Iterator[Path]:
    """A temporary folder next to `out`, renamed to `out` if there is no error.

    It is in .NAME.lora-kit-partial/content, which the next process that writes the same folder
    removes if this one is killed.

    Args:
        needed: bytes that will be written, which must be free on the disk.

    Raises:
        UserError: `out` exists or cannot be created or written, the disk is too full, another
            process is writing it, or there is something else in the partial folder.
    """
    refuse_existing(out)
    around = out.absolute().with_name(f".{out.name}.lora-kit-partial")
    missing_parents = [parent for parent in around.parents if not parent.exists()]
    check_room(out, needed, "name another disk with --out")
    held = _hold(around, out)
    try:
        refuse_existing(out)  # another process may have finished before the lock
        if strange := sorted({path.name for path in around.iterdir()} - {_CONTENT}):
            raise UserError(f"{around}: {strange[0]} is not from lora-kit: move it away")
        partial = around / _CONTENT
        try:
            if partial.exists():
                shutil.rmtree(partial)
            partial.mkdir()
            yield partial
            sync_tree(partial)
            partial.rename(out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"{out}: cannot be written ({why}): nothing was created") from error
    finally:
        for folder in (around, *missing_parents):
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()
        os.close(held)
    for folder in (out.absolute(), *missing_parents):
        sync(folder.parent)


def _hold(partial: Path, out: Path) -> int:
    """Create the folder and lock it while this process lives. Raises UserError if it cannot be
    created, or another process holds the lock."""
    while True:
        try:
            partial.mkdir(parents=True, exist_ok=True)
            held = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue  # removed by another process that finished
        except OSError as error:
            raise UserError(f"{out}: cannot be created ({error.strerror})") from None
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(held)
            raise UserError(
                f"{out}: another process is writing it: wait for it to finish"
            ) from None
        # The locked folder may have been renamed or removed: check the name again.
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(held), os.lstat(partial)):
                return held
        os.close(held)


def refuse_existing(out: Path) -> None:
    """Raises UserError if `out` exists; to fail early, before `new_folder`."""
    if os.path.lexists(out):
        raise UserError(f"{out} exists: name another folder with --out, or remove it")


def check_room(where: Path, needed: int, instead: str) -> None:
    """Raises UserError unless `needed` bytes are free on the disk of `where`. `instead`: a fix
    besides freeing space."""
    there = next(path for path in (where.absolute(), *where.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise UserError(
            f"{where}: needs {needed / 2**20:,.0f} MiB of disk space, {free / 2**20:,.0f} MiB are "
            f"free: free some, or {instead}"
        )


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically; it is on disk when this returns."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """fsync a file or folder; of a folder, some network file systems do not support it."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(opened)


def sync_tree(folder: Path) -> None:
    """fsync all files of a folder, then its subfolders and the folder itself."""
    inside = [path for path in folder.rglob("*") if not path.is_symlink()]
    # Together: the file system commits its journal once for several, which takes most of the time.
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(sync, [path for path in inside if not path.is_dir()]))
    for path in (*filter(Path.is_dir, inside), folder):
        sync(path)


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Lock a run directory: one process at a time writes into it. The kernel unlocks it when the
    process ends, however it does.

    Raises:
        UserError: another process holds the lock; or the folder cannot be written.
    """
    try:
        held = os.open(folder / _WRITER, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from None
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder}: in use by {_named(held)}: wait until it ends, or stop it"
            ) from None
        except OSError as error:  # of some network file systems
            why = f"{folder}: cannot be locked ({error.strerror})"
            print(f"warning: {why}: use it in one process at a time", file=sys.stderr)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        named = f"process {os.getpid()} on {socket.gethostname()} since {since}".encode()
        os.pwrite(held, named, 0)
        os.ftruncate(held, len(named))
        try:
            yield
        finally:
            os.ftruncate(held, 0)
    finally:
        os.close(held)


def writer_of(folder: Path) -> str | None:
    """The process that `only_writer` allows to write into a folder now; None if there is none."""
    try:
        held = os.open(folder / _WRITER, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _named(held)
    except OSError:  # of some network file systems
        return None
    finally:
        os.close(held)
    return None


def _named(held: int) -> str:
    """The process that an open _WRITER file names."""
    return os.pread(held, 200, 0).decode("utf-8", "replace") or "another process"
