"""Pins a base model: its folder, revision, hashes and licence."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lora_kit import hub_errors, nano
from lora_kit.base.tensors import INDEX
from lora_kit.errors import UserError
from lora_kit.hashes import cached_hash
from lora_kit.run import is_hub_id
from lora_kit.schema import Base, Json
from lora_kit.trust import LARGEST_JSON

# Files of a base. Other weight formats than safetensors can run code and are not read. README.md
# has the licence.
_WEIGHTS = "*.safetensors"
_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "README.md"]
_HASHED = ["config.json", "tokenizer*", "vocab*", "merges.txt", "*.jinja"]
# Only the top folder and sentence-transformers' 1_Pooling/config.json are read; `consolidated` is a
# second copy of the weights, in Mistral's layout.
_NOT_READ = ["[!1]*/*", "1[!_]*/*", "*/*.safetensors", "consolidated*.safetensors"]
# Names that repositories with quantized weights usually have.
_QUANTIZED_NAME = re.compile(r"(?i)[-_.]([48]-?bit|int[48]|fp8|gptq|awq|gguf)\b")
_QUANTIZED = "its weights are already quantized: name the original model"
# Bytes of a tokenizer; a vocabulary of 262,144 tokens takes 33 MB. Libraries read such files whole.
LARGEST_FILE = 2**26
_LARGEST_CARD = 2**20
_FRONT_MATTER = re.compile(r"\s*---\n(.*?)\n---[ \t]*(?:\n|$)", re.DOTALL)
# Its `license:`: a value, or a list in the lines below. The rest can have megabytes of results.
_LICENCE = re.compile(r"^license:[^\n]{0,500}(?:\n[ \t-][^\n]{0,100}){0,20}", re.MULTILINE)


@dataclass(frozen=True)
class Pinned:
    """A base on disk. `model` is the folder or Hub id that names it, `revision` its commit on the
    Hub, and `hashes` {file name: sha256} of all files that its output depends on."""

    model: str
    folder: str
    revision: str | None = None
    licence: str | None = None
    hashes: dict[str, str] = field(default_factory=dict)

    def to_lock(self) -> dict[str, object]:
        """The entry of the lock file, without the local folder."""
        return {key: value for key, value in asdict(self).items() if key != "folder"}


def pin(base: Base, lock: Json | None = None, weights: bool = True) -> Pinned:
    """Find the base, download it if it is on the Hub, and record its revision and hashes.

    Args:
        lock: the lock file of a run that used it, whose revision is used unless the base names
            one.
        weights: False: only the files that a tokenizer needs.

    Raises:
        UserError: it does not exist, is not cached and cannot be reached, is gated, or has no
            safetensors weights.
    """
    if base.model == "nano":
        folder, revision, model = nano.MODEL, None, "nano"
    elif Path(base.model).is_dir():
        folder, revision, model = Path(base.model).resolve(), None, base.model
    elif is_hub_id(base.model):
        used = (lock or {}).get("base", {}).get("revision")
        folder = _from_hub(base.model, base.revision or used, weights)
        # The cache has a folder per commit.
        revision, model = folder.name, base.model
    else:
        raise UserError(
            f"base.model: {base.model}: no such folder, and not a Hub id (owner/name) or `nano`"
        )
    if revision is None and base.revision is not None:
        raise UserError(f"base.revision: {model} is not a Hub model: remove it")
    if not (folder / "config.json").is_file():
        raise UserError(f"base.model: {folder}: no config.json: not a model folder")
    if weights and not list(folder.glob(_WEIGHTS)):
        raise UserError(
            f"base.model: {folder}: no .safetensors weights (other formats are not supported)"
        )
    check_sizes(folder)
    hashed = [*_HASHED, _WEIGHTS] if weights else _HASHED
    files = {file for pattern in hashed for file in folder.glob(pattern) if file.is_file()}
    hashes = {file.name: cached_hash(file) for file in sorted(files)}
    return Pinned(model, str(folder), revision, licence_of(folder / "README.md"), hashes)


def check_sizes(folder: Path) -> None:
    """Raises UserError if a file of a base or adapter that libraries read whole is too large."""
    for file in folder.iterdir():
        named = file.name in ("tokenizer.json", "vocab.json") or file.suffix in (".txt", ".model")
        most = LARGEST_FILE if named else LARGEST_JSON
        read = named or (file.suffix in (".json", ".jinja") and file.name != INDEX)
        if read and file.is_file() and file.stat().st_size > most:
            raise UserError(f"{file}: larger than {most:,} bytes: copy it again, or use another")


def _from_hub(model: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    wanted = [*_FILES, _WEIGHTS] if weights else _FILES
    suspect = _QUANTIZED_NAME.search(model) is not None  # the config decides, if it is at hand
    if weights and suspect and _is_quantized(model, revision):  # before downloading gigabytes
        raise UserError(f"base.model: {model}: {_QUANTIZED}")
    try:
        folder = snapshot_download(
            model, revision=revision, allow_patterns=wanted, ignore_patterns=_NOT_READ
        )
    except (OSError, ValueError) as error:
        problem = hub_errors.problem(error, model, revision, "model")
        # Do not advise to download weights that would be rejected.
        if suspect and "hf download" in problem:
            problem = _QUANTIZED
        raise UserError(f"base.model: {model}: {problem}") from None
    return Path(folder)


def _is_quantized(model: str, revision: str | None) -> bool:
    """Whether its config.json has a quantization config; False if it cannot be downloaded."""
    from huggingface_hub import hf_hub_download

    try:
        config = Path(hf_hub_download(model, "config.json", revision=revision))
        return "quantization_config" in json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def licence_of(card: Path) -> str | None:
    """The `license:` of a card's front matter; None if unknown."""
    import yaml

    try:
        with card.open(encoding="utf-8-sig") as opened:
            front = _FRONT_MATTER.match(opened.read(_LARGEST_CARD))
        found = _LICENCE.search(front[1]) if front else None
        value = yaml.safe_load(found[0])["license"] if found else None
    except (OSError, ValueError, yaml.YAMLError):
        return None
    if isinstance(value, list):  # texts only: nested aliases can have any size as a text
        return ", ".join(name for name in value if isinstance(name, str))
    return value if isinstance(value, str) else None
