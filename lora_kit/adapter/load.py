"""A finished run -> model and tokenizer, ready for an application."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_kit.adapter.attach import adapter_folder
from lora_kit.base.load import load_base, load_tokenizer
from lora_kit.base.pin import Pinned, pin
from lora_kit.errors import UserError
from lora_kit.run import Base, Run, load_run, read_lock


def load(run: str | Path, *, quantize: str | None = None, dtype: str | None = None) -> Any:
    """Load a run's adapter on its base.

    >>> model, tokenizer = lora_kit.load("runs/demo/sft")  # doctest: +SKIP

    Args:
        run: a run directory.
        quantize: `none`, `nf4` or `int8` instead of what the run was trained with.
        dtype: `bfloat16` or `float32` instead of the run's.

    Returns:
        (model, tokenizer): a `peft.PeftModel` in evaluation mode and its tokenizer, with the chat
        template that the adapter was trained with.

    Raises:
        UserError: no finished run is there, or the base is not the one it was trained on.
    """
    opened = open_run(run)
    base = opened.base.model_copy(
        update={k: v for k, v in (("quantize", quantize), ("dtype", dtype)) if v is not None}
    )
    pinned = pin_like(run, base)
    return load_adapter(load_base(base, pinned), run), load_run_tokenizer(run)


def open_run(run: str | Path) -> Run:
    """The run file of a run directory. Raises UserError if there is none."""
    file = Path(run) / "run.yaml"
    if not file.is_file():
        raise UserError(f"{run}: no run directory (run.yaml is missing)")
    return load_run(file)


def pin_like(run: str | Path, base: Base) -> Pinned:
    """Pin a run's base at the revision it was trained on, and check that its files are the same."""
    trained_on = read_lock(run).get("base", {})
    if trained_on.get("revision"):
        base = base.model_copy(update={"revision": trained_on["revision"]})
    pinned = pin(base)
    before = trained_on.get("hashes", pinned.hashes)
    changed = sorted(
        name
        for name in before.keys() | pinned.hashes.keys()
        if before.get(name) != pinned.hashes.get(name)
    )
    if changed:
        raise UserError(
            f"{run}: trained on another {pinned.model}: {', '.join(changed)} changed since; "
            "an adapter is only worth something on its own base"
        )
    return pinned


def load_adapter(model: Any, run: str | Path) -> Any:
    """Put a run's finished adapter on its loaded base, in evaluation mode."""
    from peft import PeftModel

    folder = adapter_folder(run)
    try:
        return PeftModel.from_pretrained(model, str(folder)).eval()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: the adapter does not fit the base: {reason}") from None


def load_run_tokenizer(run: str | Path) -> Any:
    """The tokenizer saved beside a run's adapter, with the template it was trained with."""
    return load_tokenizer(Pinned("", str(adapter_folder(run))))
