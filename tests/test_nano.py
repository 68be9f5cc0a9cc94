"""The embedded model: its text is split in one place, its files are whole and as good as said."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import processes
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_kit import nano
from lora_kit.nano import text as nano_text

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_nano", ROOT / "scripts" / "make_nano.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_nano"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(nano.MODEL)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(nano.MODEL)


@pytest.mark.slow
def test_importing_nano_loads_no_library_and_reads_no_text():
    code = (
        "import sys, lora_kit.nano as nano\n"
        "assert not {'torch', 'transformers', 'tokenizers', 'pydoc_data'} & set(sys.modules)\n"
        "assert nano.docstrings.cache_info().misses == 0\n"
        "assert nano.docstrings() and nano.topics()\n"
        "assert not {'torch', 'antigravity', 'this', 'idlelib'} & set(sys.modules)\n"
    )
    done = processes.run([sys.executable, "-c", code], cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_held_out_shares_are_those_stated_and_do_not_move():
    # Fixed names: were the hash to change, nano would be tested on what it learned.
    named = {name: nano.held_out(name) for name in ("heapq", "json.load", "os.readv", "ascii")}
    assert named == {
        "heapq": None,
        "json.load": None,
        "os.readv": "general",
        "ascii": "instructions",
    }
    names = [f"module.function_{number}" for number in range(10_000)]
    kinds = [nano.held_out(name) for name in names]
    assert kinds == [nano.held_out(name) for name in names]
    assert abs(kinds.count("general") / len(kinds) - 0.05) < 0.01
    assert abs(kinds.count("instructions") / len(kinds) - 0.20) < 0.015


def test_topics_and_docstrings_are_there_once_each():
    assert len(nano.topics()) >= 60
    assert nano.topics() == sorted(nano.topics())
    names = [name for name, _ in nano.docstrings()]
    assert len(names) == len(set(names)) > 5000
    assert {"len", "str.split", "json.dumps", "heapq.heappush", "os.getcwd"} <= set(names)
    assert not [name for name in names if name.startswith(("test.", "pydoc_data", "lib2to3"))]


def test_a_replaced_hook_changes_no_text(monkeypatch):
    # typer replaces sys.excepthook: `preview` and `compare` would read other rows than a run.
    for hook in ("excepthook", "displayhook", "breakpointhook", "unraisablehook"):
        monkeypatch.setattr(sys, hook, getattr(sys, f"__{hook}__"))
    before = list(nano_text._compiled())
    assert "sys.excepthook" in dict(before)
    for hook in ("excepthook", "displayhook", "breakpointhook", "unraisablehook"):
        monkeypatch.setattr(sys, hook, lambda *args: None)
    assert list(nano_text._compiled()) == before


def test_general_documents_are_held_out_long_and_distinct():
    names, texts = zip(*nano.general(), strict=True)
    assert len(names) >= 80
    assert {nano.held_out(name) for name in names} == {"general"}
    assert min(len(text.encode()) for text in texts) >= 200
    assert len({nano_text.squeeze(text) for text in texts}) == len(texts)


def test_instructions_are_sentences_about_names_never_trained_on():
    rows = nano.instructions()
    assert len(rows) >= 700
    general = {nano_text.squeeze(text) for _, text in nano.general()}
    for row in rows:
        assert set(row) == {"prompt", "completion"}
        name = re.fullmatch(r"What does `([\w.]+)` do\?", row["prompt"])
        assert name and nano.held_out(name[1]) == "instructions"
        assert not re.search(r"(^|\.)_|^test\b", name[1])
        completion = row["completion"]
        assert len(completion) <= 200 and len(completion.split()) >= 3
        assert "\n" not in completion and "->" not in completion
        assert completion not in general
    assert len({row["completion"] for row in rows}) == len(rows)


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Push item onto heap.\n\nMore.", "Push item onto heap."),
        ("Return the value, e.g. a\nnumber. Then more.", "Return the value, e.g. a number."),
        ("Dump x in version 3.4 form", "Dump x in version 3.4 form"),
        ("dict() -> new empty dictionary", None),
        ("find(sub[, start]) is a signature", None),
        ("Too short.", None),
        ("The following names are defined here:", None),
        ("word " * 60 + "end.", None),
    ],
)
def test_the_first_sentence_is_prose_or_nothing(docstring, sentence):
    assert nano_text._sentence(docstring) == sentence


def test_training_documents_hold_no_held_out_docstring_and_no_topic(script):
    modules = {"heapq", "textwrap", "json", "sched", "csv", "bisect"}
    found = script.documents(modules)
    kinds = found.kinds()
    assert set(kinds) == {"tests", "library", "prose", "chat"}
    assert all(kinds[kind] for kind in ("library", "prose", "chat"))
    trained = [nano_text.squeeze(text) for texts in kinds.values() for text in texts]
    everything = "\n".join(trained)
    held = [(name, nano_text.squeeze(t)) for name, t in nano.docstrings() if nano.held_out(name)]
    assert not {text for _, text in held} & set(trained)
    # Of fewer words than the guard's, only those of these modules: "Get value." stands anywhere.
    mine = [text for name, text in held if name.split(".")[0] in modules]
    assert len(mine) > 10
    assert not [text for text in mine if f'""" {text} """' in everything.replace('"""', ' """ ')]
    assert not [text for _, text in held if len(text.split()) >= 8 and text in everything]
    assert not [name for name, text in nano.topics() if nano_text.squeeze(text)[:80] in everything]


def test_texts_that_share_a_run_of_words_are_told_apart(script):
    found = script.Documents(prose=["one two three four five six seven eight nine"])
    texts = [("a", "two three four five six seven\neight nine ten"), ("b", "two three four five")]
    assert script.unshared(found, texts) == [texts[1]]


def test_cutting_takes_the_docstring_and_nothing_else(script):
    source = (
        'def f():\n    """Über\n    two lines."""\n    return "ü"\n\n\ndef g(): "Ü."; return 1\n'
    )
    tree = nano_text.ast.parse(source)
    nodes = [node for _, _, node in nano_text.definitions("m", tree)]
    assert script.cut(source, nodes) == 'def f():\n    return "ü"\n\n\ndef g(): ; return 1\n'


def test_the_written_out_attention_is_the_fused_one(script):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 17, 64) for heads in (4, 2, 2))
    ours, _ = script.causal_attention(None, query, key, value, None, scaling=64**-0.5)
    fused = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(ours, fused.transpose(1, 2))


def test_a_stream_predicts_each_token_once(script):
    rng = script.random.Random(0)
    stream = script.Stream([[5, 6, 7], [8, 9]], rng)
    windows = [stream.window(4) for _ in range(3)]
    assert all(len(window) == 5 for window in windows)
    assert [window[0] for window in windows[1:]] == [window[-1] for window in windows[:-1]]
    read = windows[0] + windows[1][1:] + windows[2][1:]
    assert sorted(read[: stream.tokens]) == [0, 0, 5, 6, 7, 8, 9]  # an epoch, end markers and all
    assert stream.given == 12


def test_the_files_are_small_whole_and_without_paths():
    files = {path.name for path in nano.MODEL.iterdir()}
    assert files == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (nano.MODEL / "model.safetensors").stat().st_size <= 8_000_000
    for name in files - {"model.safetensors", "tokenizer.json"}:
        assert not re.search(r"/(home|root|work|tmp|usr)/", (nano.MODEL / name).read_text())
    config = json.loads((nano.MODEL / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["model_type"] == "llama"
    assert config["tie_word_embeddings"] and config["max_position_embeddings"] == 512
    generation = json.loads((nano.MODEL / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [0, 2] and generation["pad_token_id"] == 3


def test_the_model_has_the_parameters_its_card_states(model):
    card = (nano.MODEL / "README.md").read_text()
    stated = re.search(r"\| Parameters \| ([\d,]+) \|", card)
    assert stated
    assert sum(p.numel() for p in model.parameters()) == int(stated[1].replace(",", ""))
    assert model.dtype == torch.bfloat16


def test_the_tokenizer_gives_back_every_text(tokenizer):
    everything = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x11000)]))
    texts = [
        "",
        " ",
        "\n\n\t  x \r\n",
        "it 's . a , b !",
        "\x00\x7f",
        everything,
        "日本 🐍 é e\u0301",
    ]
    for text in texts:
        assert tokenizer.decode(tokenizer(text, verbose=False)["input_ids"]) == text
    assert (
        tokenizer("plain")["input_ids"] == tokenizer("plain", add_special_tokens=False)["input_ids"]
    )


def test_the_markers_are_single_tokens(tokenizer):
    markers = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    assert [tokenizer(marker)["input_ids"] for marker in markers] == [[0], [1], [2], [3]]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (0, 3, None)
    assert len(tokenizer) == 4096 and tokenizer.model_max_length == 512
    assert not tokenizer.clean_up_tokenization_spaces


def test_the_chat_template_writes_chatml(tokenizer, script):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False)
    assert rendered == ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n")
    assert rendered == script.chat("Hi", "Yes.")
    asked = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert asked == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.slow
def test_the_model_predicts_docstrings_it_never_saw(script, model, tokenizer):
    encoded = script.encode_all(tokenizer, nano.general()[:20])
    assert script.bits_per_byte(model, encoded) < 1.75
