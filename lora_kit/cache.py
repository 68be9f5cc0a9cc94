"""A cache on disk of prepared rows, reference log-probabilities, hidden states and GGUF files of
bases. The key of an entry is a hash of everything that it was computed from.

~/.cache/lora_kit/<key>/ (or below LORA_KIT_CACHE) appears when it is complete. A lock lets one
process prepare while others, such as other ranks, wait.
"""

from __future__ import annotations

import atexit
import contextlib
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
# Increased whenever the same input gives different files.
VERSION = 10
DAYS_KEPT = 30
_SEAL = "seal.json"


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


def prepared(key: str, build: Callable[[Path], None]) -> Path:
    """The folder of this key, from the cache or newly made: `build` writes its files into the
    folder that it is given.

    A corrupt folder is rebuilt. If the cache is not writable, a temporary folder is used for this
    process.
    """
    from filelock import FileLock

    root = Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "lora_kit")
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / f"{key}.lock")
        lock.acquire(blocking=False)
    except TimeoutError:
        print(
            "data: waiting for another process that prepares the same data",
            file=sys.stderr,
            flush=True,
        )
        lock.acquire()
    except OSError as error:
        folder = Path(tempfile.mkdtemp(prefix="lora_kit-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        print(
            f"data: {root}: not writable, not caching ({error.strerror})",
            file=sys.stderr,
            flush=True,
        )
        build(folder)
        return folder
    folder = root / key
    try:
        if not _is_whole(folder):
            _remove_old(root)
            shutil.rmtree(folder, ignore_errors=True)
            with new_folder(folder, 0) as partial:
                build(partial)
                seal = {f.name: file_hash(f) for f in sorted(partial.iterdir())}
                (partial / _SEAL).write_text(json.dumps(seal), encoding="utf-8")
        with contextlib.suppress(OSError):
            os.utime(folder)
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
        print(f"data: {folder}: corrupt: preparing it again", file=sys.stderr, flush=True)
    return False


def _remove_old(root: Path) -> None:
    """Remove entries that were not used for DAYS_KEPT. Processes that still read them are not
    affected: on Linux mapped files stay until they are closed."""
    oldest = time.time() - DAYS_KEPT * 86400
    # Only folders with a seal, and leftovers of killed processes.
    found = [seal.parent for seal in root.glob(f"*/{_SEAL}")]
    found += root.glob(".*.lora-kit-partial")
    for folder in found:
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            if folder.stat().st_mtime < oldest:
                shutil.rmtree(folder, ignore_errors=True)
                (root / f"{folder.name}.lock").unlink(missing_ok=True)
