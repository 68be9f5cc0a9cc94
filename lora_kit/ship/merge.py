"""Merge an adapter into its base: one ordinary model folder, without loading the model.

`layout` decides which tensors the merged model has, `weights` writes them, and this module adds the
config, the tokenizer and a record, and compares logits if asked to.
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
from typing import TYPE_CHECKING, Any, Literal

from lora_kit.adapter.attach import load_adapter
from lora_kit.adapter.files import WEIGHTS, write_json
from lora_kit.adapter.finished import FinishedRun
from lora_kit.adapter.load import base_model, changed_base, with_turn_end
from lora_kit.adapter.names import MergePlan
from lora_kit.base.head import CAUSAL, with_head_on_meta
from lora_kit.base.load import unquantized_config
from lora_kit.base.tensors import stored_in
from lora_kit.errors import CheckFailed, UserError
from lora_kit.folders import new_folder, refuse_existing
from lora_kit.hashes import file_hash
from lora_kit.prove.into import choose
from lora_kit.run import read_json
from lora_kit.schema import Json
from lora_kit.ship.layout import Layout, layout
from lora_kit.ship.weights import Weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE_TOKENS = 64
Into = Literal["auto", "base", "dequantized"]
# The largest logit difference that the order of float32 sums explains.
FLOAT32_TOLERANCE = 1e-4
# A merged bfloat16 weight is rounded to 8 bits, a float16 one to 11: allowed logit difference, as a
# share of the adapter's effect.
ROUNDING_SHARE = {"float32": 0.0, "float16": 0.1, "bfloat16": 0.25}
# A wrong scale changes the logits in one direction, that of scaling the adapter; rounding errors
# have no direction and nearly cancel in the projection on it.
LESS = 0.1  # the adapter's scale is reduced by this share to find the direction
SCALE = {"float32": 1e-3, "float16": 0.02, "bfloat16": 0.1}  # allowed relative error of the scale

RECORD = "merge.json"
_OTHER_FILES = 64 * 2**20  # bytes; the largest tokenizers take half of it
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
_LEGAL = ("LICEN[CS]E*", "NOTICE*", "USE_POLICY*", "COPYING*")


@dataclass(frozen=True)
class Merged:
    """The result of a merge. Logits are those of 64 random tokens; None: not compared."""

    out: Path
    max_logit_difference: float | None  # merged model and base with adapter
    adapter_effect: float | None  # largest logit difference of base with and without adapter
    greedy_agreement: float | None  # share of positions with the same most likely token
    changed: int  # tensors
    copied: int  # tensors that are the base's, byte for byte
    seconds: float
    peak_rss_mib: float
    bytes_written: int
    into: Into  # `base` or `dequantized`
    notes: list[str]


def merge(
    run: FinishedRun,
    out: str | Path,
    dtype: str | None = None,
    *,
    into: Into = "auto",
    verify: Literal["tensors", "logits"] = "tensors",
) -> Merged:
    """Write base + adapter as one ordinary model, loadable by transformers alone.

    W + scale · B A is summed in float32 and rounded once. The folder appears under its name only
    after every file of weights was read back from the disk and verified.

    Args:
        dtype: `bfloat16`, `float16` or `float32` for the weights; None: each tensor keeps the
            base's. Tensors that a 16-bit base keeps in float32 stay in float32.
        into: `base`: the unquantized weights, also if the adapter was trained on quantized ones.
            `dequantized`: the NF4-dequantized weights, which the adapter was trained on. `auto`:
            those with the better score in the run's report; `base` if it has none.
        verify: `logits`: also load both models and compare their logits.

    Raises:
        UserError: `out` exists, the disk is too full, there is no finished run, or the adapter does
            not fit the base.
        CheckFailed: a weight is not finite, a file read back differs from what was written, or the
            logits differ by more than rounding explains.
    """
    started = time.perf_counter()
    out = Path(out)
    refuse_existing(out)
    trained = run.base
    if dtype not in (None, *SCALE):
        raise UserError(f"dtype: {dtype!r} is not usable: one of {', '.join(SCALE)}")
    into, note = choose(run, into)
    # An adapter of another program does not name its quantization.
    recorded = run.run is not None or "quantize" in run.lock.get("base", {})
    if into == "dequantized" and recorded and trained.quantize != "nf4":
        raise UserError(f"{run.path}: not trained on nf4 ({trained.quantize}): remove --into")
    pinned = run.located
    folder = Path(pinned.folder)
    config = unquantized_config(folder)
    tokenizer = run.processor if run.has_processor else None
    form = layout(run, stored_in(folder))
    weights = Weights(form.adapter, form.tensors, config, dtype, form.head, form.guard)
    if into == "dequantized":
        model, _ = with_head_on_meta(trained, pinned, run.head)
        weights.quantize(model, trained.dtype)
    legal = [file for pattern in _LEGAL for file in folder.glob(pattern) if file.is_file()]
    with new_folder(out, weights.bytes + _OTHER_FILES) as made:
        weights.write(made, run.hashes, run.refuse_base)
        form.update_config(config)
        _write_config(made, config, weights.plan, dtype)
        form.write_parts(made, _max_length(run, config))
        if run.auto == CAUSAL:
            _write_generation_config(made, folder, tokenizer)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(made))
        # `push --merged` checks that the folder was made of the run that it is given.
        name = pinned.model if pinned.revision else Path(pinned.model).name
        origin = {"model": name, "revision": pinned.revision, "hashes": run.hashes or pinned.hashes}
        digest = {"sha256": file_hash(run.folder / WEIGHTS)}
        record = {"adapter": digest, "base": origin, "into": into, "dtype": weights.dtype}
        write_json(made / RECORD, record)
        for file in legal:
            shutil.copyfile(file, made / file.name)
        difference = effect = agreement = None
        if verify == "logits":
            difference, effect, agreement = _compare(run, form, made, out, weights.dtype, into)
    return Merged(
        out=out,
        max_logit_difference=difference,
        adapter_effect=effect,
        greedy_agreement=agreement,
        changed=weights.changed,
        copied=sum(map(weights.copied, weights.entries)),
        seconds=time.perf_counter() - started,
        peak_rss_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,  # KiB on Linux
        bytes_written=sum(file.stat().st_size for file in out.rglob("*") if file.is_file()),
        into=into,
        notes=[note] if note else [],
    )


def _write_config(folder: Path, config: Json, merge: MergePlan, dtype: str | None) -> None:
    """Write config.json with the merged model's dtype (None: the base's), vocabulary and tying."""
    text = config.get("text_config") or {}
    for part in (config, text):
        part.pop("_name_or_path", None)  # a path of this machine
        for key in {"dtype", "torch_dtype"} & part.keys():
            part[key] = dtype or part[key]
        if merge.vocabulary and "vocab_size" in part:
            part["vocab_size"] = merge.vocabulary
        if merge.untied and (part is config or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
    write_json(folder / "config.json", config)


def _write_generation_config(
    folder: Path, base: Path, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """Write generation_config.json, with the end-of-turn token as an end token, so that generation
    stops there also without the chat template.

    Some bases have sampling settings although sampling is off; transformers ignores them on load
    and rejects them on save, so they are dropped.
    """
    known = generation(base, tokenizer)
    dropped = () if known.get("do_sample") else _SAMPLING
    kept = {k: v for k, v in known.items() if v is not None and k not in dropped}
    write_json(folder / "generation_config.json", kept)


def _max_length(run: FinishedRun, config: Json) -> int:
    """The length in tokens that texts are truncated to in training."""
    if run.run is not None:
        return run.run.train.max_length
    return int((config.get("text_config") or config).get("max_position_embeddings") or 512)


def generation(base: Path, tokenizer: PreTrainedTokenizerBase | None) -> Json:
    """A model folder's generation settings, with the end tokens of `with_turn_end` if there is a
    tokenizer."""
    config = read_json(base / "config.json")
    known = {**(config.get("text_config") or {}), **config}
    ids = {key: known.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    found = ids | read_json(base / "generation_config.json")
    if tokenizer is None:
        return found
    ends = with_turn_end(found["eos_token_id"], tokenizer)
    return {**found, "eos_token_id": ends, "pad_token_id": tokenizer.pad_token_id}


def seen_scale(
    along: float, whole: float, step: float, count: int, least: float
) -> tuple[float, float]:
    """The scale that an adapter seems to act with, relative to its own, by least squares over all
    logits; and the error of that estimate if each logit is off by `least`.

    Args:
        along: the dot product of the `count` logit differences with the logit changes that `step`
            of the adapter makes.
        whole: the sum of squares of these changes.
    """
    if not whole:
        return 1.0, 0.0
    return 1 + step * along / whole, least * step * math.sqrt(count / whole)


def _compare(
    run: FinishedRun, form: Layout, folder: Path, out: Path, dtype: str, into: Into
) -> tuple[float, float, float]:
    """Compare the logits of the merged model with those of base and adapter.

    Args:
        dtype: of the merged weights.

    Returns:
        The largest difference, the adapter's effect, and the share of equal greedy tokens.

    Raises:
        CheckFailed: they differ by more than rounding explains.
    """
    import torch
    from peft.helpers import rescale_adapter_scale

    base = run.base
    # NF4 depends on the dtype that it is quantized from.
    if into == "base" and dtype != "bfloat16":
        base = changed_base(base, dtype="float32")
    if base.dtype == "bfloat16":  # that both models compute in
        dtype = "bfloat16"
    unadapted: Any = base_model(run, base, "nf4" if into == "dequantized" else "none")
    if run.has_processor:
        tokens = len(run.processor)
    else:
        tokens = unadapted.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    probe = torch.randint(0, tokens, (1, PROBE_TOKENS), generator=generator)

    @torch.inference_mode()
    def logits(model: torch.nn.Module) -> torch.Tensor:
        found: torch.Tensor = model(input_ids=probe).logits.float()
        return found

    model = load_adapter(unadapted, run.adapter)
    wanted = logits(model)
    with model.disable_adapter():
        effect = (logits(model) - wanted).abs().max().item()
    with rescale_adapter_scale(model, 1 - LESS) if form.adapter.factors else nullcontext():
        direction = wanted - logits(model)
    del model, unadapted
    gc.collect()
    got = logits(form.load(folder, base.dtype))
    difference = (got - wanted).abs().max().item()
    rounding = dtype if dtype in SCALE else "float32"  # float64
    limit = max(FLOAT32_TOLERANCE, ROUNDING_SHARE[rounding] * effect)
    along = ((got - wanted) * direction).sum().item()
    whole = direction.square().sum().item()
    scale, unsure = seen_scale(along, whole, LESS, direction.numel(), FLOAT32_TOLERANCE)
    right = abs(1 - scale) <= max(SCALE[rounding], unsure)
    # Not `difference > ...`, so that a NaN fails as well.
    if not (right and difference <= limit):
        fix = "" if rounding == "float32" else "; merge with --dtype float32"
        raise CheckFailed(
            f"{out}: not written: the merged model's logits differ by {difference:.2g} "
            f"(allowed: {limit:.2g}, the adapter's effect: {effect:.2g}), as if its scale were "
            f"{scale:.3f} times what it is{fix}"
        )
    return difference, effect, (got.argmax(-1) == wanted.argmax(-1)).float().mean().item()
