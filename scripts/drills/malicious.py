"""Time and memory that malicious files cost, and whether one runs code or crashes a verb.

    python scripts/drills/malicious.py                        # every input, half an hour
    python scripts/drills/malicious.py --only gzip template   # those whose name has one of these
    python scripts/drills/malicious.py --out malicious.json

Each input replaces one good file of a small project, and each verb that reads it runs on it in a
process of its own, forked from one that has the libraries. Allowed are 5 s and 500 MB more than the
same verb needs on the good file, and an end by exit code and `error:` lines: no code of the input
runs, no traceback, no crash. What fits into these bounds need not be refused. On a busy machine,
`--cpu` counts seconds of CPU time, and as many again eight times as long.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import io
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests"))
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

MIB = 2**20
SECONDS, MORE_MIB = 5.0, 500
KILLED_AFTER_S, KILLED_BEYOND_MIB = 90.0, 6000
CANARY = "canary"
REVISION = "c0ffee" + "0" * 34
TOUCH = f"__import__('os').system('touch {CANARY}')"

DATA = ("preview",)
RUN = ("preview", "plan")
BASE = ("preview", "plan", "train", "generate", "extract")
ADAPTER = ("inspect", "check", "push", "pull", "generate", "merge", "export", "combine")
FINISHED = ("compare", "inspect", "check", "push", "merge")
VERBS = {
    "preview": ["preview", "run.yaml", "train.max_length=128"],
    "plan": ["plan", "run.yaml", "train.max_length=128"],
    "train": ["train", "run.yaml"],
    "inspect": ["inspect", "adapter"],
    "check": ["check", "adapter", "--target", "vllm"],
    "push": ["push", "adapter", "me/it", "--dry-run"],
    "generate": ["generate", "adapter", "What is it?", "--max-new-tokens", "4"],
    "merge": ["merge", "adapter", "--out", "out"],
    "pull": ["pull", "me/it", "--out", "out"],
    "export": ["export", "adapter", "--to", "portable", "--out", "out"],
    "combine": ["combine", "runs/test", "adapter", "--out", "out"],
    "extract": ["extract", "base", "tuned", "--out", "out", "--rank", "2"],
    "compare": ["compare", "runs/test"],
    "serve": ["serve", "adapter", "--port", "0"],
}
Spoil = Callable[[Path], None]


@dataclass(frozen=True)
class Input:
    name: str
    spoil: Spoil
    verbs: tuple[str, ...]


@dataclass
class Outcome:
    name: str
    verb: str
    code: int
    seconds: float
    mib: float
    errors: list[str]
    bad: list[str]


# ---------------------------------------------------------------- making inputs
def put(name: str, content: bytes | str | Callable[[], bytes]) -> Spoil:
    def spoil(folder: Path) -> None:
        made = content() if callable(content) else content
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(made.encode() if isinstance(made, str) else made)

    return spoil


def both(first: Spoil, second: Spoil) -> Spoil:
    def spoil(folder: Path) -> None:
        first(folder)
        second(folder)

    return spoil


def edited(name: str, **changes: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        values.update(changes)
        (folder / name).write_text(json.dumps(values))

    return spoil


def run_with(text: str) -> Spoil:
    """Lines at the end of the run file."""

    def spoil(folder: Path) -> None:
        with (folder / "run.yaml").open("a") as opened:
            opened.write(text)

    return spoil


def data(name: str, content: bytes | str | Callable[[], bytes], recipe: str = "cpt") -> Spoil:
    """A data file, and a run file that names it."""

    def spoil(folder: Path) -> None:
        put(name, content)(folder)
        text = (folder / "run.yaml").read_text()
        text = text.replace("rows.jsonl", name).replace("recipe: sft", f"recipe: {recipe}")
        (folder / "run.yaml").write_text(text)

    return spoil


def sparse(name: str, size: int, start: bytes = b"") -> Spoil:
    """A file of `size` bytes, which are zeros after its start."""

    def spoil(folder: Path) -> None:
        with (folder / name).open("wb") as opened:
            opened.write(start)
            opened.truncate(size)

    return spoil


def zipped(piece: bytes, times: int) -> Callable[[], bytes]:
    """A gzip file of a piece many times, made without having it in memory."""

    def make() -> bytes:
        out = io.BytesIO()
        with gzip.GzipFile(fileobj=out, mode="wb", compresslevel=6) as opened:
            for _ in range(times):
                opened.write(piece)
        return out.getvalue()

    return make


def tensors(file: str, entries: Callable[[], str], size: int = 0) -> Spoil:
    """A safetensors file with a header of these entries."""

    def spoil(folder: Path) -> None:
        header = entries().encode()
        content = len(header).to_bytes(8, "little") + header
        (folder / file).write_bytes(content + bytes(size))

    return spoil


def many_tensors(count: int) -> Callable[[], str]:
    entry = '"{}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    return lambda: "{" + ",".join(entry.format(f"t{n}") for n in range(count)) + "}"


def tokenizer(change: Callable[[dict[str, Any]], Any]) -> Spoil:
    """A change of the tokenizer.json of base and adapter."""

    def spoil(folder: Path) -> None:
        for place in ("base", "adapter"):
            file = folder / place / "tokenizer.json"
            values = json.loads(file.read_text())
            change(values)
            file.write_text(json.dumps(values))

    return spoil


def template(text: str) -> Spoil:
    def spoil(folder: Path) -> None:
        for place in ("base", "adapter"):
            (folder / place / "chat_template.jinja").write_text(text)

    return spoil


def split(pattern: str) -> Spoil:
    """A tokenizer that splits words by a regular expression."""
    kind = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}

    def change(values: dict[str, Any]) -> None:
        both = [kind, values["pre_tokenizer"]]
        values["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": both}

    return tokenizer(change)


def replaced(pattern: dict[str, str], content: str, times: int = 1) -> Spoil:
    kind = {"type": "Replace", "pattern": pattern, "content": content}
    chain = {"type": "Sequence", "normalizers": [kind] * times}
    return tokenizer(lambda values: values.update(normalizer=chain))


def arrow(kind: str, columns: Callable[[], dict[str, Any]]) -> Callable[[], bytes]:
    def make() -> bytes:
        import pyarrow as pa
        import pyarrow.parquet as pq

        table, sink = pa.table(columns()), io.BytesIO()
        if kind == "parquet":
            pq.write_table(table, sink, compression="zstd")
        else:
            with pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
        return sink.getvalue()

    return make


def nulls(rows: int) -> Callable[[], dict[str, Any]]:
    def make() -> dict[str, Any]:
        import pyarrow as pa

        return {"text": pa.Array.from_buffers(pa.null(), rows, [None])}

    return make


def one_text(rows: int, size: int) -> Callable[[], dict[str, Any]]:
    """A column whose rows are all the same long text, stored once."""

    def make() -> dict[str, Any]:
        import pyarrow as pa

        index = pa.array([0] * rows, pa.int32())
        return {"text": pa.DictionaryArray.from_arrays(index, pa.array(["a " * (size // 2)]))}

    return make


def pdf(pages: bytes) -> bytes:
    return b"%PDF-1.4\n" + pages + b"\ntrailer << /Root 1 0 R >>\n%%EOF"


def deep(opening: str, levels: int) -> str:
    return opening * levels


ROW = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "%s"}]}\n'
TEXT = '{"text": "%s"}\n'
LAUGHS = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
CARD = f"---\n{LAUGHS}license: *a11\n---\n"
CARD_INSIDE = (
    "---\nlicense: [&a [x,x,x,x,x,x,x,x,x,x], "
    + ", ".join(
        f"&{chr(n)} [{','.join([f'*{chr(n - 1)}'] * 9)}]" for n in range(ord("b"), ord("k"))
    )
    + "]\n---\n"
)
WORDS = "the quick brown fox jumps over the lazy dog "

INPUTS = [
    # --- run files
    Input("yaml aliases", put("run.yaml", LAUGHS), RUN),
    Input("yaml nested lists", put("run.yaml", "a: " + deep("[", 100_000)), RUN),
    Input("yaml nested maps", put("run.yaml", "a: " + deep("{a: ", 20_000)), RUN),
    Input("yaml of a gigabyte", sparse("run.yaml", 2**30, b"recipe: sft\n"), RUN),
    Input("yaml many values", run_with("x: [" + "1," * 60_000 + "1]\n"), RUN),
    Input("yaml many keys", run_with("".join(f"k{n}: 1\n" for n in range(10_000))), RUN),
    Input("yaml one long line", run_with("# " + "a" * 120_000), RUN),
    Input("yaml long text", run_with("name2: " + "a" * 120_000), RUN),
    Input("yaml python object", run_with(f"x: !!python/object/apply:eval [\"{TOUCH}\"]\n"), RUN),
    Input("yaml number of digits", run_with("x: " + "9" * 100_000), RUN),
    Input("run many sources", put("run.yaml", json.dumps({
        "recipe": "sft", "name": "a", "base": {"model": "base"},
        "data": {"train": [f"r{n}" for n in range(10_000)]}})), RUN),
    Input("run pattern", run_with("adapter:\n  target_modules: '(([a-z0-9_.])+)+!'\n"),
          ("plan", "train")),
    Input("run exclude pattern", run_with("adapter:\n  exclude_modules: '(([a-z0-9_.])+)+!'\n"),
          ("plan", "train")),
    Input("run rank pattern",
          run_with("adapter:\n  rank_pattern:\n    '(([a-z0-9_.])+)+!': 4\n"), ("plan", "train")),
    Input("run huge rank", run_with("adapter:\n  r: 1000000000\n"), ("plan",)),
    Input("run huge accumulation",
          run_with("train:\n  gradient_accumulation_steps: 1000000007\n"), ("plan",)),
    # --- data
    Input("one line of 2 GB",
          both(data("big.jsonl", ""), sparse("big.jsonl", 2**31, b'{"text": "')), DATA),
    Input("one line of 2 GB of letters", data("big.jsonl", lambda: b"a" * 2**31), DATA),
    Input("gzip zeros", data("a.txt.gz", zipped(bytes(MIB), 2000)), DATA),
    Input("gzip one line", data("a.txt.gz", zipped(b"a" * MIB, 2000)), DATA),
    Input("gzip lines", data("a.txt.gz", zipped(b"a\n" * (MIB // 2), 1000)), DATA),
    Input("gzip rows", data("a.jsonl.gz", zipped((TEXT % "a").encode() * 60_000, 500)), DATA),
    Input("gzip csv", data("a.csv.gz", zipped(b"a\n" * (MIB // 2), 1000)), DATA),
    Input("gzip json list", data("a.json.gz", zipped(b'[{"text": "a"},' * 60_000, 500)), DATA),
    Input("gzip html", data("a.html.gz", zipped(b"<p>a</p>" * 100_000, 1000)), DATA),
    Input("gzip csv quote", data("a.csv.gz", zipped(b'"a' * (MIB // 2), 1000)), DATA),
    Input("csv open quote", data("a.csv", b'text\n"' + b"word\n" * (10 * MIB)), DATA),
    Input("csv many columns", data("a.csv", lambda: (",".join(
        f"c{n}" for n in range(10**6)) + "\n" + ",".join(["a"] * 10**6) + "\n").encode()), DATA),
    Input("jsonl nested", data("a.jsonl", '{"text": ' + deep("[", 10**6) + "\n"), DATA),
    Input("jsonl row of 60 MB",
          data("a.jsonl", lambda: (TEXT % ("a" * (60 * MIB))).encode()), DATA),
    Input("jsonl row of 16 MB", data("a.jsonl", lambda: (
        TEXT % (WORDS * (15 * MIB // len(WORDS))) * 3).encode()), DATA),
    Input("jsonl many objects in a row",
          data("a.jsonl", lambda: ('{"text": [' + "{}," * (20 * MIB) + "{}]}\n").encode()), DATA),
    Input("jsonl many keys", data("a.jsonl", lambda: ("{" + ",".join(
        f'"k{n}": 1' for n in range(700_000)) + "}\n").encode()), DATA),
    Input("jsonl many keys, one twice", data("a.jsonl", lambda: ("{" + ",".join(
        f'"k{n}": 1' for n in range(700_000)) + ', "k699999": 1}\n').encode()), DATA),
    Input("jsonl number of digits", data("a.jsonl", '{"text": ' + "9" * (4 * MIB) + "}\n"), DATA),
    Input("json object of 60 MB", data("a.json", lambda: (
        '[{"text": "' + "a" * (60 * MIB) + '"}]').encode()), DATA),
    Input("json unclosed", data("a.json", lambda: b'[{"text": ["' + b'a","' * (15 * MIB)), DATA),
    Input("json nested", data("a.json", deep("[", 10**7)), DATA),
    Input("json one turn of many", data("rows.jsonl", lambda: (json.dumps({"messages": [
        {"role": ("user", "assistant")[n % 2], "content": "a"} for n in range(200_000)]})
        + "\n").encode(), "sft"), DATA),
    Input("txt one line of 60 MB", data("a.txt", lambda: b"a" * (60 * MIB)), DATA),
    Input("txt document of 60 MB", data("a.txt", lambda: b"a<|endoftext|>" * 30
          + (WORDS + "\n").encode() * (60 * MIB // 45)), DATA),
    Input("txt word of 12 MB", data("a.txt", lambda: b"a<|endoftext|>" * 30 + b"a" * (12 * MIB)),
          DATA),
    Input("txt of white space", data("a.txt", lambda: b"\n" * (30 * MIB)), DATA),
    Input("txt of markers", data("a.txt", lambda: b"<|endoftext|>" * (2 * MIB)), DATA),
    Input("conll sentence of 60 MB", data("a.conll", lambda: b"word O\n" * (8 * MIB)), DATA),
    Input("arrow nulls", data("a.arrow", arrow("arrow", nulls(2**31 - 1))), DATA),
    Input("parquet nulls", data("a.parquet", arrow("parquet", nulls(10**7))), DATA),
    Input("arrow dictionary", data("a.arrow", arrow("arrow", one_text(100_000, 8 * MIB))), DATA),
    Input("parquet dictionary",
          data("a.parquet", arrow("parquet", one_text(3_000, 8 * MIB))), DATA),
    Input("html nested", data("a.html", lambda: b"<div>" * (2 * MIB)), DATA),
    Input("html of 60 MB", data("a.html", lambda: b"<html><body>" + b"<p>a b c</p>" * (5 * MIB)),
          DATA),
    Input("html entities", data("a.html", '<!DOCTYPE a [<!ENTITY a "aaaaaaaaaa">' + "".join(
        f'<!ENTITY a{n} "{f"&a{n - 1 if n else str()};" * 10}">' for n in range(12))
        + "]><html><body>&a11;</body></html>"), DATA),
    Input("pdf endless pages", data("a.pdf", pdf(
        b"1 0 obj << /Type /Catalog /Pages 2 0 R >> endobj\n"
        b"2 0 obj << /Type /Pages /Kids [2 0 R] /Count 1000000000 >> endobj")), DATA),
    Input("pdf nested", data("a.pdf", pdf(b"1 0 obj " + b"[" * 10**6 + b" endobj")), DATA),
    Input("pdf zeros", data("a.pdf", lambda: pdf(b"1 0 obj " + bytes(20 * MIB))), DATA),
    # --- bases
    Input("config of a gigabyte", sparse("base/config.json", 2**30, b"{}"), BASE),
    Input("config nested", put("base/config.json", '{"a": ' + deep("[", 10**6)), BASE),
    Input("config layers", edited("base/config.json", num_hidden_layers=10**7), BASE),
    Input("config layers inside",
          edited("base/config.json", text_config={"num_hidden_layers": 10**7}), BASE),
    Input("config heads", edited("base/config.json", num_attention_heads=10**9), BASE),
    Input("config width", edited("base/config.json", hidden_size=2**40), BASE),
    Input("config vocabulary", edited("base/config.json", vocab_size=2**40), BASE),
    Input("config positions", edited("base/config.json", max_position_embeddings=2**40), BASE),
    Input("config labels", edited("base/config.json", num_labels=10**9), BASE),
    Input("config layer types", edited("base/config.json", layer_types=["a"] * 10**6), BASE),
    Input("config experts", edited("base/config.json", model_type="mixtral",
          architectures=["MixtralForCausalLM"], num_local_experts=10**7), BASE),
    Input("config GPT-2", put("base/config.json", json.dumps({
        "model_type": "gpt2", "n_layer": 10**7, "n_positions": 10**7, "vocab_size": 400})), BASE),
    Input("config GPT-2 positions", put("base/config.json", json.dumps({
        "model_type": "gpt2", "n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 10**6,
        "vocab_size": 400, "eos_token_id": 0})), BASE),
    Input("config words for numbers",
          edited("base/config.json", vocab_size="a", max_position_embeddings="a"), BASE),
    Input("config auto_map", edited("base/config.json", model_type="evil",
          auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"}), BASE),
    Input("generation config", put("base/generation_config.json", json.dumps(
        {"eos_token_id": list(range(10**6)), "num_beams": 10**6, "max_length": 10**9})),
          ("generate", "merge")),
    Input("card aliases", put("base/README.md", CARD), ("preview",)),
    Input("card aliases in the licence", put("base/README.md", CARD_INSIDE), ("preview",)),
    Input("card of a gigabyte", sparse("base/README.md", 2**30, b"---\n"), ("preview",)),
    Input("card of lines", put("base/README.md", "\n" * (20 * MIB)), ("preview",)),
    Input("base header of 10^6 tensors",
          tensors("base/model.safetensors", many_tensors(10**6)), ("train", "merge", "generate")),
    Input("base header of 65,000 tensors",
          tensors("base/model.safetensors", many_tensors(65_000)), ("merge", "generate")),
    Input("base header shape", tensors("base/model.safetensors", lambda: json.dumps(
        {"a": {"dtype": "F32", "shape": [10**4000] * 4000, "data_offsets": [0, 0]}})), ("merge",)),
    Input("base index", put("base/model.safetensors.index.json", lambda: json.dumps(
        {"weight_map": {f"t{n}": f"m{n}.safetensors" for n in range(10**6)}}).encode()),
          ("merge", "generate")),
    Input("base named pipe", lambda d: os.mkfifo(d / "base/tokenizer_pipe.json"), BASE),
    # --- tokenizers and templates
    Input("tokenizer regex", split("(a+)+$"), BASE),
    Input("tokenizer regex of letters", split(r"(\p{L}+)+\p{N}"), BASE),
    Input("tokenizer regex not valid", split("(("), BASE),
    Input("tokenizer regex look-behind", split(r"(?<=(a|b)*)\w+"), BASE),
    Input("tokenizer replace grows", replaced({"String": "e"}, "ee", 40), BASE),
    Input("tokenizer replace empty", replaced({"Regex": ""}, "x" * 100_000), BASE),
    Input("tokenizer prepend", tokenizer(lambda t: t.update(
        normalizer={"type": "Prepend", "prepend": "a" * (20 * MIB)})), BASE),
    Input("tokenizer charsmap", tokenizer(lambda t: t.update(normalizer={
        "type": "Precompiled", "precompiled_charsmap": base64.b64encode(b"\xff" * 64).decode()})),
          BASE),
    Input("tokenizer empty unigram", tokenizer(lambda t: t.update(
        model={"type": "Unigram", "unk_id": 7, "vocab": []})), BASE),
    Input("tokenizer no byte in the vocabulary", tokenizer(
        lambda t: t["model"].update(vocab={"a": 0}, merges=[])), BASE),
    Input("tokenizer ids", tokenizer(lambda t: t["model"]["vocab"].update(zz=2**32 - 1)), BASE),
    Input("tokenizer truncation", tokenizer(lambda t: t.update(truncation={
        "max_length": 0, "strategy": "LongestFirst", "stride": 5, "direction": "Right"})), BASE),
    Input("tokenizer padding", tokenizer(lambda t: t.update(padding={
        "strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"})), BASE),
    Input("tokenizer post-processor", tokenizer(lambda t: t.update(post_processor={
        "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}],
        "pair": [], "special_tokens": {}})), BASE),
    Input("tokenizer many added tokens", tokenizer(lambda t: t["added_tokens"].extend(
        {"id": 500 + n, "content": f"<{n}>", "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False, "special": True} for n in range(100_000))), BASE),
    Input("tokenizer of 60 MB", tokenizer(lambda t: t["model"]["vocab"].update(
        {f"token{n}": 400 + n for n in range(2 * 10**6)})), BASE),
    Input("tokenizer of a gigabyte", sparse("base/tokenizer.json", 2**30, b"{"), BASE),
    Input("tokenizer config nested",
          put("base/tokenizer_config.json", '{"a": ' + deep("[", 10**6)), BASE),
    Input("tokenizer code", edited("base/tokenizer_config.json", tokenizer_class="Evil",
          auto_map={"AutoTokenizer": ["evil.T", "evil.T"]}), BASE),
    Input("template loops", template(
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"), BASE),
    Input("template output", template(
        "{% for a in range(99999) %}{{ 'x' * 99999 }}{% endfor %}"), BASE),
    Input("template output of 4 MB", template(
        "{% for a in range(40) %}{{ 'x' * 99999 }}{% endfor %}{{ messages[0].content }}"), BASE),
    Input("template product", template("{{ 'x' * 9999999999 }}"), BASE),
    Input("template product of a variable",
          template("{% set n = 99999 %}{{ ('x' * n) * n }}"), BASE),
    Input("template doubles", template(
        "{% set ns = namespace(s='x') %}{% for a in range(60) %}{% set ns.s = ns.s ~ ns.s %}"
        "{% endfor %}{{ ns.s }}"), BASE),
    Input("template doubles a list", template(
        "{% set ns = namespace(s=[1]) %}{% for a in range(60) %}{% set ns.s = ns.s + ns.s %}"
        "{% endfor %}{{ ns.s|length }}"), BASE),
    Input("template center", template("{{ 'x'|center(9999999999) }}"), BASE),
    Input("template format", template("{{ '%9999999999d' % 1 }}"), BASE),
    Input("template format method", template("{{ '{:>9999999999}'.format('x') }}"), BASE),
    Input("template zfill", template("{{ 'x'.zfill(9999999999) }}"), BASE),
    Input("template power", template("{{ 9 ** 99999999 }}"), BASE),
    Input("template product of numbers", template(
        "{% set ns = namespace(n=9) %}{% for a in range(60) %}{% set ns.n = ns.n * ns.n %}"
        "{% endfor %}{{ ns.n }}"), BASE),
    Input("template recursion", template(
        "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}"), BASE),
    Input("template nested", template("{% if 1 %}" * 5000 + "{% endif %}" * 5000), BASE),
    Input("template of 10 MB", template("{{ 1 }}" * (10 * MIB // 7)), BASE),
    Input("template escape", template(
        "{{ cycler.__init__.__globals__.os.system('touch " + CANARY + "') }}"), BASE),
    Input("template for data only", template(
        "{% for m in messages %}{% if m.content|length > 3 %}{% for a in range(99999) %}"
        "{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}{{ m.content }}"
        "{% endfor %}"),
          BASE),
    # --- adapters
    Input("adapter config of a gigabyte", sparse("adapter/adapter_config.json", 2**30), ADAPTER),
    Input("adapter config nested",
          put("adapter/adapter_config.json", '{"a": ' + deep("[", 10**6)), ADAPTER),
    Input("adapter many targets", edited("adapter/adapter_config.json",
          target_modules=[f"m{n}" for n in range(10**6)]), ADAPTER),
    Input("adapter some targets", edited("adapter/adapter_config.json",
          target_modules=[f"m{n}" for n in range(80_000)]), ADAPTER),
    Input("adapter many patterns", edited("adapter/adapter_config.json",
          rank_pattern={f"m{n}": 4 for n in range(50_000)}), ADAPTER),
    Input("adapter pattern", edited("adapter/adapter_config.json",
          rank_pattern={"(([a-z0-9_.])+)+!": 4}), ADAPTER),
    Input("adapter pattern of repeats", edited("adapter/adapter_config.json",
          rank_pattern={"(((a{1,900}){1,900}){1,900}){1,900}": 4}), ADAPTER),
    Input("adapter target pattern", edited("adapter/adapter_config.json",
          target_modules="(([a-z0-9_.])+)+!"), ADAPTER),
    Input("adapter huge rank", edited("adapter/adapter_config.json", r=10**12), ADAPTER),
    Input("adapter layers", edited("adapter/adapter_config.json",
          layers_to_transform=list(range(150_000))), ADAPTER),
    Input("adapter auto_mapping", edited("adapter/adapter_config.json", auto_mapping={
        "base_model_class": "Evil", "parent_library": "evil"}), ADAPTER),
    Input("adapter header of 10^6 tensors",
          tensors("adapter/adapter_model.safetensors", many_tensors(10**6)), ADAPTER),
    Input("adapter header of 65,000 tensors",
          tensors("adapter/adapter_model.safetensors", many_tensors(65_000)), ADAPTER),
    Input("adapter header one name twice", tensors("adapter/adapter_model.safetensors", lambda:
          many_tensors(65_000)()[:-1] + ',"t0":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'),
          ADAPTER),
    Input("adapter header nested",
          tensors("adapter/adapter_model.safetensors", lambda: deep("[", 10**6)), ADAPTER),
    Input("adapter long name", tensors("adapter/adapter_model.safetensors", lambda: json.dumps(
        {"a" * (10 * MIB): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}})), ADAPTER),
    Input("adapter pickle", both(
        lambda d: (d / "adapter/adapter_model.safetensors").unlink(),
        put("adapter/adapter_model.bin", f"cos\nsystem\n(S'touch {CANARY}'\ntR.")), ADAPTER),
    Input("adapter link", both(
        lambda d: (d / "adapter/tokenizer.json").unlink(),
        lambda d: (d / "adapter/tokenizer.json").symlink_to("/dev/zero")), ADAPTER),
    Input("adapter head", put("adapter/head.json", lambda: json.dumps({
        "auto": "AutoModelForSequenceClassification", "pooling": None,
        "id2label": {str(n): "a" for n in range(10**6)}}).encode()), ADAPTER),
    # --- finished runs
    Input("lock of a gigabyte", sparse("runs/test/run.lock.json", 2**30, b"{"), FINISHED),
    Input("lock nested", put("runs/test/run.lock.json", '{"a": ' + deep("[", 10**6)), FINISHED),
    Input("report of a gigabyte", sparse("runs/test/report.json", 2**30, b"{"),
          ("push", "compare")),
    Input("report nested", put("runs/test/report.json", '{"a": ' + deep("[", 10**6)),
          ("push", "compare")),
    Input("metrics of a gigabyte", sparse("runs/test/metrics.jsonl", 2**30), ("compare",)),
    Input("run file with aliases", put("runs/test/run.yaml", LAUGHS), FINISHED),
    Input("run names a program",
          put("runs/test/evil.py", TOUCH), FINISHED),
]  # fmt: skip


# ---------------------------------------------------------------- running verbs
def make_project(folder: Path) -> None:
    """A small base, rows, an adapter and a finished run."""
    import torch
    import yaml
    from conftest import make_base, sentences
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = make_base(folder / "base")
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(str(folder / "adapter"))
    AutoTokenizer.from_pretrained(base).save_pretrained(folder / "adapter")
    edited("adapter/adapter_config.json", base_model_name_or_path="base")(folder)
    tuned: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.nn.init.ones_(tuned.model.layers[0].self_attn.q_proj.weight)
    tuned.save_pretrained(folder / "tuned")
    (folder / "rows.jsonl").write_text("".join(ROW % text for text in sentences(60)))
    values = {
        "recipe": "sft",
        "name": "test",
        "base": {"model": "base", "dtype": "float32"},
        "data": {"train": "rows.jsonl", "eval": 0.2},
    }
    short = {"train": {"max_steps": 2, "max_length": 128}, "prove": {"shots": 0}}
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    (folder / "evil.py").write_text(f"{TOUCH}\nC = T = Evil = object\n")
    (folder / "base" / "evil.py").write_text(f"{TOUCH}\nC = T = Evil = object\n")
    before = Path.cwd()
    os.chdir(folder)
    (folder / "short.yaml").write_text(yaml.safe_dump({**values, **short}))
    from lora_kit.launch import train

    train("short.yaml")
    os.chdir(before)


def run_verb(verb: str) -> int:
    """In the forked process: the verb, as from the command line."""
    if verb == "train":  # what `lora-kit train` starts, without another start of the libraries
        from lora_kit.launch import recipe_main
        from lora_kit.run import recipe_file
        from lora_kit.tasks.recipe import load_recipe

        sys.argv = [
            "recipe.py",
            "run.yaml",
            "train.max_steps=2",
            "name=other",
            "prove.shots=0",
            "train.max_length=128",
        ]
        recipe = Path("run.yaml").read_text()
        name = "cpt" if "recipe: cpt" in recipe else "sft"
        return recipe_main(load_recipe(recipe_file(name)).main)
    from lora_kit.cli import main

    if verb == "pull":
        import huggingface_hub.constants

        huggingface_hub.constants.HF_HUB_OFFLINE = False
    sys.argv = ["lora-kit", *VERBS[verb]]
    if verb in FINISHED and Path("of_run").exists():
        sys.argv = [arg.replace("adapter", "runs/test") for arg in sys.argv]
    try:
        main()
    except SystemExit as error:
        return int(error.code or 0)
    return 0


def resident(pid: int) -> float:
    with suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
        return int(found[1]) / 1024 if found else 0.0
    return 0.0


def forked(verb: str, folder: Path, cpu: bool) -> tuple[int, float, float, str]:
    """(exit code, seconds, peak MiB, stderr) of a verb in a folder; a signal is a negative code."""
    log = folder / "stderr"
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.chdir(folder)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(out, 2)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        code = 99
        try:
            code = run_verb(verb)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    start, peak = time.monotonic(), 0.0
    while True:
        done, status, used = os.wait4(pid, os.WNOHANG)
        seconds = time.monotonic() - start
        if done:
            break
        peak = max(peak, resident(pid))
        if seconds > KILLED_AFTER_S or peak > KILLED_BEYOND_MIB:
            os.killpg(pid, signal.SIGKILL)
        time.sleep(0.01)
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    if cpu:
        seconds = max(used.ru_utime + used.ru_stime, seconds / 8)
    return os.waitstatus_to_exitcode(status), seconds, peak, log.read_text(errors="replace")


def measured(
    case: Input,
    project: Path,
    pulled: dict[str, Path],
    good: dict[str, tuple[float, float]],
    cpu: bool,
) -> list[Outcome]:
    """A case's verbs. `pulled`: {revision: folder} of the Hub's repository me/it, the adapter."""
    found = []
    for verb in case.verbs:
        with tempfile.TemporaryDirectory(prefix="malicious-") as place:
            folder = Path(place) / "project"
            shutil.copytree(project, folder, symlinks=True)
            case.spoil(folder)
            pulled[REVISION] = folder / "adapter"
            if case.verbs in (FINISHED, ("push", "compare")):
                (folder / "of_run").touch()
            code, seconds, mib, text = forked(verb, folder, cpu)
            executed = bool(list(folder.rglob(CANARY)))
        most_s, most_mib = good.get(verb, (0.0, 0.0))
        lines = [line for line in text.splitlines() if line.startswith("error: ")]
        bad = []
        if executed:
            bad.append("executed")
        if code not in (0, 1, 2):
            bad.append(f"code {code}")
        if "Traceback" in text:
            bad.append("traceback")
        if code in (1, 2) and not lines:
            bad.append("no error line")
        if good and seconds > most_s + SECONDS:
            bad.append(f"{seconds - most_s:.1f} s more")
        if good and mib > most_mib + MORE_MIB:
            bad.append(f"{mib - most_mib:,.0f} MiB more")
        last = [line for line in text.splitlines() if line.strip()][-1:]
        found.append(Outcome(case.name, verb, code, seconds, mib, lines[:3] or last, bad))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--verbs", nargs="*", default=[])
    parser.add_argument("--cpu", action="store_true", help="on a busy machine")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    from hub import Hub

    pulled: dict[str, Path] = {}
    hub = Hub({"me/it": pulled}, {"main": REVISION})
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    os.environ |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}  # read on import
    import peft  # noqa: F401 - in memory before the processes are forked
    import pyarrow.parquet  # noqa: F401
    import torch
    import transformers  # noqa: F401
    from transformers import AutoTokenizer, LlamaForCausalLM, Trainer  # noqa: F401

    import lora_kit.adapter.extract
    import lora_kit.plan
    import lora_kit.preview
    import lora_kit.prove.evaluate
    import lora_kit.ship.export
    import lora_kit.ship.hub
    import lora_kit.ship.merge
    import lora_kit.ship.targets  # noqa: F401
    from lora_kit.launch import prepare_process

    torch.set_num_threads(1)
    prepare_process()
    with tempfile.TemporaryDirectory(prefix="malicious-") as place:
        os.environ["LORA_KIT_CACHE"] = str(Path(place) / "cache")
        os.environ["HF_HOME"] = str(Path(place) / "hub")
        project = Path(place) / "project"
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                project.mkdir()
                make_project(project)
                code = 0
            finally:
                os._exit(code)
        if os.waitpid(pid, 0)[1]:
            raise SystemExit("the good project could not be made")
        verbs = tuple(v for v in VERBS if v != "serve")
        good = {}
        for verb in verbs:  # twice: the first fills caches
            case = Input("good", lambda d: None, (verb,))
            tries = [measured(case, project, pulled, {}, asked.cpu) for _ in range(2)]
            (one,) = min(tries, key=lambda found: found[0].seconds)
            assert one.code == 0 and not one.bad, one
            good[verb] = (one.seconds, one.mib)
            print(f"good {verb}: {one.seconds:.1f} s, {one.mib:,.0f} MiB", flush=True)
        outcomes: list[Outcome] = []
        for case in INPUTS:
            if asked.only and not any(word in case.name for word in asked.only):
                continue
            if asked.verbs:
                case = Input(case.name, case.spoil, tuple(set(case.verbs) & set(asked.verbs)))
            for one in measured(case, project, pulled, good, asked.cpu):
                outcomes.append(one)
                state = ", ".join(one.bad) or "ok"
                more = one.seconds - good[one.verb][0], one.mib - good[one.verb][1]
                why = (one.errors or [""])[0][:150]
                print(
                    f"{state:12} {one.name} / {one.verb}: exit {one.code}, {more[0]:+.1f} s, "
                    f"{more[1]:+,.0f} MiB: {why}",
                    flush=True,
                )
    bad = [one for one in outcomes if one.bad]
    print(
        f"{len({o.name for o in outcomes})} inputs, {len(outcomes)} runs of verbs, "
        f"{sum(o.code == 0 for o in outcomes)} within the bounds, "
        f"{sum(o.code != 0 for o in outcomes)} refused; {len(bad)} bad"
    )
    for one in bad:
        print(f"  {one.name} / {one.verb}: {', '.join(one.bad)}")
    if asked.out:
        asked.out.write_text(json.dumps([vars(one) for one in outcomes], indent=1) + "\n")
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
