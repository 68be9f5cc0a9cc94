"""The last step of a recipe: judge the adapter, write the report, close the lock file."""

from __future__ import annotations

import resource
from typing import Any

from lora_kit.base.load import gpu_is_used
from lora_kit.prove.compare import HeldOut, compare_model
from lora_kit.prove.report import in_lines, write_report
from lora_kit.run import Run
from lora_kit.train.callbacks import read_metrics
from lora_kit.train.directory import is_first_rank


def prove(run: Run, trainer: Any, tokenizer: Any, judged: HeldOut) -> dict[str, Any]:
    """Compare base and adapted on all ranks; the first writes report.json and report.html.

    Returns:
        What report.json holds.
    """
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    model = trainer.model_wrapped if sharded else trainer.model
    count = f"{len(judged.domain.unit_bytes)} held-out documents"
    count += f" and {len(judged.general.unit_bytes)} general ones" if judged.general else ""
    trainer.directory.say(f"judging base and adapted on {count}")
    # A sharded model would have to generate on all ranks in step: its samples are left out.
    report = compare_model(model, tokenizer, judged, samples=is_first_rank() and not sharded)
    last: dict[str, Any] = next(
        (r for r in reversed(read_metrics(trainer.directory.metrics)) if "loss" in r), {}
    )
    report["training"] = {
        "steps": trainer.state.global_step,
        "tokens": trainer.count_tokens(),
        "tokens_per_second": last.get("tokens_per_second", 0.0),
        "seconds": round(trainer.seconds, 3),
        "trainable_parameters": trainer.model.get_nb_trainable_parameters()[0],
        "world_size": trainer.accelerator.num_processes,
    }
    report["memory"] = {"predicted_mib": None, "measured_mib": round(_peak_mib(), 1)}
    if is_first_rank():
        write_report(trainer.directory.path, run, report)
        trainer.directory.lock(finished=True)
        for line in in_lines(report):
            trainer.directory.say(line)
        trainer.directory.say(f"written to {trainer.directory.path}")
    return report


def _peak_mib() -> float:
    """The most memory this process held: the GPU's where it trains on one, else resident."""
    import torch

    if gpu_is_used():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts in KiB
