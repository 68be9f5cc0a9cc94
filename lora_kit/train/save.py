"""The end of a training: the adapter on disk, checked, and the finished lock file."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_kit.adapter.files import WEIGHTS
from lora_kit.base.head import CAUSAL, Head
from lora_kit.base.pin import Pinned
from lora_kit.errors import CheckFailed
from lora_kit.hashes import file_hash
from lora_kit.run import read_lock
from lora_kit.tasks.task import Processor
from lora_kit.train.directory import is_first_rank

if TYPE_CHECKING:
    from lora_kit.train.guards import Guards

_TOKENIZER = "tokenizer.json"


def save_run(trainer: Guards, processor: Processor, pinned: Pinned) -> None:
    """Write runs/<name>/adapter/ and complete the lock file. Every rank must call it.

    The folder is a plain PEFT adapter, its fresh modules in the same file, together with the
    tokenizer and its template, or another processor. It appears under its name only when it is
    whole and holds finite numbers.

    Raises:
        CheckFailed: a weight of the adapter is NaN or infinite.
    """
    directory = trainer.guard.directory
    partial = directory.path / "adapter.partial"
    if is_first_rank():
        shutil.rmtree(partial, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(partial))  # gathers the shards, where there are any
    if is_first_rank():
        # PEFT's card is an empty form with this machine's paths; the other holds them as well.
        for name in ("README.md", "training_args.bin"):
            (partial / name).unlink(missing_ok=True)
        for other in list(partial.glob("*/adapter_config.json")):
            shutil.rmtree(other.parent)  # the reference of a preference trainer
        _name_base(partial / "adapter_config.json", pinned)
        head = Head.of(read_lock(directory.path))
        if head.auto != CAUSAL:
            head.write(partial)
        processor.save_pretrained(str(partial))
        _check_finite(partial / WEIGHTS)
        trainer.guard.audit.check_saved(partial / WEIGHTS)
        if directory.adapter.exists():  # of this very run, stopped after it was saved
            shutil.rmtree(directory.adapter)
        partial.replace(directory.adapter)
        entries: dict[str, Any] = {"adapter": {"sha256": file_hash(directory.adapter / WEIGHTS)}}
        if (directory.adapter / _TOKENIZER).is_file():
            entries["tokenizer"] = {"sha256": file_hash(directory.adapter / _TOKENIZER)}
            template = getattr(processor, "chat_template", None)
            sha256 = template and hashlib.sha256(str(template).encode()).hexdigest()
            entries["chat_template"] = sha256
        directory.lock(**entries)
    trainer.accelerator.wait_for_everyone()


def _name_base(config: Path, pinned: Pinned) -> None:
    """A Hub model by id and commit, a local one by its folder: PEFT alone finds the base again."""
    values = json.loads(config.read_text(encoding="utf-8"))
    on_hub = pinned.revision is not None
    values["base_model_name_or_path"] = pinned.model if on_hub else pinned.folder
    values["revision"] = pinned.revision
    mapping = values.get("auto_mapping") or {}
    if not str(mapping.get("parent_library")).startswith("transformers"):
        # PEFT's loader imports the class of the base, and ours is none that it may import.
        values["auto_mapping"] = None
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _check_finite(weights: Path) -> None:
    import torch
    from safetensors import safe_open

    with safe_open(str(weights), framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118 - not a dict
            if not bool(torch.isfinite(opened.get_tensor(name)).all()):
                raise CheckFailed(f"{weights}: {name} is not finite: the adapter is not saved")
