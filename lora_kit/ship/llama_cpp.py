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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lora_kit.errors import CheckFailed, UserError
from lora_kit.trust import run_module

# Every file of ours says who wrote it.
WRITTEN_BY = "lora_kit.version"
# The model's name in llama.cpp's answers. No text of theirs holds this: quotes are escaped.
ALIAS = "@lora-kit@"
# The largest models on a slow CPU take minutes.
_SECONDS_TO_ANSWER = 3600


def need_llama_cpp() -> None:
    """Raises UserError if the extra is not installed."""
    if missing := [m for m in ("gguf", "xllamacpp") if importlib.util.find_spec(m) is None]:
        raise UserError(f"{' and '.join(missing)} missing: pip install 'lora-kit[llamacpp]'")


def need_ours(file: Path) -> None:
    """Raises UserError unless this toolkit wrote the GGUF: llama.cpp trusts what a header says."""
    from gguf import GGUFReader

    try:
        ours = GGUFReader(file).get_field(WRITTEN_BY) is not None
    except Exception:  # it is missing, or whatever a damaged header leads numpy into
        ours = False
    if not ours:
        raise UserError(
            f"{file}: no GGUF that lora-kit wrote: only those are read; make one with "
            "lora-kit export RUN --to gguf --out FOLDER"
        )


def run(
    model: Path,
    adapters: Sequence[Path] = (),
    *,
    prompts: Sequence[Sequence[int]] = (),
    tokens: int = 1,
    top: int = 0,
    texts: Sequence[str] = (),
    conversations: Sequence[Sequence[dict[str, str]]] = (),
) -> dict[str, Any]:
    """What llama.cpp makes of a GGUF of ours, in a fresh process, keys and values in float32.

    Args:
        adapters: adapter GGUFs that are put on it.
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
    for file in (model, *adapters):
        need_ours(file)
    request: dict[str, Any] = {"model": model, "adapters": adapters, "prompts": prompts}
    request |= {"tokens": tokens, "top": top, "texts": texts, "conversations": conversations}
    return ask("lora_kit.ship.llama_cpp", request, f"{model}: llama.cpp")


def ask(module: str, request: dict[str, Any], who: str) -> dict[str, Any]:
    """The JSON object that a module answers in a fresh process. Raises CheckFailed if it ends
    otherwise, or not at all."""
    asked = json.dumps(request, default=str).encode()
    try:
        child = subprocess.run(
            run_module(module), input=asked, capture_output=True, timeout=_SECONDS_TO_ANSWER
        )
    except subprocess.TimeoutExpired:
        raise CheckFailed(f"{who} gave no answer for {_SECONDS_TO_ANSWER:,} s") from None
    if child.returncode:
        lines = child.stderr.decode(errors="replace").strip().splitlines() or ["no error message"]
        # Below an assertion stands where it was; of Python's own traceback the last line counts.
        why = next((line for line in lines if "GGML_ASSERT" in line or " E " in line), lines[-1])
        raise CheckFailed(f"{who} ended ({child.returncode}): {why[:240]}")
    return dict(json.loads(child.stdout))


def answer_with(make: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The other end of `ask`, in the fresh process."""
    result = os.dup(1)
    os.dup2(2, 1)  # whatever the libraries print
    answer = json.dumps(make(json.load(sys.stdin)))
    with os.fdopen(result, "w") as out:
        out.write(answer)


def open_server(
    model: Path,
    adapters: Sequence[Path],
    address: str,
    context: int,
    slots: int = 1,
    exact: bool = True,
    verbosity: int = 1,  # errors only
) -> Any:
    """An `xllamacpp.Server`, which lives as long as the object, at an IP address or unix socket.

    Args:
        context: tokens of one conversation, of which `slots` are held at the same time.
        exact: compute in float32, on the CPU, and with this context or not at all.

    Raises:
        CheckFailed: llama.cpp does not start.
    """
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.model_alias, params.hostnames = str(model), {ALIAS}, [address]
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(file), 1.0) for file in adapters]
    params.port, params.n_parallel, params.n_ctx = 0, slots, slots * context
    # What it keeps of prompts beyond its slots it finds again by their tokens, whatever the adapter
    # was: one answer in a hundred came from another adapter's keys and values (llama.cpp b11549).
    params.cache_ram_mib = 0
    threads = int(os.environ.get("OMP_NUM_THREADS") or -1)  # as torch takes it
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.ui = params.endpoint_slots = False
    params.verbosity = verbosity
    if exact:
        params.n_gpu_layers = 0
        params.fit_params = params.warmup = False
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    try:
        return xllamacpp.Server(params)
    except (RuntimeError, ValueError):
        raise CheckFailed(f"{model}: llama.cpp does not start with it: --debug shows why") from None


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    """`run`, within the fresh process."""
    # All of it is taken at once: no more than is asked for.
    longest = max(map(len, request["prompts"]), default=0)
    context = longest + request["tokens"] + 32
    server = open_server(request["model"], request["adapters"], "127.0.0.1", context)
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
    texts = [ids(text) for text in request["texts"]]
    turns = [post("/apply-template", {"messages": each}) for each in request["conversations"]]
    conversations = [ids(rendered["prompt"]) for rendered in turns]
    return {"answers": answers, "texts": texts, "conversations": conversations}


if __name__ == "__main__":
    answer_with(_answer)
