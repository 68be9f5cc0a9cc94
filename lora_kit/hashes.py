"""The hashes that a run is pinned with."""

from __future__ import annotations

import hashlib
from pathlib import Path


def file_hash(file: Path) -> str:
    """sha256 of a file's bytes, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
