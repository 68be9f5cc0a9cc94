"""What speed.py needs a process with torch for: seeded weights, labelled rows, the matmul ceiling.

python scripts/bench/speed_parts.py weights 40m FOLDER       # a transformers folder, bf16
python scripts/bench/speed_parts.py rows RUN.yaml OUT.jsonl  # the rows lora_kit trains on
python scripts/bench/speed_parts.py ceiling 40m 100m         # JSON: GFLOP/s of bf16 matmuls
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import time
from pathlib import Path

VOCABULARY, LONGEST = 32_000, 4096
# hidden size, layers, intermediate size; heads of 64, embeddings tied.
SHAPES = {
    "10m": (256, 4, 688),
    "40m": (512, 8, 1376),
    "100m": (768, 12, 2048),
    "250m": (1024, 16, 2816),
    "1b": (2048, 16, 8192),
}


def multiplied(shape: str) -> int:
    """Weights that each token is multiplied with: all linear layers and the head, once."""
    hidden, layers, wide = SHAPES[shape]
    return layers * (4 * hidden * hidden + 3 * hidden * wide) + VOCABULARY * hidden


def weights(shape: str, folder: Path) -> None:
    """Random weights of seed 0, with nano's tokenizer, of whose 4,096 tokens the texts are."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from lora_kit import nano

    hidden, layers, wide = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=wide,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=LONGEST,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=3,
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config)
    model.bfloat16().save_pretrained(folder)
    for file in nano.MODEL.iterdir():
        if "token" in file.name or "template" in file.name:
            shutil.copy(file, folder)


def rows(run_file: Path, out: Path) -> None:
    """Write the rows of a run, in the order of its data set, as `input_ids` and `labels`."""
    from lora_kit.base.pin import pin
    from lora_kit.launch import read_run
    from lora_kit.tasks.encode import rows_of

    run, recipe = read_run(run_file, [])
    train = rows_of(recipe.task, run, pin(run.base))[1].train
    with out.open("w", encoding="utf-8") as opened:
        for number in range(len(train)):
            row = train[number]
            row = {name: row[name].tolist() for name in ("input_ids", "labels")}
            opened.write(json.dumps(row) + "\n")


def ceiling(shape: str, tokens: int = 1024, repeats: int = 7) -> float:
    """GFLOP/s of the forward and the input gradient of every linear layer and the head in bf16,
    each as one matmul into memory that it has; medians of `repeats`."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden, layers, wide = SHAPES[shape]
    matrices = [(hidden, hidden, 4 * layers), (hidden, wide, 2 * layers), (wide, hidden, layers)]
    flop = seconds = 0.0
    for inside, outside, count in [*matrices, (hidden, VOCABULARY, 1)]:
        weight = torch.randn(outside, inside, device=device).bfloat16()
        x = torch.randn(tokens, inside, device=device).bfloat16()
        y = torch.randn(tokens, outside, device=device).bfloat16()
        for left, right, out in ((x, weight.t(), torch.empty_like(y)), (y, weight, x.clone())):
            taken = []
            for _ in range(repeats + 2):
                started = time.perf_counter()
                torch.mm(left, right, out=out)
                if device == "cuda":
                    torch.cuda.synchronize()
                taken.append(time.perf_counter() - started)
            flop += count * 2 * tokens * inside * outside
            seconds += count * statistics.median(taken[2:])
    return flop / seconds / 1e9


def main() -> None:
    what, *arguments = sys.argv[1:]
    if what == "weights":
        weights(arguments[0], Path(arguments[1]))
    elif what == "rows":
        rows(Path(arguments[0]), Path(arguments[1]))
    else:
        print(json.dumps({shape: round(ceiling(shape), 1) for shape in arguments}))


if __name__ == "__main__":
    main()
