"""Saves the trained adapter, checked, and completes the lock file."""

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
    """Write runs/<name>/adapter/ and complete the lock file. All ranks must call it.

    The folder is a standard PEFT adapter with its fresh modules in the same file, and the tokenizer
    with its chat template, or another processor. It is renamed into place once it is complete and
    all weights are finite.

    Raises:
        CheckFailed: a weight of the adapter is NaN or infinite.
    """
    directory = trainer.guard.directory
    partial = directory.path / "adapter.partial"
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
        head = Head.of(read_lock(directory.path))
        if head.auto != CAUSAL:
            head.write(partial)
        processor.save_pretrained(str(partial))
        _check_finite(partial / WEIGHTS)
        trainer.guard.audit.check_saved(partial / WEIGHTS)
        if directory.adapter.exists():  # this run was stopped after saving
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


def _check_finite(weights: Path) -> None:
    import torch
    from safetensors import safe_open

    with safe_open(str(weights), framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118 - not a dict
            if not bool(torch.isfinite(opened.get_tensor(name)).all()):
                raise CheckFailed(f"{weights}: {name} is not finite: the adapter was not saved")
