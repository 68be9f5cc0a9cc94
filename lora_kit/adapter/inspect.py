"""Inspect an adapter from its two files: scales, norms, ranks; and compare two adapters.

An update is dW = scale · B A. It is never built: with B = Q_b R_b and A^T = Q_a R_a, the singular
values of dW are those of the core scale · R_b R_a^T, which is r x r.
"""

from __future__ import annotations

import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

from lora_kit.adapter.files import Adapter, Figures, Update, open_adapter
from lora_kit.adapter.finished import FinishedRun
from lora_kit.adapter.loaders import loader_issues
from lora_kit.errors import UserError, harmless
from lora_kit.run import is_hub_id

if TYPE_CHECKING:
    import torch

_FOLDER = re.compile(r"[/.~\\]|[A-Za-z]:|[^/]*/[^/]*/")


class Comparison(TypedDict):
    """Two updates compared: their `norms`, the norm of their `difference`, the same relative to the
    larger norm, and <dW, dW'> / (||dW|| ||dW'||), None if one is 0."""

    norms: list[float]
    difference: float
    relative: float
    cosine: float | None


class ModuleComparison(Comparison):
    """The updates of one module compared."""

    module: str


_Row = TypeVar("_Row", bound=Mapping[str, object])


def _issues(adapter: Adapter, changed: list[str], modules: list[Figures]) -> list[dict[str, str]]:
    """Issues of an adapter: what, which program is affected, and what happens."""
    base = str(adapter.base["model"] or "")
    norms = [module["norm"] for module in modules]
    unpinned = is_hub_id(base) and not adapter.base["revision"]
    no_tokenizer = not any(adapter.folder.glob("tokenizer*"))
    own = [
        (adapter.misnamed, adapter.misnamed or "", "every target", "not loaded, silently"),
        (None in norms, "NaN or infinite values", "every target", "generates noise"),
        (0 in norms, "a zero update", "every target", "no effect: it did not train"),
        (not base, "no base model named", "PEFT", "base not found"),
        (_FOLDER.match(base), "a base named by local path", "PEFT", "found on this machine only"),
        (unpinned, "a base without revision", "PEFT", "the newest is used"),
        (no_tokenizer, "no tokenizer", "every target", "added tokens and chat template are lost"),
        (changed, f"{', '.join(changed)} changed since the run", "lora-kit", "not loaded"),
    ]
    found = []
    for one in loader_issues(adapter.config, adapter.factors, adapter.others):
        found.append({"what": one.what, "who": ", ".join(one.who), "happens": one.happens})
    for applies, what, who, happens in own:
        if applies:
            found.append({"what": what, "who": who, "happens": happens})
    return found


def inspect(run: FinishedRun) -> dict[str, object]:
    """Describe an adapter without loading its base.

    Returns:
        `base`, with the hashes in the run's lock file; `auto`, the class of transformers that loads
        it, and its `labels`; its settings; `norm` of all updates; `modules` (see
        `Adapter.figures`); `others`: the shapes of other tensors; `loaders`: issues by program.

    Raises:
        UserError: see `open_adapter`.
    """
    adapter = open_adapter(run.folder)  # shown although it was changed
    modules = adapter.figures()
    norms = [module["norm"] for module in modules]
    keys = (
        "task_type", "target_modules", "r", "lora_alpha", "rank_pattern", "alpha_pattern",
        "use_rslora", "use_dora",
    )  # fmt: skip
    finite = [norm for norm in norms if norm is not None]
    return {
        "adapter": run.path,
        "auto": run.auto,
        "labels": list(run.head.labels),
        "base": {**_base(run), "hashes": run.hashes},
        **{key: adapter.config.get(key) for key in keys},
        "norm": math.hypot(*finite) if len(finite) == len(norms) else None,
        "modules": modules,
        "others": {name: list(tensor.shape) for name, tensor in adapter.others.items()},
        "loaders": _issues(adapter, run.changed, modules),
    }


def _base(run: FinishedRun) -> dict[str, str | None]:
    model, revision = run.peft_base
    return {"model": model, "revision": revision}


def difference(first: FinishedRun, second: FinishedRun) -> dict[str, object]:
    """Compare the updates of two adapters, dW and dW', including their scales.

    Returns:
        `modules`: a `ModuleComparison` each; `whole`: the `Comparison` of all of them as one
        matrix. Not compared: `only_first`, `only_second` and `other_shapes`. `others_differ`: other
        tensors than A and B. `same`: nothing differs.

    Raises:
        UserError: see `open_adapter`; or values are not finite.
    """
    a, b = open_adapter(first.folder), open_adapter(second.folder)
    known = first.hashes and second.hashes
    same_base = first.hashes == second.hashes if known else a.base == b.base
    modules, other_shapes = [], []
    for module in (m for m in a.factors if m in b.factors):
        ours, theirs = a.update(module), b.update(module)
        if ours.size == theirs.size:
            modules.append(compare_updates(ours, theirs))
        else:
            other_shapes.append(module)
    beside = a.others.keys() & b.others.keys()
    changed = {n for n in beside if not _equal(a.others[n].read(), b.others[n].read())}
    lists = {
        "only_first": [module for module in a.factors if module not in b.factors],
        "only_second": [module for module in b.factors if module not in a.factors],
        "other_shapes": other_shapes,
        "others_differ": sorted(changed | (a.others.keys() ^ b.others.keys())),
    }
    return {
        "adapters": [first.path, second.path],
        "bases": [_base(first), _base(second)],
        "same_base": same_base,
        "same": not any(lists.values()) and not any(m["difference"] for m in modules),
        "whole": _together(modules),
        "modules": modules,
        **lists,
    }


def compare_updates(ours: Update, theirs: Update) -> ModuleComparison:
    """Compare the updates of one module.

    Raises:
        UserError: values are not finite.
    """
    if not (ours.finite and theirs.finite):
        raise UserError(f"{ours.module}: NaN or infinite values in one of the two")
    same = ours.scale == theirs.scale and _equal(ours.a, theirs.a) and _equal(ours.b, theirs.b)
    apart = 0.0 if same else (ours - theirs).norm()
    return ModuleComparison(module=ours.module, **_comparison(ours.norm(), theirs.norm(), apart))


def _equal(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return ours.shape == theirs.shape and bool((ours == theirs).all())


def _together(modules: list[ModuleComparison]) -> Comparison:
    """The comparison of several modules as one matrix."""
    first = math.hypot(*(module["norms"][0] for module in modules))
    second = math.hypot(*(module["norms"][1] for module in modules))
    return _comparison(first, second, math.hypot(*(module["difference"] for module in modules)))


def _comparison(first: float, second: float, apart: float) -> Comparison:
    """From ||dW||, ||dW'|| and ||dW - dW'||."""
    relative, cosine = 0.0, None
    if first or second:
        relative = apart / max(first, second)
    if first and second:
        # ||dW - dW'||^2 = ||dW||^2 + ||dW'||^2 - 2 <dW, dW'>
        cosine = (first**2 + second**2 - apart**2) / (2 * first * second)
    return Comparison(norms=[first, second], difference=apart, relative=relative, cosine=cosine)


def show(found: dict[str, Any]) -> None:
    """Print the result of `inspect`: in total, by kind of module, by layer, and issues."""
    modules, base, targets = found["modules"], found["base"], found["target_modules"]
    name = "DoRA" if found["use_dora"] else "rsLoRA" if found["use_rslora"] else "LoRA"
    scales = " and ".join(sorted({f"{module['scale']:.4g}" for module in modules}))
    words = ", ".join(sorted(map(str, targets))) if isinstance(targets, list) else targets
    _say(f"base: {base['model']}, revision {base['revision']}")
    for file in sorted(file for file in base["hashes"] if file.endswith(".safetensors")):
        _say(f"weights: {file}, sha256 {base['hashes'][file]}")
    _say(f"task: {found['task_type'] or found['auto']}, on {words}")
    _some("labels", found["labels"])
    if modules:
        _say(f"{name}: r {found['r']}, lora_alpha {found['lora_alpha']}, scale {scales}")

    def cells(group: list[Figures]) -> list[object]:
        norms = [one["norm"] for one in group if one["norm"] is not None] or [math.nan]
        effective = [one["effective_rank"] for one in group if one["effective_rank"] is not None]
        ranks = ", ".join(str(r) for r in sorted({one["r"] for one in group}))
        numbers = (math.hypot(*norms), min(norms), max(norms), median(effective or [math.nan]))
        return [len(group), ranks, *(_text(number) for number in numbers)]

    if modules:  # else there is only a head
        module_table(["modules", "r", "norm", "least", "most", "effective rank"], modules, cells)
    _some("not trained (dW is 0)", [m["module"] for m in modules if m["norm"] == 0])
    _some("not finite", [m["module"] for m in modules if m["norm"] is None])
    _some("other tensors", [f"{name} {shape}" for name, shape in found["others"].items()])
    for line in found["loaders"]:
        _say(f"{line['who']}: {line['what']}: {line['happens']}")


def show_difference(found: dict[str, Any]) -> None:
    """Print the result of `difference`: in total, by kind of module and by layer."""
    first, second = found["adapters"]
    _say(f"A: {first}")
    _say(f"B: {second}")
    bases = [f"{base['model']}, revision {base['revision']}" for base in found["bases"]]
    if found["same_base"]:
        _say(f"same base: {bases[0]}")
    else:
        _say(f"DIFFERENT BASES: {bases[0]}; {bases[1]}")
    if found["same"]:
        _say("the adapters are identical: difference 0")

    def cells(group: list[ModuleComparison]) -> list[object]:
        whole = _together(group)
        numbers = (*whole["norms"], whole["relative"], whole["cosine"])
        return [_text(number) for number in numbers]

    module_table(["norm A", "norm B", "difference", "cosine"], found["modules"], cells)
    _say("difference: relative to the larger norm")
    for key in ("only_first", "only_second", "other_shapes", "others_differ"):
        _some(key.replace("_", " "), found[key])


def module_table(
    heads: list[str], modules: list[_Row], cells: Callable[[list[_Row]], Sequence[object]]
) -> None:
    """Print a row for all modules, for each kind of module, and for each layer.

    Args:
        modules: dictionaries with the name of a `module`.
        cells: what to print of a group of them.
    """
    from rich.console import Console
    from rich.table import Table

    kinds: dict[str, list[_Row]] = defaultdict(list)
    layers: dict[str, list[_Row]] = defaultdict(list)
    for module in modules:
        layer, kind = place(str(module["module"]))
        kinds[kind].append(module)
        layers[layer].append(module)
    table = Table(box=None, pad_edge=False)
    table.add_column("", overflow="fold")
    for head in heads:
        table.add_column(head, justify="right", overflow="fold")
    for name, group in [("all", modules), *kinds.items(), *layers.items()]:
        table.add_row(_line(name), *map(str, cells(group)))
    # Output for another program is not cut to the terminal's width.
    width = None if sys.stdout.isatty() else 200
    Console(markup=False, highlight=False, emoji=False, width=width).print("", table, "")


def place(module: str) -> tuple[str, str]:
    """`model.layers.3.mlp.experts.7.up_proj` -> (`layers.3`, `mlp.experts.*.up_proj`); a module
    outside of layers is returned as both."""
    found = re.fullmatch(r"(.*?\.[0-9]+)\.(.+)", module)
    if not found:
        return module, module
    return found[1].removeprefix("model."), re.sub(r"(?<=\.)[0-9]+(?=\.)", "*", found[2])


def _text(number: float | None) -> str:
    return "" if number is None else f"{number:.3g}"


def _some(what: str, names: list[str]) -> None:
    """Print the first five names, if there are any."""
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        _say(f"{what}: {', '.join(names[:5])}{more}")


def _say(text: str) -> None:
    print(_line(text))


def _line(text: str) -> str:
    """One line without control characters, in the terminal's encoding."""
    encoding = sys.stdout.encoding or "utf-8"
    line = " ".join(harmless(text).split())
    return line.encode(encoding, "backslashreplace").decode(encoding)
