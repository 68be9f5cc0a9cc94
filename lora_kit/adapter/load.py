"""A finished run -> model and processor, ready for an application."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, get_args

from lora_kit.adapter.attach import put_on
from lora_kit.adapter.finished import FinishedRun
from lora_kit.base.head import CAUSAL, load_with_head
from lora_kit.base.load import gpu_is_used, quiet_libraries
from lora_kit.base.templates import render
from lora_kit.errors import NotUsable, UserError
from lora_kit.schema import Base


def load(
    run: str | Path,
    *,
    base: str | None = None,
    quantize: str | None = None,
    dtype: str | None = None,
) -> tuple[Any, Any]:
    """Load a run's adapter on its base.

    >>> model, tokenizer = lora_kit.load("runs/demo/sft")  # doctest: +SKIP

    Args:
        run: a run directory, or the folder of a PEFT adapter.
        base: where the base is, if not where the run names it: a folder or a Hub id.
        quantize: `none`, `nf4` or `int8` instead of what the run was trained with.
        dtype: `bfloat16` or `float32` instead of the run's.

    Returns:
        (model, processor): a `peft.PeftModel` in evaluation mode, of the class that the run was
        trained with, and its tokenizer, with the chat template that the adapter was trained with.

    Raises:
        UserError: no finished run is there, or the base is not the one it was trained on.
    """
    return load_model(FinishedRun(run, base), quantize=quantize, dtype=dtype)


def load_model(
    run: FinishedRun, quantize: str | None = None, dtype: str | None = None
) -> tuple[Any, Any]:
    """`load` for a run that is open."""
    quiet_libraries()
    base = changed_base(run.base, quantize=quantize, dtype=dtype)
    model = base_model(run, base)
    if gpu_is_used() and base.quantize == "none":
        model = model.to("cuda")
    processor = run.processor
    model = put_on(model, run.adapter)
    if run.auto == CAUSAL:
        # So that an application's own `generate` stops at the end of a completion.
        model.generation_config.eos_token_id = end_tokens(model, processor)
        model.generation_config.pad_token_id = processor.pad_token_id
    return model, processor


def base_model(run: FinishedRun, base: Base, quantize: str | None = None) -> Any:
    """The model that the adapter is put on.

    Args:
        base: the run's, or one of another dtype or quantization.
        quantize: see `load_base`.
    """
    # The seed of the run: for what its base has no weights for, with the adapter switched off.
    seed = int(run.lock.get("seed") or 0)
    return load_with_head(base, run.pinned, run.head, seed, quantize)[0]


def changed_base(base: Base, **changes: str | None) -> Base:
    """A run's base with other settings; None leaves one as it is. Raises UserError on others than
    the run file takes."""
    for key, value in changes.items():
        known = get_args(Base.model_fields[key].annotation)
        if value is not None and value not in known:
            raise UserError(f"{key}: {value!r} is not usable: one of {', '.join(known)}")
    return base.model_copy(update={k: v for k, v in changes.items() if v is not None})


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Where generation stops: at the base's own end tokens, the tokenizer's, and at the token that
    ends a turn in the chat template, which need be neither (ChatML's <|im_end|>)."""
    known = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = known if isinstance(known, list) else [known]
    return sorted(
        {n for n in [*ids, tokenizer.eos_token_id, _turn_end(tokenizer)] if n is not None}
    )


def _turn_end(tokenizer: Any) -> int | None:
    """The single token that the chat template writes after a completion."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "sentinelx"}]
    if (text := rendered(tokenizer, turns, ask=False)) is None:
        return None
    after = text.rpartition("sentinelx")[2].strip()
    ids = tokenizer(after, add_special_tokens=False).input_ids if after else []
    # Only a token made to be an end: an ordinary one occurs inside of completions as well.
    special = {n for n, token in tokenizer.added_tokens_decoder.items() if token.special}
    return ids[0] if ids and ids[0] in special else None


def rendered(tokenizer: Any, turns: list[dict[str, str]], ask: bool = True) -> str | None:
    """A conversation in the tokenizer's chat template; None without one, or where it rejects the
    turns: it is a program, and may reject whatever it likes. `ask`: with the generation prompt."""
    if tokenizer.chat_template:
        with contextlib.suppress(NotUsable):
            return render(tokenizer, turns, add_generation_prompt=ask)
    return None
