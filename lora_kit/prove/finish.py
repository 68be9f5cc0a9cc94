"""The last step of a recipe: judge the adapter, write the report, close the lock file."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from lora_kit.adapter.inspect import figures
from lora_kit.errors import CheckFailed
from lora_kit.prove.compare import HeldOut, compare_model, measure_tasks
from lora_kit.prove.gate import held
from lora_kit.prove.report import in_lines, write_report
from lora_kit.schema import Run
from lora_kit.train.callbacks import read_metrics
from lora_kit.train.directory import is_first_rank


def prove(run: Run, trainer: Any, tokenizer: Any, judged: HeldOut) -> dict[str, Any]:
    """Compare base and adapted on all ranks; the first writes report.json and report.html.

    Returns:
        What report.json holds.

    Raises:
        CheckFailed: the adapter did not train as it should, or `prove.gate` does not hold. The run
            is finished and reported all the same.
    """
    directory = trainer.directory
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    model = trainer.model_wrapped if sharded else trainer.model
    directory.say(f"judging base and adapted on {judged}")
    # A sharded model would have to generate on all ranks in step: it is not let speak.
    report = compare_model(model, tokenizer, judged, run.prove, run.seed, samples=not sharded)
    alone = trainer.accelerator.num_processes == 1
    if run.prove.harness and alone:
        measure_tasks(report, model, tokenizer, run.prove)
    if (run.prove.harness and not alone) or (run.prove.metrics and sharded):
        why = f"on several processes: ask one, with lora-kit compare {directory.path}"
        report["not_measured"].append(why)
    trainer.audit.effect(report.pop("adapter_effect"))
    report["audit"] = trainer.audit.report()
    report["overfitting"] |= {
        "best_step": trainer.best_step,
        "stopped_early": trainer.stopped_early,
    }
    last: dict[str, Any] = next(
        (r for r in reversed(read_metrics(directory.metrics)) if "loss" in r), {}
    )
    report["training"] = {
        "steps": trainer.state.global_step,
        "epochs": round(trainer.state.epoch, 3),
        "tokens": trainer.count_tokens(),
        "tokens_per_second": last.get("tokens_per_second", 0.0),
        "predicted_tokens_per_second": trainer.plan and round(trainer.plan.tokens_per_second, 1),
        "seconds": round(trainer.seconds, 3),
        "trainable_parameters": trainer.model.get_nb_trainable_parameters()[0],
        "world_size": trainer.accelerator.num_processes,
        "chosen": trainer.plan and asdict(trainer.plan.choice),
        "micro_batch_halved": trainer.halvings,
    }
    report["memory"] = {
        "predicted_mib": trainer.plan and round(trainer.plan.total / 2**20, 1),
        "measured_mib": round(trainer.peak_mib, 1),  # to the end of the training
    }
    report["gate"] = held(report, run.prove.gate) if run.prove.gate else None
    if is_first_rank():
        report["layers"] = figures(directory.adapter)
        write_report(directory.path, run, report)
        directory.lock(finished=True)
        for line in in_lines(report):
            directory.say(line)
        directory.say(f"written to {directory.path}")
    failed = [f"{p['what']}: {p['cause']}; {p['fix']}" for p in report["audit"]["problems"]]
    failed += [f"gate: {line}" for line in (report["gate"] or {}).get("failed", [])]
    if failed:
        raise CheckFailed("\n".join(failed))
    return report
