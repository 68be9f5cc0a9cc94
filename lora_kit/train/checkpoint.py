"""Checkpoints with a seal, so that incomplete or corrupt ones are never used.

The seal is written last and lists every file with its sha256. A run never resumes from a checkpoint
that is incomplete or was changed; transformers would silently use it, with a fresh optimizer or
wrong weights.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from lora_kit.errors import UserError
from lora_kit.folders import write_whole
from lora_kit.hashes import file_hash

SEAL = "seal.json"


@dataclass(frozen=True)
class Checkpoint:
    """A sealed checkpoint: folder, optimizer step, and tokens and seconds trained so far."""

    folder: Path
    step: int
    tokens: int
    seconds: float


def seal(folder: Path, step: int, tokens: int, seconds: float) -> None:
    """Write the seal: every file of the checkpoint with its hash. Atomic; must come last."""
    files = {
        str(file.relative_to(folder)): file_hash(file)
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != SEAL
    }
    content = {"step": step, "tokens": tokens, "seconds": seconds, "files": files}
    write_json(folder / SEAL, content)


def read_seal(folder: Path) -> Checkpoint:
    """Verify a checkpoint.

    Raises:
        UserError: it has no seal, or a file is missing or changed.
    """
    try:
        content = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        files = dict(content["files"])
        sealed = Checkpoint(folder, *(content[name] for name in ("step", "tokens", "seconds")))
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder}: incomplete: the run was stopped while saving it") from None
    for name, expected in files.items():
        file = folder / name
        if not file.is_file():
            raise UserError(f"{folder}: {name} is missing")
        if file_hash(file) != expected:
            raise UserError(f"{folder}: {name} was changed after it was saved")
    return sealed


def newest_first(checkpoints: Path) -> list[Path]:
    """The checkpoint folders of a run, sealed or not, newest first."""
    folders = [f for f in checkpoints.glob("checkpoint-*") if f.name[11:].isdigit()]
    return sorted(folders, key=lambda folder: -int(folder.name[11:]))


def rotate(checkpoints: Path, keep: int, best: int | None = None) -> None:
    """Keep only the newest `keep` sealed checkpoints and that of step `best`."""
    folders = newest_first(checkpoints)
    sealed = [folder for folder in folders if (folder / SEAL).is_file()]
    for folder in folders:
        if folder not in sealed[:keep] and folder.name != f"checkpoint-{best}":
            # The seal first, so that an interrupted removal leaves no sealed checkpoint.
            (folder / SEAL).unlink(missing_ok=True)
            shutil.rmtree(folder)


def checkpoint_bytes(trainable: int, keep: int, optim: str) -> int:
    """Disk space of the kept checkpoints and the adapter: fp32 weights and optimizer state.

    AdamW has two states per parameter (8 bytes in fp32, 2 bytes in 8-bit). While a checkpoint is
    written there is one more than `keep`.
    """
    state = 2 if "8bit" in optim else 8
    return (keep + 1) * trainable * (4 + state) + trainable * 4 + (keep + 1) * (1 << 20)


def write_json(path: Path, content: object) -> None:
    """Write a JSON file atomically."""
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
