"""LLaMA-Factory on a job of speed.py; run by the Python of its own environment.

    python scripts/bench/peers/llamafactory_sft.py JOB.json OUT.json

`shipped`: its defaults with bf16, as in each of its examples. `tuned`: no checkpointing, and the
allocator setting of lora_kit, made from inside the process (its `pure_bf16` is refused on a CPU).
Every row is counted as full. Its losses are 255/256 of ours: the first label of a row is counted,
though nothing predicts it.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
import types
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    tuned: dict[str, Any] = {}
    if job["track"] == "tuned":
        from lora_kit.speed.runtime import keep_freed_memory

        assert keep_freed_memory()
        tuned = {"disable_gradient_checkpointing": True}

    # PyPI's torchaudio and torchvision want CUDA's libraries; without them LLaMA-Factory reads no
    # pictures, but imports torchaudio all the same.
    if find_spec("torchaudio") is None:
        sys.modules["torchaudio"] = types.ModuleType("torchaudio")
        sys.modules["torchaudio"].__spec__ = ModuleSpec("torchaudio", None)

    from datasets import Dataset, DatasetDict
    from llamafactory.train.tuner import run_exp
    from transformers import TrainerCallback

    ends: list[float] = []
    losses: list[float] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            ends.append(time.perf_counter())

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            ends.append(time.perf_counter())

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            losses.extend([logs["loss"]] if "loss" in logs else [])

    rows = list(map(json.loads, Path(job["rows"]).read_text(encoding="utf-8").splitlines()))
    for row in rows:
        row["attention_mask"] = [1] * len(row["input_ids"])
    folder = Path(job["out"])
    DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(str(folder / "tokenized"))
    arguments = {
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_target": "all",
        "lora_rank": job["r"],
        "lora_alpha": job["alpha"],
        "template": "empty",
        "dataset": "rows",
        "tokenized_path": str(folder / "tokenized"),
        "model_name_or_path": job["base"],
        "output_dir": str(folder / "saved"),
        "max_steps": job["steps"],
        "cutoff_len": job["max_length"],
        "per_device_train_batch_size": job["batch"],
        "learning_rate": job["learning_rate"],
        "lr_scheduler_type": "constant",
        "seed": job["seed"],
        "data_seed": job["seed"],
        "bf16": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": job["use_cpu"],
        "disable_tqdm": True,
        **tuned,
    }
    run_exp(arguments, callbacks=[Clock()])
    packages = ("llamafactory", "trl", "peft", "transformers", "torch")
    result = {
        "seconds": [b - a for a, b in itertools.pairwise(ends)],
        "tokens": [job["batch"] * job["max_length"]] * (len(ends) - 1),
        "losses": losses,
        "versions": {name: version(name) for name in packages},
    }
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
