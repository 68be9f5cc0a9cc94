"""Every shipped run file is valid, says how it is started, and nano's run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import sentences

import lora_kit
from lora_kit.run import load_run, shipped
from lora_kit.schema import Run
from lora_kit.tasks.recipe import load_recipe
from lora_kit.train.arguments import check_installed, training_arguments

CONFIGS = sorted((shipped("recipes") / "configs").rglob("*.yaml"))
EXPECTED = {
    "llama-3.1-8b-qlora": ("meta-llama/Llama-3.1-8B", "nf4"),
    "llama-3.3-70b-fsdp-qlora": ("meta-llama/Llama-3.3-70B-Instruct", "nf4"),
    "minilm-classify": ("sentence-transformers/all-MiniLM-L6-v2", "none"),
    "nano-cpt": ("nano", "nf4"),
    "nano-dpo": ("nano", "none"),
    "nano-sft": ("nano", "none"),
    "qwen3-0.6b-sft": ("Qwen/Qwen3-0.6B", "none"),
    "qwen3-8b-qlora": ("Qwen/Qwen3-8B", "nf4"),
    "smollm2-135m-sft": ("HuggingFaceTB/SmolLM2-135M", "none"),
}


def load(config: Path, folder: Path) -> Run:
    """Load a copy of a config with the data it names beside it, as `lora-kit copy` leaves it."""
    copy = folder / "run.yaml"
    copy.write_text(config.read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    pairs = [
        {"prompt": f"What does {word} do?", "chosen": f"{word}.", "rejected": f"It is {word}."}
        for word in sentences(60)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")
    (folder / "rows.csv").write_text("text,label\na,b\n", encoding="utf-8")
    (folder / "texts").mkdir()
    return load_run(copy, task_of=lambda file: load_recipe(file).task)


def test_all_are_here() -> None:
    assert [config.stem for config in CONFIGS] == sorted(EXPECTED)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_is_valid_and_says_how_to_start_it(config: Path, tmp_path: Path) -> None:
    run = load(config, tmp_path)
    assert run.name == config.stem
    assert (run.base.model, run.base.quantize) == EXPECTED[config.stem]
    check_installed(run)
    arguments = training_arguments(run, tmp_path / "checkpoints")
    assert arguments.learning_rate == run.train.learning_rate
    header = [line for line in config.read_text().splitlines() if line.startswith("#")]
    assert re.search(r"#   lora-kit (train|copy) ", "\n".join(header))


@pytest.mark.slow
def test_nano_learns_preferences(work: Path) -> None:
    """Run for real; `lora-kit demo` runs the other two of nano, and so does its test."""
    load(shipped("recipes") / "configs" / "nano-dpo.yaml", work)
    # float32: many CPUs compute bfloat16 ten times slower.
    changes = ("base.dtype=float32", "train.max_steps=2", "train.logging_steps=1", "data.eval=0.4")
    report = lora_kit.train(work / "run.yaml", *changes)
    assert report["training"]["steps"] == 2
    assert report["domain"]["documents"] >= 20
    assert report["general"]["documents"] >= 20
    assert (work / "runs/nano-dpo/adapter/adapter_model.safetensors").is_file()
