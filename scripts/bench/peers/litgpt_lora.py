"""LitGPT's `finetune_lora` on a job of speed.py; run by the Python of LitGPT's own environment.

    python scripts/bench/peers/litgpt_lora.py JOB.json OUT.json

The weights are converted by its own converter, the rows come ready from a data module. Its schedule
(warm-up, then cosine) is replaced by a constant rate, so that losses can be compared. `shipped`:
its own precision for training, bf16-mixed. `tuned`: bf16-true, and the allocator setting of
lora_kit, made from inside the process.
"""

from __future__ import annotations

import csv
import itertools
import json
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any


def convert(base: Path) -> Path:
    """The folder of a transformers Llama with LitGPT's files beside its own."""
    from litgpt.config import name_to_config
    from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint

    found = json.loads((base / "config.json").read_text(encoding="utf-8"))
    name_to_config["bench"] = {
        "name": "bench",
        "hf_config": {"org": "bench", "name": "bench"},
        "block_size": found["max_position_embeddings"],
        "vocab_size": found["vocab_size"],
        "padded_vocab_size": found["vocab_size"],
        "n_layer": found["num_hidden_layers"],
        "n_head": found["num_attention_heads"],
        "n_embd": found["hidden_size"],
        "rotary_percentage": 1.0,
        "parallel_residual": False,
        "bias": False,
        "norm_class_name": "RMSNorm",
        "norm_eps": found["rms_norm_eps"],
        "mlp_class_name": "LLaMAMLP",
        "intermediate_size": found["intermediate_size"],
    }
    folder = base.with_name(base.name + "-litgpt")
    if not (folder / "lit_model.pth").is_file():
        shutil.copytree(base, folder, dirs_exist_ok=True)
        convert_hf_checkpoint(folder, model_name="bench")
    return folder


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    precision = None
    if job["track"] == "tuned":
        from lora_kit.speed.runtime import keep_freed_memory

        assert keep_freed_memory()
        precision = "bf16-true"

    import torch
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.data import DataModule
    from litgpt.data.base import get_sft_collate_fn
    from litgpt.finetune import lora
    from torch.utils.data import DataLoader

    class Rows(DataModule):
        prompt_style = "default"

        def connect(self, tokenizer: Any = None, batch_size: int = 1, **_: Any) -> None:
            lines = Path(job["rows"]).read_text(encoding="utf-8").splitlines()
            # The order of transformers' sampler: everybody sees the same rows at the same step.
            order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(job["seed"]))
            self.rows = [self.row(**json.loads(lines[number])) for number in order.tolist()]
            self.batch_size = batch_size

        @staticmethod
        def row(input_ids: list[int], labels: list[int]) -> dict[str, Any]:
            counts = {"raw": len(input_ids), "raw_plus_prompt_template": len(input_ids)}
            ids, targets = torch.tensor(input_ids), torch.tensor(labels)
            return {"input_ids": ids, "labels": targets, "token_counts": counts}

        def train_dataloader(self) -> Any:
            collate = get_sft_collate_fn()
            return DataLoader(self.rows, self.batch_size, collate_fn=collate)  # type: ignore[arg-type]

        val_dataloader = train_dataloader

    def constant(optimizer: Any, **_: Any) -> Any:
        return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)

    lora.get_lr_scheduler = constant
    # What comes after the training wants a command line of its own.
    for after in ("save_hyperparameters", "save_prompt_style", "merge_lora"):
        setattr(lora, after, lambda *_, **__: None)
    where = {name: True for name in ("query", "key", "value", "projection", "mlp")}
    lora.setup(
        convert(Path(job["base"])),
        Path(job["out"]),
        precision,
        lora_r=job["r"],
        lora_alpha=job["alpha"],
        lora_dropout=0.0,
        **{f"lora_{name}": adapted for name, adapted in where.items()},
        data=Rows(),
        train=TrainArgs(
            global_batch_size=job["batch"],
            micro_batch_size=job["batch"],
            max_seq_length=job["max_length"],
            max_steps=job["steps"],
            epochs=1000,
            log_interval=1,
            save_interval=None,
        ),
        eval=EvalArgs(interval=10**9, max_new_tokens=1, max_iters=1, final_validation=False),
        optimizer={
            "class_path": "torch.optim.AdamW",
            "init_args": {"lr": job["learning_rate"], "weight_decay": 0.0},
        },
        seed=job["seed"],
    )
    (logged,) = Path(job["out"]).rglob("metrics.csv")
    with logged.open(encoding="utf-8") as opened:
        steps = [row for row in csv.DictReader(opened) if row["iter_time"]]
    tokens = [0, *(int(float(row["tokens"])) for row in steps)]
    result = {
        "seconds": [float(row["iter_time"]) for row in steps],
        "tokens": [b - a for a, b in itertools.pairwise(tokens)],
        "losses": [float(row["loss"]) for row in steps],
        "versions": {name: version(name) for name in ("litgpt", "lightning", "torch")},
    }
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
