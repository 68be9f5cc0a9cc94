"""A frozen base + LoRA -> a PEFT model of which only the adapter trains."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_kit.adapter.audit import Coverage, coverage
from lora_kit.errors import UserError
from lora_kit.run import nearest
from lora_kit.schema import Adapter

# Fields of `adapter:` that are not PEFT's.
OWN_FIELDS = {"start"}
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Attached:
    """What trains: where it is, and trainable and all parameters (as stored)."""

    coverage: Coverage
    trainable: int
    total: int

    @property
    def modules(self) -> dict[str, int]:
        """{name ending: how many modules}"""
        return self.coverage.modules

    def __str__(self) -> str:
        names = ", ".join(f"{count} {name}" for name, count in self.modules.items())
        share = self.trainable / self.total
        lines = [
            f"adapter on {names}: {self.trainable:,} parameters train, {share:.2%} of all",
            f"they adapt {self.coverage}",
        ]
        lines += [
            "warning: {what}: {cause}; {fix}".format(**problem)
            for problem in self.coverage.problems
        ]
        return "\n".join(lines)


def lora_config(adapter: Adapter) -> Any:
    """The `peft.LoraConfig` that `adapter:` describes."""
    from peft import LoraConfig

    fields = adapter.model_dump(exclude=OWN_FIELDS)
    return LoraConfig(task_type="CAUSAL_LM", **fields)


def attach(model: Any, adapter: Adapter, seed: int) -> Any:
    """Put a fresh adapter, or the one of `adapter.start`, on a frozen base.

    The seed is set before the adapter is made, so that A is the same in every run and every rank.

    Raises:
        UserError: the patterns match no module, or the adapter to start from does not fit.
    """
    from peft import PeftModel, get_peft_model
    from transformers import set_seed

    set_seed(seed)
    if adapter.start:
        folder = adapter_folder(adapter.start)
        try:
            started = PeftModel.from_pretrained(model, str(folder), is_trainable=True)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"adapter.start: {folder}: does not fit the base: {reason}") from None
        _check_whole(started, folder)
        return started
    linear = linear_names(model)
    _check_layers(model, adapter)
    _check_names(model, adapter, linear)
    if adapter.layers_to_transform and adapter.target_modules == "all-linear":
        # PEFT takes numbers of layers only with a list of names.
        adapter = adapter.model_copy(update={"target_modules": linear})
    try:
        attached = get_peft_model(model, lora_config(adapter))
    except ValueError as error:
        wanted = adapter.target_modules
        hint = nearest(wanted, linear) if isinstance(wanted, str) else ""
        if isinstance(wanted, str) and wanted in linear:
            hint = f"; a text is a regular expression for the whole name: write [{wanted}]"
        reason = " ".join(str(error).split())
        if "not found in the base model" in reason or "No modules were targeted" in reason:
            raise UserError(
                f"adapter.target_modules: {wanted!r} matches no module{hint}; "
                f"the linear ones are {', '.join(linear)}"
            ) from None
        raise UserError(f"adapter: {reason[:240]}") from None
    _check_patterns(attached, adapter)
    return attached


def describe(model: Any) -> Attached:
    """Count the adapted modules by name ending, the parameters, and those of the base below."""
    trainable, total = model.get_nb_trainable_parameters()
    return Attached(coverage(model), trainable, total)


def adapter_folder(run: str | Path) -> Path:
    """The adapter of a run directory, or the folder itself if it is an adapter.

    Raises:
        UserError: there is none.
    """
    for folder in (Path(run) / "adapter", Path(run)):
        if (folder / "adapter_config.json").is_file():
            return folder.resolve()
    if (Path(run) / "run.yaml").is_file():
        raise UserError(f"{run}: a run without an adapter: it did not finish (train --resume)")
    raise UserError(f"{run}: neither a run directory nor an adapter folder")


def linear_names(model: Any) -> list[str]:
    """The different name endings of the linear modules, the head apart."""
    import torch

    head = model.get_output_embeddings()
    return sorted(
        {
            name.rsplit(".", 1)[-1]
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and module is not head
        }
    )


def _check_whole(model: Any, folder: Path) -> None:
    """PEFT leaves random what the file lacks, as the adapter of a base with fewer layers does."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    with safe_open(str(folder / WEIGHTS), framework="pt") as opened:
        stored = set(opened.keys())
    if missing := sorted(get_peft_model_state_dict(model).keys() - stored):
        raise UserError(
            f"adapter.start: {folder}: does not fit the base: it has nothing for {missing[0]}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
        )


def _check_layers(model: Any, adapter: Adapter) -> None:
    """PEFT ignores layer numbers that do not exist, and adapts fewer layers than were asked for."""
    count: int = model.config.get_text_config().num_hidden_layers
    beyond = [n for n in adapter.layers_to_transform or [] if not 0 <= n < count]
    if beyond:
        raise UserError(
            f"adapter.layers_to_transform: {beyond}: the base has layers 0 to {count - 1}"
        )


def _check_names(model: Any, adapter: Adapter, linear: list[str]) -> None:
    """Every name that was given must stand for a module; PEFT is content if one of them does."""
    names = [name for name, _ in model.named_modules()]
    problems = []
    for key in ("target_modules", "exclude_modules"):
        given = getattr(adapter, key)
        for word in given if isinstance(given, list) else []:
            if not any(name == word or name.endswith(f".{word}") for name in names):
                problems.append(
                    f"adapter.{key}: `{word}` matches no module{nearest(word, linear)}; "
                    f"the linear ones are {', '.join(linear)}"
                )
    excluded = adapter.exclude_modules
    if isinstance(excluded, str) and not any(re.fullmatch(excluded, name) for name in names):
        problems.append(f"adapter.exclude_modules: `{excluded}` matches no module's whole name")
    if problems:
        raise UserError("\n".join(problems))


def _check_patterns(model: Any, adapter: Adapter) -> None:
    """Ranks and scales of their own must be those of an adapted module."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = [name for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    # As PEFT reads a pattern: at the end of a name, from the start or after a dot.
    problems = [
        f"adapter.{key}: `{pattern}` matches no adapted module"
        for key in ("rank_pattern", "alpha_pattern")
        for pattern in getattr(adapter, key)
        if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in adapted)
    ]
    if problems:
        raise UserError("\n".join(problems))
