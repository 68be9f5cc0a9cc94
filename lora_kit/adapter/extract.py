"""Extract a LoRA from a full fine-tune: dW = TUNED - BASE of each linear module, rank-truncated.

Matrices are read in blocks of rows: only the factors, (in + out) x rank numbers for each module,
are in memory. B = U sqrt(S) and A = sqrt(S) V^T; their first k columns and rows are the best
approximation of rank k (Eckart & Young 1936).
"""

from __future__ import annotations

import math
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from lora_kit.adapter.files import TOKENIZER_FILES, fingerprint, write_json, write_standard
from lora_kit.base.pin import pin
from lora_kit.base.tensors import FLOATS, Stored, stored_in
from lora_kit.errors import CheckFailed, UserError, harmless
from lora_kit.folders import new_folder, refuse_existing
from lora_kit.run import read_json
from lora_kit.schema import Base, Json

if TYPE_CHECKING:
    import torch

Block = tuple[slice, "torch.Tensor"]  # rows of a matrix, and these rows in float32
Blocks = Callable[[], Iterable[Block]]  # all of a matrix in order; called once per iteration

# Elements: 1 MiB in float32. Larger blocks fragment the heap: 16 MiB took 300 MiB more.
_BLOCK = 2**18
_EXACT = 256  # up to this width the subspace is the whole space
_OVERSAMPLING = 16  # columns of the subspace beyond the rank
_POWERS = 3  # iterations
_LAYER = re.compile(r"(?:.+\.)?(?:layers|blocks)\.[0-9]+\..+\.weight")


class NotCarried(TypedDict):
    """A changed tensor that a LoRA cannot represent.

    `relative`: ||dW||_F / ||W||_F; None: not comparable, or W is 0.
    """

    name: str
    why: str
    relative: float | None


def row_slices(out: int, width: int) -> Iterator[slice]:
    """The rows of an (out, width) matrix, in blocks of 1 MiB."""
    step = max(1, _BLOCK // max(1, width))
    return (slice(first, min(first + step, out)) for first in range(0, out, step))


def factored(
    blocks: Blocks, shape: tuple[int, int], rank: int, seed: int, name: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The factors B A of a rank that approximate a matrix M of `shape` (out, in) best.

    Randomized subspace iteration in blocks: Q <- orth(M^T M Q), then the SVD of M Q (Halko,
    Martinsson & Tropp 2011, arXiv:0909.4061, algorithm 4.4); exact if a side is at most 256.

    Returns:
        b (out, k), a (k, in), float32, k = min(rank, out, in); and float64 (k + 1,):
        ||M - B A||_F with the first 0, 1, ... k of them: computed exactly from the norm of
        M - M Q Q^T and the dropped singular values, since Q is orthonormal.

    Raises:
        UserError: a value is not finite; `name` is for the message.
    """
    import torch

    side = min(shape)
    width = side if side <= _EXACT else min(side, rank + _OVERSAMPLING)
    q = torch.randn(shape[1], width, generator=torch.Generator().manual_seed(seed))
    for _ in range(_POWERS):
        q = torch.linalg.qr(q).Q
        image = torch.zeros_like(q)
        for _, block in blocks():
            image += block.T @ (block @ q)
        if not bool(image.isfinite().all()):
            raise UserError(f"{name}: NaN or infinite values")
        q = image
    q = torch.linalg.qr(q).Q
    y = torch.cat([block @ q for _, block in blocks()])  # (out, width)
    missed = sum(float((block - y[rows] @ q.T).norm()) ** 2 for rows, block in blocks())
    u, s, vt = torch.linalg.svd(y, full_matrices=False)
    dropped = s.double().square().flip(0).cumsum(0).flip(0)
    k = min(rank, side)
    errors = torch.cat([dropped, torch.zeros(1).double()])[: k + 1].add(missed).sqrt()
    root = s[:k].sqrt()
    return u[:, :k] * root, root[:, None] * (vt[:k] @ q.T), errors


def write_metadata(folder: Path, tokenizer: Path, lock: Json) -> None:
    """Complete the folder of a written adapter.

    Args:
        tokenizer: a folder whose tokenizer and chat template are copied.
        lock: entries of run.lock.json; the hashes of this folder's files are added.
    """
    for file in sorted({f for pattern in TOKENIZER_FILES for f in tokenizer.glob(pattern)}):
        shutil.copyfile(file, folder / file.name)
    write_json(folder / "run.lock.json", {**lock, "adapter": fingerprint(folder)})


def extract(
    base: str, tuned: str, out: str | Path, rank: int = 16, seed: int = 0
) -> dict[str, object]:
    """Write the PEFT adapter of a rank that approximates a full fine-tune best.

    Args:
        base, tuned: model folders or Hub ids.
        seed: of the random start of the subspace iteration.

    Returns:
        `modules`: a number; `relative_error`: ||dW - B A||_F / ||dW||_F over all modules, by rank;
        `not_carried`: see `NotCarried`.

    Raises:
        UserError: the two have different shapes, or an unsupported architecture.
        CheckFailed: nothing changed that a LoRA can represent.
    """
    out = Path(out)
    refuse_existing(out)
    pins = [pin(Base(model=model)) for model in (base, tuned)]
    folders = [Path(pinned.folder) for pinned in pins]
    before, after = (stored_in(folder) for folder in folders)
    linear = _linear(before, after, folders[0])
    changed = [name for name in linear if _differs(before[name], after[name])]
    not_carried = _not_carried(before, after, set(linear))
    if not changed:
        what = "nothing"
        if not_carried:
            others = ", ".join(one["name"] for one in not_carried[:5])
            what = f"only tensors that a LoRA cannot represent ({others})"
        raise CheckFailed(f"{tuned}: {what} changed since {base}: there is nothing to extract")
    sizes = {name: (before[name].shape[0], before[name].shape[1]) for name in changed}
    factors: dict[str, torch.Tensor] = {}
    errors: list[torch.Tensor] = []
    # The space needed: float32 factors of every module.
    with new_folder(out, 4 * rank * sum(map(sum, sizes.values()))) as folder:
        for name in changed:
            blocks = partial(_changed_rows, before[name], after[name])
            where = f"{after[name].file}: {after[name].name}"
            b, a, error = factored(blocks, sizes[name], rank, seed, where)
            module = name.removesuffix(".weight")
            factors[f"base_model.model.{module}.lora_A.weight"] = a
            factors[f"base_model.model.{module}.lora_B.weight"] = b
            errors.append(error)
        # PEFT alone must find the base: by its Hub id and commit, or its folder.
        named = pins[0].model if pins[0].revision else pins[0].folder
        targets = _targets(changed, linear)
        write_standard(folder, factors, (named, pins[0].revision), rank, targets)
        lock = {
            "base": pins[0].to_lock(),
            "extracted": {"from": Path(tuned).name, "hashes": pins[1].hashes, "seed": seed},
        }
        # The tuned model's tokenizer, unless it has tokens without embeddings in the base: a tensor
        # that "10 rows became 11" of.
        resized = any("rows" in one["why"] for one in not_carried)
        write_metadata(folder, folders[0] if resized else folders[1], lock)
    return {
        "out": str(out),
        "rank": rank,
        "modules": len(changed),
        "relative_error": _relative_errors(errors, rank),
        "not_carried": not_carried,
    }


def _relative_errors(errors: list[torch.Tensor], rank: int) -> dict[str, float]:
    """The error of all modules together, relative to that of rank 0, for powers of 2 up to the rank
    and for the rank itself; modules narrower than a rank keep their last error."""
    found = {}
    for r in sorted({0, *(2**n for n in range(rank.bit_length())), rank}):
        each = [float(error[min(r, len(error) - 1)]) for error in errors]
        found[r] = math.hypot(*each)
    return {str(r): error / found[0] for r, error in found.items() if r}


def show(found: dict[str, Any]) -> None:
    """Print the error by rank, and the changed tensors that a LoRA cannot represent."""
    print("rank  ||dW - BA|| / ||dW||")
    for rank, error in found["relative_error"].items():
        print(f"{rank:>4}  {error:.2%}")
    alike = defaultdict(list)
    for one in found["not_carried"]:
        alike[re.sub(r"\.[0-9]+\.", ".*.", one["name"]), one["why"]].append(one["relative"])
    for (name, why), far in alike.items():
        moved = "" if None in far else f", changed by at most {max(far):.2%} of its norm"
        print(f"not extracted: {len(far)} {harmless(name)}: {why}{moved}")
    print(f"{found['out']}: rank {found['rank']}, {found['modules']} modules")


def _targets(changed: list[str], linear: list[str]) -> list[str]:
    """Name endings if they match exactly the modules of these weights, else full names."""
    modules = [name.removesuffix(".weight") for name in changed]
    endings = {module.rpartition(".")[2] for module in modules}
    matched = [name for name in linear if name.split(".")[-2] in endings]
    return sorted(endings) if set(matched) == set(changed) else modules


def _linear(before: dict[str, Stored], after: dict[str, Stored], folder: Path) -> list[str]:
    """Names of the weights of linear modules in decoder layers, and of an untied head.

    Raises:
        UserError: they differ in shape, are quantized, or are stored transposed.
    """
    config = read_json(folder / "config.json")
    if config.get("model_type") in ("gpt2", "openai-gpt") or any(".c_attn." in n for n in before):
        raise UserError(f"{folder}: weights are stored transposed, as in GPT-2: not supported")
    moe = any(".experts." in name for name in before)
    head = () if config.get("tie_word_embeddings") is True else ("lm_head.weight",)
    found = [
        name
        for name, tensor in before.items()
        if (_LAYER.fullmatch(name) or name in head)
        and len(tensor.shape) == 2
        # Experts and their router are not linear modules in the loaded model.
        and not (moe and re.search(r"\.experts\.|\.(gate|router)\.weight$", name))
        and name in after
    ]
    if not found:
        raise UserError(f"{folder}: no layers with linear modules")
    for name in found:
        old, new = before[name], after[name]
        if old.shape != new.shape and name not in head:
            sizes = f"{old.shape} in one and {new.shape} in the other"
            raise UserError(f"{name}: {sizes}: name the base that it was fine-tuned from")
        packed = {old.dtype, new.dtype} - FLOATS
        if packed:
            raise UserError(f"{name}: stored as {min(packed)}: name the unquantized model")
    return [name for name in found if before[name].shape == after[name].shape]


def _differences(
    before: Stored, after: Stored
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """(rows, W, dW) in blocks, float32, flattened to two dimensions; for rows that both have."""
    rows = min(before.shape[0], after.shape[0]) if before.shape else 1
    for some in row_slices(rows, math.prod(before.shape[1:])):
        old, new = (t.read(some.start, some.stop).float() for t in (before, after))
        old, new = (t.reshape(some.stop - some.start, -1) for t in (old, new))
        yield some, old, new.sub_(old)


def _changed_rows(before: Stored, after: Stored) -> Iterator[Block]:
    return ((rows, change) for rows, _, change in _differences(before, after))


def _differs(before: Stored, after: Stored) -> bool:
    return any(bool(change.any()) for _, change in _changed_rows(before, after))


def _not_carried(
    before: dict[str, Stored], after: dict[str, Stored], linear: set[str]
) -> list[NotCarried]:
    """The changed tensors that are not among the linear ones."""
    found = []
    for name in sorted((before.keys() | after.keys()) - linear):
        old, new = before.get(name), after.get(name)
        why, relative = None, None
        if old is None or new is None:
            why = "only in TUNED" if old is None else "only in BASE"
        elif old.shape[1:] != new.shape[1:]:
            why = f"{old.shape} became {new.shape}"
        else:
            norms = [(float(w.norm()), float(dw.norm())) for _, w, dw in _differences(old, new)]
            size = math.hypot(*(norm for norm, _ in norms))
            moved = math.hypot(*(norm for _, norm in norms))
            relative = moved / size if size else None
            if old.shape != new.shape:
                why = f"{old.shape[0]} rows became {new.shape[0]}"
            elif moved:
                why = "a norm or bias" if len(old.shape) < 2 else "not a linear module of a layer"
        if why:
            found.append(NotCarried(name=name, why=why, relative=relative))
    return found
