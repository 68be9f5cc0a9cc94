"""What an adapter holds, from its two files alone: scales, norms, ranks, and what differs in two.

An update is dW = scale · B A. It is never built: with B = Q_b R_b and A^T = Q_a R_a, the singular
values of dW are those of the core scale · R_b R_a^T, which is r x r.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from lora_kit.adapter.attach import adapter_folder
from lora_kit.adapter.load import run_home
from lora_kit.data.preview import harmless
from lora_kit.errors import UserError
from lora_kit.hashes import file_hash
from lora_kit.run import is_hub_id, read_lock

WEIGHTS = "adapter_model.safetensors"
_HALF = re.compile(r"(.+)\.lora_(?:embedding_)?(A|B)(?:\.weight)?")
# Norms this many times above or below the median of their kind are named.
OUTLIER = 4.0
# Directions whose subspaces are compared, at most.
DIRECTIONS = 4
_NOT_LOADED = "not loaded"
_WRONG_SCALE = "loaded with a wrong scale, silently"
_FOLDER = re.compile(r"[/.~\\]|[A-Za-z]:|[^/]*/[^/]*/")


@dataclass(frozen=True)
class Update:
    """scale · B A of one module, float64.

    `a`: (experts, r, in), `b`: (experts, out, r); `experts` is 1 but for PEFT's target_parameters.
    Kernels of convolutions are laid flat; an embedding's dW is transposed, which changes no figure.
    """

    module: str
    scale: float
    a: Any
    b: Any

    @property
    def r(self) -> int:
        return int(self.a.shape[1])

    @property
    def finite(self) -> bool:
        # What bfloat16 and float32 can hold: squares of it stay far from float64's end.
        return all(bool(np.abs(half).max() < 1e38) for half in (self.a, self.b))

    def __sub__(self, other: Update) -> Update:
        """The difference, of rank r + r at most."""
        b = np.concatenate([self.scale * self.b, -other.scale * other.b], axis=2)
        return Update(self.module, 1.0, np.concatenate([self.a, other.a], axis=1), b)

    def factors(self) -> tuple[Any, Any, Any]:
        """dW = U S V^T: (experts, out, k), (experts, k) from large to small, (experts, in, k)."""
        q_b, r_b = np.linalg.qr(self.b)
        q_a, r_a = np.linalg.qr(self.a.swapaxes(1, 2))
        u, values, vt = np.linalg.svd(self.scale * r_b @ r_a.swapaxes(1, 2), full_matrices=False)
        return q_b @ u, values, q_a @ vt.swapaxes(1, 2)

    def inner(self, other: Update) -> float:
        """<dW, dW'> = sum of dW · dW' over all entries, from matrices of r x r'."""
        products = (self.b.swapaxes(1, 2) @ other.b) * (self.a @ other.a.swapaxes(1, 2))
        return float(self.scale * other.scale * products.sum())


@dataclass(frozen=True)
class Adapter:
    """The files of an adapter, open: tensors are read when they are asked for.

    `halves`: {module: {"A": a tensor's name, "B": ...}}; `others`: the tensors beside them;
    `shapes`: of all.
    """

    folder: Path
    config: dict[str, Any]
    halves: dict[str, dict[str, str]]
    others: list[str]
    shapes: dict[str, list[int]]
    opened: Any

    @property
    def base(self) -> dict[str, str | None]:
        keys = {"model": "base_model_name_or_path", "revision": "revision"}
        return {name: self.config.get(key) for name, key in keys.items()}

    def tensor(self, name: str) -> Any:
        tensor = self.opened.get_tensor(name)
        # numpy has no bfloat16: such a file is read by torch.
        return tensor.double().numpy() if hasattr(tensor, "double") else tensor.astype("float64")

    def sizes(self, module: str) -> tuple[Any, ...]:
        """What two updates must have in common, their ranks apart: in, out, experts."""
        a, b = (self.shapes[self.halves[module][half]] for half in "AB")
        return a[1:], b[0], a[0] // self.rank_and_scale(module)[0]

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

    def update(self, module: str) -> Update:
        r, scale = self.rank_and_scale(module)
        a, b = (self.tensor(self.halves[module][half]) for half in "AB")
        # Of experts in one parameter PEFT keeps A as (experts · r, in) and B as (out, r · experts).
        a = a.reshape(len(a) // r, r, -1)
        b = b.reshape(len(b), r, len(a)).transpose(2, 0, 1)
        return Update(module, scale, a, b)


def open_adapter(path: str | Path) -> Adapter:
    """The adapter of a run directory, or the folder of any LoRA adapter that PEFT saved.

    Raises:
        UserError: there is none, its files are damaged or do not fit each other, or it is no LoRA.
    """
    folder = adapter_folder(path)
    config = _config(folder / "adapter_config.json")
    file = folder / WEIGHTS
    if not file.is_file():
        pickled = (folder / "adapter_model.bin").exists()
        why = "adapter_model.bin can run code, and is not read: save it again with PEFT"
        raise UserError(f"{file}: missing: {why if pickled else 'copy the whole adapter again'}")
    try:
        opened = safe_open(str(file), framework="np")
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        shapes = {name: list(part.get_shape()) for name, part in slices.items()}
        if any(part.get_dtype() not in ("F16", "F32", "F64") for part in slices.values()):
            opened = safe_open(str(file), framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: no safetensors file, or damaged ({error})") from None
    halves: dict[str, dict[str, str]] = defaultdict(dict)
    others = []
    for name in sorted(shapes, key=_in_order):
        if half := _HALF.fullmatch(name.removeprefix("base_model.model.")):
            halves[half[1]][half[2]] = name
        else:
            others.append(name)
    adapter = Adapter(folder, config, dict(halves), others, shapes, opened)
    if not halves:
        raise UserError(f"{file}: it holds no lora_A and lora_B: save the adapter again")
    try:
        problems = [problem for module in halves if (problem := _misfit(adapter, module))]
    except (TypeError, AttributeError, ArithmeticError, ValueError, re.error) as error:
        where = folder / "adapter_config.json"
        raise UserError(f"{where}: r, lora_alpha or a pattern is not usable: {error}") from None
    if problems:
        more = f" (and {len(problems) - 1} more modules)" if len(problems) > 1 else ""
        raise UserError(f"{file}: {problems[0]}{more}: PEFT does not load it whole; save it again")
    return adapter


def _config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        kind = config.get("peft_type")
    except (OSError, ValueError, AttributeError, RecursionError):
        raise UserError(f"{file}: no JSON object: copy the adapter again") from None
    if kind != "LORA":
        raise UserError(f"{file}: peft_type is {kind!r}: only LoRA adapters are inspected")
    return dict(config)


def _misfit(adapter: Adapter, module: str) -> str | None:
    """What is wrong with a module's halves, if anything."""
    halves = adapter.halves[module]
    if missing := {"A", "B"} - halves.keys():
        return f"{module} has no lora_{min(missing)}"
    a, b = (adapter.shapes[halves[half]] for half in "AB")
    r, scale = adapter.rank_and_scale(module)
    whole = a[0] % r == 0 if adapter.config.get("target_parameters") else a[0] == r
    fits = whole and type(r) is int and abs(scale) < 1e30 and min(len(a), len(b)) > 1
    if not fits or 0 in a + b or a[0] != b[1]:
        return f"{module}: r is {r} and the scale {scale:g} by its config, A is {a} and B {b}"
    return None


def _in_order(name: str) -> list[Any]:
    """Layer 10 after layer 9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", name)]


def figures(path: str | Path) -> list[dict[str, Any]]:
    """Of each module's update: r, scale, norm ||dW||_F, largest singular value, effective rank, and
    the share of rows of B that are zeros.

    The effective rank is exp(entropy of the singular values over their sum) (Roy & Vetterli 2007),
    0 for dW = 0; of experts that lie in one parameter it is the mean. None: not finite.

    Raises:
        UserError: see `open_adapter`.
    """
    adapter = open_adapter(path)
    return [_figures(adapter.update(module)) for module in adapter.halves]


def _figures(update: Update) -> dict[str, Any]:
    norm = top = effective = None
    if update.finite:
        values = update.factors()[1]  # (experts, r)
        norm, top = float(np.linalg.norm(values)), float(values.max())
        alive = values[values[:, 0] > 0]
        shares = alive / alive.sum(axis=1, keepdims=True)
        entropy = -(shares * np.log(np.where(shares > 0, shares, 1))).sum(axis=1)
        effective = float(np.exp(entropy).mean()) if len(alive) else 0.0
    return {
        "module": update.module,
        "r": update.r,
        "scale": update.scale,
        "norm": norm,
        "top_singular_value": top,
        "effective_rank": effective,
        "zero_rows": float((update.b == 0).all(axis=2).mean()),
    }


# What is odd in an adapter: who trips over it, and what happens then. A name that adapter_config
# knows is odd where it is set; `_odd` looks for the others.
LOADERS = {
    "use_dora": ("vLLM, SGLang, llama.cpp", _NOT_LOADED),
    "use_rslora": ("SGLang, llama.cpp", _WRONG_SCALE),
    "rank_pattern": ("SGLang", _WRONG_SCALE),
    "alpha_pattern": ("SGLang, llama.cpp", _WRONG_SCALE),
    "lora_bias": ("vLLM, llama.cpp", _NOT_LOADED),
    "alora_invocation_tokens": ("vLLM", _NOT_LOADED),
    "layer_replication": ("vLLM", _NOT_LOADED),
    "modules_to_save": ("llama.cpp", _NOT_LOADED),
    "trainable_token_indices": ("SGLang, llama.cpp", _NOT_LOADED),
    "bias that trained": ("vLLM", _NOT_LOADED),
    "modules_to_save besides classifier and score": ("vLLM", _NOT_LOADED),
    "a start from the base's own weights": ("vLLM", "not loaded before PEFT has converted it"),
    "a rank over 16": ("vLLM", "not loaded without a larger --max-lora-rank"),
    "a rank over 512": ("vLLM", _NOT_LOADED),
    "values that are not finite": ("every target", "answers noise"),
    "an update of zeros": ("every target", "without effect there: it did not train"),
    "a base that is not named": ("PEFT", "not found"),
    "a base named by its folder": ("PEFT", "found on this machine only"),
    "a base without revision": ("PEFT", "the newest is taken, which may be another"),
    "no tokenizer": ("every target", "takes the base's: added tokens and a template are lost"),
    "weights that are not as the run saved them": ("lora-kit", _NOT_LOADED),
}


def _odd(adapter: Adapter, lock: dict[str, Any], modules: list[dict[str, Any]]) -> list[str]:
    config, base = adapter.config, str(adapter.base["model"] or "")
    rank, norms = max(m["r"] for m in modules), [m["norm"] for m in modules]
    start, apart = str(config.get("init_lora_weights")), config.get("modules_to_save")
    apart = set(map(str, apart)) if isinstance(apart, list) else set()
    saved = lock.get("adapter", {}).get("sha256")
    found = {
        "bias that trained": config.get("bias", "none") != "none",
        "modules_to_save besides classifier and score": apart - {"classifier", "score"},
        "a start from the base's own weights": re.match("pissa|olora|corda|loftq", start),
        "a rank over 16": 16 < rank <= 512,
        "a rank over 512": rank > 512,
        "values that are not finite": None in norms,
        "an update of zeros": 0 in norms,
        "a base that is not named": not base,
        "a base named by its folder": _FOLDER.match(base),
        "a base without revision": is_hub_id(base) and not adapter.base["revision"],
        "no tokenizer": not any(adapter.folder.glob("tokenizer*")),
        "weights that are not as the run saved them": saved
        and saved != file_hash(adapter.folder / WEIGHTS),
    }
    return [name for name in LOADERS if found.get(name, config.get(name))]


def inspect(path: str | Path) -> dict[str, Any]:
    """All that can be known of an adapter without its base.

    Returns:
        `base`, with the hashes in the run's lock file; its settings; `norm`, of all updates
        together; `modules` (see `figures`); `others`: the shapes of tensors beside the updates;
        `loaders`: what who would trip over.

    Raises:
        UserError: see `open_adapter`.
    """
    adapter = open_adapter(path)
    lock = read_lock(run_home(path))
    modules = [_figures(adapter.update(module)) for module in adapter.halves]
    norms = [module["norm"] for module in modules]
    keys = ("task_type", "target_modules", "r", "lora_alpha", "rank_pattern", "alpha_pattern")
    return {
        "adapter": str(path),
        "base": {**adapter.base, "hashes": lock.get("base", {}).get("hashes", {})},
        **{key: adapter.config.get(key) for key in (*keys, "use_rslora", "use_dora")},
        "norm": None if None in norms else math.hypot(*norms),
        "modules": modules,
        "others": {name: adapter.shapes[name] for name in adapter.others},
        "loaders": [
            {"what": what, "who": LOADERS[what][0], "happens": LOADERS[what][1]}
            for what in _odd(adapter, lock, modules)
        ],
    }


def difference(first: str | Path, second: str | Path) -> dict[str, Any]:
    """How far two adapters are apart, dW from dW', each with its scale.

    Returns:
        `modules`, and `whole` for all of them as one matrix: `norms` of both, the norm of their
        `difference`, this over the larger norm (`relative`), and the `cosine` <dW, dW'> /
        (||dW|| ||dW'||), None where one is 0; in `modules` also `shared_inputs` and
        `shared_outputs` (`_shared`). Not compared are `only_first`, `only_second` and
        `other_shapes`. `others_differ`: tensors beside A and B. `same`: nothing differs.

    Raises:
        UserError: see `open_adapter`; or values are not finite.
    """
    a, b = open_adapter(first), open_adapter(second)
    hashes = [read_lock(run_home(p)).get("base", {}).get("hashes") for p in (first, second)]
    both = [m for m in a.halves if m in b.halves]
    fitting = [m for m in both if a.sizes(m) == b.sizes(m)]
    modules = [_compared(a.update(m), b.update(m)) for m in fitting]
    lists = {
        "only_first": [m for m in a.halves if m not in b.halves],
        "only_second": [m for m in b.halves if m not in a.halves],
        "other_shapes": [m for m in both if m not in fitting],
        "others_differ": sorted(
            name
            for name in {*a.others, *b.others}
            if a.shapes.get(name) != b.shapes.get(name) or (a.tensor(name) != b.tensor(name)).any()
        ),
    }
    return {
        "adapters": [str(first), str(second)],
        "bases": [a.base, b.base],
        "same_base": hashes[0] == hashes[1] if all(hashes) else a.base == b.base,
        "same": not any(lists.values()) and not any(m["difference"] for m in modules),
        "whole": _together(modules),
        "modules": modules,
        **lists,
    }


def _compared(a: Update, b: Update) -> dict[str, Any]:
    if not (a.finite and b.finite):
        raise UserError(f"{a.module}: values that are not finite in one of the two: train it again")
    same = a.scale == b.scale and np.array_equal(a.a, b.a) and np.array_equal(a.b, b.b)
    ours, theirs = a.factors(), b.factors()
    found = {
        "norms": [float(np.linalg.norm(values)) for _, values, _ in (ours, theirs)],
        "difference": 0.0 if same else float(np.linalg.norm((a - b).factors()[1])),
        "inner": a.inner(b),
    }
    return {
        "module": a.module,
        **found,
        **_together([found]),
        "shared_inputs": _shared(ours, theirs, 2),
        "shared_outputs": _shared(ours, theirs, 0),
    }


def _together(modules: list[dict[str, Any]]) -> dict[str, Any]:
    norms = [math.hypot(*(module["norms"][n] for module in modules)) for n in (0, 1)]
    apart = math.hypot(*(module["difference"] for module in modules))
    inner = math.fsum(module["inner"] for module in modules)
    return {
        "norms": norms,
        "difference": apart,
        "relative": apart / max(norms) if any(norms) else 0.0,
        "cosine": max(-1.0, min(1.0, inner / norms[0] / norms[1])) if all(norms) else None,
    }


def _shared(ours: Any, theirs: Any, side: int) -> float | None:
    """phi = ||U^T U'||_F^2 / k of the k strongest directions, 0 to 1 (Hu et al. 2021, 7.2); by
    chance k / dimension. None where an update is 0. Of experts the mean."""
    alive = (int((v > 1e-9 * v.max()).sum(axis=1).min()) for _, v, _ in (ours, theirs))
    k = min(DIRECTIONS, *alive)
    if not k:
        return None
    products = ours[side][..., :k].swapaxes(1, 2) @ theirs[side][..., :k]
    return float((products**2).sum() / k / len(products))


def show(found: dict[str, Any]) -> None:
    """Print what `inspect` found: by kind of module, by layer, what is odd, who trips over it."""
    modules, base, targets = found["modules"], found["base"], found["target_modules"]
    kinds = _grouped(modules, 1)
    name = "DoRA" if found["use_dora"] else "rsLoRA" if found["use_rslora"] else "LoRA"
    scales = " and ".join(sorted({f"{module['scale']:.4g}" for module in modules}))
    _say(f"base: {base['model']}, revision {base['revision']}")
    for file in sorted(file for file in base["hashes"] if file.endswith(".safetensors")):
        _say(f"weights: {file}, sha256 {base['hashes'][file]}")
    words = ", ".join(sorted(map(str, targets))) if isinstance(targets, list) else targets
    _say(f"task: {found['task_type']}, on {words}")
    _say(f"{name}: r {found['r']}, lora_alpha {found['lora_alpha']}, scale {scales}")
    _say(f"norm of all {len(modules)} updates together: {_text(found['norm'])}")
    rows, far = [], []
    for kind, group in kinds.items():
        known = [module for module in group if module["norm"] is not None]
        ranks = ", ".join(map(str, sorted({module["r"] for module in group})))
        norms = [module["norm"] for module in known] or [math.nan]
        tops = [module["top_singular_value"] for module in known] or [math.nan]
        middle = median(norms)
        cells = (middle, min(norms), max(norms), max(tops), _median(group, "effective_rank"))
        rows.append([kind, len(group), ranks, *map(_text, cells)])
        times = [(m["module"], m["norm"] / middle) for m in known if m["norm"] and middle]
        far += [f"{m} {t:.2g}x" for m, t in times if not 1 / OUTLIER <= t <= OUTLIER]
    heads = ["modules", "count", "r", "norm", "least", "most", "top singular", "effective rank"]
    _table(heads, rows)
    _table(["norm of", *map(_short, kinds), "all", ""], list(_layer_rows(modules, list(kinds))))
    print()
    _some("learned nothing, dW is 0", [m["module"] for m in modules if m["norm"] == 0])
    dead = [m for m in modules if m["norm"] and m["zero_rows"]]
    _some("rows of B are zeros", [f"{m['module']} {m['zero_rows']:.1%}" for m in dead])
    _some("not finite", [m["module"] for m in modules if m["norm"] is None])
    _some("far from the median of their kind", far)
    _some("beside the updates", [f"{name} {shape}" for name, shape in found["others"].items()])
    for line in found["loaders"]:
        _say(f"{line['who']}: {line['what']}: {line['happens']}")


def _layer_rows(modules: list[dict[str, Any]], kinds: list[str]) -> Iterator[list[Any]]:
    """The norm of each kind in a layer, of the whole layer, and the latter as a bar."""
    layers = _grouped(modules, 0)
    most = max(map(_norm, layers.values())) or 1.0
    for layer, group in layers.items():
        here, whole = _grouped(group, 1), _norm(group)
        cells = (_text(_norm(here[kind])) if kind in here else "" for kind in kinds)
        yield [layer, *cells, _text(whole), "#" * round(12 * whole / most)]


def _norm(modules: list[dict[str, Any]]) -> float:
    """Of all together, as far as they are finite."""
    return math.hypot(*(module["norm"] or 0.0 for module in modules))


def show_difference(found: dict[str, Any]) -> None:
    """Print what `difference` found: whole, by kind of module, by layer."""
    first, second = found["adapters"]
    _say(f"A: {first}")
    _say(f"B: {second}")
    bases = [f"{base['model']}, revision {base['revision']}" for base in found["bases"]]
    _say(f"one base: {bases[0]}" if found["same_base"] else f"OTHER BASES: {bases[0]}; {bases[1]}")
    if found["same"]:
        _say("the adapters are identical: difference 0")
    rows, modules = [], found["modules"]
    groups = [("all", modules), *_grouped(modules, 1).items(), *_grouped(modules, 0).items()]
    for name, group in groups:
        whole = _together(group)
        shared = (_median(group, key) for key in ("shared_inputs", "shared_outputs"))
        cells = (*whole["norms"], whole["relative"], whole["cosine"], *shared)
        rows.append([name, *map(_text, cells)])
    _table(["", "norm A", "norm B", "difference", "cosine", "shared in", "shared out"], rows)
    _say("difference: over the larger norm; shared: of the strongest directions, 0 to 1 (median)")
    for key in ("only_first", "only_second", "other_shapes", "others_differ"):
        _some(key.replace("_", " "), found[key])


def _place(module: str) -> tuple[str, str]:
    """`model.layers.3.mlp.experts.7.up_proj` -> (`layers.3`, `mlp.experts.*.up_proj`); what is in
    no layer stands for itself, in both."""
    found = re.fullmatch(r"(.*?\.[0-9]+)\.(.+)", module)
    if not found:
        return module, module
    return found[1].removeprefix("model."), re.sub(r"(?<=\.)[0-9]+(?=\.)", "*", found[2])


def _grouped(modules: list[dict[str, Any]], by: int) -> dict[str, list[dict[str, Any]]]:
    """By layer (0) or by kind (1)."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for module in modules:
        groups.setdefault(_place(module["module"])[by], []).append(module)
    return groups


def _median(modules: list[dict[str, Any]], key: str) -> float | None:
    known = [module[key] for module in modules if module[key] is not None]
    return median(known) if known else None


def _short(kind: str) -> str:
    return kind.rpartition(".")[2].removesuffix("_proj")


def _text(number: float | None) -> str:
    return "" if number is None else f"{number:.3g}"


def _some(what: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        _say(f"{what}: {', '.join(names[:5])}{more}")


def _say(text: str) -> None:
    print(_line(text))


def _line(text: Any) -> str:
    """One line that does not steer the terminal, in characters that it has."""
    encoding = sys.stdout.encoding or "utf-8"
    line = " ".join(harmless(str(text)).split())
    return line.encode(encoding, "backslashreplace").decode(encoding)


def _table(heads: list[str], rows: list[list[Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    # What another program reads is not cut to the width of a terminal.
    width = None if sys.stdout.isatty() else 200
    table = Table(box=None, pad_edge=False)
    for number, head in enumerate(heads):
        table.add_column(
            _line(head), justify="right" if number and head else "left", overflow="fold"
        )
    for row in rows:
        table.add_row(*map(_line, row))
    print()
    Console(markup=False, highlight=False, emoji=False, width=width).print(table)
