"""Tiers of tests, and tiny models and data that the tests make themselves; nothing is fetched.

A test is in the quick tier (`./scripts/test.sh`) unless it, or its module, is marked:

- `slow`: only `./scripts/test.sh --all` runs it. Mark what takes more than about two seconds on a
  quiet core: whole trainings, other than one journey for each kind of trainer, and processes that
  import torch. Whole modules: `pytestmark = pytest.mark.slow`; a test in one that is quick all the
  same: `quick`.
- `gpu`: needs a GPU and is in no tier: `./scripts/test.sh -m gpu`.

Where the variable CI is set nothing may be skipped: a skip is a failure.

A test passes on a busy machine too: it waits for events (`processes.until`), measures no time, and
a limit is only there for what would hang (`processes.LIMIT_S`). Tests that only look at a finished
run share one that is trained once (the fixtures in `trained.py` and below). Importing the libraries
takes a child process ten seconds of CPU time: use `processes.here`, or `forked` for several ranks,
unless the test is about the process itself.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, TypeVar

import hypothesis
import pytest

# Read by the libraries when they are imported, in this process and in those the tests start.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# On models this small more threads only wait for each other, and spin while they do.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

# No deadlines and no health check of speed: the same examples however busy the machine is.
hypothesis.settings.load_profile("ci")

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "the",
    "lazy",
    "dog",
    "while",
    "seven",
    "wizards",
    "make",
    "toxic",
    "brew",
    "for",
    "an",
    "evil",
    "queen",
    "and",
    "her",
    "jack",
    "of",
    "all",
    "trades",
    "who",
    "knows",
    "how",
    "to",
    "bake",
    "bread",
    "in",
    "a",
    "stone",
    "oven",
    "every",
    "morning",
]


def sentences(count: int, seed: int = 0) -> list[str]:
    """Sentences of ten words, all different, the same for the same seed."""
    import random

    chooser = random.Random(seed)
    return [" ".join(chooser.choices(WORDS, k=10)) + f" {n}." for n in range(count)]


def make_tokenizer(folder: Path, chat_template: str | None = None, bos: bool = False) -> Any:
    """A byte-level BPE with 400 tokens: <eos>, <pad>, <s>, <|im_end|> and merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<eos>", "<pad>", "<s>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(200), trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 2)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        pad_token="<pad>",
        bos_token="<s>" if bos else None,
        chat_template=chat_template,
    )
    fast.save_pretrained(str(folder))
    return fast


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_base(folder: Path, chat_template: str | None = CHATML, **config: Any) -> Path:
    """A random Llama of two layers, width 64 (NF4 quantizes in blocks of 64), with a tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    make_tokenizer(folder, chat_template)
    settings = {
        "vocab_size": 400,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 1,
        **config,
    }
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**settings)).save_pretrained(folder)
    return folder


Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)


def _not_skipped(report: Report) -> Report:
    """The report itself; where CI is set, that of a failure if it tells of a skip."""
    if report.skipped and os.environ.get("CI") and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, which is a failure where CI is set: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    return _not_skipped((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    return _not_skipped((yield))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules with many slow tests first: what begins last is short, so that two processes end at
    about the same time."""
    slow: dict[Path, int] = {}
    for item in items:
        if "slow" in item.keywords:
            slow[item.path] = slow.get(item.path, 0) + 1
    items.sort(key=lambda item: -slow.get(item.path, 0))


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny base with a ChatML template, float32. Do not write into it."""
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def plain_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without a chat template."""
    return make_base(tmp_path_factory.mktemp("plain_base"), chat_template=None)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is prepared is kept here, for these tests and the processes they start."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["LORA_KIT_CACHE"] = str(folder)
    return folder


@functools.cache  # gc.get_freeze_count() counts a million objects each time
def freeze_libraries() -> None:
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def without_what_costs_each_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The garbage collector leaves alone what the libraries made, which takes 0.3 s a visit; and
    the plan measures this machine in a moment."""
    if "transformers.trainer" in sys.modules:
        freeze_libraries()
    if "lora_kit.plan" in sys.modules:
        monkeypatch.setattr("lora_kit.plan._PROBED_S", 0.0)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of one test; its folder is not there yet."""
    monkeypatch.setenv("LORA_KIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tokenizer with a chat template; some modules have their own."""
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), CHATML)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, entered."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def cpt_run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of `cpt`. Change nothing in it: `trained.copied` gives a copy."""
    from trained import finish_in

    return finish_in(tmp_path_factory.mktemp("cpt_run"), base)


@pytest.fixture(scope="session")
def sft_run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of `sft`."""
    from trained import finish_in

    return finish_in(tmp_path_factory.mktemp("sft_run"), base, "sft")


RunMaker = Callable[..., Path]


@pytest.fixture
def run_file(work: Path, base: Path) -> RunMaker:
    """Writes run.yaml and its data into the working folder; dotted keys replace settings.

    run_file("cpt", **{"train.max_steps": 2}) -> Path
    """

    def write(recipe: str = "cpt", **changes: Any) -> Path:
        if recipe == "cpt":
            (work / "text.txt").write_text("<|endoftext|>".join(sentences(60)), encoding="utf-8")
            source = "text.txt"
        else:
            rows = [
                {"prompt": f"What is {n}?", "completion": f"It is {s}"}
                for n, s in enumerate(sentences(60))
            ]
            (work / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
            source = "rows.jsonl"
        values: dict[str, Any] = {
            "recipe": recipe,
            "name": "test",
            "base": {"model": str(base), "dtype": "float32"},
            "adapter": {"r": 4, "lora_alpha": 8},
            "data": {"train": source, "eval": 0.4},
            "train": {
                "max_steps": 4,
                "max_length": 128,
                "per_device_train_batch_size": 4,
                "learning_rate": 1e-2,
                "warmup_steps": 0,  # the first step of a warm-up has a rate of 0
                "logging_steps": 1,
            },
            "prove": {"budget": None},
        }
        for key, value in changes.items():
            *sections, last = key.split(".")
            place = values
            for section in sections:
                place = place.setdefault(section, {})
            place[last] = value
        file = work / "run.yaml"
        file.write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML
        return file

    return write
