"""Pairs per second of lora_kit's DPO and of TRL's, best tuned, in turn, each in its own process.

    python scripts/bench/preference.py pairs.jsonl
    python scripts/bench/preference.py pairs.jsonl --rounds 3 --steps 12 --batch 2

Both train from the same seeded weights (a Llama of 40M parameters) on the same texts: r = 16 on all
linear layers, the same batch and learning rate, no chat template. TRL: weights in --dtype without
autocast over them, no checkpointing, the reference precomputed, freed memory kept (mallopt). Both
train one epoch on the same pairs, so that the work is the same whatever their order; the seconds
are those of all steps, and computing the reference is in neither figure. Where other programs use
the machine, the pairs per second of CPU time say more. Rows are prompt, chosen and rejected; those
over --length tokens, which TRL would cut and lora_kit would drop, are skipped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, ClassVar

from transformers import TrainerCallback
from transformers.trainer import DEFAULT_CALLBACKS

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=512, help="tokens of a side at most")
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        help="of the weights; float32 where the CPU has no bf16 instructions",
    )
    parser.add_argument("--shape", default="40m", help="a shape of speed_parts.py")
    parser.add_argument("--side", choices=("ours", "trl"), help="one measurement, in this process")
    parser.add_argument(
        "--folder", type=Path, help="of the base and the rows; made if it is missing"
    )
    asked = parser.parse_args()
    if asked.side:
        print(json.dumps({"ours": ours, "trl": trl}[asked.side](asked)))
        return
    with tempfile.TemporaryDirectory() as made:
        asked.folder = asked.folder or Path(made)
        prepare(asked)
        found: dict[str, list[dict[str, Any]]] = {"ours": [], "trl": []}
        for _, side in itertools.product(range(asked.rounds), found):
            command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
            command += ["--folder", str(asked.folder)]
            out = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout
            found[side].append(json.loads(out.splitlines()[-1]))
            print(side, found[side][-1], file=sys.stderr)
    summary: dict[str, Any] = {"rounds": found}
    for figure in ("pairs_per_second", "pairs_per_cpu_second"):
        own, other = (statistics.median(one[figure] for one in each) for each in found.values())
        summary[figure] = {"ours": own, "trl": other, "ratio": round(own / other, 2)}
    print(json.dumps(summary, indent=1))


def prepare(asked: argparse.Namespace) -> None:
    """The base, and the rows that both can train on whole."""
    from transformers import AutoTokenizer

    base = asked.folder / "base"
    if not base.exists():
        subprocess.run(
            [sys.executable, str(HERE / "speed_parts.py"), "weights", asked.shape, str(base)],
            check=True,
        )
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(base)
    (base / "chat_template.jinja").unlink(missing_ok=True)

    def size(text: str) -> int:
        return len(tokenizer(text).input_ids)

    rows = map(json.loads, asked.pairs.read_text(encoding="utf-8").splitlines())
    fitting = (
        {name: row[name] for name in ("prompt", "chosen", "rejected")}
        for row in rows
        if max(size(row["prompt"] + row[side]) for side in ("chosen", "rejected"))
        < asked.length - 4
    )
    for name, count in (("pairs", asked.batch * asked.steps), ("eval", 4)):
        some = list(itertools.islice(fitting, count))
        if len(some) < count:
            raise SystemExit(f"{asked.pairs}: too few pairs: lower --steps, or raise --length")
        text = "".join(json.dumps(row) + "\n" for row in some)
        (asked.folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


class Clock(TrainerCallback):
    """The time, and the CPU time of this process, at the end of each step."""

    ends: ClassVar[list[tuple[float, float]]] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.ends.append((time.perf_counter(), time.process_time()))

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.on_train_begin()


def result(batch: int, losses: list[float]) -> dict[str, Any]:
    from lora_kit.train.callbacks import peak_mib

    first, last = Clock.ends[0], Clock.ends[-1]
    pairs = batch * (len(Clock.ends) - 1)
    peak = peak_mib()
    return {
        "pairs_per_second": round(pairs / (last[0] - first[0]), 3),
        "pairs_per_cpu_second": round(pairs / (last[1] - first[1]), 3),
        "peak_mib": round(peak),
        "losses": losses,
    }


def ours(asked: argparse.Namespace) -> dict[str, Any]:
    import os

    import yaml

    from lora_kit.launch import train

    values = {
        "recipe": "dpo",
        "name": f"ours-{time.time_ns()}",
        "base": {"model": str(asked.folder / "base"), "dtype": asked.dtype},
        "adapter": {"r": 16, "lora_alpha": 32},
        "data": {
            "train": str(asked.folder / "pairs.jsonl"),
            "eval": str(asked.folder / "eval.jsonl"),
            "limits": {"dropped": 1.0, "exact_leaks": 10**6, "near_leaks": 1.0},
        },
        "train": {
            "max_steps": asked.steps,
            "max_length": asked.length,
            "per_device_train_batch_size": asked.batch,
            "learning_rate": 1e-5,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "logging_steps": 1,
        },
    }
    callbacks: list[Any] = DEFAULT_CALLBACKS
    callbacks.append(Clock)
    os.chdir(asked.folder)
    Path("run.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    train("run.yaml")
    metrics = Path("runs", str(values["name"]), "metrics.jsonl").read_text(encoding="utf-8")
    rows = map(json.loads, metrics.splitlines())
    return result(asked.batch, [row["loss"] for row in rows if "loss" in row])


def trl(asked: argparse.Namespace) -> dict[str, Any]:
    from lora_kit.speed.runtime import keep_freed_memory

    assert keep_freed_memory()
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    lines = (asked.folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    trainer = DPOTrainer(
        model=str(asked.folder / "base"),
        args=DPOConfig(
            output_dir=str(asked.folder / "trl"),
            max_steps=asked.steps,
            max_length=asked.length,
            per_device_train_batch_size=asked.batch,
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            gradient_checkpointing=False,
            precompute_ref_log_probs=True,
            model_init_kwargs={"dtype": asked.dtype},
        ),
        train_dataset=Dataset.from_list(list(map(json.loads, lines))),
        peft_config=LoraConfig(
            r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[Clock()],
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return result(asked.batch, losses)


if __name__ == "__main__":
    main()
