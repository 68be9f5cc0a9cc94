"""Is the memory that a plan predicts the memory that training takes, and is its speed?

    python scripts/bench/memory.py --out memory.json              # every shape, ten minutes
    python scripts/bench/memory.py --only llama-40m qwen2         # shapes whose name begins so

Each shape is a random model made from a configuration. `lora-kit plan` says what its run will need;
then the recipe itself trains a few steps in a process of its own, whose largest resident memory up
to the end of training is what was predicted (on a GPU: torch's largest allocated); and evaluates,
which should not raise it. The planner has few constants, fitted to the Llama and Gemma shapes; the
others are new to it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lora_kit import nano

LLAMAS = {  # hidden, intermediate, layers, heads, groups of keys
    "10m": (256, 688, 6, 4, 4),
    "40m": (512, 1376, 8, 8, 8),
    "100m": (768, 2048, 12, 12, 4),
    "250m": (1024, 2816, 18, 16, 8),
}


def llama(size: str, vocabulary: int = 32000, tied: bool = False) -> dict[str, Any]:
    """A configuration of transformers, as keywords."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    shape = dict(zip((*names, "num_key_value_heads"), LLAMAS[size], strict=True))
    common = {"vocab_size": vocabulary, "tie_word_embeddings": tied}
    return {"model_type": "llama", "max_position_embeddings": 4096, **shape, **common}


QWEN2 = {**llama("100m", 60000, True), "model_type": "qwen2"}
GEMMA = {**llama("40m", 128000, True), "model_type": "gemma2", "head_dim": 64}
PYTHIA = {
    "model_type": "gpt_neox", "vocab_size": 50304, "hidden_size": 512, "num_hidden_layers": 8,
    "intermediate_size": 2048, "num_attention_heads": 8, "tie_word_embeddings": False,
}  # fmt: skip
# name: (configuration, rows of a pass, tokens of a row, more overrides of the run)
SHAPES: dict[str, tuple[dict[str, Any], int, int, list[str]]] = {
    "llama-10m 4x256": (llama("10m"), 4, 256, []),
    "llama-40m 4x256": (llama("40m"), 4, 256, []),
    "llama-40m 4x256 plain": (llama("40m"), 4, 256, ["speed=plain"]),
    "llama-40m 4x256 nf4": (llama("40m"), 4, 256, ["base.quantize=nf4"]),
    "llama-40m 4x256 float32": (llama("40m"), 4, 256, ["base.dtype=float32"]),
    "llama-40m 4x256 top": (llama("40m"), 4, 256, ["adapter.layers_to_transform=[6,7]"]),
    "llama-40m 2x1024": (llama("40m"), 2, 1024, []),
    "llama-40m 1x4096": (llama("40m"), 1, 4096, []),
    "llama-40m 2x1024 recomputed": (llama("40m"), 2, 1024, ["train.gradient_checkpointing=true"]),
    "llama-100m 4x512 tied": (llama("100m", tied=True), 4, 512, []),
    "llama-100m 2x512 nf4": (llama("100m"), 2, 512, ["base.quantize=nf4"]),
    "llama-250m 2x256": (llama("250m"), 2, 256, []),
    "llama-250m 1x2048 nf4": (llama("250m"), 1, 2048, ["base.quantize=nf4"]),
    "qwen2-100m 2x512": (QWEN2, 2, 512, []),
    "gemma2-40m 2x256": (GEMMA, 2, 256, []),
    "gemma2-40m 2x256 plain": (GEMMA, 2, 256, ["speed=plain"]),
    "pythia-40m 2x512": (PYTHIA, 2, 512, []),
}
FITTED = ("llama", "gemma2")  # shapes whose names begin so


def make(config: dict[str, Any], folder: Path) -> None:
    """A random model in bfloat16 with nano's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    ends = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    made: Any = AutoConfig.for_model(**{**config, **ends})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16).save_pretrained(folder)
    for file in nano.MODEL.glob("*token*"):
        shutil.copy(file, folder)


def run_file(folder: Path) -> Path:
    """A run of text that fills every row."""
    words = ["field", "model", "layer", "rank", "token", "adapts", "learns", "keeps", "of", "the"]
    choose = random.Random(0).choices
    texts = (" ".join(choose(words, k=2000)) for _ in range(120))
    (folder / "text.txt").write_text("<|endoftext|>".join(texts), encoding="utf-8")
    file = folder / "run.yaml"
    values = {"recipe": "cpt", "name": "run", "base": {"model": "base"}, "prove": {"shots": 0}}
    data = {"train": "text.txt", "eval": 0.1}
    file.write_text(json.dumps({**values, "data": data}), encoding="utf-8")  # JSON is YAML
    return file


def command(code: str, arguments: list[str], folder: Path) -> dict[str, Any]:
    """What a process of ours prints as the last line, JSON."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=folder, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return dict(json.loads(done.stdout.splitlines()[-1]))


PLAN = "from lora_kit.cli import main; main()"
TRAIN = """
import json, sys
from lora_kit import launch
from lora_kit.train.callbacks import peak_mib

report = launch.train(sys.argv[1], *sys.argv[2:])
print(json.dumps({
    "mib": report["memory"]["measured_mib"],
    "whole_mib": peak_mib(),
    "tokens_per_second": report["training"]["tokens_per_second"],
}))
"""


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Predicted and measured, of one shape."""
    config, rows, length, more = SHAPES[name]
    make(config, folder / "base")
    settings = [
        f"train.per_device_train_batch_size={rows}", f"train.max_length={length}", *more,
        "train.max_steps=6", "train.logging_steps=2",
    ]  # fmt: skip
    file = str(run_file(folder))
    plan = command(PLAN, ["plan", file, *settings, "--json"], folder)
    found = command(TRAIN, [file, *settings], folder)
    return {
        "shape": name,
        "fitted": name.startswith(FITTED),
        "predicted_mib": plan["total_mib"],
        "measured_mib": round(found["mib"], 1),
        "whole_mib": round(found["whole_mib"], 1),
        "off": round(plan["total_mib"] / found["mib"] - 1, 4),
        "predicted_tokens_per_second": plan["tokens_per_second"],
        "tokens_per_second": found["tokens_per_second"],
        "memory_mib": plan["memory_mib"],
        "chosen": plan["chosen"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[""], help="names begin with")
    parser.add_argument("--out", type=Path, help="write JSON there")
    options = parser.parse_args()
    os.environ.setdefault("LORA_KIT_CACHE", tempfile.mkdtemp())
    rows = []
    for name in SHAPES:
        if name.startswith(tuple(options.only)):
            with tempfile.TemporaryDirectory() as folder:
                try:
                    row = measure(name, Path(folder))
                except RuntimeError as error:
                    print(f"{name:<30} failed: {error}", file=sys.stderr)
                    continue
            rows.append(row)
            print(
                f"{name:<30} predicted {row['predicted_mib']:>7,.0f} MiB  "
                f"measured {row['measured_mib']:>7,.0f}  {row['off']:+.1%}   "
                f"with evaluation {row['whole_mib'] / row['measured_mib']:.2f}   "
                f"{row['predicted_tokens_per_second']:>7,.0f} tokens/s "
                f"({row['tokens_per_second']:,.0f})",
                flush=True,
            )
    if options.out:
        names = ("torch", "transformers", "peft", "bitsandbytes")
        found = {
            "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
            "versions": {name: version(name) for name in names},
            "shapes": rows,
        }
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
