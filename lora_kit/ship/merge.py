"""Merge an adapter into its base, and believe it only after the logits were compared."""

from __future__ import annotations

import gc
import resource
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_kit.adapter.load import load_adapter, load_run_tokenizer, open_run, pin_like
from lora_kit.base.load import load_base
from lora_kit.errors import CheckFailed, UserError

PROBE_TOKENS = 64
# float32 sums differ in their last digits; the largest logit difference that explains.
FLOAT32_TOLERANCE = 1e-4
# In bfloat16 the merged weight is rounded to 8 bits: what that may cost of the adapter's own effect.
ROUNDING_SHARE = 0.25


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
    if out.exists():
        raise UserError(f"{out} exists: name another folder with --out, or remove it")
    opened = open_run(run)
    base = opened.base.model_copy(update={"dtype": dtype or opened.base.dtype})
    pinned = pin_like(run, base)
    tokenizer = load_run_tokenizer(run)
    model = load_adapter(load_base(base, pinned, quantize="none"), run)
    probe = _probe(len(tokenizer))
    with torch.inference_mode():
        wanted = model(input_ids=probe).logits.float()
        with model.disable_adapter():
            effect = (model(input_ids=probe).logits.float() - wanted).abs().max().item()
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        merged = model.merge_and_unload(safe_merge=True)
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
            raise CheckFailed(
                f"{out}: not written: the merged model's logits differ by {difference:.2g} "
                f"(allowed: {limit:.2g}, the adapter's effect: {effect:.2g}); "
                "merge with --dtype float32"
            )
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Merged(
        out,
        difference,
        effect,
        (got.argmax(-1) == wanted.argmax(-1)).float().mean().item(),
        time.perf_counter() - started,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        sum(file.stat().st_size for file in out.rglob("*") if file.is_file()),
    )


def _probe(vocabulary: int) -> Any:
    """(1, 64) token ids spread over the vocabulary, the same every time."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, (1, PROBE_TOKENS), generator=generator)
