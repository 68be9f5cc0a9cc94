"""Combine adapters, and evaluate base, adapters and combinations on held-out rows."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_kit.adapter.attach import load_adapter
from lora_kit.adapter.combine import METHODS, combine
from lora_kit.adapter.files import open_adapter
from lora_kit.adapter.finished import FinishedRun
from lora_kit.base.load import load_base, quiet_libraries, to_gpu
from lora_kit.data.rows import Rows
from lora_kit.errors import UserError, harmless
from lora_kit.folders import new_folder
from lora_kit.prove.compare import prepared_again, task_of
from lora_kit.tasks.bootstrap import compared, verdict
from lora_kit.tasks.measure import Losses, measure

if TYPE_CHECKING:
    import torch


def combine_and_measure(
    adapters: Sequence[FinishedRun],
    out: Path,
    runs: Sequence[FinishedRun],
    method: str | None,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
) -> dict[str, Any]:
    """Combine by one method or by all, evaluate on the runs' held-out rows, and keep the best.

    Args:
        runs: finished runs on the same base; the mean of their losses counts.
        weights, rank, density, seed: as in `combine`.

    Returns:
        The result of `combine` for the best, and `losses`: {name: {"mean", one for each run}} in
        nats per token; `best_single`: the best adapter's name; `difference` of the best combination
        from it, `ci95`, and `verdict`: better, no different, worse, or too little data. If there
        are several methods, the best is chosen on these same rows.

    Raises:
        UserError: see `combine`; or a run has another base, is not evaluated by loss, or its data
            changed.
    """
    quiet_libraries()
    notes: list[str] = []
    for run in adapters:
        run.require_language_model("combine --on")
    held_out = {run.path: _held_out(run, adapters, notes) for run in runs}
    with new_folder(out, 0) as folder:
        found = {}
        for name in [method] if method else METHODS:
            found[name] = combine(adapters, folder / name, name, weights, rank, density, seed)
        base = adapters[0].base
        model: Any = load_base(base, adapters[0].pinned)
        to_gpu(model, base)
        pad = adapters[0].processor.pad_token_id
        # {base, adapter or method: {run: losses}}
        losses = {"base": _losses(model, held_out, pad)}
        singles = {_name(run): run for run in adapters}
        files = {name: run.adapter for name, run in singles.items()}
        files |= {name: open_adapter(folder / name) for name in found}
        for name, adapter in files.items():
            adapted = load_adapter(model, adapter)
            losses[name] = _losses(adapted, held_out, pad)
            model = adapted.unload()
        total = {name: _mean(_together(each)) for name, each in losses.items()}
        best = min(found, key=total.__getitem__)
        single = min(singles, key=total.__getitem__)
        for file in sorted((folder / best).iterdir()):
            file.rename(folder / file.name)
        for name in found:
            shutil.rmtree(folder / name)
    without, combined = (_together(losses[name]).scores()[0] for name in (single, best))
    against = compared(without, combined, seed)
    means: dict[str, dict[str, float]] = {}
    for name, each in losses.items():
        means[name] = {"mean": total[name]}
        for path, loss in each.items():
            means[name][path] = _mean(loss)
    return {
        **found[best],
        "out": str(out),
        "notes": [*found[best]["notes"], *notes],
        "losses": means,
        "best_single": single,
        "difference": against["difference"],
        "ci95": against["ci95"],
        "verdict": verdict(against, len(combined.sums)),
    }


def _held_out(run: FinishedRun, adapters: Sequence[FinishedRun], notes: list[str]) -> Rows:
    """The held-out rows of a run; a note for each adapter that may have been trained on them.

    Raises:
        UserError: another base, no score `loss`, or changed data.
    """
    opened = run.require_run()
    if run.hashes != (adapters[0].hashes or run.hashes):
        raise UserError(f"--on {run.path}: a run on another base than {adapters[0].path}")
    task = task_of(run)
    if "loss" not in task.scores:
        raise UserError(f"--on {run.path}: loss on text is compared: name a run of cpt or sft")
    _, prepared = prepared_again(run, task)
    for one in adapters:
        shared = {*prepared.hashes.values()} & {*one.lock.get("data", {}).values()}
        if shared and one.lock.get("seed") != opened.seed:
            why = f"split by another seed than {run.path}: it may have been trained on its rows"
            notes.append(f"{one.path}: {why}")
    return prepared.eval


def _losses(model: torch.nn.Module, held_out: dict[str, Rows], pad: int) -> dict[str, Losses]:
    """A model's losses on the held-out rows of each run."""
    return {run: measure(model, rows, pad) for run, rows in held_out.items()}


def _together(losses: dict[str, Losses]) -> Losses:
    """The losses of all runs, each with the same total weight, whatever its number of tokens."""
    each = list(losses.values())
    return Losses(
        np.concatenate([one.nats / one.tokens.sum() for one in each]),
        np.concatenate([one.tokens / one.tokens.sum() for one in each]),
        np.concatenate([one.bytes / one.tokens.sum() for one in each]),
    )


def _name(adapter: FinishedRun) -> str:
    """An adapter's path, which must not be the name of a method or of the base."""
    return f"./{adapter.path}" if adapter.path in ("base", *METHODS) else adapter.path


def _mean(loss: Losses) -> float:
    return float(loss.nats.sum() / loss.tokens.sum())


def show(found: dict[str, Any]) -> None:
    """Print all losses, and whether the combination is better than the best adapter."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, title="nats per token", title_justify="left")
    table.add_column("")
    runs = list(found["losses"]["base"])
    for run in runs:
        table.add_column(harmless(run), justify="right")
    for name, loss in found["losses"].items():
        table.add_row(harmless(name), *(f"{loss[run]:.4f}" for run in runs))
    Console(markup=False).print(table)
    low, high = found["ci95"]
    worth = f"{found['difference']:+.4f} nats per token, 95% interval {low:+.4f} to {high:+.4f}"
    print(f"{found['method']} against {harmless(found['best_single'])}: {worth}")
    if found["verdict"] != "better":
        alone = {"no different": "as well", "worse": "better", "too little data": "perhaps as well"}
        how = alone[found["verdict"]]
        print(f"the combination is {found['verdict']}: the best adapter alone does {how} here")
    base, chosen = (found["losses"][name] for name in ("base", found["method"]))
    for run in runs:
        if run != "mean" and chosen[run] > base[run]:
            print(f"on {harmless(run)} it is worse than the base without an adapter")
