"""`lora-kit serve` with 500 clients at once, slow clients and malicious requests.

    python scripts/drills/server.py                 # five minutes on two cores
    python scripts/drills/server.py --clients 100

A base and an adapter, both nano, are served. First, rounds of as many clients at once as --clients,
each of which must get the answer that it gets alone; the resident memory after the last round is
compared with that after the first. Then malicious requests: each must get a response within 5 s,
and an ordinary request after it its usual answer. Last, clients that send their request a byte at a
time.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20
PROMPTS = ["The function returns a list of", "import os", "for name in", "Return the", "class A"]
TOKENS = 8
SERVE = "from lora_kit.cli import main; main()"
CHAT, TEXT = "/chat/completions", "/completions"
TURN = {"role": "user", "content": "a"}
SCHEMA = {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}


def nested(levels: int) -> Any:
    value: Any = {"type": "string"}
    for _ in range(levels):
        value = {"type": "array", "items": value}
    return value


def form(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}


HARMFUL: list[tuple[str, str, dict[str, Any]]] = [
    ("many prompts", TEXT, {"prompt": ["a"] * 100_000}),
    ("many prompts of tokens", TEXT, {"prompt": [[1]] * 100_000}),
    ("tokens that are not there", TEXT, {"prompt": [10**9, -5, 2**40]}),
    ("a long prompt", TEXT, {"prompt": "a " * 900_000}),
    ("a word of a megabyte", TEXT, {"prompt": "a" * 1_900_000}),
    ("prompts of other types", TEXT, {"prompt": {"a": 1}}),
    ("endless tokens", TEXT, {"prompt": "a", "max_tokens": -1, "ignore_eos": True}),
    ("10^9 tokens", TEXT, {"prompt": "a", "max_tokens": 10**9, "n_predict": 10**9}),
    ("10^6 answers", TEXT, {"prompt": "a", "n": 10**6}),
    ("10^9 log-probabilities", TEXT, {"prompt": "a", "logprobs": 10**9, "n_probs": 10**9}),
    ("many stops", TEXT, {"prompt": "a", "stop": [f"s{n}" for n in range(100_000)]}),
    ("an empty stop", TEXT, {"prompt": "a", "stop": ["", ""]}),
    ("many biases", TEXT, {"prompt": "a", "logit_bias": {str(n): 1 for n in range(100_000)}}),
    ("a bias of a token that is not there", TEXT, {"prompt": "a", "logit_bias": [[10**9, 5.0]]}),
    ("temperature", TEXT, {"prompt": "a", "temperature": -1e308, "top_p": float("1e400")}),
    ("top_k", TEXT, {"prompt": "a", "top_k": -(2**31), "min_keep": 10**9}),
    ("repeat", TEXT, {"prompt": "a", "repeat_last_n": 2**31 - 1, "repeat_penalty": 0.0}),
    ("dry", TEXT, {"prompt": "a", "dry_multiplier": 1.0, "dry_penalty_last_n": 2**31 - 1,
                   "dry_sequence_breakers": ["a" * 10_000] * 50}),
    ("mirostat", TEXT, {"prompt": "a", "mirostat": 2, "mirostat_tau": -1e30, "mirostat_eta": 1e30}),
    ("samplers", TEXT, {"prompt": "a", "samplers": ["a"] * 10_000}),
    ("a slot", TEXT, {"prompt": "a", "id_slot": 10**6}),
    ("n_keep", TEXT, {"prompt": "a", "n_keep": -(2**31), "n_discard": 2**31 - 1}),
    ("adapters", TEXT, {"prompt": "a", "lora": [{"id": 99, "scale": 1e30}]}),
    ("numbers of other types", TEXT, {"prompt": "a", "max_tokens": "a", "stream": "b", "n": {}}),
    ("infill", TEXT, {"prompt": "a", "input_prefix": "a", "input_suffix": "b", "suffix": "c"}),
    ("a grammar", TEXT, {"prompt": "a", "grammar": "root ::= " + "(" * 100_000}),
    ("a schema of itself", CHAT, {"messages": [TURN], "response_format": form(SCHEMA)}),
    ("a nested schema", CHAT, {"messages": [TURN], "response_format": form(nested(300))}),
    ("a schema of a pattern", CHAT, {"messages": [TURN], "response_format": form(
        {"type": "string", "pattern": "^" + "(a{0,99}){0,99}" * 20 + "$"})}),
    ("a schema of many items", CHAT, {"messages": [TURN], "response_format": form(
        {"type": "array", "items": {"type": "string"}, "minItems": 10**6, "maxItems": 10**7})}),
    ("tools", CHAT, {"messages": [TURN], "tools": [{"type": "function", "function": {
        "name": "f", "parameters": nested(300)}}]}),
    ("a tool of a pattern", CHAT, {"messages": [TURN], "tools": [{"type": "function", "function": {
        "name": "f", "parameters": {"type": "object", "properties": {"a": {
            "type": "string", "pattern": "^(a{0,999}){0,999}$"}}}}}], "tool_choice": "required"}),
    ("many turns", CHAT, {"messages": [TURN] * 40_000}),
    ("no turns", CHAT, {"messages": []}),
    ("turns of other types", CHAT, {"messages": [1, None, {"role": []}]}),
    ("a picture of another server", CHAT, {"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/a"}}]}]}),
    ("a file", CHAT, {"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]}),
    ("a template", CHAT, {"messages": [TURN], "chat_template": "{{ 'x' * 999999999 }}",
                          "chat_template_kwargs": {"a": "b" * 100_000}}),
    ("thinking", CHAT, {"messages": [TURN], "reasoning_format": "a", "reasoning_budget": 10**9}),
    ("an answer to go on from", CHAT, {"messages": [TURN, {"role": "assistant", "content": ""}]}),
]  # fmt: skip


class Server:
    """`lora-kit serve`, in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "stderr"
        command = [sys.executable, "-c", SERVE, "serve", str(folder / "adapter"), "--port", "0"]
        self.process = subprocess.Popen(
            [*command, "--type", "f32"],
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
        )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().split(" ")[0]
        assert self.url.startswith("http"), self.log.read_text()

    @property
    def port(self) -> int:
        return int(re.findall(r":(\d+)/", self.url)[0])

    def mib(self, what: str = "VmRSS") -> float:
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(rf"{what}:\s+(\d+)", text)[0]) / 1024

    def ask(self, path: str, body: dict[str, Any], seconds: float = 600) -> tuple[int, Any]:
        """(status, answer); a status of 0: the connection was closed."""
        data = json.dumps({"model": "adapter", **body}).encode()
        try:
            request = urllib.request.Request(self.url + path, data)
            with urllib.request.urlopen(request, timeout=seconds) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode(errors="replace")
        except (OSError, ValueError) as error:
            return 0, repr(error)

    def text(self, prompt: str, model: str = "adapter") -> str:
        body = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "model": model}
        status, answer = self.ask(TEXT, body)
        return str(answer["choices"][0]["text"]) if status == 200 else f"{status} {answer}"


def make_adapter(folder: Path) -> None:
    """A loud adapter on nano."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from lora_kit import nano

    torch.manual_seed(1)
    settings = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(nano.MODEL), settings)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.03)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "nano"
    (folder / "adapter_config.json").write_text(json.dumps(config))


def crowd(server: Server, clients: int, rounds: int) -> bool:
    """Whether many at once are answered as one is, in memory that does not grow."""
    asked = [(p, m) for p in PROMPTS for m in ("adapter", "base")]
    alone = {one: server.text(*one) for one in asked}
    assert len(set(alone.values())) > len(PROMPTS), alone
    sizes = []
    wrong = 0
    for number in range(rounds):
        start = time.monotonic()
        barrier = threading.Barrier(clients)

        def one(index: int, barrier: threading.Barrier = barrier) -> bool:
            barrier.wait()
            return server.text(*asked[index % len(asked)]) == alone[asked[index % len(asked)]]

        with ThreadPoolExecutor(clients) as pool:
            right = list(pool.map(one, range(clients)))
        wrong += right.count(False)
        sizes.append(server.mib())
        print(
            f"round {number}: {right.count(True)} of {clients} right in "
            f"{time.monotonic() - start:.1f} s; {sizes[-1]:,.0f} MiB resident "
            f"(peak {server.mib('VmHWM'):,.0f})",
            flush=True,
        )
    return not wrong and sizes[-1] - sizes[0] < 30


def harm(server: Server) -> list[str]:
    """What went wrong with the harmful requests."""
    bad: list[str] = []
    good = server.text(PROMPTS[0])
    for name, path, body in HARMFUL:
        before, start = server.mib("VmHWM"), time.monotonic()
        more = {} if "max_tokens" in body else {"max_tokens": TOKENS}
        status, answer = server.ask(path, {**more, **body}, seconds=120)
        seconds = time.monotonic() - start
        state = []
        if server.process.poll() is not None:
            print(f"{name}: the server ended: {server.process.returncode}", flush=True)
            return [*bad, f"{name}: the server ended with {server.process.returncode}"]
        grown = server.mib("VmHWM") - before
        state += [f"{seconds:.1f} s"] if seconds > 5 and status != 200 else []
        state += [f"{grown:,.0f} MiB"] if grown > 500 else []
        state += ["other answers after it"] if server.text(PROMPTS[0]) != good else []
        bad += [f"{name}: {', '.join(state)}"] if state else []
        what = " ".join(str(answer).split())[:100]
        print(
            f"{', '.join(state) or 'ok':8} {name}: {status} in {seconds:.1f} s, "
            f"{grown:+,.0f} MiB: {what}",
            flush=True,
        )
    return bad


def slow(server: Server, clients: int = 200) -> bool:
    """Whether others are answered beside clients that send a byte now and then, which are ended."""
    head = b"POST /v1/completions HTTP/1.0\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{"
    started = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(clients)]
    for number, one in enumerate(started):
        one.sendall(head[: number % len(head) + 1])
    start = time.monotonic()
    good = server.text(PROMPTS[0])
    beside = time.monotonic() - start
    open_ones = set(started)
    while open_ones and time.monotonic() - start < 90:
        time.sleep(1)
        for one in list(open_ones):
            one.setblocking(False)
            try:
                one.sendall(b"a")
                while one.recv(1000):
                    pass
                open_ones.discard(one)
            except BlockingIOError:
                pass
            except OSError:
                open_ones.discard(one)
    print(
        f"slow clients: another is answered in {beside:.1f} s; all {clients} but {len(open_ones)} "
        f"were ended after {time.monotonic() - start:.0f} s",
        flush=True,
    )
    return not open_ones and not good.startswith("0 ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=4)
    asked = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        os.environ["LORA_KIT_CACHE"] = str(folder / "cache")
        make_adapter(folder / "adapter")
        server = Server(folder)
        try:
            right = crowd(server, asked.clients, asked.rounds)
            patient = slow(server)
            bad = harm(server)
            server.process.send_signal(signal.SIGTERM)
            code = server.process.wait(60)
        finally:
            server.process.kill()
        log = server.log.read_text()
    print(f"crowd {'right' if right else 'WRONG'}, slow clients {'ended' if patient else 'NOT'}")
    print(f"{len(HARMFUL)} harmful requests, {len(bad)} bad; exit {code}; stderr: {log[-300:]}")
    raise SystemExit(not right or not patient or bool(bad) or "Traceback" in log)


if __name__ == "__main__":
    main()
