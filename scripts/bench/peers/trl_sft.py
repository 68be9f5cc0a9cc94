"""TRL's SFTTrainer with PEFT on a job of speed.py; run by the Python of TRL's own environment.

    python scripts/bench/peers/trl_sft.py JOB.json OUT.json

`shipped`: the model by name, every default of SFTConfig. `tuned`: weights in bf16 without autocast
over them, no checkpointing, conversations packed, and the allocator setting of lora_kit, made from
inside the process.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    tuned: dict[str, Any] = {}
    if job["track"] == "tuned":
        from lora_kit.speed.runtime import keep_freed_memory

        assert keep_freed_memory()
        tuned = {"gradient_checkpointing": False, "bf16": False}
        tuned["model_init_kwargs"] = {"dtype": "bfloat16"}
        if job["chat"]:  # 3.6 conversations fill a packed row: about as many tokens a step
            tuned |= {"packing": True, "per_device_train_batch_size": job["batch"] // 4}

    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback, set_seed
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        ends: list[float]

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.ends = [time.perf_counter()]

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.ends.append(time.perf_counter())

    rows = list(map(json.loads, Path(job["rows"]).read_text(encoding="utf-8").splitlines()))
    set_seed(job["seed"])
    clock = Clock()
    trainer = SFTTrainer(
        model=job["base"],
        args=SFTConfig(
            output_dir=job["out"],
            max_steps=job["steps"] or -1,
            num_train_epochs=job["epochs"],
            learning_rate=job["learning_rate"],
            lr_scheduler_type="constant",
            seed=job["seed"],
            data_seed=job["seed"],
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=job["use_cpu"],  # else bf16, its default, is refused there
            disable_tqdm=True,
            max_length=job["max_length"],
            **{"per_device_train_batch_size": job["batch"], **tuned},
        ),
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(
            r=job["r"],
            lora_alpha=job["alpha"],
            # "all-linear" in words: PEFT takes no layers beside it.
            target_modules=[f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")],
            layers_to_transform=job["layers"],
            task_type="CAUSAL_LM",
        ),
        callbacks=[clock],
    )
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    tokens = [0, *(int(row["num_tokens"]) for row in logged)]
    packages = ("trl", "peft", "transformers", "accelerate", "torch")
    result = {
        "seconds": [b - a for a, b in itertools.pairwise(clock.ends)],
        "tokens": [b - a for a, b in itertools.pairwise(tokens)],
        "losses": [row["loss"] for row in logged],
        "versions": {name: version(name) for name in packages},
    }
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
