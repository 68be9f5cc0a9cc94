"""The files of a LoRA adapter, read without PEFT: which modules, their halves, ranks and scales."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_kit.base.tensors import Stored, stored
from lora_kit.errors import UserError
from lora_kit.trust import time_limit

WEIGHTS = "adapter_model.safetensors"
_LARGEST_SCALE = 1e30  # far from what float32 holds
_SECONDS_TO_MATCH = 10.0  # patterns against names; a good one takes a millisecond
# Of adapter_config.json: what is read ...
_READ = {
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "bias"),
    *("lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "lora_bias"),
    *("layers_pattern", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"),
    *("fan_in_fan_out", "modules_to_save", "trainable_token_indices", "target_parameters"),
    *("ensure_weight_tying", "init_lora_weights"),
}
# ... and what changes no output of a trained adapter, or names code to import. Another key that
# says something is refused: without it the adapter would act otherwise.
_DROPPED = {
    *("auto_mapping", "inference_mode", "peft_version", "megatron_core", "runtime_config"),
    *("qalora_group_size", "eva_config", "lora_ga_config", "velora_config"),
}
_NAME = re.compile(r"\w+([.-]\w+)*")
_HALF = re.compile(r"(.+)\.lora_(?:embedding_)?(A|B)(?:\.weight)?")


@dataclass(frozen=True)
class Update:
    """scale · B A of one module, tensors of float64.

    `a`: (experts, r, in), `b`: (experts, out, r); `experts` is 1 but for PEFT's target_parameters.
    Kernels of convolutions are laid flat; an embedding's dW is transposed, which changes no figure.
    """

    module: str
    scale: float
    a: Any
    b: Any

    @property
    def size(self) -> tuple[int, int, int]:
        """(experts, out, in)"""
        return *self.b.shape[:2], self.a.shape[2]

    @property
    def finite(self) -> bool:
        return bool(self.a.isfinite().all() and self.b.isfinite().all())

    def __sub__(self, other: Update) -> Update:
        """The difference, of rank r + r at most."""
        import torch

        b = torch.cat([self.scale * self.b, -other.scale * other.b], dim=2)
        return Update(self.module, 1.0, torch.cat([self.a, other.a], dim=1), b)

    def singular_values(self) -> Any:
        """(experts, k), from large to small."""
        import torch

        r_b = torch.linalg.qr(self.b, mode="r").R
        r_a = torch.linalg.qr(self.a.mT, mode="r").R
        return torch.linalg.svdvals(self.scale * r_b @ r_a.mT)

    def norm(self) -> float:
        """||dW||_F, of all experts together."""
        return float(self.singular_values().norm())


@dataclass(frozen=True)
class Adapter:
    """The files of an adapter. `halves`: {module: {"A": stored, "B": stored}}, in the order of the
    layers; `others`: the tensors beside them, by name. Nothing but the header is read."""

    folder: Path
    config: dict[str, Any]
    halves: dict[str, dict[str, Stored]]
    others: dict[str, Stored]

    @property
    def base(self) -> dict[str, str | None]:
        keys = {"model": "base_model_name_or_path", "revision": "revision"}
        return {name: self.config.get(key) for name, key in keys.items()}

    @property
    def targets(self) -> list[str]:
        """The endings of `target_modules` where they stand for just these modules; else names."""
        named, config = self.config.get("target_modules"), self.config
        narrowed = config.get("layers_to_transform") is not None or config.get("exclude_modules")
        return list(self.halves) if narrowed or not isinstance(named, list) else named

    def tensors(self) -> dict[str, Any]:
        """All of them, by their names in the file."""
        halves = {stored.name: stored for pair in self.halves.values() for stored in pair.values()}
        return {name: stored.read() for name, stored in {**halves, **self.others}.items()}

    def rank_and_scale(self, module: str) -> tuple[int, float]:
        """As PEFT takes them from its config: alpha / r, or alpha / sqrt(r) with rsLoRA; the first
        pattern that a name ends with holds."""
        found = []
        for key, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
            patterns: dict[str, Any] = self.config.get(pattern) or {}
            value = self.config.get(key, 8)  # PEFT's own default, of both
            own = (v for p, v in patterns.items() if re.match(rf"(.*\.)?({p})$", module))
            found.append(next(own, value))
        r, alpha = found
        return r, alpha / (math.sqrt(r) if self.config.get("use_rslora") else r)

    def figures(self) -> list[dict[str, Any]]:
        """Of each module's update: r, scale, norm ||dW||_F and effective rank.

        The effective rank is exp(entropy of the singular values over their sum) (Roy & Vetterli
        2007), 0 for dW = 0; of experts that are in one parameter it is the mean. None: not finite.
        """
        return [_figures(self.update(module)) for module in self.halves]

    def update(self, module: str) -> Update:
        r, scale = self.rank_and_scale(module)
        a, b = (self.halves[module][half].read().double() for half in "AB")
        # Of experts in one parameter PEFT keeps A as (experts · r, in) and B as (out, r · experts).
        a = a.reshape(len(a) // r, r, -1)
        return Update(module, scale, a, b.reshape(len(b), r, len(a)).permute(2, 0, 1))


def _figures(update: Update) -> dict[str, Any]:
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


def write_config(
    folder: Path, base: tuple[str | None, str | None], rank: int, targets: list[str], **more: Any
) -> None:
    """The adapter_config.json of a plain LoRA of one rank and scale 1.

    Args:
        base: its folder or id on the Hub, and its revision.
    """
    config = {
        **{"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "inference_mode": True},
        **{"base_model_name_or_path": base[0], "revision": base[1]},
        **{"r": rank, "lora_alpha": rank, "target_modules": sorted(targets), **more},
    }
    write_json(folder / "adapter_config.json", config)


def write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def adapter_folder(run: str | Path) -> Path:
    """The adapter of a run directory, or the folder itself if it is an adapter.

    Raises:
        UserError: there is none, or something in it is a link that leads elsewhere.
    """
    inside = Path(run) / "adapter"
    for folder in (inside, Path(run)):
        if (folder / "adapter_config.json").is_file():
            _check_links([inside] * (folder == inside) + sorted(folder.iterdir()))
            return folder.resolve()
    if (Path(run) / "run.yaml").is_file():
        raise UserError(f"{run}: a run without an adapter: it did not finish (train --resume)")
    raise UserError(f"{run}: neither a run directory nor an adapter folder")


def _check_links(files: list[Path]) -> None:
    """A link may show a file of this machine as a part of the adapter, to be copied with it. Those
    of the Hub's cache lead from snapshots/COMMIT/ to its own blobs/."""
    for file in filter(Path.is_symlink, files):
        snapshots = [a.parent for a in file.absolute().parents if a.parent.name == "snapshots"]
        if file.resolve().parent not in [s.resolve().parent / "blobs" for s in snapshots]:
            raise UserError(f"{file}: a link to somewhere else: put the file itself there")


def open_adapter(path: str | Path) -> Adapter:
    """The adapter of a run directory, or the folder of any LoRA adapter that PEFT saved.

    Raises:
        UserError: there is none, its files are damaged or do not fit each other, or it is no LoRA.
    """
    folder = adapter_folder(path)
    config = read_config(folder)
    file = folder / WEIGHTS
    if not file.is_file():
        pickled = (folder / "adapter_model.bin").exists()
        why = "adapter_model.bin can run code, and is not read: save it again with PEFT"
        raise UserError(f"{file}: missing: {why if pickled else 'copy the whole adapter again'}")
    tensors = stored(file)
    halves: dict[str, dict[str, Stored]] = defaultdict(dict)
    others = {}
    if strange := [name for name in tensors if not _NAME.fullmatch(name) or len(name) > 512]:
        raise UserError(f"{file}: {strange[0]!r:.80} is no name of a tensor: copy it again")
    for name in sorted(tensors, key=_in_order):
        if half := _HALF.fullmatch(name.removeprefix("base_model.model.")):
            if half[2] in halves[half[1]]:
                raise UserError(f"{file}: {half[1]}.lora_{half[2]} is there twice: save it again")
            halves[half[1]][half[2]] = tensors[name]
        elif ".original_module." not in name:  # PEFT's copy of the base's own
            others[name.replace(".modules_to_save.", ".")] = tensors[name]
    if not halves and not (others and config.get("modules_to_save")):  # a head alone needs none
        raise UserError(f"{file}: it holds no lora_A and lora_B: save the adapter again")
    adapter = Adapter(folder, config, dict(halves), others)
    try:
        with time_limit(_SECONDS_TO_MATCH, f"{folder}: a pattern of its config takes for ever"):
            _check_settings(config)
            problems = [problem for module in halves if (problem := _misfit(adapter, module))]
    except (TypeError, AttributeError, ArithmeticError, re.error) as error:
        where = folder / "adapter_config.json"
        raise UserError(f"{where}: not usable: {error}") from None
    if problems:
        more = f" (and {len(problems) - 1} more modules)" if len(problems) > 1 else ""
        raise UserError(f"{file}: {problems[0]}{more}: PEFT does not load it whole; save it again")
    return adapter


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json without what changes no output.

    Raises:
        UserError: it is no LoRA, or has settings that are not known here.
    """
    file = folder / "adapter_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        kind = config.get("peft_type")
        library = (config.get("auto_mapping") or {}).get("parent_library") or "transformers"
    except (OSError, ValueError, AttributeError, RecursionError):
        raise UserError(f"{file}: no JSON object: copy the adapter again") from None
    if kind != "LORA":
        raise UserError(f"{file}: peft_type is {kind!r}: only LoRA adapters are read")
    strange = sorted(key for key in config.keys() - _READ - _DROPPED if config[key])
    if str(config.get("init_lora_weights")).startswith(("corda", "loftq")):
        strange.append("init_lora_weights")
    # PEFT imports this module to find the class of the base.
    if str(library).split(".")[0] != "transformers":
        strange.append("auto_mapping")
    if strange:
        names = ", ".join(f"`{key:.40}`" for key in strange[:5])
        raise UserError(
            f"{file}: {names}: not known here, and it may change what the adapter does: convert "
            "it with PEFT to a plain LoRA"
        )
    return {key: value for key, value in config.items() if key in _READ}


def _check_settings(config: dict[str, Any]) -> None:
    """Raises TypeError or AttributeError: what is no number, or NaN, would be multiplied with."""
    named = config.get("target_modules") or ""
    if not all(isinstance(one, str) for one in (named if isinstance(named, list) else [named])):
        raise TypeError(f"target_modules is {named!r:.40}")
    for key, patterns in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        for value in (config.get(key, 8), *(config.get(patterns) or {}).values()):
            whole = type(value) is int and value > 0
            if not (whole or (key != "r" and type(value) is float and math.isfinite(value))):
                raise TypeError(f"{key} is {value!r:.40}")


def _misfit(adapter: Adapter, module: str) -> str | None:
    """What is wrong with a module's halves, if anything."""
    halves = adapter.halves[module]
    if missing := {"A", "B"} - halves.keys():
        return f"{module} has no lora_{min(missing)}"
    a, b = (list(halves[half].shape) for half in "AB")
    r, scale = adapter.rank_and_scale(module)
    if not abs(scale) < _LARGEST_SCALE:
        return f"{module}: a scale of {scale:g}"
    whole = a[0] % r == 0 if adapter.config.get("target_parameters") else a[0] == r
    if not whole or type(r) is not int or min(len(a), len(b)) < 2 or a[0] != b[1] or 0 in a + b:
        return f"{module}: r is {r} and the scale {scale:g} by its config, A is {a} and B {b}"
    return None


def _in_order(name: str) -> list[Any]:
    """Layer 10 after layer 9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", name)]
