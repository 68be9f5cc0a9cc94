"""A finished run -> model and tokenizer, ready for an application."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from lora_kit.adapter.attach import put_on
from lora_kit.adapter.files import WEIGHTS, Adapter, adapter_folder, open_adapter
from lora_kit.base.load import gpu_is_used, load_base, load_tokenizer, quiet_libraries
from lora_kit.base.pin import Pinned, pin
from lora_kit.base.templates import render, set_template
from lora_kit.errors import NotUsable, UserError
from lora_kit.hashes import file_hash
from lora_kit.run import load_run, read_lock
from lora_kit.schema import Base, Run


def load(run: str | Path, *, quantize: str | None = None, dtype: str | None = None) -> Any:
    """Load a run's adapter on its base.

    >>> model, tokenizer = lora_kit.load("runs/demo/sft")  # doctest: +SKIP

    Args:
        run: a run directory, or the folder of a PEFT adapter.
        quantize: `none`, `nf4` or `int8` instead of what the run was trained with.
        dtype: `bfloat16` or `float32` instead of the run's.

    Returns:
        (model, tokenizer): a `peft.PeftModel` in evaluation mode and its tokenizer, with the chat
        template that the adapter was trained with.

    Raises:
        UserError: no finished run is there, or the base is not the one it was trained on.
    """
    quiet_libraries()
    base = changed_base(run_base(run), quantize=quantize, dtype=dtype)
    adapter_folder(run)  # before anything large is loaded
    pinned = pin_like(run, base)
    model = load_base(base, pinned)
    if gpu_is_used() and base.quantize == "none":
        model = model.to("cuda")
    tokenizer = load_run_tokenizer(run, pinned)
    model = load_adapter(model, run)
    # So that an application's own `generate` stops where an answer ends.
    model.generation_config.eos_token_id = end_tokens(model, tokenizer)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


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
    ends an answer in the chat template, which need be neither (ChatML's <|im_end|>)."""
    known = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = known if isinstance(known, list) else [known]
    return sorted(
        {n for n in [*ids, tokenizer.eos_token_id, _turn_end(tokenizer)] if n is not None}
    )


def _turn_end(tokenizer: Any) -> int | None:
    """The single token that the chat template writes after an answer."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "sentinelx"}]
    if (text := rendered(tokenizer, turns, ask=False)) is None:
        return None
    after = text.rpartition("sentinelx")[2].strip()
    ids = tokenizer(after, add_special_tokens=False).input_ids if after else []
    # Only a token made to be an end: an ordinary one also stands inside of answers.
    special = {n for n, token in tokenizer.added_tokens_decoder.items() if token.special}
    return ids[0] if ids and ids[0] in special else None


def rendered(tokenizer: Any, turns: list[dict[str, str]], ask: bool = True) -> str | None:
    """A conversation in the tokenizer's chat template; None without one, or where it refuses: it is
    a program, and may refuse whatever it likes. `ask`: with the prompt for an answer."""
    if tokenizer.chat_template:
        with contextlib.suppress(NotUsable):
            return render(tokenizer, turns, add_generation_prompt=ask)
    return None


def open_run(run: str | Path, overrides: Sequence[str] = ()) -> Run:
    """The run file of a run directory. Raises UserError if there is none."""
    file = Path(run) / "run.yaml"
    if not file.is_file():
        raise UserError(f"{run}: no run directory (run.yaml is missing)")
    return load_run(file, list(overrides), needs_sources=False)


def run_home(run: str | Path) -> Path:
    """The run directory of a run, also when its adapter/ was named; else the adapter's folder."""
    if (Path(run) / "run.yaml").is_file():
        return Path(run)
    folder = adapter_folder(run)
    # A run keeps its lock file beside adapter/; what was pulled or exported has its own inside, and
    # may lie in a working folder that holds some run.yaml.
    own = (folder / "run.lock.json").is_file() or folder.name != "adapter"
    return folder if own or not (folder.parent / "run.yaml").is_file() else folder.parent


def run_base(run: str | Path) -> Base:
    """The base that a run file names, or, for an adapter folder alone, its adapter_config.json;
    in the type and quantized as its lock file says.

    Raises:
        UserError: neither is there, or no base is named.
    """
    home = run_home(run)
    if (home / "run.yaml").is_file():
        return open_run(home).base
    named = open_adapter(home).base
    locked = read_lock(home).get("base") or {}
    if not named["model"]:
        raise UserError(f"{home}: adapter_config.json names no base (base_model_name_or_path)")
    try:
        as_trained = {key: locked[key] for key in ("dtype", "quantize") if key in locked}
        return Base.model_validate({**named, **as_trained})
    except ValueError:
        raise UserError(
            f"{home}: adapter_config.json or run.lock.json: the base they name is not usable"
        ) from None


def pin_like(run: str | Path, base: Base, weights: bool = True) -> Pinned:
    """Pin a run's base at the revision it was trained on, and check that its files are the same.

    `weights=False`: but for a local folder's weights, for whoever reads them all anyway.
    """
    lock = read_lock(run_home(run))
    trained_on = lock.get("base", {})
    if not trained_on and (run_home(run) / "run.yaml").is_file():
        what = "whether this is the base that it was trained on is not known"
        print(f"warning: {run}: its run.lock.json is gone: {what}", file=sys.stderr)
    weights = weights or not Path(base.model).is_dir()
    pinned = pin(base, lock, weights)
    now = pinned.hashes
    before = trained_on.get("hashes", now)
    changed = [name for name in before.keys() | now.keys() if before.get(name) != now.get(name)]
    if not weights:
        changed = [name for name in changed if not name.endswith(".safetensors")]
    refuse_changed(run, pinned, changed)
    return pinned


def refuse_changed(run: str | Path, pinned: Pinned, changed: Sequence[str]) -> None:
    """Raises UserError if files of the base are not those that the run was trained on."""
    if changed:
        trained = read_lock(run_home(run))["base"]["model"]
        which = "another" if trained == pinned.model else f"{trained}, not on"
        raise UserError(
            f"{run}: trained on {which} {pinned.model}: {', '.join(sorted(changed))} changed "
            "since; an adapter is only worth something on its own base"
        )


def run_adapter(run: str | Path) -> Adapter:
    """A run's finished adapter. Raises UserError: it is missing, or not as the run saved it."""
    weights = adapter_folder(run) / WEIGHTS
    saved = read_lock(run_home(run)).get("adapter", {}).get("sha256")
    if saved is not None and weights.is_file() and file_hash(weights) != saved:
        raise UserError(f"{weights}: not as the run saved it: copy the run again, or train again")
    return open_adapter(run)


def load_adapter(model: Any, run: str | Path) -> Any:
    """Put a run's finished adapter on its loaded base, in evaluation mode.

    Raises:
        UserError: it is missing, not as the run saved it, or does not fit the base.
    """
    return put_on(model, run_adapter(run))


def load_run_tokenizer(run: str | Path, pinned: Pinned | None = None) -> Any:
    """A run's tokenizer, with the template it was trained with; its base's, if it came without.

    `pinned`: the base, if it is known already.
    """
    folder = adapter_folder(run)
    if not any(folder.glob("tokenizer*")):
        folder = Path((pinned or pin_like(run, run_base(run), weights=False)).folder)
    tokenizer = load_tokenizer(Pinned("", str(folder)))
    set_template(tokenizer, None)  # a template that loops is refused
    return tokenizer
