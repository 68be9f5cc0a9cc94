"""Merge an adapter into its base, tensor by tensor, and believe it only after a check.

The model is never in memory (`ship.weights`).
"""

from __future__ import annotations

import gc
import math
import resource
import shutil
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from lora_kit.adapter.attach import load_adapter
from lora_kit.adapter.files import WEIGHTS, write_json
from lora_kit.adapter.finished import FinishedRun
from lora_kit.adapter.load import base_model, changed_base, end_tokens
from lora_kit.adapter.names import MergePlan
from lora_kit.base.head import CAUSAL
from lora_kit.base.load import unquantized_config
from lora_kit.base.tensors import stored_in
from lora_kit.errors import CheckFailed, UserError
from lora_kit.folders import new_folder, refuse_existing
from lora_kit.hashes import file_hash
from lora_kit.run import read_json
from lora_kit.schema import Base
from lora_kit.ship.layout import Layout, layout
from lora_kit.ship.weights import Weights

PROBE_TOKENS = 64
Into = Literal["base", "dequantized"]
# float32 sums differ in their last digits; the largest logit difference that explains.
FLOAT32_TOLERANCE = 1e-4
# In bfloat16 the merged weight is rounded to 8 bits: what that may cost of the adapter's effect.
ROUNDING_SHARE = 0.25
# By what the scale may seem another, fitted to all differences beside those that a tenth less of it
# makes: rounding points anywhere and nearly leaves that sum, a wrong scale is all in it.
LESS = 0.1  # of the adapter, taken away to see what its scale does
SCALE = {"float32": 1e-3, "bfloat16": 0.1}

RECORD = "merge.json"
_BESIDE = 64 * 2**20  # bytes for all but the weights; the largest tokenizers take half of it
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
_LEGAL = ("LICEN[CS]E*", "NOTICE*", "USE_POLICY*", "COPYING*")


@dataclass(frozen=True)
class Merged:
    """What a merge came to. The logits are those of a probe of 64 tokens; None: not compared."""

    out: Path
    max_logit_difference: float | None
    adapter_effect: float | None  # largest difference that the adapter makes to the base's logits
    greedy_agreement: float | None  # share of positions where both choose the same token
    changed: int  # tensors
    copied: int  # byte for byte
    seconds: float
    peak_rss_mib: float
    bytes_written: int


def merge(
    run: FinishedRun,
    out: str | Path,
    dtype: str | None = None,
    *,
    into: Into = "base",
    verify: Literal["tensors", "logits"] = "tensors",
) -> Merged:
    """Write base + adapter as one ordinary model, loadable by transformers alone.

    W + scale · B A is summed in float32 and rounded once. The folder appears under its name only
    after every file was read back from the disk and was what had been meant.

    Args:
        dtype: `bfloat16` or `float32` for the weights; None: the run's. Tensors that a bfloat16
            base keeps in float32 stay so.
        into: `base`: the unquantized weights, whatever the adapter was trained on, for a merge into
            4 bits is rounded to 4 bits. `dequantized`: what NF4 leaves of them, as the adapter saw
            them in training.
        verify: `logits`: load both models as well and compare their logits.

    Raises:
        UserError: `out` exists or has no room, there is no finished run, or adapter and base do
            not belong together.
        CheckFailed: a weight is not finite, what was read back is not what was written, or the
            logits differ by more than rounding explains.
    """
    started = time.perf_counter()
    out = Path(out)
    refuse_existing(out)
    trained = run.base
    base = changed_base(trained, dtype=dtype)
    known = run.run is not None or "quantize" in run.lock.get("base", {})
    if into == "dequantized" and known and trained.quantize != "nf4":
        raise UserError(f"{run.path}: not trained on nf4 ({trained.quantize}): remove --into")
    pinned = run.located
    folder, config = Path(pinned.folder), unquantized_config(pinned)
    tokenizer = run.processor if run.has_processor else None
    form = layout(run, stored_in(folder))
    weights = Weights(form.adapter, form.tensors, config, base.dtype, form.head, form.guard)
    if into == "dequantized":
        weights.quantize(*form.on_meta(folder), trained.dtype)
    legal = [file for pattern in _LEGAL for file in folder.glob(pattern) if file.is_file()]
    with new_folder(out, weights.bytes + _BESIDE) as made:
        weights.write(made, run.hashes, run.refuse_base)
        form.settle(config)
        _settle(made, config, weights.plan, base.dtype)
        form.write_parts(made, _longest(run, config))
        if run.auto == CAUSAL:
            _settle_generation(made, folder, tokenizer)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(made))
        # Of which run this is: `push --merged` asks.
        name = pinned.model if pinned.revision else Path(pinned.model).name
        origin = {"model": name, "revision": pinned.revision, "hashes": run.hashes or pinned.hashes}
        digest = {"sha256": file_hash(run.folder / WEIGHTS)}
        record = {"adapter": digest, "base": origin, "into": into, "dtype": base.dtype}
        write_json(made / RECORD, record)
        for file in legal:
            shutil.copyfile(file, made / file.name)
        compared: tuple[Any, Any, Any] = (None, None, None)
        if verify == "logits":
            quantize = "nf4" if into == "dequantized" else "none"
            compared = _compare(run, form, made, out, base, quantize)
    return Merged(
        out,
        *compared,
        weights.changed,
        sum(map(weights.copied, weights.entries)),
        time.perf_counter() - started,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        sum(file.stat().st_size for file in out.rglob("*") if file.is_file()),
    )


def _settle(folder: Path, config: dict[str, Any], merge: MergePlan, dtype: str) -> None:
    """Write config.json."""
    text = config.get("text_config") or {}
    for part in (config, text):
        part.pop("_name_or_path", None)  # a path of this machine
        for key in {"dtype", "torch_dtype"} & part.keys():
            part[key] = dtype
        if merge.vocabulary and "vocab_size" in part:
            part["vocab_size"] = merge.vocabulary
        if merge.untied and (part is config or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
    write_json(folder / "config.json", config)


def _settle_generation(folder: Path, base: Path, tokenizer: Any) -> None:
    """Write where generation ends, so that whoever loads the folder stops at the end of a turn
    without knowing the template.

    Bases come with sampling settings and sampling off; transformers ignores them until it saves,
    and then it refuses.
    """
    known = generation(base, tokenizer)
    left_out = () if known.get("do_sample") else _SAMPLING
    write_json(
        folder / "generation_config.json",
        {key: value for key, value in known.items() if key not in left_out and value is not None},
    )


def _longest(run: FinishedRun, config: dict[str, Any]) -> int:
    """Tokens of a text that a classifier was trained on at most."""
    if run.run is not None:
        return run.run.train.max_length
    return int((config.get("text_config") or config).get("max_position_embeddings") or 512)


def generation(base: Path, tokenizer: Any) -> dict[str, Any]:
    """A model folder's generation settings; they end at all of `end_tokens`, without a tokenizer
    where the base ends."""
    config = read_json(base / "config.json")
    known = {**(config.get("text_config") or {}), **config}
    ids = {key: known.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    found = ids | read_json(base / "generation_config.json")
    if tokenizer is None:
        return found
    ends = end_tokens(SimpleNamespace(generation_config=SimpleNamespace(**found)), tokenizer)
    return {**found, "eos_token_id": ends, "pad_token_id": tokenizer.pad_token_id}


def seen_scale(
    along: float, whole: float, step: float, count: int, least: float
) -> tuple[float, float]:
    """How many times its scale an adapter acts with, fitted to all differences, and by how much
    differences of `least` everywhere can look like another, where the scale hardly matters.

    Args:
        along: sum of the `count` differences, each times what `step` of the adapter adds there.
        whole: the sum of squares of what it adds.
    """
    if not whole:
        return 1.0, 0.0
    return 1 + step * along / whole, least * step * math.sqrt(count / whole)


def _compare(
    run: FinishedRun, form: Layout, folder: Path, out: Path, base: Base, quantize: str
) -> tuple[float, float, float]:
    """Largest difference of logits between merged and base with adapter, the adapter's own effect,
    and the share of equal greedy tokens. Raises CheckFailed if they differ by more than rounding.
    """
    import torch
    from peft.helpers import rescale_adapter_scale

    model = base_model(run, base, quantize)
    if run.has_processor:
        tokens = len(run.processor)
    else:
        tokens = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    probe = torch.randint(0, tokens, (1, PROBE_TOKENS), generator=generator)

    @torch.inference_mode()
    def logits(of: Any) -> Any:
        return of(input_ids=probe).logits.float()

    model = load_adapter(model, run.adapter)
    wanted = logits(model)
    with model.disable_adapter():
        effect = (logits(model) - wanted).abs().max().item()
    with rescale_adapter_scale(model, 1 - LESS) if form.adapter.factors else nullcontext():
        own = wanted - logits(model)
    del model
    gc.collect()
    got = logits(form.load(folder, base.dtype))
    difference = (got - wanted).abs().max().item()
    limit = FLOAT32_TOLERANCE if base.dtype == "float32" else ROUNDING_SHARE * effect
    along, whole = ((got - wanted) * own).sum().item(), own.square().sum().item()
    scale, unsure = seen_scale(along, whole, LESS, own.numel(), FLOAT32_TOLERANCE)
    right = abs(1 - scale) <= max(SCALE[base.dtype], unsure)
    # Written so that a NaN fails as well.
    if not (right and difference <= max(limit, FLOAT32_TOLERANCE)):
        fix = "" if base.dtype == "float32" else "; merge with --dtype float32"
        raise CheckFailed(
            f"{out}: not written: the merged model's logits differ by {difference:.2g} "
            f"(allowed: {limit:.2g}, the adapter's effect: {effect:.2g}), as if its scale were "
            f"{scale:.3f} times what it is{fix}"
        )
    return difference, effect, (got.argmax(-1) == wanted.argmax(-1)).float().mean().item()
