"""`lora-kit check`: whether a runtime loads an adapter onto its base, all of it."""

from __future__ import annotations

import contextlib
import shlex
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TypedDict

from lora_kit.adapter.attach import load_adapter
from lora_kit.adapter.files import WEIGHTS, Adapter, open_adapter
from lora_kit.adapter.finished import FinishedRun
from lora_kit.base.load import base_on_meta
from lora_kit.base.tensors import stored_in
from lora_kit.errors import UserError, in_a_line
from lora_kit.prove.into import cost_of_original
from lora_kit.run import nearest, read_json
from lora_kit.ship.gguf import needs_untied, open_source
from lora_kit.ship.mlx import check_mlx
from lora_kit.ship.targets import GGUF, LOADERS, Problem, base_folder, file_problems


class Checked(TypedDict):
    """The output of `check --json`. `loads`: the target loads the adapter exactly; `notes`: what
    was not checked, and what else its user must know."""

    target: str
    loads: bool
    problems: list[Problem]
    notes: list[str]


def check(run: FinishedRun, target: str) -> Checked:
    """Whether `target` loads an adapter as it is, onto the base that it names.

    Of the base only config.json and the names of its tensors are read, if they are on this machine.
    llama.cpp and Ollama load GGUF: the adapter is checked for llama.cpp's own converter. MLX has no
    converter.

    Raises:
        UserError: unknown target, not a language model's adapter, or see `open_adapter`.
    """
    if target not in LOADERS:
        raise UserError(
            f"--target {target}: unknown{nearest(target, list(LOADERS))}: {', '.join(LOADERS)}"
        )
    run.require_language_model(f"check --target {target}")
    adapter, folder, notes = open_adapter(run.folder), base_folder(run), []
    found = file_problems(run, target, folder)
    problems, kinds = [problem for _, problem in found], {kind for kind, _ in found}
    file = str(adapter.folder / WEIGHTS)
    if folder is None:
        missing = "the base is not on this machine (name it with --base FOLDER)"
        notes.append(f"{missing}: names and shapes were not compared with it")
    elif "broken" in kinds:
        pass
    elif misfit := _misfit(run, adapter, folder, notes):
        named = "name the base that it was trained on with --base FOLDER_OR_ID"
        problems.append(Problem(what=misfit, where=file, fix=named))
    elif "merge" not in kinds and (unmapped := _unmapped(adapter, target, folder, notes)):
        merge = f"lora-kit merge {shlex.quote(run.path)} --out merged"
        problems.append(Problem(what=unmapped, where=file, fix=merge))
    if cost := cost_of_original(run):
        notes.append(cost)
    return {"target": target, "loads": not problems, "problems": problems, "notes": notes}


def _misfit(run: FinishedRun, adapter: Adapter, folder: Path, notes: list[str]) -> str | None:
    """What PEFT does not load onto the base of this folder, tried on a model without weights."""
    try:
        skeleton = base_on_meta(run.base, folder)
    except Exception as error:  # a model of another kind; and parsers raise anything
        notes.append(f"names and shapes were not compared with the base: {in_a_line(error)}")
        return None
    # Of initialisations from the base's weights there are none.
    plain = replace(adapter, config={**adapter.config, "init_lora_weights": True})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing is copied to the meta device
        try:
            load_adapter(skeleton, plain)
        except UserError as error:
            return str(error).removeprefix(f"{adapter.folder}: ")
    return None


def _unmapped(adapter: Adapter, target: str, folder: Path, notes: list[str]) -> str | None:
    """What the target's loader finds no place for, though PEFT does."""
    modules, values = list(adapter.factors), read_json(folder / "config.json")
    kernels = [name for name, pair in adapter.factors.items() if len(pair["A"].shape) > 2]
    if kernels and target != "transformers":
        return f"{kernels[0]} is a convolution: not loaded"
    try:
        if target == "mlx":
            check_mlx(adapter, values)
        elif target in GGUF:
            source = open_source(folder)
            needs_untied(adapter, source)
            lost = [module for module in modules if source.name(f"{module}.weight") is None]
            return f"llama.cpp has no tensor for {lost[0]}" if lost else None
    except ImportError:
        notes.append("names were not mapped to GGUF: pip install 'lora-kit[llamacpp]'")
    except UserError as error:
        return str(error).removeprefix(f"{folder}: ").removeprefix(f"{adapter.folder}: ")
    if target == "vllm" and "ForConditionalGeneration" in str(values.get("architectures")):
        # vLLM maps names as those of the base's files.
        with contextlib.suppress(UserError):  # no weights here
            names = stored_in(folder).keys()
            inside = any("language_model." in name for name in names)
            lost = [m for m in modules if "language_model." not in m and f"{m}.weight" not in names]
            if inside and lost:
                return f"ignored, silently: vLLM has no {lost[0]}, but one in language_model"
    return None
