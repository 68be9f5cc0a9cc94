"""What a stranger's file may cost: it is refused in one line before it takes memory or minutes.

scripts/drills/malicious.py has many more, through the verbs, with time and memory measured.
"""

from __future__ import annotations

import gzip
import json
import os
import resource
import shutil
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import RunMaker, make_tokenizer
from trained import edit

from lora_kit import trust
from lora_kit.adapter.attach import attach
from lora_kit.adapter.files import open_adapter, read_config
from lora_kit.base.head import Head
from lora_kit.base.load import _config, base_on_meta, load_tokenizer
from lora_kit.base.pin import check_sizes, licence_of, pin
from lora_kit.base.templates import check_template, render
from lora_kit.base.tensors import stored
from lora_kit.data.readers import is_table, table_batches, text_batches
from lora_kit.data.sources import open_sources
from lora_kit.errors import UserError
from lora_kit.run import load_run
from lora_kit.schema import Adapter, Base
from lora_kit.ship import serve
from lora_kit.train.callbacks import read_metrics

MIB = 2**20


def read(file: Path) -> int:
    """The rows of a data file."""
    batches = table_batches(file) if is_table(file) else text_batches([file], whole=False)
    return sum(len(list(batch.parsed())) for batch in batches)


# --- Memory and time


def test_memory_is_bounded_and_given_back() -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with pytest.raises(UserError, match="too much"), trust.bounded(60, "too much", mib=64):
        "x" * (200 * MIB)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    with trust.bounded(60, "too much", mib=64):
        "x" * (20 * MIB)
    assert len("x" * (200 * MIB)) == 200 * MIB


def test_json_files_are_small_and_flat(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('{"a": "' + "a" * 100 + '"}')
    assert trust.read_json(file)
    with pytest.raises(ValueError, match="larger than 50 bytes"):
        trust.read_json(file, 50)
    file.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="nesting too deep"):
        trust.read_json(file)


# --- Data


@pytest.mark.parametrize(
    ("name", "piece"),
    [
        ("a.txt.gz", b"a" * MIB),
        ("a.txt.gz", b"a\n" * (MIB // 2)),
        ("a.jsonl.gz", b'{"text": "a"}\n' * 70_000),
        ("a.csv.gz", b"text\n" * 200_000),
        ("a.json.gz", b'[{"text": "a"},' + b'{"text": "a"},' * 70_000),
        ("a.html.gz", b"<p>a</p>" * 100_000),
        ("a.parquet.gz", bytes(MIB)),
    ],
)
def test_a_gzip_bomb(tmp_path: Path, name: str, piece: bytes) -> None:
    with gzip.open(tmp_path / name, "wb") as opened:
        for _ in range(20):
            opened.write(piece)
    with pytest.raises(UserError, match=r"(expands to|lines).*unpack it first"):
        read(tmp_path / name)


def test_a_small_file_may_be_of_one_letter(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "a.jsonl.gz", "wb") as opened:
        opened.write(b'{"text": "a"}\n' * 100_000)
    assert read(tmp_path / "a.jsonl.gz") == 100_000


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"text": "' + "a" * 2000 + '"}\n'),
        ("a.jsonl", '{"text": [' + "1," * 500 + "1]}\n"),
        ("a.csv", 'text\n"' + "a\n" * 2000),
        ("a.csv", "text\n" + "a" * 2000),
        ("a.conll", "word O\n" * 500),
        ("a.txt", "a" * 2000),
        ("a.txt", "a<|endoftext|>" * 30 + "words\n" * 500),
    ],
)
def test_a_row_that_is_too_long(
    tmp_path: Path, name: str, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("json_rows", "readers"):
        monkeypatch.setattr(f"lora_kit.data.{module}.LONGEST_ROW", 1000)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=rf"{name}:\d+: .*(more than|larger than field limit)"):
        read(tmp_path / name)
    (tmp_path / name).write_text("text\nword\n" if name == "a.csv" else '{"text": "word"}\n')
    if name in ("a.csv", "a.jsonl"):
        assert read(tmp_path / name) == 1


@pytest.mark.parametrize(("name", "line"), [("a.txt", "\n"), ("a.conll", "word O\n")])
def test_a_row_of_many_short_lines(
    tmp_path: Path, name: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each line takes time, however few characters it has."""
    monkeypatch.setattr("lora_kit.data.readers.LONGEST_ROW", 10_000)
    (tmp_path / name).write_text(line * 2000)
    with pytest.raises(UserError, match=rf"{name}:1: a row of more than"):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_text_without_white_space(tmp_path: Path, name: str) -> None:
    """A tokenizer takes 200 bytes for each character of a word."""

    def write(text: str) -> None:
        marked = "a<|endoftext|>" * 30 + text
        content = json.dumps({"text": text}) if name == "a.jsonl" else marked
        (tmp_path / name).write_text(content)

    write("a" * (2 * MIB + 1))
    with pytest.raises(UserError, match=rf"{name}:1: 1,048,576 characters without white space"):
        read(tmp_path / name)
    write("\n".join(["a" * (MIB - 1)] * 4))
    assert read(tmp_path / name) == (31 if name == "a.txt" else 1)


def test_a_file_of_one_line_is_not_hashed_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_kit.data.readers.LONGEST_ROW", 1000)
    monkeypatch.delattr("lora_kit.data.sources.file_hash")
    (tmp_path / "a.jsonl").write_text("a" * 5000)
    with pytest.raises(UserError, match=r"a\.jsonl:1: a row of more than"):
        open_sources(str(tmp_path / "a.jsonl"))


def test_an_object_of_many_keys_with_one_twice(tmp_path: Path) -> None:
    keys = ",".join(f'"k{n}": 1' for n in range(200_000))
    (tmp_path / "a.jsonl").write_text("{" + keys + ', "k199999": 1}\n')
    with pytest.raises(UserError, match="duplicate key 'k199999'"):
        read(tmp_path / "a.jsonl")


def test_rows_of_nothing(tmp_path: Path) -> None:
    for file, most in ((tmp_path / "a.arrow", 2**31 - 1), (tmp_path / "a.parquet", 2**20)):
        nothing = pa.table({"text": pa.Array.from_buffers(pa.null(), most, [None])})
        write(file, nothing)
        with pytest.raises(UserError, match="rows in a file of its size"):
            read(file)


@pytest.mark.parametrize("name", ["a.arrow", "a.parquet"])
def test_a_text_that_is_stored_once_is_not_read_for_every_row(tmp_path: Path, name: str) -> None:
    index = pa.array([0] * 200, pa.int32())
    column = pa.DictionaryArray.from_arrays(index, pa.array(["a " * (2 * MIB)]))
    write(tmp_path / name, pa.table({"text": column}))
    refused = pytest.raises(UserError, match="long rows are more than 10 times its size: no data")
    with trust.bounded(600, "too much", mib=400), refused:
        read(tmp_path / name)
    # As a prompt that many rows share.
    column = pa.DictionaryArray.from_arrays(index, pa.array(["a " * 8000]))
    write(tmp_path / name, pa.table({"text": column}))
    assert read(tmp_path / name) == 200


def write(file: Path, table: pa.Table) -> None:
    """A table as Arrow or Parquet."""
    if file.suffix == ".parquet":
        pq.write_table(table, file)
        return
    with pa.ipc.new_file(str(file), table.schema) as writer:
        writer.write_table(table)


# --- Bases and adapters


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"num_hidden_layers": 10**7}, "num_hidden_layers"),
        ({"text_config": {"num_layers": 1e9}}, "num_layers"),
        ({"n_layer": 10**400}, "n_layer"),
        ({"a": {"b": {"num_local_experts": 10**7}}}, "num_local_experts"),
        ({"num_labels": 10**9}, "num_labels"),
    ],
)
def test_more_layers_than_any_model_has(tmp_path: Path, change: Any, key: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"num_hidden_layers": 126, "num_experts": 512}))
    assert _config(tmp_path)
    edit(file, lambda values: values.update(change))
    with pytest.raises(UserError, match=rf"config\.json: {key}: 1.* is too large"):
        _config(tmp_path)


@pytest.mark.parametrize("key", ["vocab_size", "n_positions", "text_config", "rope_scaling"])
def test_a_config_with_words_for_numbers(tmp_path: Path, key: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({key: "a"}))
    with pytest.raises(UserError, match=rf"config\.json: {key}: invalid"):
        _config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({key: None}))
    assert _config(tmp_path) == {key: None}


def header(file: Path, entries: Any) -> Path:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    return file


def test_headers_of_many_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_kit.base.tensors._LARGEST_HEADER", 10_000)
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    assert len(stored(header(tmp_path / "a", {f"t{n}": entry for n in range(100)}))) == 100
    with pytest.raises(UserError, match=r"a header of 6\d,\d+ bytes"):
        stored(header(tmp_path / "a", {f"t{n}": entry for n in range(1000)}))
    monkeypatch.undo()
    with pytest.raises(UserError, match="70,000 tensors"):
        stored(header(tmp_path / "a", {f"t{n}": entry for n in range(70_000)}))
    for shape in ([1] * 1000, [10**4000] * 16, [2**63]):
        with pytest.raises(UserError, match=r"dimensions|offsets do not match"):
            stored(header(tmp_path / "a", {"a": {**entry, "shape": shape}}))


@pytest.mark.parametrize(
    ("name", "most"),
    [
        *(("config.json", 2**24), ("tokenizer_config.json", 2**24), ("chat_template.jinja", 2**24)),
        *(("tokenizer.json", 2**26), ("merges.txt", 2**26), ("spiece.model", 2**26)),
    ],
)
def test_files_that_libraries_read_whole(tmp_path: Path, name: str, most: int) -> None:
    for size in (most, most + 1):
        with (tmp_path / name).open("wb") as opened:
            opened.truncate(size)
        if size <= most:
            check_sizes(tmp_path)
    with pytest.raises(UserError, match=rf"{name}: larger than {most:,} bytes"):
        check_sizes(tmp_path)


def test_a_card_whose_licence_would_be_a_terabyte(tmp_path: Path) -> None:
    lists = ["&a [x,x,x,x,x,x,x,x,x,x]"]
    for name, before in zip("bcdefghijkl", "abcdefghijk", strict=True):
        lists.append(f"&{name} [" + ",".join([f"*{before}"] * 10) + "]")
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: [mit, " + ", ".join(lists) + "]\n---\n")
    assert licence_of(card) == "mit"
    card.write_text("---\ntags:\n" + "- a\n" * 50_000 + "license:\n- mit\n- gpl\nb: 1\n---\n")
    assert licence_of(card) == "mit, gpl"


def test_an_adapters_config_of_many_names(cpt_run: Path, tmp_path: Path) -> None:
    """PEFT compares each of them with each."""
    adapter = shutil.copytree(cpt_run / "adapter", tmp_path / "adapter")
    names = [f"m{n}" for n in range(10_001)]
    edit(adapter / "adapter_config.json", lambda config: config.update(target_modules=names))
    with pytest.raises(UserError, match=r"adapter_config\.json: .*target_modules has 10,001 names"):
        open_adapter(adapter)


def test_a_head_of_many_labels(tmp_path: Path) -> None:
    names = {str(number): "a" for number in range(2**17 + 1)}
    values = {"auto": "AutoModelForSequenceClassification", "pooling": None, "id2label": names}
    (tmp_path / "head.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"head\.json: corrupt"):
        Head.read(tmp_path)


def test_metrics_of_one_line(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n')
    os.truncate(file, 600 * MIB)  # zeros that take no room on the disk
    with trust.bounded(600, "too much", mib=200):
        assert read_metrics(file) == [{"step": 1}]


def test_a_page_of_many_megabytes(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_bytes(b"<html><body>" + b"<p>a b c</p>" * (2 * MIB))
    with pytest.raises(UserError, match=r"a\.html:1: a row of more than 16,777,216 characters"):
        read(tmp_path / "a.html")


def test_an_adapters_config_of_many_patterns(tmp_path: Path) -> None:
    patterns = {f"module{n}": 4 for n in range(100_000)}
    config = {"peft_type": "LORA", "rank_pattern": patterns}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="not a JSON object"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"target_modules": "(([a-z0-9_.])+)+!"},
        {"exclude_modules": "(([a-z0-9_.])+)+!"},
        {"rank_pattern": {"(([a-z0-9_.])+)+!": 4}},
        {"alpha_pattern": {"(([a-z0-9_.])+)+!": 4}},
    ],
)
def test_a_pattern_that_takes_forever(
    base: Path, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_kit.adapter.attach._SECONDS_TO_MATCH", 0.2)
    settings = Base(model=str(base))
    model = base_on_meta(settings, base)
    with pytest.raises(UserError, match="takes too long"):
        attach(model, Adapter.model_validate(change), (), 0)


def test_a_run_file_of_many_mistakes(run_file: RunMaker) -> None:
    file = run_file()
    with file.open("a") as opened:
        opened.write("".join(f"k{n}: 1\n" for n in range(2_000)))
    with pytest.raises(UserError) as caught:
        load_run(file)
    assert str(caught.value).count("\n") < 100


# --- Tokenizers and templates

SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
PIECE = {"SpecialToken": {"id": "x", "type_id": 0}}


@pytest.mark.parametrize(
    "change",
    [
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////w=="}},
        {
            "post_processor": {
                **{"type": "TemplateProcessing", "single": [PIECE]},
                **{"pair": [], "special_tokens": {}},
            }
        },
        {
            "normalizer": {
                "type": "Sequence",
                "normalizers": [{"type": "Replace", "pattern": {"String": "e"}, "content": "ee"}]
                * 40,
            }
        },
        {"normalizer": {"type": "Replace", "pattern": {"Regex": ""}, "content": "x" * 10_000}},
        {"normalizer": {"type": "Prepend", "prepend": "a" * (20 * MIB)}},
    ],
    ids=lambda change: str(change)[:60],
)
def test_a_tokenizer_that_breaks_or_explodes(tmp_path: Path, change: dict[str, Any]) -> None:
    make_tokenizer(tmp_path)
    load_tokenizer(tmp_path)
    edit(tmp_path / "tokenizer.json", lambda values: values.update(change))
    with pytest.raises(UserError, match="no usable tokenizer") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_of_many_added_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tokenizer(tmp_path)
    monkeypatch.setattr("lora_kit.base.load._MOST_ADDED", 3)
    with pytest.raises(UserError, match="4 added tokens"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_breaks_on_a_row(
    run_file: RunMaker, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    from lora_kit.launch import read_run
    from lora_kit.tasks.encode import rows_of

    own = shutil.copytree(base, tmp_path / "own")
    slow = {**SPLIT, "pattern": {"Regex": r"(\p{L}+)+\p{N}"}}  # exponential on a long word

    def change(values: dict[str, Any]) -> None:
        both = [slow, values["pre_tokenizer"]]
        values["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": both}

    edit(own / "tokenizer.json", change)
    file = run_file("cpt", **{"base.model": str(own)})
    (Path("text.txt")).write_text("<|endoftext|>".join("a" * 60 + f" {n}" for n in range(40)))
    run, recipe = read_run(file, ["data.train=text.txt"])
    with pytest.raises(UserError, match=r"text\.txt:\d+, or soon after it: the tokenizer cannot"):
        rows_of(recipe.task, run, pin(run.base, weights=False))


@pytest.mark.parametrize(
    "text",
    [
        "{{ 'x' * 9999999999 }}",
        "{% set n = 99999 %}{{ ('x' * n) * n }}",
        "{% for a in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
        "{% for a in range(40) %}{{ 'x' * 99999 }}{% endfor %}",
        "{% set ns = namespace(s='x') %}{% for a in range(60) %}{% set ns.s = ns.s ~ ns.s %}"
        "{% endfor %}{{ ns.s }}",
        "{% set ns = namespace(s=[1]) %}{% for a in range(60) %}{% set ns.s = ns.s + ns.s %}"
        "{% endfor %}{{ ns.s|length }}",
        "{{ 'x'|center(9999999999) }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ '{:>9999999999}'.format('x') }}",
        "{{ 1 }}" * 50_000,
    ],
    ids=lambda text: text[:40],
)
def test_a_template_that_writes_gigabytes(tmp_path: Path, text: str) -> None:
    tokenizer = make_tokenizer(tmp_path, text)
    with pytest.raises(UserError, match="chat template") as caught:
        check_template(tokenizer)
    assert "\n" not in str(caught.value)


def test_a_template_may_write_a_long_conversation(tmp_path: Path) -> None:
    text = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
    turns = [{"role": "user", "content": "word " * 200_000}]
    assert len(render(make_tokenizer(tmp_path, text), turns)) > 10**6


# --- The server


@pytest.fixture
def front(monkeypatch: pytest.MonkeyPatch) -> Iterator[serve._Front]:
    """The server for clients, without llama.cpp behind it."""
    monkeypatch.setattr(serve, "_SECONDS_TO_ASK", 0.2)
    monkeypatch.setattr(serve, "MOST_CLIENTS", 3)
    server = serve._Front("127.0.0.1", 0, False)
    server.models = {"base": None}
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def wait(what: Callable[[], bool]) -> None:
    while not what():
        time.sleep(0.01)


def test_a_request_that_is_sent_slowly_is_ended(front: serve._Front) -> None:
    head = b"POST /v1/completions HTTP/1.0\r\nHost: localhost\r\nContent-Length: 100\r\n"
    for start in (b"", b"POST /v1", head, head + b"\r\n{"):
        with socket.create_connection(front.server_address[:2]) as client:  # type: ignore[arg-type]
            client.sendall(start)
            while client.recv(1000):  # until it is closed
                pass
    wait(lambda: not front.clients and not front.bodies)


def test_too_many_clients_are_turned_away(front: serve._Front, monkeypatch: Any) -> None:
    monkeypatch.setattr(serve, "_SECONDS_TO_ASK", 600)
    address: Any = front.server_address[:2]
    waiting = [socket.create_connection(address) for _ in range(3)]
    wait(lambda: len(front.clients) == 3)
    with socket.create_connection(address) as client:
        assert client.recv(1) == b""
    for one in waiting:
        one.close()
    wait(lambda: not front.clients)
    url = f"http://127.0.0.1:{address[1]}/health"
    assert urllib.request.urlopen(url).status == 200


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"model": "base", "prompt": ["a"] * 100}, 400),
        ({"model": "base", "prompt": [[1]] * 100}, 400),
        ({"model": "base", "prompt": "a", "logit_bias": {str(n): 1 for n in range(2000)}}, 400),
        ({"model": "base", "messages": [{}] * 5000}, 400),
        ({"model": "base", "prompt": "a" * (3 * MIB)}, 413),
    ],
)
def test_requests_of_too_much(front: serve._Front, body: Any, status: int) -> None:
    url = f"http://127.0.0.1:{front.server_address[1]}/v1/completions"
    with pytest.raises((urllib.error.URLError, ConnectionError)) as caught:
        urllib.request.urlopen(url, json.dumps(body).encode())
    if isinstance(caught.value, urllib.error.HTTPError):
        assert caught.value.code == status
    else:  # too large a body is not read: the connection is closed while it is still being sent
        assert status == 413
        assert isinstance(getattr(caught.value, "reason", caught.value), ConnectionError)


def test_bodies_of_too_many_bytes_together(front: serve._Front, monkeypatch: Any) -> None:
    monkeypatch.setattr(serve, "_LARGEST_BODIES", 50)
    url = f"http://127.0.0.1:{front.server_address[1]}/v1/completions"
    with pytest.raises(urllib.error.HTTPError, match="503"):
        urllib.request.urlopen(url, json.dumps({"model": "base", "prompt": "a" * 60}).encode())
