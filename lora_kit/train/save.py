"""What training saves: sealed checkpoints, and the adapter at the end.

The seal of a checkpoint is written last, when everything that it lists is on disk: every file with
its sha256. The run's lock file lists the seals. A run never resumes from a checkpoint that is
incomplete, was changed, or is of another run; transformers would silently use it, with a fresh
optimizer or wrong weights, and unpickle its files.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_kit.adapter.files import WEIGHTS, fingerprint
from lora_kit.base.head import CAUSAL, Head
from lora_kit.base.pin import Pinned
from lora_kit.errors import UserError
from lora_kit.folders import sync, sync_tree, write_whole
from lora_kit.hashes import file_hash
from lora_kit.run import read_lock
from lora_kit.tasks.task import Processor
from lora_kit.train.directory import add_to_lock, is_first_rank, say

if TYPE_CHECKING:
    from lora_kit.train.guards import Guards

SEAL = "seal.json"


@dataclass(frozen=True)
class Checkpoint:
    """A sealed checkpoint: folder, optimizer step, and tokens and seconds trained so far."""

    folder: Path
    step: int
    tokens: int
    seconds: float


def seal(folder: Path, step: int, tokens: int, seconds: float) -> None:
    """Write the seal: the run, and every file of the checkpoint with its hash. Atomic; must come
    last. The checkpoint is on disk when this returns."""
    sync_tree(folder)
    directory = folder.parent.parent
    for parent in (folder.parent, directory):
        sync(parent)
    lock = read_lock(directory)
    content = {"step": step, "tokens": tokens, "seconds": seconds, "files": _hashes(folder)}
    text = json.dumps({"run": lock.get("id"), **content}, indent=1) + "\n"
    if "id" in lock:
        known = lock.get("checkpoints", {})
        kept = {name: known[name] for name in known if (folder.parent / name / SEAL).is_file()}
        kept[folder.name] = hashlib.sha256(text.encode()).hexdigest()
        add_to_lock(directory, checkpoints=kept)  # before the seal is there: it is never unknown
    write_whole(folder / SEAL, text)


def _hashes(folder: Path) -> dict[str, str]:
    """{file: sha256} of a checkpoint, without its seal."""
    return {
        str(file.relative_to(folder)): file_hash(file)
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != SEAL
    }


def read_seal(folder: Path) -> Checkpoint:
    """Verify a checkpoint of a run directory.

    Raises:
        UserError: it has no seal, is not of this run, or a file is missing, changed or added.
    """
    lock = read_lock(folder.parent.parent)
    try:
        text = (folder / SEAL).read_bytes()
        content = json.loads(text)
        files = dict(content["files"])
        sealed = Checkpoint(folder, content["step"], content["tokens"], content["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder}: incomplete: the run was stopped while saving it") from None
    if "id" in lock:  # not of runs of older versions
        if content.get("run") != lock["id"]:
            raise UserError(f"{folder}: a checkpoint of another run")
        known = (lock.get("checkpoints") or {}).get(folder.name)
        if known != hashlib.sha256(text).hexdigest():
            raise UserError(f"{folder}: {SEAL} is not the one that the run's run.lock.json names")
    found = _hashes(folder)
    for name in sorted(files.keys() | found.keys()):
        if name not in found:
            raise UserError(f"{folder}: {name} is missing")
        if name not in files:
            raise UserError(f"{folder}: {name} was added after it was saved")
        if files[name] != found[name]:
            raise UserError(f"{folder}: {name} was changed after it was saved")
    return sealed


def newest_intact(directory: Path) -> Checkpoint:
    """The checkpoint from which a run directory is resumed; problems of newer ones are reported.

    Raises:
        UserError: there is none.
    """
    problems = []
    for folder in _newest_first(directory / "checkpoints"):
        try:
            return read_seal(folder)
        except UserError as error:
            say(f"skipping a checkpoint: {error}")
            problems.append(str(error))
    raise UserError(
        f"{directory}: no intact checkpoint to resume from "
        f"({'; '.join(problems) or 'none was saved'}): remove the folder and start again, or "
        "choose another with name=NAME"
    )


def _newest_first(checkpoints: Path) -> list[Path]:
    """The checkpoint folders of a run, sealed or not, newest first."""
    folders = [f for f in checkpoints.glob("checkpoint-*") if f.name.partition("-")[2].isdigit()]
    return sorted(folders, key=lambda folder: -int(folder.name.partition("-")[2]))


def rotate(checkpoints: Path, keep: int, best: int | None = None, sealed_only: bool = True) -> None:
    """Keep only the newest `keep` checkpoints and that of step `best`.

    Args:
        sealed_only: count sealed ones only, and remove others. False on a node without a disk
            shared with rank 0, where a checkpoint is the random states of this node's ranks.
    """
    folders = _newest_first(checkpoints)
    counted = [folder for folder in folders if not sealed_only or (folder / SEAL).is_file()]
    for folder in folders:
        if folder not in counted[:keep] and folder.name != f"checkpoint-{best}":
            # The seal first, so that an interrupted removal leaves no sealed checkpoint.
            (folder / SEAL).unlink(missing_ok=True)
            shutil.rmtree(folder)


def checkpoint_bytes(trainable: int, keep: int, optim: str) -> int:
    """Bytes on disk of the kept checkpoints and the adapter: fp32 weights and optimizer state, and
    1 MiB per checkpoint for its other files.

    AdamW has two states per parameter (8 bytes in fp32, 2 bytes in 8-bit). While a checkpoint is
    written there is one more than `keep`.
    """
    state = 2 if "8bit" in optim else 8
    return (keep + 1) * trainable * (4 + state) + trainable * 4 + (keep + 1) * (1 << 20)


def save_run(trainer: Guards, processor: Processor, pinned: Pinned) -> None:
    """Write runs/<name>/adapter/ and complete the lock file. All ranks must call it.

    The folder is a standard PEFT adapter with its fresh modules in the same file, and the tokenizer
    with its chat template, or another processor. It is renamed into place once it is complete. Its
    weights are finite: they were checked with the last checkpoint.
    """
    directory = trainer.guard.directory
    partial, adapter = directory / "adapter.partial", directory / "adapter"
    if is_first_rank():
        shutil.rmtree(partial, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(partial))  # gathers shards
    if is_first_rank():
        # PEFT's model card is a template with local paths; training_args.bin has them as well.
        for name in ("README.md", "training_args.bin"):
            (partial / name).unlink(missing_ok=True)
        for other in list(partial.glob("*/adapter_config.json")):
            shutil.rmtree(other.parent)  # TRL's reference adapter
        _name_base(partial / "adapter_config.json", pinned)
        head = Head.of(read_lock(directory))
        if head.auto != CAUSAL:
            head.write(partial)
        processor.save_pretrained(str(partial))
        trainer.guard.audit.check_saved(partial / WEIGHTS)
        if adapter.exists():  # this run was stopped after saving
            shutil.rmtree(adapter)
        sync_tree(partial)
        partial.replace(adapter)
        add_to_lock(directory, adapter=fingerprint(adapter))
    trainer.accelerator.wait_for_everyone()


def _name_base(config: Path, pinned: Pinned) -> None:
    """Name the base so that PEFT finds it: a Hub model by id and commit, a local one by folder."""
    values = json.loads(config.read_text(encoding="utf-8"))
    on_hub = pinned.revision is not None
    values["base_model_name_or_path"] = pinned.model if on_hub else pinned.folder
    values["revision"] = pinned.revision
    mapping = values.get("auto_mapping") or {}
    if not str(mapping.get("parent_library")).startswith("transformers"):
        # PEFT's loader would import the base's class, which is one of ours.
        values["auto_mapping"] = None
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
