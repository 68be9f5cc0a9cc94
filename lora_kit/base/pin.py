"""Where a base model lies and exactly which one it is: folder, revision, hashes, licence."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lora_kit import nano
from lora_kit.errors import UserError
from lora_kit.run import Base

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
# What a base is made of. Weights in other formats than safetensors can run code, and are not read.
_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]


@dataclass(frozen=True)
class Pinned:
    """A base as it lies on disk. `hashes`: {file name: sha256}, of weights and configuration."""

    model: str
    folder: str
    revision: str | None = None
    licence: str | None = None
    hashes: dict[str, str] = field(default_factory=dict)

    def to_lock(self) -> dict[str, object]:
        """What the lock file keeps; the folder is this machine's business."""
        return {key: value for key, value in asdict(self).items() if key != "folder"}


def pin(base: Base) -> Pinned:
    """Find the base, fetch it if it is on the Hub, and fix its revision and hashes.

    Raises:
        UserError: it is not there, cannot be reached offline, is gated, or has no safetensors.
    """
    if base.model == "nano":
        folder, revision, model = nano.MODEL, None, "nano"
    elif Path(base.model).is_dir():
        folder, revision, model = Path(base.model).resolve(), None, base.model
    elif _HUB_ID.match(base.model):
        folder = _from_hub(base.model, base.revision)
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
    if not list(folder.glob("*.safetensors")):
        raise UserError(
            f"base.model: {folder}: no .safetensors weights; other formats are not read"
        )
    return Pinned(model, str(folder), revision, _licence(folder), _hashes(folder))


def _from_hub(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        # README.md carries the licence.
        return Path(
            snapshot_download(model, revision=revision, allow_patterns=[*_FILES, "README.md"])
        )
    except GatedRepoError:
        raise UserError(
            f"base.model: {model} is gated: ask for access at {where}/{model}, "
            "then log in with `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"base.revision: {model} has no revision `{revision}`") from None
    except RepositoryNotFoundError:
        raise UserError(
            f"base.model: {model} is not on {where}, or is private and you are not logged in "
            "(`hf auth login`)"
        ) from None
    except (OfflineModeIsEnabled, LocalEntryNotFoundError):
        offline = os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on")
        why = "HF_HUB_OFFLINE is set" if offline else f"{where} cannot be reached"
        raise UserError(
            f"base.model: {model} is neither a local folder nor in the cache, and {why}: "
            "name a local folder, or fetch it first with `hf download`"
        ) from None
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "no status")
        if status in (401, 403):
            raise UserError(
                f"base.model: {model}: access refused ({status}): ask for it at {where}/{model}, "
                "then log in with `hf auth login`"
            ) from None
        raise UserError(f"base.model: {model}: {where} answers {status}: try again later") from None


def _hashes(folder: Path) -> dict[str, str]:
    """sha256 of weights and configuration; the Hub's cache names large files by it already."""
    files = sorted([*folder.glob("*.safetensors"), folder / "config.json"])
    return {file.name: _sha256(file) for file in files}


def _sha256(file: Path) -> str:
    cached = file.resolve().name if file.is_symlink() else ""
    if re.fullmatch(r"[0-9a-f]{64}", cached):
        return cached
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _licence(folder: Path) -> str | None:
    """The `license:` of the model card's front matter; None is unknown."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    import yaml

    parts = card.read_text(encoding="utf-8", errors="replace").split("---", 2)
    if len(parts) < 3 or parts[0].strip():
        return None
    try:
        front = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return None
    value = front.get("license") if isinstance(front, dict) else None
    return value if isinstance(value, str) else None
