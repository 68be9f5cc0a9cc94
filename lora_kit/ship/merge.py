"""Merge an adapter into its base, and believe it only after the logits were compared."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_kit.adapter.attach import adapter_folder
from lora_kit.adapter.load import (
    changed_base,
    end_tokens,
    load_adapter,
    load_run_tokenizer,
    pin_like,
    run_base,
)
from lora_kit.base.load import load_base
from lora_kit.errors import CheckFailed, UserError

PROBE_TOKENS = 64
# float32 sums differ in their last digits; the largest logit difference that explains.
FLOAT32_TOLERANCE = 1e-4
# In bfloat16 the merged weight is rounded to 8 bits: what that may cost of the adapter's effect.
ROUNDING_SHARE = 0.25

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


@dataclass(frozen=True)
class Merged:
    """What a merge came to. The logits are those of a probe of 64 tokens."""

    out: Path
    max_logit_difference: float
    adapter_effect: float  # largest difference that the adapter makes to the base's logits
    greedy_agreement: float  # share of positions where both choose the same token
    seconds: float
    peak_rss_mib: float
    bytes_written: int


def merge(run: str | Path, out: str | Path, dtype: str | None = None) -> Merged:
    """Write base + adapter as one ordinary model, loadable by transformers alone.

    The adapter is merged into the unquantized base, whatever it was trained on, because a merge
    into 4 bits is rounded to 4 bits. The folder appears under its name only after the model was
    reloaded from disk and its logits compared with those of base and adapter apart.

    Args:
        dtype: `bfloat16` or `float32` for the merged weights; None: the run's.

    Raises:
        UserError: `out` exists, or there is no finished run.
        CheckFailed: the merged model's logits differ by more than rounding explains.
    """
    import torch
    from transformers import AutoModelForCausalLM

    started = time.perf_counter()
    out = Path(out)
    if os.path.lexists(out):
        raise UserError(f"{out} exists: name another folder with --out, or remove it")
    partial = out.with_name(out.name + ".partial")
    if os.path.lexists(partial):
        raise UserError(f"{partial} exists, perhaps of a merge that was killed: remove it")
    base = changed_base(run_base(run), dtype=dtype)
    adapter_folder(run)
    pinned = pin_like(run, base)
    tokenizer = load_run_tokenizer(run)
    model = load_adapter(load_base(base, pinned, quantize="none"), run)
    probe = _probe(len(tokenizer))
    with torch.inference_mode():
        wanted = model(input_ids=probe).logits.float()
        with model.disable_adapter():
            effect = (model(input_ids=probe).logits.float() - wanted).abs().max().item()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    above = _make_room(partial, size)
    try:
        _untie(model.get_base_model())
        merged = model.merge_and_unload(safe_merge=True)
        _settle_generation(merged, tokenizer)
        merged.save_pretrained(partial)
        tokenizer.save_pretrained(str(partial))
        del model, merged
        gc.collect()
        again = AutoModelForCausalLM.from_pretrained(partial, dtype=base.dtype).eval()
        with torch.inference_mode():
            got = again(input_ids=probe).logits.float()
        difference = (got - wanted).abs().max().item()
        limit = FLOAT32_TOLERANCE if base.dtype == "float32" else ROUNDING_SHARE * effect
        # Written so that a NaN fails as well.
        if not difference <= max(limit, FLOAT32_TOLERANCE):
            fix = "" if base.dtype == "float32" else "; merge with --dtype float32"
            raise CheckFailed(
                f"{out}: not written: the merged model's logits differ by {difference:.2g} "
                f"(allowed: {limit:.2g}, the adapter's effect: {effect:.2g}){fix}"
            )
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in above if not out.exists() else ():
            with contextlib.suppress(OSError):  # somebody else put something there
                folder.rmdir()
    return Merged(
        out,
        difference,
        effect,
        (got.argmax(-1) == wanted.argmax(-1)).float().mean().item(),
        time.perf_counter() - started,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        sum(file.stat().st_size for file in out.rglob("*") if file.is_file()),
    )


def _untie(model: Any) -> None:
    """Where the adapter changes one of two tied matrices, embeddings or head, they part: merged
    into the shared one it would change both."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    ends: Any = (model.get_input_embeddings(), model.get_output_embeddings())
    if not any(isinstance(end, BaseTunerLayer) for end in ends):
        return
    layers: list[Any] = [e.get_base_layer() if isinstance(e, BaseTunerLayer) else e for e in ends]
    embeddings, head = layers
    if embeddings.weight is head.weight:
        head.weight = torch.nn.Parameter(embeddings.weight.detach().clone(), requires_grad=False)
        model.config.get_text_config().tie_word_embeddings = False
        model.config.tie_word_embeddings = False


def _settle_generation(model: Any, tokenizer: Any) -> None:
    """Whoever loads the folder stops where an answer ends, without knowing the template.

    Bases come with sampling settings and sampling off; transformers ignores them until it saves,
    and then it refuses.
    """
    config = model.generation_config
    config.eos_token_id = end_tokens(model, tokenizer)
    config.pad_token_id = tokenizer.pad_token_id
    if not config.do_sample:
        for name in _SAMPLING:
            setattr(config, name, None)


def _make_room(folder: Path, needed: int) -> list[Path]:
    """Make an empty folder on a disk with `needed` bytes free; returns the parents made, innermost
    first."""
    above = [parent for parent in folder.parents if not parent.exists()]
    free = shutil.disk_usage(folder.parents[len(above)]).free
    if free < needed:
        raise UserError(
            f"{folder.parent}: {free / 2**20:,.0f} MiB free, the merged model takes "
            f"{needed / 2**20:,.0f} MiB: free some, or name another disk with --out"
        )
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror})") from None
    return above


def _probe(vocabulary: int) -> Any:
    """(1, 64) token ids spread over the vocabulary, the same every time."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, (1, PROBE_TOKENS), generator=generator)
