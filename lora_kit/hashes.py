"""The hashes that a run is pinned with."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path


def file_hash(file: Path) -> str:
    """sha256 of a file's bytes, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def cached_hash(file: Path) -> str:
    """The same; of a large file in the Hub's cache, the name it has there."""
    blob = file.resolve()
    known = blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name)
    return blob.name if known else file_hash(file)
