"""A folder that appears under its name only when it is whole."""

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
    """Make a folder beside `out` to write into; without an error it is renamed to `out`.

    What a killed process left is removed by the next one that writes the same folder; the name
    (.NAME.lora-kit-partial) is only ever ours.

    Args:
        needed: bytes that will be written; the disk must have them free.

    Raises:
        UserError: `out` exists, cannot be made, or there is too little room; or another process
            is writing it.
    """
    refuse_existing(out)
    partial = out.absolute().with_name(f".{out.name}.lora-kit-partial")
    above = [parent for parent in partial.parents if not parent.exists()]
    check_room(out, needed, "name another disk with --out")
    held = _hold(partial, out)
    try:
        refuse_existing(out)  # by another process, while this one came to hold it
        for left in partial.iterdir():
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        yield partial
        for file in partial.rglob("*"):
            sync(file)
        sync(partial)
        partial.rename(out)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in above:
            with contextlib.suppress(OSError):  # somebody else put something there
                folder.rmdir()
        if isinstance(error, OSError):
            why = error.strerror or error
            raise UserError(f"{out}: cannot be written ({why}): nothing was") from error
        raise
    finally:
        os.close(held)
    sync(out.absolute().parent)


def _hold(partial: Path, out: Path) -> int:
    """Make the folder and lock it as long as this process lives, so that only what the dead left is
    removed. Raises UserError if it cannot be made, or a living one holds it."""
    while True:
        try:
            partial.mkdir(parents=True, exist_ok=True)
            held = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue  # removed by the one that was done with it
        except OSError as error:
            raise UserError(f"{out}: cannot be made ({error.strerror})") from None
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(held)
            raise UserError(f"{out}: another process is writing it: wait for that one") from None
        # What was locked may have been renamed or removed meanwhile: the name counts.
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(held), os.lstat(partial)):
                return held
        os.close(held)


def refuse_existing(out: Path) -> None:
    """For whoever has much to do before `new_folder`. Raises UserError if `out` exists."""
    if os.path.lexists(out):
        raise UserError(f"{out} exists: name another folder with --out, or remove it")


def check_room(where: Path, needed: int, instead: str) -> None:
    """Raises UserError unless `needed` bytes are free on the disk that `where` is, or will be, on.
    `instead`: what else a person can do than to free some."""
    there = next(path for path in (where.absolute(), *where.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise UserError(
            f"{where}: {free / 2**20:,.0f} MiB free on its disk, {needed / 2**20:,.0f} MiB are "
            f"needed: free some, or {instead}"
        )


def write_whole(path: Path, text: str) -> None:
    """Write a file so that there is either the old one or the whole new one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
