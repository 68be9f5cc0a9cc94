"""llama.cpp through `xllamacpp`: the token ids and log-probabilities of a GGUF.

llama.cpp logs to standard error, and aborts its process on what it does not support: `run` starts a
fresh process, and turns an abort into an error of one line.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict, cast

from lora_kit.errors import CheckFailed, UserError
from lora_kit.schema import Json
from lora_kit.trust import run_module

if TYPE_CHECKING:
    from xllamacpp import Server

# The metadata key by which a GGUF that lora_kit wrote is recognised.
WRITTEN_BY = "lora_kit.version"
# The model's name in llama.cpp's responses, which `serve` replaces.
ALIAS = "@lora-kit@"
# The largest models on a slow CPU take minutes.
_SECONDS_TO_ANSWER = 3600


class Generated(TypedDict):
    """A greedy continuation of a prompt: token ids without the end token; whether it `stopped` at
    an end token; {token id: log-probability} of the likeliest tokens at each step."""

    tokens: list[int]
    stopped: bool
    top: list[dict[str, float]]


class Consumed(TypedDict):
    """What a program makes of an export: a continuation of each prompt, the token ids of each text
    and of each conversation; `ends`: the end tokens that it knows, where it reports them."""

    answers: list[Generated]
    texts: list[list[int]]
    conversations: list[list[int]]
    ends: NotRequired[list[int]]


def need_llama_cpp() -> None:
    """Raises UserError if the extra is not installed."""
    if missing := [m for m in ("gguf", "xllamacpp") if importlib.util.find_spec(m) is None]:
        raise UserError(f"{' and '.join(missing)} missing: pip install 'lora-kit[llamacpp]'")


def need_ours(file: Path) -> None:
    """Raises UserError unless lora_kit wrote the GGUF: llama.cpp does not validate headers."""
    from gguf import GGUFReader

    try:
        ours = GGUFReader(file).get_field(WRITTEN_BY) is not None
    except Exception:  # missing, or any error of numpy on a damaged header
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
) -> Consumed:
    """Run llama.cpp on a GGUF that lora_kit wrote, in a fresh process, with the key-value cache in
    float32.

    Args:
        adapters: adapter GGUFs to apply.
        prompts: token ids; each is continued greedily by at most `tokens` tokens.
        top: the number of log-probabilities per generated token.
        texts: texts to tokenize as a prompt: with the BOS token if the model adds one.
        conversations: messages to render with the GGUF's chat template, with the generation prompt,
            and to tokenize.

    Raises:
        UserError: the extra is missing, or lora_kit did not write a file.
        CheckFailed: llama.cpp does not load it, or crashed.
    """
    need_llama_cpp()
    for file in (model, *adapters):
        need_ours(file)
    request = {
        "model": str(model),
        "adapters": [str(file) for file in adapters],
        "prompts": prompts,
        "tokens": tokens,
        "top": top,
        "texts": texts,
        "conversations": conversations,
    }
    answer = ask("lora_kit.ship.llama_cpp", request, f"{model}: llama.cpp")
    return cast(Consumed, answer)


def ask(module: str, request: Mapping[str, object], who: str) -> Json:
    """Send a request to a module in a fresh process (see `answer_with`); returns its JSON object.

    Raises:
        CheckFailed: it crashed, or takes too long.
    """
    asked = json.dumps(request).encode()
    try:
        child = subprocess.run(
            run_module(module), input=asked, capture_output=True, timeout=_SECONDS_TO_ANSWER
        )
    except subprocess.TimeoutExpired:
        raise CheckFailed(f"{who} gave no answer for {_SECONDS_TO_ANSWER:,} s") from None
    if child.returncode:
        lines = child.stderr.decode(errors="replace").strip().splitlines() or ["no error message"]
        # llama.cpp prints a backtrace after an assertion; of Python's the last line has the error.
        why = next((line for line in lines if "GGML_ASSERT" in line or " E " in line), lines[-1])
        raise CheckFailed(f"{who} ended ({child.returncode}): {why[:240]}")
    return dict(json.loads(child.stdout))


def answer_with(make: Callable[[Json], Mapping[str, object]]) -> None:
    """The other end of `ask`, in the fresh process."""
    result = os.dup(1)
    os.dup2(2, 1)  # libraries may print to stdout
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
) -> Server:
    """A llama.cpp server at an IP address or unix socket, which runs as long as the object exists.

    Args:
        context: tokens per conversation; `slots` conversations are held at the same time.
        exact: compute in float32, on the CPU, and never with a smaller context.

    Raises:
        CheckFailed: llama.cpp does not start.
    """
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.model_alias, params.hostnames = str(model), {ALIAS}, [address]
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(file), 1.0) for file in adapters]
    params.port, params.n_parallel, params.n_ctx = 0, slots, slots * context
    # The prompt cache is looked up by tokens, without the adapter: one answer in a hundred came
    # from another adapter's keys and values (llama.cpp b11549).
    params.cache_ram_mib = 0
    threads = int(os.environ.get("OMP_NUM_THREADS") or -1)  # as torch reads it
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


def _answer(request: Json) -> Consumed:
    """`run`, within the fresh process."""
    # llama.cpp allocates the whole context: no more than needed.
    longest = max(map(len, request["prompts"]), default=0)
    context = longest + request["tokens"] + 32
    server = open_server(request["model"], request["adapters"], "127.0.0.1", context)
    # Loopback: no proxy of the environment.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    # Any: llama.cpp's responses.
    def post(path: str, body: Mapping[str, object]) -> Any:
        headers = {"Content-Type": "application/json"}
        asked = urllib.request.Request(
            server.listening_address + path, json.dumps(body).encode(), headers
        )
        with opener.open(asked) as answer:
            return json.load(answer)

    def ids(text: str) -> list[int]:
        return list(post("/tokenize", {"content": text, "add_special": True})["tokens"])

    (*_, letter) = post("/tokenize", {"content": "a"})["tokens"]  # a space may precede it

    def top_after(before: list[int]) -> dict[str, float]:
        # llama.cpp withholds log-probabilities for a token that ends within a character: a bias
        # makes it choose a letter. The log-probabilities are those before the bias.
        body = {"prompt": before, "n_predict": 1, "n_probs": request["top"], "temperature": 0}
        got = post("/completion", {**body, "logit_bias": [[letter, 1e6]]})
        top = got["completion_probabilities"][0]["top_logprobs"]
        return {str(each["id"]): each["logprob"] for each in top}

    answers: list[Generated] = []
    for prompt in request["prompts"]:
        body = {"prompt": prompt, "n_predict": request["tokens"], "temperature": 0}
        got = post("/completion", {**body, "return_tokens": True})
        chosen = got["tokens"]
        places = range(len(prompt), len(prompt) + len(chosen)) if request["top"] else ()
        top = [top_after([*prompt, *chosen][:end]) for end in places]
        answers.append({"tokens": chosen, "stopped": got["stop_type"] == "eos", "top": top})
    turns = [post("/apply-template", {"messages": each}) for each in request["conversations"]]
    return Consumed(
        answers=answers,
        texts=[ids(text) for text in request["texts"]],
        conversations=[ids(rendered["prompt"]) for rendered in turns],
    )


if __name__ == "__main__":
    answer_with(_answer)
