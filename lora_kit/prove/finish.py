"""The last step of a recipe: evaluate the adapter, write the report, close the lock file."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from lora_kit.adapter.files import open_adapter
from lora_kit.errors import CheckFailed
from lora_kit.prove.evaluate import evaluate, measure_tasks
from lora_kit.prove.gate import held
from lora_kit.prove.report import in_lines, write_report
from lora_kit.tasks.encode import Prepared
from lora_kit.tasks.task import Processor
from lora_kit.train.callbacks import read_metrics
from lora_kit.train.directory import add_to_lock, is_first_rank, say
from lora_kit.train.guards import Guards, best_step, stopped_early


def prove(
    trainer: Guards, data: Prepared, processor: Processor, fresh: tuple[str, ...]
) -> dict[str, Any]:
    """Compare the adapted model with its contenders on all ranks; the first writes report.json and
    report.html.

    Returns:
        What report.json holds.

    Raises:
        CheckFailed: the adapter did not train as it should, or `prove.gate` does not hold. The run
            is finished and reported all the same.
    """
    guard = trainer.guard
    run, directory = guard.run, guard.directory
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    model: Any = trainer.model_wrapped if sharded else trainer.model
    general = f" and {data.general.units} general ones" if data.general else ""
    units = "documents" if "loss" in guard.task.scores else "rows"
    say(f"evaluating on {data.eval.units} held-out {units}{general}")
    # A sharded model would have to generate on all ranks in step: it does not generate.
    report = evaluate(guard.task, model, data, processor, run, fresh, generates=not sharded)
    alone = trainer.accelerator.num_processes == 1
    if run.prove.harness and alone:
        measure_tasks(report, model, processor, run.prove.harness)
    further = set(run.prove.metrics) - set(guard.task.scores)
    if (run.prove.harness and not alone) or (further and sharded):
        why = f"on several processes: measure it in one, with lora-kit compare {directory}"
        report["not_measured"].append(why)
    effect = report.pop("adapter_effect")
    if effect is not None:
        guard.audit.effect(effect)
    report["audit"] = guard.audit.report()
    patience = run.train.early_stopping_patience
    report["overfitting"] |= {
        "best_step": best_step(trainer.state),
        "stopped_early": stopped_early(trainer.state, patience),
    }
    rows = read_metrics(directory / "metrics.jsonl")
    last: dict[str, Any] = next((row for row in reversed(rows) if "loss" in row), {})
    plan = guard.plan
    report["training"] = {
        "steps": trainer.state.global_step,
        "epochs": round(trainer.state.epoch or 0.0, 3),
        "tokens": guard.meter.tokens(),
        "tokens_per_second": last.get("tokens_per_second", 0.0),
        "predicted_tokens_per_second": plan and round(plan.tokens_per_second, 1),
        "seconds": round(guard.meter.seconds, 3),
        "trainable_parameters": sum(p.numel() for p in _trained(trainer)),
        "world_size": trainer.accelerator.num_processes,
        "chosen": plan and asdict(plan.choice),
        "micro_batch_halved": guard.halving.times,
    }
    report["memory"] = {
        "predicted_mib": plan and round(plan.total / 2**20, 1),
        "measured_mib": round(guard.peak_mib, 1),  # to the end of the training
    }
    report["gate"] = held(report, run.prove.gate) if run.prove.gate else None
    if is_first_rank():
        report["layers"] = open_adapter(directory / "adapter").figures()
        write_report(directory, run, report)
        add_to_lock(directory, finished=True)
        for line in in_lines(report):
            say(line)
        say(f"written to {directory}")
    failed = [f"{p['what']}: {p['cause']}; {p['fix']}" for p in report["audit"]["problems"]]
    failed += [f"gate: {line}" for line in (report["gate"] or {}).get("failed", [])]
    if failed:
        raise CheckFailed("\n".join(failed))
    return report


def _trained(trainer: Guards) -> list[Any]:
    return [p for p in trainer.model.parameters() if p.requires_grad]
