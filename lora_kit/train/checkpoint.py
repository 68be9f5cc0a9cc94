"""Checkpoints that are whole or not there.

A checkpoint counts only when its seal, written last, names every file with its sha256. One that a
killed process left half written, or whose bytes changed, is never continued from: transformers
would take it, and go on with a fresh optimizer or wrong weights, without a word.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from lora_kit.errors import UserError
from lora_kit.hashes import file_hash

SEAL = "seal.json"


@dataclass(frozen=True)
class Checkpoint:
    """A sealed checkpoint: its folder, the optimizer step, tokens and seconds trained so far."""

    folder: Path
    step: int
    tokens: int
    seconds: float


def seal(
    folder: Path, step: int, tokens: int, seconds: float, eval_loss: float | None = None
) -> None:
    """Name every file of the checkpoint and its hash; the last thing written, and at once.

    eval_loss: on the held-out rows at this very step, where they were looked at; nats per token.
    """
    files = {
        str(file.relative_to(folder)): file_hash(file)
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != SEAL
    }
    content = {"step": step, "tokens": tokens, "seconds": seconds, "eval_loss": eval_loss}
    write_json(folder / SEAL, {**content, "files": files})


def read_seal(folder: Path) -> Checkpoint:
    """Verify a checkpoint.

    Raises:
        UserError: it has no seal, or a file is missing or changed, which is named.
    """
    try:
        content = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        files = content["files"]
    except (OSError, ValueError, KeyError):
        raise UserError(f"{folder}: not finished when the run was stopped") from None
    for name, expected in files.items():
        file = folder / name
        if not file.is_file():
            raise UserError(f"{folder}: {name} is missing")
        if file_hash(file) != expected:
            raise UserError(f"{folder}: {name} is not as it was saved")
    return Checkpoint(folder, content["step"], content["tokens"], content["seconds"])


def newest(checkpoints: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint, and what is wrong with the newer ones."""
    problems: list[str] = []
    for folder in reversed(_sorted(checkpoints)):
        try:
            return read_seal(folder), problems
        except UserError as error:
            problems.append(str(error))
    return None, problems


def rotate(checkpoints: Path, keep: int, best: int | None = None) -> None:
    """Remove all but the newest `keep` checkpoints and that of step `best`, and unsealed ones."""
    folders = _sorted(checkpoints)
    sealed = [folder for folder in folders if (folder / SEAL).is_file()]
    for folder in folders:
        if folder not in sealed[-keep:] and folder.name != f"checkpoint-{best}":
            # Unsealed first, so that a removal cut short leaves nothing that looks whole.
            (folder / SEAL).unlink(missing_ok=True)
            shutil.rmtree(folder)


def check_disk(where: Path, needed: int) -> None:
    """Raises UserError unless `needed` bytes are free on the disk that holds `where`."""
    while not where.exists():
        where = where.parent
    free = shutil.disk_usage(where).free
    if free < needed:
        raise UserError(
            f"{where}: {free / 2**20:,.0f} MiB free, the run's checkpoints need "
            f"{needed / 2**20:,.0f} MiB: free some, or lower train.save_total_limit"
        )


def checkpoint_bytes(trainable: int, keep: int, optim: str) -> int:
    """What the kept checkpoints and the adapter take at most: fp32 weights and optimizer state.

    AdamW keeps two values for each parameter (8 bytes in fp32, 2 in 8 bits). One checkpoint more
    than `keep` lies on the disk while it is written.
    """
    state = 2 if "8bit" in optim else 8
    return (keep + 1) * trainable * (4 + state) + trainable * 4 + (keep + 1) * (1 << 20)


def write_json(path: Path, content: object) -> None:
    """Write JSON so that the file is either the old one or the whole new one."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as opened:
        json.dump(content, opened, indent=1, ensure_ascii=False)
        opened.write("\n")
        opened.flush()
        os.fsync(opened.fileno())
    partial.replace(path)


def _sorted(checkpoints: Path) -> list[Path]:
    folders = [f for f in checkpoints.glob("checkpoint-*") if f.name[11:].isdigit()]
    return sorted(folders, key=lambda folder: int(folder.name[11:]))
