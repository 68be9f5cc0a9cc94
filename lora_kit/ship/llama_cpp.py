"""llama.cpp through `xllamacpp`, in a process of its own: what a GGUF says, in ids and figures.

llama.cpp logs to the process's own standard error and ends it when it meets what it does not take:
`run` starts a fresh process and turns such an end into one line.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_kit.errors import CheckFailed, UserError

# Every file of ours says who wrote it.
WRITTEN_BY = "lora_kit.version"


def need_llama_cpp() -> None:
    """Raises UserError if the extra is not installed."""
    if missing := [m for m in ("gguf", "xllamacpp") if importlib.util.find_spec(m) is None]:
        raise UserError(f"{' and '.join(missing)} missing: pip install 'lora-kit[llamacpp]'")


def need_ours(file: Path) -> None:
    """Raises UserError unless this toolkit wrote the GGUF: llama.cpp trusts what a header says."""
    from gguf import GGUFReader

    try:
        ours = GGUFReader(file).get_field(WRITTEN_BY) is not None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from None
    except Exception:  # whatever a damaged header leads numpy into
        ours = False
    if not ours:
        raise UserError(
            f"{file}: no GGUF that lora-kit wrote: only those are read; make one with "
            "lora-kit export RUN --to gguf --out FOLDER"
        )


def run(
    model: Path,
    adapters: Sequence[tuple[Path, float]] = (),
    *,
    prompts: Sequence[Sequence[int]] = (),
    tokens: int = 1,
    top: int = 0,
    texts: Sequence[str] = (),
    conversations: Sequence[Sequence[dict[str, str]]] = (),
) -> dict[str, Any]:
    """What llama.cpp makes of a GGUF of ours, in a fresh process, keys and values in float32.

    Args:
        adapters: adapter GGUFs with the scale of each (1: as trained).
        prompts: token ids, each continued greedily by `tokens` tokens at most.
        top: of how many tokens the log-probabilities are wanted, in place of each that is chosen.
        texts: to be split into ids, as a prompt is: with the BOS token if the model adds one.
        conversations: messages to be rendered by the GGUF's template, an answer asked for.

    Returns:
        "answers": [{"tokens": ids, "stopped": by an end token, "top": [{id: log-probability}]}],
        one for each prompt; "texts": ids of each; "conversations": ids of each.

    Raises:
        UserError: the extra is missing, or a file is not ours.
        CheckFailed: llama.cpp does not load it, or ended.
    """
    need_llama_cpp()
    for file in (model, *(file for file, _ in adapters)):
        need_ours(file)
    request = {
        **{"model": str(model), "adapters": [(str(file), scale) for file, scale in adapters]},
        **{"prompts": [list(p) for p in prompts], "tokens": tokens, "top": top},
        **{"texts": list(texts), "conversations": list(conversations)},
    }
    command = [sys.executable, "-m", "lora_kit.ship.llama_cpp"]
    child = subprocess.run(command, input=json.dumps(request).encode(), capture_output=True)
    if child.returncode:
        lines = child.stderr.decode(errors="replace").strip().splitlines() or ["without a word"]
        # Below an assertion stands where it was; of Python's own traceback the last line counts.
        why = next((line for line in lines if "GGML_ASSERT" in line or " E " in line), lines[-1])
        raise CheckFailed(f"{model}: llama.cpp ended ({child.returncode}): {why[:240]}")
    return dict(json.loads(child.stdout))


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    """`run`, within the fresh process."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.verbosity = request["model"], 1  # errors only
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(*each) for each in request["adapters"]]
    params.hostnames, params.port, params.n_gpu_layers = ["127.0.0.1"], 0, 0
    # All of it is taken at once: no more than is asked for.
    longest = max(map(len, request["prompts"]), default=0)
    params.n_ctx = longest + request["tokens"] + 32
    if threads := int(os.environ.get("OMP_NUM_THREADS", "0")):  # its own wait for each other awake
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    # It would shrink the context to the free memory, and run once for nothing.
    params.fit_params = params.warmup = params.ui = False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    # Whatever proxy the environment names: this is loopback.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def post(path: str, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        asked = urllib.request.Request(
            server.listening_address + path, json.dumps(body).encode(), headers
        )
        with opener.open(asked) as answer:
            return json.load(answer)

    def ids(text: str) -> list[int]:
        return list(post("/tokenize", {"content": text, "add_special": True})["tokens"])

    (*_, letter) = post("/tokenize", {"content": "a"})["tokens"]

    def top_after(before: list[int]) -> dict[int, float]:
        # Of a token that ends within a character llama.cpp keeps the figures back: whatever it
        # would choose, it is made to choose a letter. The figures are those before the bias.
        body = {"prompt": before, "n_predict": 1, "n_probs": request["top"], "temperature": 0}
        got = post("/completion", {**body, "logit_bias": [[letter, 1e6]]})
        top = got["completion_probabilities"][0]["top_logprobs"]
        return {each["id"]: each["logprob"] for each in top}

    answers = []
    for prompt in request["prompts"]:
        body = {"prompt": prompt, "n_predict": request["tokens"], "temperature": 0}
        got = post("/completion", {**body, "return_tokens": True})
        chosen = got["tokens"]
        places = range(len(prompt), len(prompt) + len(chosen)) if request["top"] else ()
        top = [top_after([*prompt, *chosen][:end]) for end in places]
        answers.append({"tokens": chosen, "stopped": got["stop_type"] == "eos", "top": top})
    rendered = [
        post("/apply-template", {"messages": messages})["prompt"]
        for messages in request["conversations"]
    ]
    texts = {"texts": request["texts"], "conversations": rendered}
    return {"answers": answers, **{key: list(map(ids, of)) for key, of in texts.items()}}


if __name__ == "__main__":
    result = os.dup(1)
    os.dup2(2, 1)  # whatever llama.cpp prints
    answer = json.dumps(_answer(json.load(sys.stdin)))
    with os.fdopen(result, "w") as out:
        out.write(answer)
