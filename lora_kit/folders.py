"""Atomic output: folders and files that appear under their name only when complete."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_kit.errors import UserError


@contextmanager
def new_folder(out: Path, needed: int) -> Iterator[Path]:
    """A temporary folder next to `out`, renamed to `out` if there is no error.

    The leftovers of a killed process (.NAME.lora-kit-partial) are removed by the next one that
    writes the same folder.

    Args:
        needed: bytes that will be written, which must be free on the disk.

    Raises:
        UserError: `out` exists or cannot be created or written, the disk is too full, or another
            process is writing it.
    """
    refuse_existing(out)
    partial = out.absolute().with_name(f".{out.name}.lora-kit-partial")
    missing_parents = [parent for parent in partial.parents if not parent.exists()]
    check_room(out, needed, "name another disk with --out")
    held = _hold(partial, out)
    try:
        refuse_existing(out)  # another process may have finished before the lock
        for left in partial.iterdir():
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        yield partial
        for file in partial.rglob("*"):
            sync(file)
        sync(partial)
        partial.rename(out)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in missing_parents:
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()
        if isinstance(error, OSError):
            why = error.strerror or error
            raise UserError(f"{out}: cannot be written ({why}): nothing was created") from error
        raise
    finally:
        os.close(held)
    sync(out.absolute().parent)


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
    """Write a file atomically."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """fsync a file or folder."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
