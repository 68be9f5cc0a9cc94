"""What was exported, loaded by the program it is for, in a process that knows nothing of the run.

`python -m lora_kit.ship.reload` reads a request on stdin and prints one JSON object; `reloaded` is
its other end. llama.cpp has a process of its own, with the same answer (see `llama_cpp.run`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from lora_kit.adapter.load import end_tokens, rendered
from lora_kit.base.load import quiet_libraries
from lora_kit.ship.llama_cpp import Consumed, answer_with, ask

TOP = 64  # log-probabilities that are compared at a step
TOKENS = 32  # answered at most
TEXTS = ("The quick brown fox,\n\tjumps: 1234567 x+=1; über 'naïve' ☃\n", " ", "a")
CONVERSATIONS: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "What do you know of your field?"}],
    [
        {"role": "user", "content": "Say one word."},
        {"role": "assistant", "content": "One."},
        {"role": "user", "content": " Another,\nplease! "},
    ],
)


@dataclass(frozen=True)
class Continued:
    """Token ids that follow a prompt, the end token left out, and (steps, vocabulary) of float32:
    the log-probabilities of which each was chosen, and of the end token, where it `stopped`."""

    tokens: list[int]
    stopped: bool
    log_probabilities: Any


def continued(
    step: Callable[[list[int]], Any], prompt: Sequence[int], ends: Sequence[int]
) -> Continued:
    """Greedily, without the penalties that a generation config may ask for.

    Args:
        step: new token ids -> logits of the next one, (vocabulary,), all before being remembered.
    """
    import torch

    tokens: list[int] = []
    rows: list[Any] = []
    new = list(prompt)
    while len(rows) < TOKENS:
        rows.append(torch.log_softmax(step(new).float(), dim=-1))
        token = int(rows[-1].argmax())
        if token in ends:
            return Continued(tokens, True, torch.stack(rows))
        tokens.append(token)
        new = [token]
    return Continued(tokens, False, torch.stack(rows))


def torch_step(model: Any) -> Callable[[list[int]], Any]:
    """The `step` of a transformers model, for one prompt."""
    import torch

    cache: dict[str, Any] = {}

    def step(new: list[int]) -> Any:
        with torch.inference_mode():
            ids = torch.tensor([new], device=model.device)
            out = model(input_ids=ids, use_cache=True, **cache)
        cache["past_key_values"] = out.past_key_values
        return out.logits[0, -1].cpu()

    return step


def template_ids(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """The ids of a prompt that asks for an answer; none without a template, or if it refuses."""
    text = rendered(tokenizer, messages)
    return [] if text is None else list(tokenizer(text, add_special_tokens=False)["input_ids"])


def reloaded(
    consumer: str,
    model: str | Path,
    adapter: str | Path | None,
    prompts: Sequence[Sequence[int]],
    ends: Sequence[int] | None = None,
) -> Consumed | None:
    """What a fresh process makes of an export, computed in float32.

    Args:
        consumer: `transformers`, `peft` (adapter on model) or `mlx`.
        ends: the end tokens that it is told; None: it knows them.

    Returns:
        None: mlx-lm, or the mlx that it needs, is not installed here.

    Raises:
        CheckFailed: it is not loaded.
    """
    request = {
        **{"consumer": consumer, "model": str(model), "adapter": adapter and str(adapter)},
        **{"prompts": [list(p) for p in prompts], "ends": ends and list(ends)},
    }
    answer = ask("lora_kit.ship.reload", request, f"{adapter or model}: {consumer}")
    return cast(Consumed, answer) if answer else None


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    """`reloaded`, within the fresh process; nothing without mlx-lm, where that is asked for."""
    if request["consumer"] == "mlx" and not _runs_mlx():
        return {}
    load = _load_mlx if request["consumer"] == "mlx" else _load_torch
    new_step, tokenizer, ends = load(request["model"], request["adapter"])
    answers = []
    for prompt in request["prompts"]:
        got = continued(new_step(), prompt, request["ends"] or ends)
        top = []
        for row in got.log_probabilities:
            values, ids = row.topk(min(TOP, len(row)))
            top.append(dict(zip(ids.tolist(), values.tolist(), strict=True)))
        answers.append({"tokens": got.tokens, "stopped": got.stopped, "top": top})
    return {
        "answers": answers,
        "texts": [list(tokenizer(text)["input_ids"]) for text in TEXTS],
        "conversations": [template_ids(tokenizer, m) for m in CONVERSATIONS],
        "ends": sorted(ends),
    }


def _load_torch(folder: str, adapter: str | None) -> tuple[Callable[[], Any], Any, list[int]]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quiet_libraries()
    known = {"local_files_only": True, "trust_remote_code": False}
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **known)
    own = adapter if adapter and any(Path(adapter).glob("tokenizer*")) else folder
    tokenizer: Any = AutoTokenizer.from_pretrained(own, **known)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
        ends = end_tokens(model, tokenizer)
    else:  # as whoever loads the folder, who knows nothing of the template
        known_ends = model.generation_config.eos_token_id
        ends = known_ends if isinstance(known_ends, list) else [known_ends]
    model.eval()
    return lambda: torch_step(model), tokenizer, ends


def _runs_mlx() -> bool:
    """pip installs mlx-lm without mlx on Linux, and mlx without the library that computes."""
    try:
        import mlx.core  # noqa: F401
        import mlx_lm  # noqa: F401
    except ImportError:
        return False
    return True


def _load_mlx(folder: str, adapter: str | None) -> tuple[Callable[[], Any], Any, list[int]]:
    import mlx.core as mx
    import numpy as np
    import torch
    from mlx_lm import load
    from mlx_lm.models.cache import make_prompt_cache

    safe = {"trust_remote_code": False}
    model, tokenizer = load(folder, tokenizer_config=safe, adapter_path=adapter)[:2]
    model.set_dtype(mx.float32)

    def new_step() -> Any:
        cache = make_prompt_cache(model)
        return lambda new: torch.tensor(np.array(model(mx.array([new]), cache=cache)[0, -1]))

    return new_step, tokenizer._tokenizer, sorted(tokenizer.eos_token_ids)


if __name__ == "__main__":
    answer_with(_answer)
