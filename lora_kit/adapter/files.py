"""The files of a LoRA adapter, read without PEFT: modules, factors A and B, ranks and scales."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from lora_kit.adapter.foreign import VALUE_HEAD, other_library
from lora_kit.base.tensors import Stored, stored
from lora_kit.errors import UserError
from lora_kit.hashes import file_hash
from lora_kit.schema import Json
from lora_kit.trust import bounded, read_json

if TYPE_CHECKING:
    import torch

WEIGHTS = "adapter_model.safetensors"
_LARGEST_SCALE = 1e30  # far below the limit of float32
_MOST_NAMES = 10_000  # PEFT compares each with each, and saves fewer
_SECONDS_TO_MATCH = 4.0  # for all patterns of a config; usually a millisecond
_LARGEST_CONFIG = 2**20  # bytes
# fmt: off
# Keys of adapter_config.json that are read ...
_READ = {
    "peft_type", "task_type", "base_model_name_or_path", "revision", "r", "lora_alpha",
    "lora_dropout", "bias", "lora_bias", "target_modules", "exclude_modules", "target_parameters",
    "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "use_rslora",
    "use_dora", "fan_in_fan_out", "modules_to_save", "trainable_token_indices",
    "ensure_weight_tying", "init_lora_weights",
}
# ... and keys that do not affect a trained adapter's output, or name code to import. Other keys
# with a value are rejected, since ignoring them could change the output.
_DROPPED = {
    "auto_mapping", "inference_mode", "peft_version", "megatron_core", "runtime_config",
    "qalora_group_size", "eva_config", "lora_ga_config", "velora_config",
}
# fmt: on
# Keys that may be edited: where the base is.
_NAMES_OF_BASE = {"base_model_name_or_path", "revision"}
# The files that a tokenizer is loaded from, and those of an adapter's processor and head.
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*tokens*.json", "*.jinja")
_PROCESSOR = (*TOKENIZER_FILES, "*.model", "*processor*.json", "head.json")
_NAME = re.compile(r"\w+([.-]\w+)*")
# PEFT's prefix, and no name of a wrapper after it.
_LOADED = re.compile(
    r"base_model\.model\.(?!module\.|base_model\.)"
    r"(?!(.*\.)?(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)"
)
_FACTOR = re.compile(r"(.+)\.lora_(?:embedding_)?(A|B)(?:\.weight)?")


class Figures(TypedDict):
    """See `Adapter.figures`."""

    module: str
    r: int
    scale: float
    norm: float | None
    effective_rank: float | None


@dataclass(frozen=True)
class Update:
    """The update scale · B A of one module, in float64.

    `a`: (experts, r, in), `b`: (experts, out, r); `experts` is 1 except for PEFT's
    target_parameters. Convolution kernels are flattened; an embedding's dW is transposed, which
    does not change norms and ranks.
    """

    module: str
    scale: float
    a: torch.Tensor
    b: torch.Tensor

    @property
    def size(self) -> tuple[int, int, int]:
        """(experts, out, in)"""
        return *self.b.shape[:2], self.a.shape[2]

    @property
    def finite(self) -> bool:
        return bool(self.a.isfinite().all() and self.b.isfinite().all())

    def __sub__(self, other: Update) -> Update:
        """The difference, of rank at most r + r."""
        import torch

        b = torch.cat([self.scale * self.b, -other.scale * other.b], dim=2)
        return Update(self.module, 1.0, torch.cat([self.a, other.a], dim=1), b)

    def singular_values(self) -> torch.Tensor:
        """(experts, k), descending."""
        import torch

        r_b = torch.linalg.qr(self.b, mode="r").R
        r_a = torch.linalg.qr(self.a.mT, mode="r").R
        return torch.linalg.svdvals(self.scale * r_b @ r_a.mT)

    def norm(self) -> float:
        """||dW||_F over all experts."""
        return float(self.singular_values().norm())


@dataclass(frozen=True)
class Adapter:
    """The files of an adapter; only headers are read.

    `config`: the keys of adapter_config.json that `read_config` keeps. `factors`: {module: {"A":
    stored, "B": stored}}, in layer order. `others`: {name: other tensor}, such as a whole module.
    """

    folder: Path
    config: Json
    factors: dict[str, dict[str, Stored]]
    others: dict[str, Stored]

    @property
    def base(self) -> dict[str, str | None]:
        """`model` and `revision`, as its config names the base."""
        keys = {"model": "base_model_name_or_path", "revision": "revision"}
        return {name: self.config.get(key) for name, key in keys.items()}

    @property
    def targets(self) -> list[str]:
        """The name endings of `target_modules` if they match exactly these modules; else names."""
        named, config = self.config.get("target_modules"), self.config
        narrowed = config.get("layers_to_transform") is not None or config.get("exclude_modules")
        return list(self.factors) if narrowed or not isinstance(named, list) else named

    @property
    def misnamed(self) -> str | None:
        """Why PEFT ignores some tensors, on any base; None: no such name.

        PEFT skips tensors whose names its model does not have: those of a wrapped model
        (torch.compile, DDP, FSDP), or without PEFT's own prefix."""
        names = [one.name for pair in self.factors.values() for one in pair.values()]
        names += [one.name for one in self.others.values()]
        wrong = [name for name in names if not _LOADED.match(name)]
        if not wrong:
            return None
        return f"PEFT ignores {len(wrong)} of {len(names)} tensors, such as {wrong[0]}"

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors, by their names in the file."""
        found = {}
        for pair in self.factors.values():
            for factor in pair.values():
                found[factor.name] = factor.read()
        for name, tensor in self.others.items():
            found[name] = tensor.read()
        return found

    def rank_and_scale(self, module: str) -> tuple[int, float]:
        """As in PEFT: the scale is alpha / r, or alpha / sqrt(r) with rsLoRA; the first pattern
        that matches the end of the name applies; with target_parameters, of the parameter's."""
        name = self.parameters.get(module, module)
        r = self._of_module("r", "rank_pattern", name)
        alpha = self._of_module("lora_alpha", "alpha_pattern", name)
        return r, alpha / (math.sqrt(r) if self.config.get("use_rslora") else r)

    @cached_property
    def parameters(self) -> dict[str, str]:
        """{module of a factor: the parameter that it adapts}, of target_parameters.

        PEFT wraps one parameter of a module after another, in the module's order: the first is
        innermost, and has most `.base_layer` in its name."""
        modules: dict[str, list[str]] = defaultdict(list)
        for module in self.factors if self.config.get("target_parameters") else ():
            modules[re.sub(r"(\.base_layer)+$", "", module)].append(module)
        found: dict[str, str] = {}
        for core, wrapped in modules.items():
            names: list[str] = []
            for target in self.config["target_parameters"]:
                inside, _, name = target.rpartition(".")
                if f".{core}".endswith(f".{inside}") and name not in names:
                    names.append(name)
            names.sort(key=lambda name: name.startswith("down"))  # gate_up_proj is before it
            wrapped.sort(key=len, reverse=True)
            if len(names) == len(wrapped):
                parameters = [f"{core}.{name}" for name in names]
                found |= dict(zip(wrapped, parameters, strict=True))
        return found

    def _of_module(self, key: str, patterns: str, module: str) -> int:
        for pattern, value in (self.config.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return self.config.get(key, 8)  # PEFT's default for both

    def figures(self) -> list[Figures]:
        """Of each module's update: r, scale, norm ||dW||_F and effective rank.

        The effective rank is exp(entropy of the singular values over their sum) (Roy & Vetterli
        2007), 0 for dW = 0; of experts that are in one parameter it is the mean. None: not finite.
        """
        return [_figures(self.update(module)) for module in self.factors]

    def update(self, module: str) -> Update:
        """The update of a module; reads its factors."""
        r, scale = self.rank_and_scale(module)
        a, b = self.read_factors(module, r)
        return Update(module, scale, a.double(), b.double())

    def read_factors(self, module: str, r: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A (experts, r, in) and B (experts, out, r) of a module, as stored."""
        a, b = (self.factors[module][letter].read() for letter in "AB")
        # For fused experts PEFT stores A as (experts · r, in) and B as (out, r · experts).
        experts = len(a) // r
        return a.reshape(experts, r, -1), b.reshape(len(b), r, experts).permute(2, 0, 1)


def _figures(update: Update) -> Figures:
    import torch

    norm = effective = None
    if update.finite:
        values = update.singular_values()  # (experts, r)
        alive = values[values[:, 0] > 0]
        entropy = torch.special.entr(alive / alive.sum(dim=1, keepdim=True)).sum(dim=1)
        norm = float(values.norm())
        effective = float(entropy.exp().mean()) if len(alive) else 0.0
    return {
        "module": update.module,
        "r": update.a.shape[1],
        "scale": update.scale,
        "norm": norm,
        "effective_rank": effective,
    }


def write_standard(
    folder: Path,
    factors: Mapping[str, torch.Tensor],
    base: tuple[str | None, str | None],
    rank: int,
    targets: Sequence[str],
    **more: object,
) -> None:
    """Write a LoRA with one rank and scale 1: its tensors and adapter_config.json.

    Args:
        factors: A (k, in) and B (out, k) by their names in the file; padded with zeros to the rank.
        base: its folder or Hub id, and its revision.
        more: further keys of the config.
    """
    from safetensors.torch import save_file

    tensors = {}
    for name, factor in factors.items():
        match = _FACTOR.fullmatch(name)
        assert match is not None, name
        shape = list(factor.shape)
        shape[0 if match[2] == "A" else 1] = rank
        tensors[name] = factor.new_zeros(shape)
        tensors[name][: factor.shape[0], : factor.shape[1]] = factor
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "bias": "none",
        "inference_mode": True,
        "base_model_name_or_path": base[0],
        "revision": base[1],
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted(targets),
        **more,
    }
    write_json(folder / "adapter_config.json", config)


def write_json(file: Path, values: Mapping[str, object]) -> None:
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def fingerprint(folder: Path) -> Json:
    """The entry `adapter` of run.lock.json: the hash of the weights, that of the config without
    the base's name, and `files`: {file: sha256} of the processor."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    entry = {"sha256": file_hash(folder / WEIGHTS), "config": config_hash(config)}
    return {**entry, "files": processor_hashes(folder)}


def config_hash(config: Json) -> str:
    """A hash of an adapter_config.json without the base's name. Keys without a value do not count,
    so that a key that a later version also reads changes no hash of an older adapter."""
    kept = {key: config[key] for key in config if config[key] and key in _READ - _NAMES_OF_BASE}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def processor_hashes(folder: Path) -> dict[str, str]:
    """{file: sha256} of the files of a folder that its processor is loaded from."""
    files = {file for pattern in _PROCESSOR for file in folder.glob(pattern)}
    return {file.name: file_hash(file) for file in sorted(files) if file.is_file()}


def adapter_folder(run: str | Path) -> Path:
    """The adapter folder of a run directory, or the folder itself if it is an adapter.

    Raises:
        UserError: there is none, or it has a link to elsewhere.
    """
    inside = Path(run) / "adapter"
    for folder in (inside, Path(run)):
        if (folder / "adapter_config.json").is_file():
            if folder == inside:
                _check_link(inside)
            for file in sorted(folder.iterdir()):
                _check_link(file)
            return folder.resolve()
    if (Path(run) / "run.yaml").is_file():
        raise UserError(f"{run}: this run has no adapter: it did not finish (train --resume)")
    what = other_library(Path(run)) or "neither a run directory nor an adapter folder"
    raise UserError(f"{run}: {what}")


def _check_link(file: Path) -> None:
    """Raises UserError on a link, through which local files could be copied along with an adapter;
    those of the Hub's cache, from snapshots/COMMIT/ to its blobs/, are allowed."""
    if not file.is_symlink():
        return
    snapshots = [folder for folder in file.absolute().parents if folder.name == "snapshots"]
    if file.resolve().parent not in [one.resolve().parent / "blobs" for one in snapshots]:
        raise UserError(f"{file}: a link to elsewhere: replace it with the file")


def open_adapter(path: str | Path) -> Adapter:
    """Open the adapter of a run directory, or the folder of any LoRA adapter saved by PEFT.

    Raises:
        UserError: there is none, its files are corrupt or inconsistent, or it is not a LoRA of
            PEFT's: another library is named.
    """
    folder = adapter_folder(path)
    config = read_config(folder)
    file = folder / WEIGHTS
    if not file.is_file():
        pickled = (folder / "adapter_model.bin").exists()
        why = "adapter_model.bin can run code and is not read: save it again with PEFT"
        what = why if pickled else "copy the whole adapter again"
        raise UserError(f"{file}: {other_library(folder) or f'missing: {what}'}")
    if any(folder.glob(VALUE_HEAD)):
        raise UserError(f"{folder}: {other_library(folder)}")
    tensors = stored(file)
    factors: dict[str, dict[str, Stored]] = defaultdict(dict)
    others = {}
    for name in tensors:
        if not _NAME.fullmatch(name) or len(name) > 512:
            raise UserError(f"{file}: {name!r:.80} is not a valid tensor name: copy it again")
    for name in sorted(tensors, key=_in_order):
        match = _FACTOR.fullmatch(name.removeprefix("base_model.model."))
        if match:
            module, letter = match.groups()
            if letter in factors[module]:
                raise UserError(f"{file}: {module}: duplicate lora_{letter}: save it again")
            factors[module][letter] = tensors[name]
        elif ".original_module." not in name:  # PEFT's copy of the base's module
            others[name.replace(".modules_to_save.", ".")] = tensors[name]
    if not factors and not (others and config.get("modules_to_save")):  # a head without LoRA
        what = other_library(folder) or "no lora_A and lora_B: save the adapter again"
        raise UserError(f"{file}: {what}")
    adapter = Adapter(folder, config, dict(factors), others)
    try:
        late = f"{folder}: a pattern of its config takes too long to match"
        with bounded(_SECONDS_TO_MATCH, late):
            _check_settings(config)
            found = [_misfit(adapter, module) for module in factors]
    except (TypeError, AttributeError, ArithmeticError, re.error) as error:
        where = folder / "adapter_config.json"
        raise UserError(f"{where}: invalid: {error}") from None
    problems = [problem for problem in found if problem]
    if problems:
        more = f" (and {len(problems) - 1} more modules)" if len(problems) > 1 else ""
        raise UserError(f"{file}: {problems[0]}{more}: PEFT cannot load all of it: save it again")
    return adapter


def read_config(folder: Path) -> Json:
    """adapter_config.json, only with the keys that affect the output.

    Raises:
        UserError: it is not a LoRA, or has unsupported settings.
    """
    file = folder / "adapter_config.json"
    try:
        config = read_json(file, _LARGEST_CONFIG)
        kind = config.get("peft_type")
        library = (config.get("auto_mapping") or {}).get("parent_library") or "transformers"
    except (OSError, ValueError, AttributeError):
        raise UserError(f"{file}: not a JSON object: copy the adapter again") from None
    if kind != "LORA":
        what = other_library(folder) if kind is None else None
        what = what or f"peft_type is {kind!r}: only LoRA adapters are supported"
        raise UserError(f"{file}: {what}")
    if str(library).startswith("diffusers"):
        raise UserError(f"{file}: {other_library(folder)}")
    strange = sorted(key for key in config.keys() - _READ - _DROPPED if config[key])
    if str(config.get("init_lora_weights")).startswith(("corda", "loftq", "lora_ga")):
        strange.append("init_lora_weights")
    # PEFT would import this module to find the base's class.
    if str(library).split(".")[0] != "transformers":
        strange.append("auto_mapping")
    if strange:
        names = ", ".join(f"`{key:.40}`" for key in strange[:5])
        raise UserError(
            f"{file}: {names}: unsupported, and may change the adapter's output: convert it to a "
            "standard LoRA with PEFT"
        )
    return {key: value for key, value in config.items() if key in _READ}


def _check_settings(config: Json) -> None:
    """Raises TypeError or AttributeError if ranks, alphas or target modules have a wrong type."""
    named = config.get("target_modules") or ""
    if not all(isinstance(one, str) for one in (named if isinstance(named, list) else [named])):
        raise TypeError(f"target_modules is {named!r:.40}")
    if isinstance(named, list) and len(named) > _MOST_NAMES:
        raise TypeError(f"target_modules has {len(named):,} names")
    for key, patterns in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        for value in (config.get(key, 8), *(config.get(patterns) or {}).values()):
            whole = type(value) is int and value > 0
            if not (whole or (key != "r" and type(value) is float and math.isfinite(value))):
                raise TypeError(f"{key} is {value!r:.40}")


def _misfit(adapter: Adapter, module: str) -> str | None:
    """A problem of a module's factors, or None."""
    factors = adapter.factors[module]
    missing = {"A", "B"} - factors.keys()
    if missing:
        return f"{module} has no lora_{min(missing)}"
    a, b = (list(factors[letter].shape) for letter in "AB")
    r, scale = adapter.rank_and_scale(module)
    if not abs(scale) < _LARGEST_SCALE:
        return f"{module}: the scale is {scale:g}"
    whole = a[0] % r == 0 if adapter.config.get("target_parameters") else a[0] == r
    if not whole or type(r) is not int or min(len(a), len(b)) < 2 or a[0] != b[1] or 0 in a + b:
        return (
            f"{module}: r is {r} and the scale {scale:g} in its config, but A is {a} and B is {b}"
        )
    return None


def _in_order(name: str) -> list[int | str]:
    """Sort key: layer 10 after layer 9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", name)]
