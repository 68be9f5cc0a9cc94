"""A base and its adapters as one OpenAI-compatible API, on llama.cpp.

llama.cpp's own HTTP server generates; each request sets the scale of the adapters. It listens on a
unix socket in a folder that only this user can enter. A small server in front of it does what
llama.cpp does not: names for the adapters, protection from other sites' requests, and cancelling an
answer when its client disconnects.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import json
import math
import os
import select
import shlex
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

from lora_kit.adapter.files import Adapter
from lora_kit.adapter.finished import FinishedRun
from lora_kit.adapter.loaders import vllm_rank
from lora_kit.base.load import quiet_libraries
from lora_kit.cache import key_of, prepared
from lora_kit.errors import CheckFailed, UserError
from lora_kit.prove.into import cost_of_original
from lora_kit.schema import Json
from lora_kit.ship.gguf import Kind, needs_untied, open_source, write_adapter, write_model
from lora_kit.ship.llama_cpp import ALIAS, need_llama_cpp, open_server
from lora_kit.tasks.encode import identity
from lora_kit.train.interrupt import StopSignal

SLOTS = 4  # concurrent requests; others wait
CONTEXT = 4096  # tokens per conversation; at most the base's context length
LARGEST_BODY = 2 * 2**20  # bytes of a request
# fmt: off
# Fields that llama.cpp follows, of OpenAI's interface and of its own sampling; not among them tools
# and response_format, which become grammars, whose parser can be made to crash (b11549).
_FOLLOWED = {
    "model", "messages", "prompt", "max_tokens", "max_completion_tokens", "temperature", "top_p",
    "stop", "seed", "presence_penalty", "frequency_penalty", "logit_bias", "logprobs",
    "top_logprobs", "stream", "stream_options", "n",
    "top_k", "min_p", "typical_p", "repeat_penalty", "repeat_last_n", "ignore_eos",
}
# Fields that change no answer ...
_WITHOUT_EFFECT = {
    "user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key",
    "parallel_tool_calls",
}
# fmt: on
# ... and values that ask for what is done anyway, besides null, false and empty ones.
_AS_IT_IS: dict[str, tuple[object, ...]] = {
    "best_of": (1,),
    "tool_choice": ("none", "auto"),  # without tools
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
MOST_CLIENTS = 768  # connections: two more files for each of those in llama.cpp, of usually 1,024
_LARGEST_BODIES = 2**28  # bytes of all requests together
_SECONDS_TO_ASK = 30.0  # for the whole request
# Entries of a list or object of a request; llama.cpp starts a task for each prompt, and looks up
# each token in the biases.
_MOST_ENTRIES, _MOST_OF = 1024, {"prompt": 64, "messages": 4096}
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
_FORMAT = 1  # increased whenever the same base gives another GGUF


def serve(
    runs: Sequence[FinishedRun],
    host: str = "127.0.0.1",
    port: int = 8080,
    *,
    kind: Kind = "f16",
    context: int = CONTEXT,
    public: bool = False,
) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP.

    The base is written as GGUF once and cached; adapters, which are small, are written to a
    temporary folder at each start. Requests wait until everything is loaded.

    Args:
        runs: of one base.
        port: 0: any free one.
        context: tokens per conversation; at most the base's context length.
        public: allow an address that other machines can reach.

    Raises:
        UserError: a run is not usable or of another base, llama.cpp does not support its adapter,
            or the address is public or in use; nothing that was written is left.
        CheckFailed: llama.cpp does not start.
        Interrupted: by the signal, the normal end.
    """
    need_llama_cpp()
    quiet_libraries()
    with StopSignal().listening(), contextlib.ExitStack() as stack:
        front = stack.enter_context(_Front(host, port, public))
        front.models = adapters_by_name(runs)
        pinned, tokenizer = runs[0].pinned, runs[0].processor
        adapters = [adapter for adapter in front.models.values() if adapter]
        folder = Path(pinned.folder)
        temporary = Path(stack.enter_context(TemporaryDirectory(prefix="lora_kit-serve-")))
        files = [temporary / f"{n}.gguf" for n in range(len(adapters))]
        for adapter, file in zip(adapters, files, strict=True):
            write_adapter(adapter, folder, file)
        source = open_source(folder)
        untie = any(needs_untied(adapter, source) for adapter in adapters)

        def build(out: Path) -> None:
            print(f"{pinned.model}: written as {kind} GGUF, once", file=sys.stderr, flush=True)
            write_model(folder, out / "base.gguf", kind, untie=untie, tokenizer=tokenizer)

        key = key_of("gguf", _FORMAT, kind, untie, pinned.hashes, identity(tokenizer))
        base = prepared(key, build) / "base.gguf"
        front.engine = str(temporary / "llama.sock")
        if len(os.fsencode(front.engine)) > 100:  # the path of a Unix socket has at most 107 bytes
            front.engine = stack.enter_context(TemporaryDirectory(dir="/tmp")) + "/llama.sock"
        front.template = str(tokenizer.chat_template or "")
        # At neither verbosity does it log prompts or completions.
        verbosity = 3 if os.environ.get("LORA_KIT_DEBUG") else -1
        llama = [open_server(base, files, front.engine, context, SLOTS, kind == "f32", verbosity)]
        stack.callback(llama.clear)  # its threads end with the object, once no request is running
        stack.callback(front.hang_up)
        # Signals are handled in the main thread, which only waits here. It wakes up regularly,
        # since the kernel may deliver the signal to another thread.
        answering = threading.Thread(target=front.serve_forever, daemon=True)
        answering.start()
        stack.callback(front.shutdown)
        print(_welcome(front, runs[0]), flush=True)
        for cost in filter(None, map(cost_of_original, runs)):
            print(f"note: {cost}", file=sys.stderr, flush=True)
        while answering.is_alive():
            answering.join(0.2)
        raise CheckFailed("the server ended by itself: start it again")


def adapters_by_name(runs: Sequence[FinishedRun]) -> dict[str, Adapter | None]:
    """{name: adapter}; None for the names of the base.

    Raises:
        UserError: the runs do not share a base and a tokenizer, or a name occurs twice; one line
            per problem.
    """
    for run in runs:
        run.require_language_model("serve")
    first, pinned = runs[0], runs[0].pinned
    # The name of a local folder without its path.
    local = Path(pinned.model).is_dir()
    models: dict[str, Adapter | None] = {"base": None}
    models[Path(pinned.folder).name if local else pinned.model] = None
    problems = []
    for run in runs:
        name = run.run.name if run.run else run.name
        if (run.hashes or run.pinned.hashes) != pinned.hashes:
            both = f"on {run.base.model}, and {first.path} on {pinned.model}"
            problems.append(f"{run.path}: trained {both}, which are not the same: serve them apart")
        elif identity(run.processor) != identity(first.processor):
            why = f"has other tokens or another chat template than {first.path}"
            problems.append(f"{run.path}: {why}, and llama.cpp takes one: serve them apart")
        if name in models:
            problems.append(f"{run.path}: `{name}` is taken: rename the folder of its adapter")
        models[name] = run.adapter
    if problems:
        raise UserError("\n".join(problems))
    return models


def _welcome(front: _Front, run: FinishedRun) -> str:
    """The address, a command to try it, and the commands that serve the same with other servers."""
    host, port = front.socket.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    adapters = {name: adapter for name, adapter in front.models.items() if adapter}
    name, first = next(iter(adapters.items()))
    turns = [{"role": "user", "content": "Who are you?"}]
    asked = {"messages": turns} if front.template else {"prompt": "Once upon a time"}
    body = json.dumps({"model": name, **asked, "max_tokens": 64, "temperature": 0})
    curl = ["curl", url + (CHAT if front.template else TEXT), "-d", body]
    pinned = run.pinned
    base = [pinned.model, "--revision", pinned.revision] if pinned.revision else [pinned.folder]
    template = first.folder / "chat_template.jinja"
    words = ["--chat-template", str(template)] if template.is_file() else []
    modules = [f"{name}={adapter.folder}" for name, adapter in adapters.items()]
    rank = max(a.rank_and_scale(module)[0] for a in adapters.values() for module in a.factors)
    loras = ["--enable-lora", "--lora-modules", *modules, "--max-lora-rank", str(vllm_rank(rank))]
    merge = shlex.join(["lora-kit", "merge", run.path, "--out", "merged"])
    check = shlex.join(["lora-kit", "check", run.path, "--target", "vllm"])
    return "\n".join(
        [
            f"{url}/v1 serves {', '.join(front.models)}; Ctrl-C stops it. Try:",
            f"  {shlex.join(curl)}",
            f"The same with vLLM ({check} shows what it supports):",
            f"  {shlex.join(['vllm', 'serve', *base, *words, *loras])}",
            "With transformers, one merged model at a time (pip install 'transformers[serving]'):",
            f"  {merge} && transformers serve merged",
        ]
    )


class _Front(socketserver.ThreadingTCPServer):
    """The server for clients.

    Attributes:
        models: {name: adapter}; see `adapters_by_name`.
        engine: path of llama.cpp's socket.
        template: the base's chat template; empty: it has none.
        calls: the open connections to llama.cpp.
        clients: {connection: its start; infinite once its request was read}.
        bodies: {connection: bytes of its request}.
        turns: to ask llama.cpp, whose threads for connections are few.
    """

    daemon_threads = allow_reuse_address = True
    request_queue_size = 1024
    engine, template = "", ""
    models: dict[str, Adapter | None]

    def __init__(self, host: str, port: int, public: bool) -> None:
        self.public, self.calls = public, set[socket.socket]()
        self.clients: dict[socket.socket, float] = {}
        self.bodies: dict[socket.socket, int] = {}
        self.turns = threading.Semaphore(SLOTS + 2)
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            others = [a[4][0] for a in found if not _is_loopback(str(a[4][0]))]
            if others and not public:
                raise UserError(
                    f"--host {host}: others can reach {others[0]}, and use what is served there: "
                    "add --public if that is wanted, or remove --host"
                )
            self.address_family = found[0][0]
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError, UnicodeError) as error:
            why = getattr(error, "strerror", None) or error
            raise UserError(f"{host} port {port}: {why}: name another with --port") from None

    def hang_up(self) -> None:
        """Cancel running requests, and let later ones fail."""
        self.engine = ""
        for call in self.calls.copy():
            with contextlib.suppress(OSError):
                call.shutdown(socket.SHUT_RDWR)

    def service_actions(self) -> None:
        """Twice a second: end requests that are sent too slowly."""
        for client, start in list(self.clients.items()):
            if time.monotonic() - start > _SECONDS_TO_ASK:
                with contextlib.suppress(OSError):
                    client.shutdown(socket.SHUT_RD)

    # Signatures of the standard library: Any is what it passes.
    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread, or hang up if there are too many."""
        if len(self.clients) >= MOST_CLIENTS:
            return self.shutdown_request(request)
        self.clients[request] = time.monotonic()
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.clients.pop(request, None)
        self.bodies.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore disconnected clients; report an error of ours in one line, without the prompt."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            print(f"a request failed: {type(error).__name__}", file=sys.stderr, flush=True)


class _Handler(BaseHTTPRequestHandler):
    """One request per connection: HTTP/1.0."""

    server_version, sys_version = "lora-kit", ""
    timeout = 60  # seconds without sending or receiving, after which a client is disconnected
    server: _Front

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if path == "/health":
            self._say(200, {"status": "ok"})
        elif path == "/v1/models":
            models = [{"id": n, "object": "model", "created": 0} for n in self.server.models]
            if self._may_ask():
                self._say(200, {"object": "list", "data": models})
        else:
            self.send_error(404, f"{path} is not served here")

    def do_POST(self) -> None:
        path = urlsplit(self.path).path
        length = self.headers["Content-Length"] or ""
        if not self._may_ask():
            return
        if path not in (CHAT, TEXT):
            return self.send_error(404, f"{path} is not served here, but {CHAT} and {TEXT}")
        if not length.isdecimal() or len(length) > 9 or int(length) > LARGEST_BODY:
            return self.send_error(413, f"a body of a stated length, {LARGEST_BODY:,} at most")
        self.server.bodies[self.connection] = int(length)
        if sum(list(self.server.bodies.values())) > _LARGEST_BODIES:
            return self.send_error(503, "too many large requests wait: try again later")
        body = self.rfile.read(int(length))
        self.server.clients[self.connection] = math.inf
        with self.server.turns:
            self._answer(path, body)

    def _answer(self, path: str, body: bytes) -> None:
        """Check a request, and pass it on to llama.cpp."""
        models = self.server.models
        try:
            request = json.loads(body)
            name = str(request["model"])
        except (ValueError, TypeError, KeyError, RecursionError):
            return self.send_error(400, "the body must be a JSON object with `model`")
        if name not in models:
            known = f"model {name[:80]!r} is not served: one of {', '.join(models)}"
            return self.send_error(404, known, "model_not_found")
        for key, value in request.items():
            most, tokens = _MOST_OF.get(key, _MOST_ENTRIES), 0
            if isinstance(value, list) and key == "prompt":
                tokens = sum(type(part) is int for part in value)
            if isinstance(value, (list, dict)) and len(value) - tokens > most:
                return self.send_error(400, f"{key:.40}: more than {most:,} entries")
        if path == CHAT and not self.server.template:
            return self.send_error(400, f"the base has no chat template: use {TEXT}")
        if ignored := _ignored(request, self.server.template):
            return self.send_error(400, f"{', '.join(ignored)}: not supported here: remove it")
        request = {name: value for name, value in request.items() if name in _FOLLOWED}
        adapters = enumerate(adapter for adapter in models.values() if adapter)
        request["lora"] = [{"id": n, "scale": float(a is models[name])} for n, a in adapters]
        engine, call = http.client.HTTPConnection("llama.cpp"), socket.socket(socket.AF_UNIX)
        self.server.calls.add(call)
        try:
            engine.sock = call
            call.connect(self.server.engine)
            engine.request("POST", path, json.dumps(request), {"Content-Type": "application/json"})
            waiting = select.poll()  # select() takes no socket over 1023
            for one in (call, self.connection):
                waiting.register(one, select.POLLIN)
            ready = [number for number, _ in waiting.poll()]
            # If only the client's socket is ready and has nothing to read, it has disconnected.
            if call.fileno() in ready or self.connection.recv(1, socket.MSG_PEEK):
                self._pass_on(engine.getresponse(), name)
        finally:
            engine.close()  # cancels it in llama.cpp
            self.server.calls.discard(call)

    def _pass_on(self, answer: http.client.HTTPResponse, name: str) -> None:
        """Send llama.cpp's response, line by line for streams, with the model's name in it."""
        self._begin(answer.status, answer.headers["Content-Type"])
        ours, alias = (f'"model":{json.dumps(n)}'.encode() for n in (name, ALIAS))
        while line := answer.readline():
            self.wfile.write(line.replace(alias, ours))

    def _may_ask(self) -> bool:
        """Whether the request is local. A page of another site must not reach the server through
        the user's browser: neither by a name that resolves to this address (DNS rebinding), nor as
        a cross-origin request."""
        asked = [f"//{self.headers['Host']}", self.headers["Origin"] or "//localhost"]
        with contextlib.suppress(ValueError):
            if self.server.public or all(_is_loopback(urlsplit(a).hostname) for a in asked):
                return True
        self.send_error(403, "it can only be asked as localhost (else: serve --public)")
        return False

    def _begin(self, status: int, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.end_headers()

    def _say(self, status: int, value: Mapping[str, object]) -> None:
        self._begin(status)
        self.wfile.write(json.dumps(value).encode())

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """An error in OpenAI's format; `explain` is its code. http.server calls this, too."""
        error = {"message": message, "type": "invalid_request_error", "code": explain}
        self._say(code, {"error": {**error, "param": None}})

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: prompts are private."""


def _ignored(request: Json, template: str) -> list[str]:
    """The fields of a request that change the answer elsewhere and would be ignored here."""
    found = []
    for name, value in request.items():
        empty = value is None or value is False or value in ("", [], {})
        known = name in _FOLLOWED or name in _WITHOUT_EFFECT or value in _AS_IT_IS.get(name, ())
        if not (known or empty) or (name == "stop" and not isinstance(value, str | list | None)):
            found.append(str(name)[:80])
    turns = request.get("messages")
    for n, turn in enumerate(turns if isinstance(turns, list) else []):
        for name, value in turn.items() if isinstance(turn, dict) else []:
            # Such as tool_calls; a template that shows them names them.
            if value and name not in ("role", "content", "name") and name not in template:
                found.append(f"messages[{n}].{name[:80]}")
            parts = value if name == "content" and isinstance(value, list) else []
            if any(isinstance(part, dict) and part.get("type") != "text" for part in parts):
                found.append(f"messages[{n}].content: only text")
    return sorted(found)


def _is_loopback(host: str | None) -> bool:
    with contextlib.suppress(ValueError):
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    return False
