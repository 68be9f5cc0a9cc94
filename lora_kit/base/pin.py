"""Where a base model lies and exactly which one it is: folder, revision, hashes, licence."""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lora_kit import nano
from lora_kit.errors import UserError
from lora_kit.hashes import file_hash
from lora_kit.schema import Base

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
# What a base is made of. Weights in other formats than safetensors can run code, and are not read.
# README.md carries the licence.
_WEIGHTS = "*.safetensors"
_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "README.md"]
_HASHED = ["config.json", "tokenizer*", "vocab*", "merges.txt", "*.jinja"]
# Only the top folder is read; `consolidated` are the same weights once more, in Mistral's layout.
_NOT_READ = ["*/*", "consolidated*.safetensors"]


@dataclass(frozen=True)
class Pinned:
    """A base as it lies on disk. `hashes`: {file name: sha256}, of all that decides its output."""

    model: str
    folder: str
    revision: str | None = None
    licence: str | None = None
    hashes: dict[str, str] = field(default_factory=dict)

    def to_lock(self) -> dict[str, object]:
        """What the lock file keeps; the folder is this machine's business."""
        return {key: value for key, value in asdict(self).items() if key != "folder"}


def pin(base: Base, lock: dict[str, Any] | None = None, weights: bool = True) -> Pinned:
    """Find the base, fetch it if it is on the Hub, and fix its revision and hashes.

    Args:
        lock: the lock file of a run that used it; the revision is the one named there, unless the
            base names its own.
        weights: without them only what a tokenizer needs is fetched and hashed.

    Raises:
        UserError: it is not there, cannot be reached offline, is gated, or has no safetensors.
    """
    if base.model == "nano":
        folder, revision, model = nano.MODEL, None, "nano"
    elif Path(base.model).is_dir():
        folder, revision, model = Path(base.model).resolve(), None, base.model
    elif _HUB_ID.match(base.model):
        used = (lock or {}).get("base", {}).get("revision")
        folder = _from_hub(base.model, base.revision or used, weights)
        # The cache keeps each snapshot in a folder named after its commit.
        revision, model = folder.name, base.model
    else:
        raise UserError(
            f"base.model: {base.model}: no such folder, and not a Hub id (owner/name) or `nano`"
        )
    if revision is None and base.revision is not None:
        raise UserError(
            f"base.revision: {model} is no Hub model and has no revisions: leave it out"
        )
    if not (folder / "config.json").is_file():
        raise UserError(f"base.model: {folder}: no config.json: not a model folder")
    if weights and not list(folder.glob(_WEIGHTS)):
        raise UserError(
            f"base.model: {folder}: no .safetensors weights; other formats are not read"
        )
    return Pinned(model, str(folder), revision, _licence(folder), _hashes(folder, weights))


def _from_hub(model: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        IncompleteSnapshotError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        return Path(
            snapshot_download(
                model,
                revision=revision,
                allow_patterns=_FILES + [_WEIGHTS] * weights,
                ignore_patterns=_NOT_READ,
            )
        )
    except HFValidationError as error:
        raise UserError(f"base.model: {model}: not a Hub id: {_first_line(error)}") from None
    except RevisionNotFoundError:
        raise UserError(f"base.revision: {model} has no revision `{revision}`") from None
    # Gated is a kind of not found to the client.
    except (RepositoryNotFoundError, OSError, ValueError) as error:
        # What went wrong on the way is the cause of "not in the cache".
        cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(cause, GatedRepoError) or status == 403:
            problem = (
                f"access refused ({status}): ask for it at {where}/{model}, "
                "then log in with `hf auth login`"
            )
        elif isinstance(cause, RepositoryNotFoundError) or status in (401, 404):
            problem = (
                f"not on {where}, or private and you are not logged in (`hf auth login`); "
                "or name a local folder"
            )
        elif status is not None:
            problem = f"{where} answers {status}: try again later, or name a local folder"
        elif isinstance(error, IncompleteSnapshotError):
            problem = f"only in part in the cache, and {_why(where)}: fetch it with `hf download`"
        elif isinstance(error, OfflineModeIsEnabled | FileNotFoundError):
            problem = (
                f"neither a local folder nor in the cache, and {_why(where)}: "
                "name a local folder, or fetch it first with `hf download`"
            )
        else:
            problem = f"cannot be fetched from {where}: {_first_line(error)}"
        raise UserError(f"base.model: {model}: {problem}") from None


def _why(where: str) -> str:
    from huggingface_hub import constants

    return "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{where} cannot be reached"


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__


def _hashes(folder: Path, weights: bool) -> dict[str, str]:
    """sha256 of weights, configuration, tokenizer and template."""
    files = {file for pattern in _HASHED + [_WEIGHTS] * weights for file in folder.glob(pattern)}
    return {file.name: sha256(file) for file in sorted(files)}


def sha256(file: Path) -> str:
    """The hash of a base's file; of a large one in the Hub's cache, the name it has there."""
    cached = file.resolve()
    if cached.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", cached.name):
        return cached.name
    return file_hash(file)


def _licence(folder: Path) -> str | None:
    """The `license:` of the model card's front matter; None is unknown."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    import yaml

    text = card.read_text(encoding="utf-8", errors="replace")
    front = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    try:
        values = yaml.safe_load(front[1]) if front else None
    except yaml.YAMLError:
        return None
    value = values.get("license") if isinstance(values, dict) else None
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return value if isinstance(value, str) else None
