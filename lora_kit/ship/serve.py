"""A base and its adapters behind one OpenAI-compatible address, on llama.cpp.

llama.cpp's own HTTP server does the work, each request naming the adapter's scale. It listens on a
unix socket in a folder that only this user can enter. Before it stands a small server of ours that
knows what llama.cpp does not: names for the adapters, who may ask, and when a client has left.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import json
import os
import select
import shlex
import socket
import socketserver
import sys
import threading
from collections.abc import Sequence
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
from lora_kit.ship.gguf import Kind, needs_untied, open_source, write_adapter, write_model
from lora_kit.ship.llama_cpp import ALIAS, need_llama_cpp, open_server
from lora_kit.tasks.encode import identity
from lora_kit.train.interrupt import StopSignal

SLOTS = 4  # answers that are made at the same time; others wait
CONTEXT = 4096  # tokens of one conversation, if the base was made for as many
LARGEST_BODY = 2 * 2**20  # bytes of a request
# Of llama.cpp alone: its parser of grammars can be led to end the process (b11549).
_ENGINES_OWN = {"grammar", "grammar_lazy", "grammar_triggers", "json_schema", "preserved_tokens"}
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
_FORMAT = 1  # raised whenever the same base is written as another GGUF than before


def serve(
    runs: Sequence[FinishedRun],
    host: str = "127.0.0.1",
    port: int = 8080,
    *,
    kind: Kind = "f16",
    context: int = CONTEXT,
    public: bool = False,
) -> None:
    """Serve until SIGINT or SIGTERM.

    The base is written as GGUF once and kept in the cache; adapters, which are small, are written
    to a temporary folder at each start. Who asks before all is loaded, waits.

    Args:
        runs: of one base.
        port: 0 takes a free one.
        context: tokens of one conversation; never more than the base was made for.
        public: allow an address that others can reach.

    Raises:
        UserError: a run is not usable or of another base, llama.cpp cannot compute its adapter, or
            the address is public or taken; nothing is left of what was written.
        CheckFailed: llama.cpp does not start.
        Interrupted: by the signal, which is how a server ends.
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
        base = prepared(key, build)
        front.engine, front.chats = str(temporary / "llama.sock"), bool(tokenizer.chat_template)
        exact, verbosity = kind == "f32", 3 if os.environ.get("LORA_KIT_DEBUG") else -1
        # At neither verbosity it logs what is said.
        engine = (front.engine, context, SLOTS, exact, verbosity)
        llama = [open_server(base / "base.gguf", files, *engine)]
        stack.callback(llama.clear)  # its threads end with the object, if no answer is waited for
        stack.callback(front.hang_up)
        # A signal is raised in the main thread: it waits there, and is within nothing. It looks up
        # now and then, because the kernel may hand the signal to another thread.
        answering = threading.Thread(target=front.serve_forever, daemon=True)
        answering.start()
        stack.callback(front.shutdown)
        print(_welcome(front, runs[0]), flush=True)
        while answering.is_alive():
            answering.join(0.2)
        raise CheckFailed("the server ended by itself: start it again")


def adapters_by_name(runs: Sequence[FinishedRun]) -> dict[str, Adapter | None]:
    """{name: adapter}; the names of the base have None.

    Raises:
        UserError: the runs do not share a base and a tokenizer, or a name is taken; all of it, a
            line each.
    """
    for run in runs:
        run.require_language_model("serve")
    first, pinned = runs[0], runs[0].pinned
    # Of a folder its name, not the way there.
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
    """The address, a line to try it with, and how others serve the same."""
    host, port = front.socket.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    adapters = {name: adapter for name, adapter in front.models.items() if adapter}
    name, first = next(iter(adapters.items()))
    turns = [{"role": "user", "content": "Who are you?"}]
    asked = {"messages": turns} if front.chats else {"prompt": "Once upon a time"}
    body = json.dumps({"model": name, **asked, "max_tokens": 64, "temperature": 0})
    curl = ["curl", url + (CHAT if front.chats else TEXT), "-d", body]
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
            f"The same with vLLM ({check} says what it takes):",
            f"  {shlex.join(['vllm', 'serve', *base, *words, *loras])}",
            "With transformers, one merged model at a time (pip install 'transformers[serving]'):",
            f"  {merge} && transformers serve merged",
        ]
    )


class _Front(socketserver.ThreadingTCPServer):
    """The address that clients know.

    `engine`: llama.cpp's socket; `calls`: the connections to it.
    """

    daemon_threads = allow_reuse_address = True
    request_queue_size = 64
    engine, chats = "", True
    models: dict[str, Adapter | None]

    def __init__(self, host: str, port: int, public: bool) -> None:
        self.public, self.calls = public, set[socket.socket]()
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            others = [a[4][0] for a in found if not _is_loopback(str(a[4][0]))]
            if others and not public:
                raise UserError(
                    f"--host {host}: others can reach {others[0]}, and use what is served there: "
                    "add --public if that is wanted, or leave --host out"
                )
            self.address_family = found[0][0]
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError, UnicodeError) as error:
            why = getattr(error, "strerror", None) or error
            raise UserError(f"{host} port {port}: {why}: name another with --port") from None

    def hang_up(self) -> None:
        """Give up the answers that are being made."""
        self.engine = ""
        for call in self.calls.copy():
            with contextlib.suppress(OSError):
                call.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that left is none; of ours, one line without what was asked."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            print(f"a request failed: {type(error).__name__}", file=sys.stderr, flush=True)


class _Handler(BaseHTTPRequestHandler):
    """One request, whose connection ends with its answer: HTTP/1.0."""

    server_version, sys_version = "lora-kit", ""
    timeout = 60  # seconds; a client that sends or takes nothing for so long is left
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
        path, models = urlsplit(self.path).path, self.server.models
        length = self.headers["Content-Length"] or ""
        if not self._may_ask():
            return
        if path not in (CHAT, TEXT):
            return self.send_error(404, f"{path} is not served here, but {CHAT} and {TEXT}")
        if not length.isdecimal() or len(length) > 9 or int(length) > LARGEST_BODY:
            return self.send_error(413, f"a body of a stated length, {LARGEST_BODY:,} at most")
        try:
            request = json.loads(self.rfile.read(int(length)))
            name = str(request["model"])
        except (ValueError, TypeError, KeyError, RecursionError):
            return self.send_error(400, "the body must be a JSON object with `model`")
        if name not in models:
            known = f"model {name[:80]!r} is not served: one of {', '.join(models)}"
            return self.send_error(404, known, "model_not_found")
        if path == CHAT and not self.server.chats:
            return self.send_error(400, f"the base has no chat template: use {TEXT}")
        if named := _ENGINES_OWN & request.keys():
            return self.send_error(400, f"{', '.join(sorted(named))}: not of OpenAI's interface")
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
            if call.fileno() in ready or self.connection.recv(1, socket.MSG_PEEK):
                self._pass_on(engine.getresponse(), name)
        finally:
            engine.close()  # llama.cpp leaves an answer that nobody waits for
            self.server.calls.discard(call)

    def _pass_on(self, answer: http.client.HTTPResponse, name: str) -> None:
        self._begin(answer.status, answer.headers["Content-Type"])
        ours, alias = (f'"model":{json.dumps(n)}'.encode() for n in (name, ALIAS))
        while line := answer.readline():
            self.wfile.write(line.replace(alias, ours))

    def _may_ask(self) -> bool:
        """A page of another site must not reach it through the user's browser: neither by a name
        that was made to point here (DNS rebinding), nor across origins."""
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

    def _say(self, status: int, value: dict[str, Any]) -> None:
        self._begin(status)
        self.wfile.write(json.dumps(value).encode())

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """In OpenAI's shape; `explain` is its code. The library calls it as well."""
        error = {"message": message, "type": "invalid_request_error", "code": explain}
        self._say(code, {"error": {**error, "param": None}})

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is logged: what is asked is the client's business."""


def _is_loopback(host: str | None) -> bool:
    with contextlib.suppress(ValueError):
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    return False
