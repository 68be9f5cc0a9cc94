"""Load an export with the runtime it is for, in a new process without the run, and generate.

`reloaded` starts `python -m lora_kit.ship.reload`, which reads a request on stdin and prints one
JSON object. llama.cpp has its own process with the same output (see `llama_cpp.run`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lora_kit.adapter.load import end_tokens, rendered
from lora_kit.base.load import quiet_libraries
from lora_kit.schema import Json
from lora_kit.ship.llama_cpp import Consumed, answer_with, ask

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Token ids that follow those of earlier calls -> logits of the next one, (vocabulary,).
Step = Callable[[list[int]], "torch.Tensor"]

TOP = 64  # log-probabilities that are compared per token
TOKENS = 32  # generated at most
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
    """A greedy completion.

    Attributes:
        tokens: its ids, without the end token.
        stopped: whether an end token was generated.
        log_probabilities: (steps, vocabulary) float32, a row per generated token, including the end
            token.
    """

    tokens: list[int]
    stopped: bool
    log_probabilities: torch.Tensor


def continued(step: Step, prompt: Sequence[int], ends: Sequence[int]) -> Continued:
    """Generate greedily, without the penalties of a generation config.

    Args:
        step: called with the prompt, then with each generated token; returns (vocabulary,) logits.
        ends: ids of end tokens.
    """
    import torch

    tokens: list[int] = []
    rows: list[torch.Tensor] = []
    new = list(prompt)
    while len(rows) < TOKENS:
        rows.append(torch.log_softmax(step(new).float(), dim=-1))
        token = int(rows[-1].argmax())
        if token in ends:
            return Continued(tokens, True, torch.stack(rows))
        tokens.append(token)
        new = [token]
    return Continued(tokens, False, torch.stack(rows))


def torch_step(model: PreTrainedModel | PeftModel) -> Step:
    """The `step` of a transformers model, for one prompt."""
    import torch

    cache: dict[str, Any] = {}

    def step(new: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            ids = torch.tensor([new], device=model.device)
            out = model(input_ids=ids, use_cache=True, **cache)
        cache["past_key_values"] = out.past_key_values
        return out.logits[0, -1].cpu()

    return step


def template_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    """The ids of a prompt for generation; empty without a template, or if it rejects the turns."""
    text = rendered(tokenizer, messages)
    return [] if text is None else list(tokenizer(text, add_special_tokens=False)["input_ids"])


def reloaded(
    consumer: str,
    model: str | Path,
    adapter: str | Path | None,
    prompts: Sequence[Sequence[int]],
    ends: Sequence[int] | None = None,
) -> Consumed | None:
    """Load an export in a new process and generate from it, in float32.

    Args:
        consumer: `transformers`, `peft` (adapter on model) or `mlx`.
        ends: end tokens to stop at; None: those of the export.

    Returns:
        None: mlx-lm or mlx is not installed.

    Raises:
        CheckFailed: it cannot be loaded.
    """
    request = {
        "consumer": consumer,
        "model": str(model),
        "adapter": None if adapter is None else str(adapter),
        "prompts": [list(prompt) for prompt in prompts],
        "ends": None if ends is None else list(ends),
    }
    answer = ask("lora_kit.ship.reload", request, f"{adapter or model}: {consumer}")
    return cast(Consumed, answer) if answer else None


def _answer(request: Json) -> dict[str, object]:
    """`reloaded` in the new process; empty if mlx is needed and not installed."""
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
    """A function that returns a new `step`, the tokenizer, and the end tokens."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quiet_libraries()
    safe = {"local_files_only": True, "trust_remote_code": False}
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **safe)
    with_tokenizer = adapter if adapter and any(Path(adapter).glob("tokenizer*")) else folder
    tokenizer: Any = AutoTokenizer.from_pretrained(with_tokenizer, **safe)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
        ends = end_tokens(model, tokenizer)
    else:  # what an application that loads the folder has
        known_ends = model.generation_config.eos_token_id
        ends = known_ends if isinstance(known_ends, list) else [known_ends]
    model.eval()
    return lambda: torch_step(model), tokenizer, ends


def _runs_mlx() -> bool:
    """Whether mlx can compute here: on Linux pip installs mlx-lm without mlx, or mlx without its
    backend."""
    try:
        import mlx.core  # noqa: F401
        import mlx_lm  # noqa: F401
    except ImportError:
        return False
    return True


def _load_mlx(folder: str, adapter: str | None) -> tuple[Callable[[], Any], Any, list[int]]:
    """As `_load_torch`, with mlx-lm."""
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
