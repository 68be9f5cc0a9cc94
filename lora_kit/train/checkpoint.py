"""Checkpoints that are whole or not there.

A checkpoint counts only when its seal, written last, names every file with its sha256. One that a
killed process left half written, or whose bytes changed, is never continued from: transformers
would take it, and go on with a fresh optimizer or wrong weights, without a word.
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
    """A sealed checkpoint: its folder, the optimizer step, tokens and seconds trained so far."""

    folder: Path
    step: int
    tokens: int
    seconds: float


def seal(folder: Path, step: int, tokens: int, seconds: float) -> None:
    """Name every file of the checkpoint and its hash; the last thing written, and at once."""
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
        UserError: it has no seal, or a file is missing or changed, which is named.
    """
    try:
        content = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        files = dict(content["files"])
        sealed = Checkpoint(folder, *(content[name] for name in ("step", "tokens", "seconds")))
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder}: not finished when the run was stopped") from None
    for name, expected in files.items():
        file = folder / name
        if not file.is_file():
            raise UserError(f"{folder}: {name} is missing")
        if file_hash(file) != expected:
            raise UserError(f"{folder}: {name} is not as it was saved")
    return sealed


def newest_first(checkpoints: Path) -> list[Path]:
    """The folders of a run's checkpoints, whole ones or not."""
    folders = [f for f in checkpoints.glob("checkpoint-*") if f.name[11:].isdigit()]
    return sorted(folders, key=lambda folder: -int(folder.name[11:]))


def rotate(checkpoints: Path, keep: int, best: int | None = None) -> None:
    """Remove all but the newest `keep` checkpoints and that of step `best`, and unsealed ones."""
    folders = newest_first(checkpoints)
    sealed = [folder for folder in folders if (folder / SEAL).is_file()]
    for folder in folders:
        if folder not in sealed[:keep] and folder.name != f"checkpoint-{best}":
            # Unsealed first, so that a removal cut short leaves nothing that looks whole.
            (folder / SEAL).unlink(missing_ok=True)
            shutil.rmtree(folder)


def checkpoint_bytes(trainable: int, keep: int, optim: str) -> int:
    """What the kept checkpoints and the adapter take at most: fp32 weights and optimizer state.

    AdamW keeps two values for each parameter (8 bytes in fp32, 2 in 8 bits). One checkpoint more
    than `keep` lies on the disk while it is written.
    """
    state = 2 if "8bit" in optim else 8
    return (keep + 1) * trainable * (4 + state) + trainable * 4 + (keep + 1) * (1 << 20)


def write_json(path: Path, content: object) -> None:
    """Write JSON so that the file is either the old one or the whole new one."""
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
