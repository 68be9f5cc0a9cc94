"""A server that people start, asked by the client that people have, against transformers."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
from processes import LIMIT_S, LORA_KIT, as_in_a_terminal
from trained import edit
from typer.testing import CliRunner

import lora_kit
from lora_kit import nano
from lora_kit.adapter.finished import FinishedRun
from lora_kit.base.load import load_tokenizer
from lora_kit.base.pin import pin
from lora_kit.cli import app
from lora_kit.errors import UserError
from lora_kit.schema import Base
from lora_kit.ship.serve import serve

pytestmark = pytest.mark.slow

PROMPTS = ["The function returns a list of", "import os", "for name in", "Return the"]
TURNS: Any = [{"role": "user", "content": "What does `sorted` return?"}]
TOKENS = 24


@dataclass
class Served:
    process: subprocess.Popen[str]
    lines: list[str]  # of what it printed
    temporary: Path

    @property
    def url(self) -> str:
        return self.lines[0].split(" ")[0]

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=LIMIT_S)


def start(folder: Path, *arguments: str) -> Served:
    """`lora-kit serve` until it answers; its temporary files go to a folder of its own."""
    temporary = folder / "tmp"
    temporary.mkdir(exist_ok=True)
    process = subprocess.Popen(
        [*LORA_KIT, "serve", *arguments, "--port", "0", "--type", "f32"],
        stdout=subprocess.PIPE,
        stderr=(folder / "stderr").open("w"),
        text=True,
        env={**os.environ, "TMPDIR": str(temporary)},
        preexec_fn=as_in_a_terminal,
    )
    assert process.stdout is not None
    lines = [process.stdout.readline().rstrip() for _ in range(6)]
    assert lines[0].startswith("http://127.0.0.1:"), (folder / "stderr").read_text()
    return Served(process, lines, temporary)


def loud_adapter(folder: Path, seed: int = 1, **config: Any) -> Path:
    """An adapter on nano that no training made, as PEFT saves it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    settings = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **config)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(nano.MODEL), settings)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.03)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    edit(folder / "adapter_config.json", lambda c: c.update(base_model_name_or_path="nano"))
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where runs/trained, a run directory, and the adapter `scaled` lie, both on nano."""
    folder = tmp_path_factory.mktemp("serve")
    run, base = folder / "runs/trained", Base(model="nano", dtype="float32")
    loud_adapter(run / "adapter", seed=2)
    pinned = pin(base)
    load_tokenizer(pinned.folder).save_pretrained(run / "adapter")
    values = {"recipe": "sft", "name": "trained", "base": base.model_dump()}
    (run / "run.yaml").write_text(json.dumps({**values, "data": {"train": "rows.jsonl"}}))
    (run / "run.lock.json").write_text(json.dumps({"base": pinned.to_lock()}))
    # Its scale is not the one that llama.cpp computes.
    loud_adapter(folder / "scaled", use_rslora=True, alpha_pattern={"q_proj": 16})
    return folder


@pytest.fixture(scope="module")
def served(home: Path) -> Iterator[Served]:
    server = start(home, str(home / "runs/trained"), str(home / "scaled"))
    yield server
    server.process.kill()
    server.process.wait()


@pytest.fixture(scope="module")
def wanted(home: Path) -> dict[str, dict[str, str]]:
    """{model: {prompt: greedy continuation, "chat": the answer}}, from transformers and PEFT."""
    import torch

    model, tokenizer = lora_kit.load(home / "runs/trained", dtype="float32")
    model.load_adapter(str(home / "scaled"), "scaled")
    asked = {p: tokenizer(p, return_tensors="pt").input_ids for p in PROMPTS}
    asked["chat"] = tokenizer.apply_chat_template(
        TURNS, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).input_ids

    @torch.inference_mode()
    def answer(ids: Any) -> str:
        mask = torch.ones_like(ids)
        made = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=TOKENS
        )
        return str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))

    with model.disable_adapter():
        found = {"base": {what: answer(ids) for what, ids in asked.items()}}
    for name in ("default", "scaled"):
        model.set_adapter(name)
        found[name] = {what: answer(ids) for what, ids in asked.items()}
    found["trained"] = found.pop("default")
    return found


def complete(client: openai.OpenAI, model: str, prompt: str) -> Any:
    return client.completions.create(model=model, prompt=prompt, max_tokens=TOKENS, temperature=0)


def test_base_and_each_adapter_answer_as_in_transformers(
    served: Served, wanted: dict[str, dict[str, str]]
) -> None:
    client, longest = served.client, 0
    assert [m.id for m in client.models.list()] == ["base", "nano", "trained", "scaled"]
    for model, texts in wanted.items():
        for prompt in PROMPTS:
            got = complete(client, model, prompt)
            assert (got.model, got.choices[0].text) == (model, texts[prompt])
            longest = max(longest, got.usage.completion_tokens)
        chat = client.chat.completions.create(
            model=model, messages=TURNS, max_tokens=TOKENS, temperature=0
        )
        assert chat.choices[0].message.content == texts["chat"]
        assert chat.model == model
    assert longest == TOKENS
    for prompt in PROMPTS:  # none of the three says what another says
        assert len({texts[prompt] for texts in wanted.values()}) == 3
    assert complete(client, "nano", PROMPTS[0]).choices[0].text == wanted["base"][PROMPTS[0]]


def test_no_answer_is_another_adapters_when_many_ask_at_once(
    served: Served, wanted: dict[str, dict[str, str]]
) -> None:
    asked = [(model, prompt) for prompt in PROMPTS for model in wanted] * 3
    with ThreadPoolExecutor(6) as threads:
        got = threads.map(lambda one: complete(served.client, *one).choices[0].text, asked)
    assert list(got) == [wanted[model][prompt] for model, prompt in asked]


def test_a_stream_comes_in_pieces_that_make_the_same_answer(
    served: Served, wanted: dict[str, dict[str, str]]
) -> None:
    pieces = list(
        served.client.chat.completions.create(
            model="trained", messages=TURNS, max_tokens=TOKENS, temperature=0, stream=True
        )
    )
    text = "".join(p.choices[0].delta.content or "" for p in pieces if p.choices)
    assert text == wanted["trained"]["chat"]
    assert len(pieces) > 3 and {piece.model for piece in pieces} == {"trained"}


def test_what_is_printed_works_when_pasted(served: Served, home: Path) -> None:
    _, url, _, body = shlex.split(served.lines[1])
    request = urllib.request.Request(url, body.encode())
    answer = json.load(urllib.request.urlopen(request))
    assert answer["model"] == "trained" and answer["choices"][0]["message"]["content"]
    vllm = shlex.split(served.lines[3])
    assert vllm[:2] == ["vllm", "serve"] and vllm[-2:] == ["--max-lora-rank", "8"]
    names = dict(one.split("=") for one in vllm if "=" in one)
    assert names.keys() == {"trained", "scaled"}
    assert all((Path(folder) / "adapter_config.json").is_file() for folder in names.values())


def test_errors_have_openais_shape(served: Served) -> None:
    with pytest.raises(openai.NotFoundError, match="one of base, nano, trained, scaled") as caught:
        complete(served.client, "gpt-4", "a")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="context"):
        complete(served.client, "base", "word " * 2000)


@pytest.mark.parametrize(
    ("path", "body", "headers", "status"),
    [
        ("/models", None, {"Host": "evil.example"}, 403),
        ("/models", None, {"Host": "[::1"}, 403),
        ("/completions", b"{}", {"Origin": "https://evil.example"}, 403),
        ("/models", None, {"Host": "localhost:1", "Origin": "http://[::1]:3000"}, 200),
        ("/completions", b"[1]", {}, 400),
        ("/completions", b"[" * 100_000, {}, 400),
        ("/completions", b'{"model": ["base"], "prompt": "a"}', {}, 404),
        ("/completions", b"{}", {"Content-Length": "9" * 6000}, 413),
        ("/completions", b"{}", {"Content-Length": "-1"}, 413),
        ("/completions", b'{"model": "base", "grammar": "root"}', {}, 400),
        ("/lora-adapters", b"[]", {}, 404),
        ("/../slots", None, {}, 404),
    ],
)
def test_who_may_not_ask_or_asks_wrong(
    served: Served, path: str, body: bytes | None, headers: dict[str, str], status: int
) -> None:
    request = urllib.request.Request(served.url + path, body, headers)
    try:
        with urllib.request.urlopen(request, timeout=LIMIT_S) as answer:
            assert answer.status == status
    except urllib.error.HTTPError as error:
        assert error.code == status
        assert json.load(error)["error"]["message"]


TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aaaa"}}
# What a request holds besides model and messages, and the field that its 400 names; "": it is
# answered as the same request without it.
FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"tools": [TOOL]}, "tools"),
    ({"tools": [TOOL], "tool_choice": "required"}, "tool_choice, tools"),
    ({"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}}, ""),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"functions": [{"name": "find"}]}, "functions"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs"),
    ({"an_option_of_tomorrow": 3}, "an_option_of_tomorrow"),
    ({"an_option_of_tomorrow": None, "user": "me", "store": True, "metadata": {"a": "b"}}, ""),
    ({"n_predict": 1}, "n_predict"),
    ({"stop": 5}, "stop"),
    ({"messages": [*TURNS, {"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "tool_calls"),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, "only text"),
    ({"messages": [{**TURNS[0], "content": [{"type": "text", "text": TURNS[0]["content"]}]}]}, ""),
    ({"messages": [{**TURNS[0], "refusal": None, "tool_calls": None}]}, ""),
]


def ask(served: Served, path: str = "/chat/completions", **more: Any) -> tuple[int, Any]:
    """The status, and the answer or the error's message."""
    asked = {"messages": TURNS} if "chat" in path else {"prompt": PROMPTS[0]}
    body = {"model": "trained", "temperature": 0, "max_tokens": 8, **asked, **more}
    request = urllib.request.Request(served.url + path, json.dumps(body).encode())
    try:
        with urllib.request.urlopen(request, timeout=LIMIT_S) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["error"]["message"]


@pytest.mark.parametrize(("more", "named"), FIELDS)
def test_no_field_is_ignored_silently(served: Served, more: dict[str, Any], named: str) -> None:
    status, answer = ask(served, **more)
    if named:
        assert status == 400 and named in answer
    else:
        assert status == 200 and answer["choices"] == ask(served)[1]["choices"]


def test_fields_that_llama_cpp_follows(served: Served) -> None:
    (plain,) = ask(served)[1]["choices"]
    text = plain["message"]["content"]
    for path in ("/chat/completions", "/completions"):
        choices = ask(served, path, n=3)[1]["choices"]
        assert [choice["index"] for choice in choices] == [0, 1, 2]
        assert ask(served, path, n=9)[0] == 400
        for name in ("echo", "suffix", "best_of"):
            assert ask(served, path, **{name: 2}) == (
                400,
                f"{name}: not supported here: remove it",
            )
    (choice,) = ask(served, logprobs=True, top_logprobs=3)[1]["choices"]
    chosen = choice["logprobs"]["content"]
    assert len(chosen) == 8 and all(len(one["top_logprobs"]) == 3 for one in chosen)
    assert choice["message"]["content"] == text

    def content(**more: Any) -> str:
        return str(ask(served, **more)[1]["choices"][0]["message"]["content"])

    assert content(stop=[text[4:6]]) == text[:4]
    assert len(content(max_tokens=None, max_completion_tokens=2)) < len(text)
    assert content(logit_bias={"100": 100}) != text
    drawn = [content(temperature=1.5, seed=seed) for seed in (1, 1, 2, 3)]
    assert drawn[0] == drawn[1] and len(set(drawn)) > 1
    assert content(temperature=1.5, top_p=0.001) == text
    long = {"max_tokens": 40, "ignore_eos": True}
    plain_text = content(**long)
    assert content(presence_penalty=2, **long) != plain_text
    assert content(frequency_penalty=2, **long) != plain_text


def test_the_base_is_written_once(
    served: Served, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start_with(base: Path, *_: Any) -> None:
        raise UserError(f"started with {base.stat().st_size} bytes")

    monkeypatch.setattr("lora_kit.ship.serve.open_server", start_with)
    monkeypatch.delattr("lora_kit.ship.serve.write_model")
    with pytest.raises(UserError, match=r"started with \d+ bytes"):
        serve([*map(FinishedRun, [home / "scaled"])], port=0, kind="f32")


def test_a_stopped_server_leaves_nothing(served: Served, home: Path) -> None:
    stream = served.client.completions.create(
        model="scaled", prompt="a", stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))

    asked = threading.Semaphore(0)

    def ask() -> None:
        with contextlib.suppress(OSError):
            while True:
                urllib.request.urlopen(served.url.removesuffix("/v1") + "/health").close()
                asked.release()

    for _ in range(4):  # the signal may come within a request
        threading.Thread(target=ask, daemon=True).start()
    for _ in range(20):
        assert asked.acquire(timeout=LIMIT_S)
    served.process.send_signal(signal.SIGTERM)
    assert served.process.wait(timeout=LIMIT_S) == 143
    assert not list(served.temporary.iterdir())
    written, stopped = (home / "stderr").read_text().splitlines()
    assert "written as f32 GGUF, once" in written and stopped == "stopped by SIGTERM"
    with pytest.raises(openai.APIConnectionError):
        served.client.models.list()


def test_a_closed_terminal_leaves_nothing_of_a_server(home: Path, tmp_path: Path) -> None:
    # The path of a Unix socket has at most 107 bytes, a temporary folder may have more.
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    server = start(folder, str(home / "scaled"))
    assert list(server.temporary.iterdir())
    server.process.send_signal(signal.SIGHUP)
    assert server.process.wait(timeout=LIMIT_S) == 129
    assert not list(server.temporary.iterdir())


def test_addresses_that_are_refused(home: Path) -> None:
    for host in ("0.0.0.0", "::", "192.0.2.1"):
        result = CliRunner().invoke(app, ["serve", str(home / "scaled"), "--host", host])
        assert isinstance(result.exception, UserError) and "--public" in str(result.exception)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"{port}.*in use.*--port"):
            serve([*map(FinishedRun, [home / "scaled"])], port=port)


def test_runs_that_cannot_be_served_together(
    home: Path, base: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    kept = sorted(cache.iterdir())
    dora = loud_adapter(tmp_path / "dora", use_dora=True)
    other = loud_adapter(tmp_path / "other")
    edit(other / "adapter_config.json", lambda c: c.update(base_model_name_or_path=str(base)))
    hostile = loud_adapter(tmp_path / "hostile")
    tokenizer = load_tokenizer(pin(Base(model="nano")).folder)
    tokenizer.chat_template = "{% for n in range(10 ** 9) %}{{ messages }}{% endfor %}"
    tokenizer.save_pretrained(hostile)
    with pytest.raises(UserError, match="template"):
        serve([*map(FinishedRun, [hostile])], port=0)
    with pytest.raises(UserError, match="lora-kit merge"):
        serve([*map(FinishedRun, [home / "scaled", dora])], port=0)
    with pytest.raises(UserError, match=rf"other.* {base}.*scaled on nano"):
        serve([*map(FinishedRun, [home / "scaled", other])], port=0)
    with pytest.raises(UserError, match="`scaled` is taken"):
        serve([*map(FinishedRun, [home / "scaled", home / "scaled"])], port=0)
    assert sorted(cache.iterdir()) == kept
