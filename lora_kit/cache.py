"""A cache on disk of prepared rows, reference log-probabilities, hidden states and GGUF files of
bases. The key of an entry is a hash of everything that it was computed from.

~/.cache/lora_kit/<key>/ (or below LORA_KIT_CACHE) appears when it is complete. A lock lets one
process prepare while others, such as other ranks, wait. Entries that were not used for a month are
removed, and the oldest ones where the cache is larger than LORA_KIT_CACHE_GB; never one in use.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import hashlib
import inspect
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from lora_kit.errors import UserError
from lora_kit.folders import new_folder
from lora_kit.hashes import file_hash

CACHE_VARIABLE = "LORA_KIT_CACHE"
BOUND_VARIABLE = "LORA_KIT_CACHE_GB"  # gigabytes; unset: no bound
# Increased whenever the same input gives different files.
VERSION = 11
DAYS_KEPT = 30
_SEAL = "seal.json"
_LEFTOVER = ".lora-kit-partial"  # suffix of partial folders of killed processes: see `new_folder`
# Entries that this process uses, locked while it lives.
_in_use: dict[Path, int] = {}


def key_of(*parts: object, libraries: Iterable[str] = ()) -> str:
    """A cache key of plain values and the versions of libraries that affect the result."""
    versions = {name: installed(name) for name in ("lora-kit", *libraries)}
    text = json.dumps([VERSION, versions, parts], default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def code_of(something: object) -> str:
    """A hash of the source files of an object's class and base classes: a task's own code is part
    of a cache key."""
    files = set()
    for kind in type(something).__mro__:
        with contextlib.suppress(OSError, TypeError):  # built in
            files.add(vars(kind).get("__file__") or inspect.getsourcefile(kind) or "")
    digests = [file_hash(Path(file)) for file in sorted(files) if file and Path(file).is_file()]
    return hashlib.sha256(repr([type(something).__qualname__, digests]).encode()).hexdigest()


def installed(library: str) -> str | None:
    """The installed version of a library, or None."""
    try:
        return version(library)
    except PackageNotFoundError:  # of an extra
        return None


def root_folder() -> Path:
    """The folder of the cache."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "lora_kit")


def size_of(folder: Path) -> int:
    """Bytes on disk of all files in a folder."""
    blocks = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(OSError):  # removed meanwhile
            blocks += file.lstat().st_blocks
    return 512 * blocks


def prepared(key: str, build: Callable[[Path], None]) -> Path:
    """The folder of this key, from the cache or newly made: `build` writes its files into the
    folder that it is given.

    A corrupt folder is rebuilt. If the cache is not writable, a temporary folder is used for this
    process.
    """
    from filelock import FileLock

    root, bound = root_folder(), _bound()
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / f"{key}.lock")
        lock.acquire(blocking=False)
    except TimeoutError:
        print("data: waiting for another process that prepares the same data", file=sys.stderr)
        lock.acquire()
    except OSError as error:
        folder = Path(tempfile.mkdtemp(prefix="lora_kit-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        print(f"data: {root}: not writable, not caching ({error.strerror})", file=sys.stderr)
        build(folder)
        return folder
    folder = root / key
    try:
        whole = _is_whole(folder)
        if not whole:
            _remove_old(root, bound)
            shutil.rmtree(folder, ignore_errors=True)
            with new_folder(folder, 0) as partial:
                build(partial)
                seal = {f.name: file_hash(f) for f in sorted(partial.iterdir())}
                (partial / _SEAL).write_text(json.dumps(seal), encoding="utf-8")
        _use(folder)
        if not whole and bound is not None:
            _remove_old(root, bound)
    except UserError as error:
        if isinstance(error.__cause__, OSError):  # for instance a full disk
            raise UserError(f"{error}; set {CACHE_VARIABLE} to another folder") from None
        raise
    finally:
        lock.release()
    return folder


def _is_whole(folder: Path) -> bool:
    """Whether a folder is complete: all files have the hashes in its seal."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        seal = json.loads((folder / _SEAL).read_text(encoding="utf-8"))
        if seal and all(file_hash(folder / name) == seal[name] for name in seal):
            return True
    if folder.exists():
        print(f"data: {folder}: corrupt: preparing it again", file=sys.stderr)
    return False


def _bound() -> float | None:
    """The largest size of the cache in bytes. Raises UserError if it is not a number."""
    text = os.environ.get(BOUND_VARIABLE)
    try:
        return 1e9 * float(text) if text else None
    except ValueError:
        raise UserError(f"{BOUND_VARIABLE}={text}: not a number of gigabytes: correct it") from None


def _use(folder: Path) -> None:
    """Record that an entry is used now, and keep it from being removed while this process lives."""
    with contextlib.suppress(OSError):
        held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        if folder in _in_use:
            os.close(_in_use[folder])
        _in_use[folder] = held
        os.utime(folder)
        fcntl.flock(held, fcntl.LOCK_SH)


def _remove_old(root: Path, bound: float | None) -> None:
    """Remove entries that were not used for DAYS_KEPT, and the oldest of a cache over `bound`
    bytes."""
    oldest = time.time() - DAYS_KEPT * 86400
    # Only folders with a seal, and leftovers of killed processes.
    folders = [*(seal.parent for seal in root.glob(f"*/{_SEAL}")), *root.glob(f".*{_LEFTOVER}")]
    found = []
    for folder in folders:
        size = 0 if bound is None else size_of(folder)
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            found.append((folder.stat().st_mtime, size, folder))
    total = sum(size for _, size, _ in found)
    for used, size, folder in sorted(found):
        over = bound is not None and total > bound
        if (used < oldest or over) and _removed(folder):
            total -= size


def _removed(folder: Path) -> bool:
    """Remove an entry or a leftover, unless a process prepares or uses it; returns whether it was
    removed."""
    from filelock import FileLock

    key = folder.name.removeprefix(".").removesuffix(_LEFTOVER)
    lock = FileLock(folder.with_name(f"{key}.lock"))
    try:
        with lock.acquire(blocking=False):
            held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
                folder.with_name(f"{key}.lock").unlink(missing_ok=True)
            finally:
                os.close(held)
    except (TimeoutError, OSError):  # in use, or removed meanwhile
        return False
    return True
