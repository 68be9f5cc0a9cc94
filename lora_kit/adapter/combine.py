"""Combine several LoRA adapters of one base into one, module by module; no model is loaded.

The inputs are the updates dW_i = scale_i · B_i A_i, with weights w_i:

- `linear`: the exact sum of w_i dW_i, of rank r_1 + r_2 + ...: PEFT's `cat`;
- `svd`: the same sum, truncated to a rank: PEFT's `svd`;
- `ties`: the mean of the largest entries of each dW_i whose sign has the majority (Yadav et al.
  2023, arXiv:2306.01708), truncated to a rank: PEFT's `ties_svd`;
- `dare`: the sum of dW_i with random entries dropped and the others rescaled (Yu et al. 2023,
  arXiv:2311.03099), truncated to a rank: PEFT's `dare_linear_svd`.

PEFT's own `linear`, `ties` and `dare_linear` combine A and B separately, which multiplies one
adapter's B with another's A and needs equal ranks. For two adapters of `nano` (mean loss on the
held-out rows of both; the better single one: 3.244) they gave 3.279, 3.300 and 3.381; the methods
above 3.248, 3.270 and 3.257. PEFT (0.21) also keeps the first adapter's use_rslora, and with it a
scale of sqrt(r).
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_kit.adapter.extract import factored, write_metadata
from lora_kit.adapter.files import WEIGHTS, Adapter, Update, write_standard
from lora_kit.adapter.finished import FinishedRun
from lora_kit.adapter.portable import check_portable
from lora_kit.errors import UserError
from lora_kit.folders import new_folder, refuse_existing
from lora_kit.hashes import file_hash
from lora_kit.schema import Json

if TYPE_CHECKING:
    import torch

# Entries of the first adapter's lock file that are kept.
_FROM_FIRST = ("base", "kind", "joiner")
METHODS = ("linear", "svd", "ties", "dare")


def combine(
    runs: Sequence[FinishedRun],
    out: str | Path,
    method: str = "linear",
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
) -> dict[str, Any]:
    """Write one standard PEFT adapter: one rank, scale 1, the tokenizer of the first adapter.

    A module that an adapter lacks counts as an update of 0.

    Args:
        runs: finished runs, or adapter folders.
        method: see the module docstring.
        weights: one per adapter; None: equal, with sum 1.
        rank: of the result; None: the sum for `linear`, else the largest.
        density: share of the entries that `ties` and `dare` keep.
        seed: of `dare`'s drop mask: as in PEFT after torch.manual_seed, with the modules in the
            order of the file.

    Returns:
        `method`, `weights`, `rank`, `modules` (a number) and `notes` for the user.

    Raises:
        UserError: the adapters have different bases or shapes, or more than LoRA updates.
    """
    weights = [1 / len(runs)] * len(runs) if weights is None else list(weights)
    _check_settings(len(runs), method, weights, rank, density)
    sizes = _check_adapters(runs)
    refuse_existing(Path(out))
    adapters = [run.adapter for run in runs]
    exact = method == "linear" and rank is None
    if rank is None:
        rank = _default_rank(adapters, sum if exact else max)
    weighted = list(zip(weights, adapters, strict=True))
    factors = _combined(weighted, sizes, method, None if exact else rank, density, seed)
    of = [{"adapter": run.name, "sha256": file_hash(run.folder / WEIGHTS)} for run in runs]
    settings: dict[str, Any] = {"method": method, "weights": weights, "rank": rank, "of": of}
    if method in ("ties", "dare"):
        settings |= {"density": density, "seed": seed}
    targets = {name for adapter in adapters for name in adapter.targets}
    # The space needed: float32 factors of every module.
    with new_folder(Path(out), 4 * rank * sum(map(sum, sizes.values()))) as folder:
        write_standard(folder, factors, runs[0].peft_base, rank, sorted(targets))
        write_metadata(folder, runs[0].folder, {**_kept_of_locks(runs), "combined": settings})
    notes = _notes(adapters, list(sizes))
    return {**settings, "out": str(out), "modules": len(sizes), "notes": notes}


def _check_settings(
    adapters: int, method: str, weights: list[float], rank: int | None, density: float
) -> None:
    """Raises UserError with a line for each invalid setting."""
    problems = []
    if adapters < 2:
        problems.append("only one adapter: name two or more")
    if len(weights) != adapters:
        problems.append(
            f"--weights: {len(weights)} for {adapters} adapters: give one each, as 0.7,0.3"
        )
    if not all(abs(weight) < 1e6 for weight in weights):  # also for NaN
        problems.append("--weights: must be finite numbers below a million")
    if not 0 < density <= 1:
        problems.append(f"--density {density}: must be > 0 and <= 1")
    if rank is not None and rank < 1:
        problems.append(f"--rank {rank}: must be at least 1")
    if method not in METHODS:
        problems.append(f"--method {method}: one of {', '.join(METHODS)}")
    if problems:
        raise UserError("\n".join(problems))


def _default_rank(adapters: list[Adapter], of_module: Callable[[list[int]], int]) -> int:
    """The largest rank that a module needs: the sum or the maximum of its ranks."""
    ranks: dict[str, list[int]] = defaultdict(list)
    for adapter in adapters:
        for module in adapter.factors:
            ranks[module].append(adapter.rank_and_scale(module)[0])
    return max(of_module(each) for each in ranks.values())


def _combined(
    adapters: list[tuple[float, Adapter]],
    modules: Iterable[str],
    method: str,
    rank: int | None,
    density: float,
    seed: int,
) -> dict[str, torch.Tensor]:
    """A and B of all modules, by their names in the file.

    Args:
        adapters: with their weights.
        rank: that sums are truncated to; None: they are exact.
    """
    import torch

    factors = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in modules:
            having = [(weight, one) for weight, one in adapters if module in one.factors]
            updates = [(weight, adapter.update(module)) for weight, adapter in having]
            if not all(update.finite for _, update in updates):
                raise UserError(f"{module}: NaN or infinite values")
            if method in ("linear", "svd") or rank is None:
                a, b = _summed(updates, rank)
            else:
                a, b = _sparse(updates, method, rank, density, seed)
            stored = having[-1][1].factors[module]
            factors[stored["A"].name] = a
            factors[stored["B"].name] = b
    return factors


def _kept_of_locks(runs: Sequence[FinishedRun]) -> Json:
    """The entries of the adapters' lock files that also hold for the combination."""
    first = runs[0].lock
    kept: Json = {key: first[key] for key in _FROM_FIRST if key in first}
    if "base" in kept and runs[0].run:  # the path may be relative to the run
        kept["base"] = {**kept["base"], "model": runs[0].base.model}
    for key in ("data", "commits"):  # of all adapters, since their licences apply
        entries: Json = {}
        for run in runs:
            for name, value in run.lock.get(key, {}).items():
                differs = entries.get(name, value) != value
                entries[f"{name} of {run.path}" if differs else name] = value
        kept[key] = entries
    uses: Json = {}
    for run in runs:
        for digest, use in run.lock.get("uses", {}).items():
            uses[digest] = "train" if "train" in (use, uses.get(digest)) else use
    return {**kept, "uses": uses}


def _check_adapters(runs: Sequence[FinishedRun]) -> dict[str, tuple[int, int]]:
    """(out, in) of every module. Raises UserError unless all adapters are standard LoRA, with the
    same base and shapes."""
    problems = []
    first = runs[0]
    shapes: dict[str, tuple[int, int]] = {}
    for run in runs:
        adapter = run.adapter
        check_portable(adapter)
        other_base = run.peft_base != first.peft_base
        if run.hashes and first.hashes:  # a moved base is still the same
            other_base = run.hashes != first.hashes
        if other_base:
            bases = f"{run.peft_base[0]}, and {first.peft_base[0]} for {first.path}"
            problems.append(f"{run.path}: different bases or revisions: {bases}")
        for module, factors in adapter.factors.items():
            size = (factors["B"].shape[0], factors["A"].shape[1])
            if shapes.setdefault(module, size) != size or len(factors["A"].shape) != 2:
                problems.append(f"{run.path}: {module} is {size}, but {shapes[module]} elsewhere")
                break
    if problems:
        raise UserError("\n".join(problems))
    return shapes


def _notes(adapters: list[Adapter], modules: list[str]) -> list[str]:
    notes = []
    for name, what in {"tokenizer.json": "tokenizers", "chat_template.jinja": "templates"}.items():
        files = [adapter.folder / name for adapter in adapters]
        if len({file.read_bytes() if file.is_file() else None for file in files}) > 1:
            notes.append(f"the adapters have different {what}: using the first one's")
    partly = sum(any(m not in adapter.factors for adapter in adapters) for m in modules)
    if partly:
        notes.append(f"{partly} of {len(modules)} modules are missing in an adapter: counted as 0")
    return notes


def _summed(
    pairs: list[tuple[float, Update]], rank: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A (k, in) and B (out, k), float32, of one module's sum: exact for rank None, else truncated,
    by the SVD of the small core between two orthonormal bases."""
    import torch

    a = torch.cat([weight * one.scale * one.a[0] for weight, one in pairs])  # (sum of r, in)
    b = torch.cat([one.b[0] for _, one in pairs], dim=1)  # (out, sum of r)
    if rank is None:
        return a.float(), b.float()
    (q_b, r_b), (q_a, r_a) = torch.linalg.qr(b), torch.linalg.qr(a.T)
    u, s, vt = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    root = s[:rank].sqrt()
    return (root[:, None] * (vt[:rank] @ q_a.T)).float(), (q_b @ u[:, :rank] * root).float()


def _sparse(
    pairs: list[tuple[float, Update]], method: str, rank: int, density: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A (k, in) and B (out, k), float32, for `ties` and `dare`, by PEFT's functions, which need the
    whole updates in memory: one matrix of the module's size for each adapter."""
    import torch
    from peft.utils.merge_utils import dare_linear, ties

    updates = [(u.b[0].float() @ u.a[0].float()) * u.scale for _, u in pairs]
    weights = torch.tensor([weight for weight, _ in pairs])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The density")  # of 1: nothing is dropped
        combined = (dare_linear if method == "dare" else ties)(updates, weights, density)
    whole = slice(0, len(combined))
    shape = (combined.shape[0], combined.shape[1])
    b, a, _ = factored(lambda: [(whole, combined)], shape, rank, seed, pairs[0][1].module)
    return a, b
