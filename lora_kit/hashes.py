"""File hashes."""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache
from pathlib import Path


def file_hash(file: Path) -> str:
    """sha256 of a file's bytes, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def cached_hash(file: Path) -> str:
    """`file_hash`, cached while the file is unchanged; for a file in the Hub's cache, its blob
    name, which is the hash."""
    blob = file.resolve()
    if blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name):
        return blob.name
    now = blob.stat()
    return _hash_of(blob, now.st_ino, now.st_size, now.st_mtime_ns)


@lru_cache
def _hash_of(file: Path, inode: int, size: int, changed: int) -> str:
    """`file_hash`; inode, size and time of change are only part of the cache's key."""
    return file_hash(file)
