"""How well LoRA and QLoRA adapt a 260K-parameter Llama to Shakespeare's plays.

    python scripts/bench/shakespeare.py --base stories260K --text tinyshakespeare.txt

The last tenth of the text is held out. r=8 on all linear layers, 300 steps of 16 rows of 256
tokens, float32; then the same on NF4. Prints the loss on the held-out tenth before and after, in
nats per token. A plain PEFT loop of the same geometry came to 2.62 at a learning rate of 1e-2.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

from lora_kit.launch import train

LEARNING_RATE = 1e-2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--base", type=Path, required=True, help="the model's folder")
    parser.add_argument("--text", type=Path, required=True, help="the plays, one text file")
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    text = options.text.read_text(encoding="utf-8")
    cut = len(text) * 9 // 10
    base = options.base.resolve()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("train.txt").write_text(text[:cut], encoding="utf-8")
        Path("eval.txt").write_text(text[cut:], encoding="utf-8")
        for quantize in ("none", "nf4"):
            values = {
                "recipe": "cpt",
                "name": f"shakespeare-{quantize}",
                "base": {"model": str(base), "dtype": "float32", "quantize": quantize},
                "adapter": {"r": 8, "lora_alpha": 16},
                "data": {"train": "train.txt", "eval": "eval.txt"},
                "train": {
                    "learning_rate": LEARNING_RATE,
                    "max_steps": options.steps,
                    "max_length": 256,
                    "per_device_train_batch_size": 16,
                    "logging_steps": 50,
                },
            }
            Path("run.yaml").write_text(json.dumps(values), encoding="utf-8")
            report = train("run.yaml")
            loss, training = report["domain"]["loss"], report["training"]
            print(
                f"{quantize}: {loss['base']:.3f} -> {loss['adapted']:.3f} nats per token, "
                f"{training['tokens_per_second']:,.0f} tokens/s, {training['seconds']:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
