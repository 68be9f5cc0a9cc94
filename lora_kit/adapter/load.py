"""A finished run -> model and processor, ready for use."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from lora_kit.adapter.attach import load_adapter
from lora_kit.adapter.finished import FinishedRun
from lora_kit.base.head import CAUSAL, load_with_head
from lora_kit.base.load import quiet_libraries, to_gpu
from lora_kit.base.templates import render
from lora_kit.errors import NotUsable, UserError
from lora_kit.schema import Base

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from lora_kit.base.load import Model


def load(
    run: str | Path,
    *,
    base: str | None = None,
    quantize: str | None = None,
    dtype: str | None = None,
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Load a run's adapter onto its base.

    >>> model, tokenizer = lora_kit.load("runs/demo/sft")  # doctest: +SKIP

    Args:
        run: a run directory, or the folder of a PEFT adapter.
        base: a folder or Hub id of the base, if it has moved.
        quantize: `none`, `nf4` or `int8` instead of the run's.
        dtype: `bfloat16` or `float32` instead of the run's.

    Returns:
        (model, processor): a `peft.PeftModel` in evaluation mode, and the tokenizer with the chat
        template of training.

    Raises:
        UserError: there is no finished run, or the base is not the one it was trained on.
    """
    return load_model(FinishedRun(run, base), quantize=quantize, dtype=dtype)


def load_model(
    run: FinishedRun, quantize: str | None = None, dtype: str | None = None
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """`load` for an open run."""
    quiet_libraries()
    base = changed_base(run.base, quantize=quantize, dtype=dtype)
    model = base_model(run, base)
    to_gpu(model, base)
    processor = run.processor
    adapted = load_adapter(model, run.adapter)
    if run.auto == CAUSAL:
        # So that plain `generate` stops at the end of a completion.
        adapted.generation_config.eos_token_id = end_tokens(adapted, processor)
        adapted.generation_config.pad_token_id = processor.pad_token_id
    return adapted, processor


def base_model(run: FinishedRun, base: Base, quantize: str | None = None) -> Model:
    """The model without the adapter.

    Args:
        base: the run's, or one of another dtype or quantization.
        quantize: see `load_base`.
    """
    # The run's seed, for the initialisation of fresh modules.
    seed = int(run.lock.get("seed") or 0)
    return load_with_head(base, run.pinned, run.head, seed, quantize)[0]


def changed_base(base: Base, **changes: str | None) -> Base:
    """A run's base with other settings; None keeps a setting. Raises UserError on invalid
    values."""
    for key, value in changes.items():
        known = get_args(Base.model_fields[key].annotation)
        if value is not None and value not in known:
            raise UserError(f"{key}: {value!r} is not usable: one of {', '.join(known)}")
    return base.model_copy(update={k: v for k, v in changes.items() if v is not None})


def end_tokens(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids at which generation stops: see `with_turn_end`."""
    known = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return with_turn_end(known, tokenizer)


def with_turn_end(known: int | list[int] | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The base's end tokens, the tokenizer's, and the end-of-turn token of the chat template, which
    may be neither (ChatML's <|im_end|>)."""
    ids = known if isinstance(known, list) else [known]
    found = {*ids, tokenizer.eos_token_id, _turn_end(tokenizer)}
    return sorted(number for number in found if number is not None)


def _turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The single token that the chat template writes after a completion."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "sentinelx"}]
    text = rendered(tokenizer, turns, ask=False)
    if text is None:
        return None
    after = text.rpartition("sentinelx")[2].strip()
    ids = tokenizer(after, add_special_tokens=False).input_ids if after else []
    # Only a special token: an ordinary one also occurs inside completions.
    special = {n for n, token in tokenizer.added_tokens_decoder.items() if token.special}
    return ids[0] if ids and ids[0] in special else None


def rendered(
    tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], ask: bool = True
) -> str | None:
    """A conversation rendered with the tokenizer's chat template; None without a template, or if it
    rejects the turns. `ask`: add the generation prompt."""
    if tokenizer.chat_template:
        with contextlib.suppress(NotUsable):
            return render(tokenizer, turns, add_generation_prompt=ask)
    return None
