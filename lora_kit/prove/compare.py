"""A finished run, evaluated again: `lora-kit compare`."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_kit.adapter.finished import FinishedRun
from lora_kit.adapter.load import load_model
from lora_kit.base.load import gpu_is_used
from lora_kit.errors import UserError
from lora_kit.folders import only_writer
from lora_kit.hashes import file_hash
from lora_kit.prove.evaluate import add_harness, check_prove, evaluate
from lora_kit.prove.report import write_report
from lora_kit.prove.scores import against, check_gate
from lora_kit.run import read_json, recipe_file
from lora_kit.schema import Gate, Json, Run
from lora_kit.tasks.bootstrap import verdict
from lora_kit.tasks.encode import Prepared, rows_of
from lora_kit.tasks.recipe import load_recipe
from lora_kit.tasks.task import Processor, Task
from lora_kit.train.arguments import training_arguments
from lora_kit.train.callbacks import read_metrics

# Keys that may differ from those of the training.
_FREE = ("prove.", "train.per_device_eval_batch_size=")


def compare(
    run: str | Path,
    overrides: Sequence[str] = (),
    *,
    gate: bool = False,
    scratch: bool = False,
    base: str | None = None,
) -> Json:
    """Evaluate a finished run again, and write its report.json and report.html anew, unless they
    hold something that was not measured this time.

    Args:
        run: the run directory.
        overrides: `prove.KEY=VALUE`, to measure more or something else than the run did; or another
            `train.per_device_eval_batch_size`, to use less memory.
        gate: hold the run to the default bounds of `prove.gate` if it names none.
        scratch: also train a randomly initialised model of the same architecture, on the same
            budget (recipes with the score `loss`).
        base: a folder or Hub id in place of the base that the run names.

    Returns:
        The content of report.json.

    Raises:
        UserError: there is no finished run, its data, base or recipe changed since it was trained,
            or another process writes into its directory.
    """
    if strange := [item for item in overrides if not item.startswith(_FREE)]:
        allowed = "prove.* keys and train.per_device_eval_batch_size"
        raise UserError(f"{', '.join(strange)}: a finished run takes other {allowed} only")
    finished = FinishedRun(run, base, overrides)
    task = task_of(finished)
    with only_writer(finished.home):
        return _measured(finished, task, gate, scratch)


def _measured(finished: FinishedRun, task: Task, gate: bool, scratch: bool) -> Json:
    """See `compare`."""
    opened = finished.run_of(task)
    before = read_json(finished.home / "report.json")
    processor, data = prepared_again(finished, task)
    check_prove(task, data, processor, opened)
    if scratch and "loss" not in task.scores:
        raise UserError(
            f"{finished.path}: --scratch applies to the loss on text only: to cpt or sft runs"
        )
    model, processor = load_model(finished)
    tokens = (before.get("training") or {}).get("tokens")
    if tokens is None:  # the evaluation was stopped before there was a report
        logged = read_metrics(finished.home / "metrics.jsonl")
        tokens = max((row.get("tokens") or 0 for row in logged), default=None)
    report = evaluate(task, model, data, processor, opened, finished.fresh, trained=tokens)
    del report["adapter_effect"]  # of a training's audit
    if opened.prove.harness:
        add_harness(report, model, processor, opened)
    report["layers"] = finished.adapter.figures()
    if scratch:
        batch, steps = finished.lock["batch"], (before.get("training") or {}).get("steps")
        passes = batch["processes"] * batch["gradient_accumulation_steps"]
        found = _against_scratch(task, opened, model, processor, data, passes, steps)
        report["scratch"] = found
        report["verdict"]["scratch"] = verdict(found["loss"], found["documents"])
    # Only training measures these.
    report |= {name: before.get(name) for name in ("training", "memory", "audit")}
    chosen = before.get("overfitting") or {}
    report["overfitting"] |= {
        "best_step": chosen.get("best_step"),
        "stopped_early": chosen.get("stopped_early", False),
    }
    bounds = opened.prove.gate or (Gate() if gate else None)
    report["gate"] = check_gate(report, bounds) if bounds else None
    if lost := _lost(before, report):
        print(
            f"report.json and report.html stay as they are: they hold {', '.join(lost)}, which was "
            "not measured now",
            file=sys.stderr,
        )
    else:
        write_report(finished.home, opened, report)
    return report


def task_of(finished: FinishedRun) -> Task:
    """The task of a finished run, from its recipe.

    Raises:
        UserError: the recipe is gone, or is not as it was when the run was trained.
    """
    run = finished.require_run()
    file = recipe_file(run.recipe)
    known = finished.lock.get("recipe") or {}
    if not file.is_file():
        raise UserError(f"{finished.path}: recipe: {file}: no such file: put it back there")
    # Shipped recipes change with the package's version, which the lock has.
    own = run.recipe.endswith(".py")
    if own and known.get("sha256") not in (None, file_hash(file)):
        raise UserError(
            f"{finished.path}: recipe: {file} changed since the run was trained: restore it; "
            "if the run did not finish, continue it with train --resume; else train again"
        )
    return load_recipe(file).task


def prepared_again(finished: FinishedRun, task: Task) -> tuple[Processor, Prepared]:
    """Processor and rows of a finished run. Raises UserError if its data changed since, or is not
    read as it was."""
    # What the limits allow was decided when the run was trained.
    run, lock = finished.run_of(task), finished.lock
    _, data = rows_of(task, run, finished.located, lock, limits=False)
    # By content, not by name: a run and its data may have been moved.
    recorded = lock.get("data", {}).values()
    changed = [source for source, digest in data.hashes.items() if digest not in recorded]
    if changed and recorded:
        raise UserError(
            f"{', '.join(changed)} changed since {finished.path} was trained: rows it was trained "
            "on could be among those it is evaluated on; restore the data, or train again"
        )
    # Another version may drop other rows, and then hold out others.
    before = read_json(finished.home / "census.json").get("eval") or {}
    kept, now = before.get("rows_kept"), data.census.eval.rows_kept
    if data.census.held_out and kept not in (None, now):
        raise UserError(
            f"{finished.path}: {now:,} rows are held out, and {kept:,} were when it was trained: "
            "this version reads its data differently, so rows it was trained on could be among "
            "those it is evaluated on: train again"
        )
    return finished.processor, data


def _lost(before: Json, report: Json) -> list[str]:
    """What an earlier report holds and this one does not."""
    lost = [name for name in ("few_shot", "scratch") if before.get(name) and not report[name]]
    for part in ("metrics", "harness"):
        lost += (before.get(part) or {}).keys() - (report[part] or {}).keys()
    return sorted(lost)


def _against_scratch(
    task: Task,
    run: Run,
    adapted: Any,
    processor: Processor,
    data: Prepared,
    passes: int,
    steps: int | None,
) -> Json:
    """What pretraining was worth: train random weights of the base's shape in float32 on the same
    rows for as many steps, all of them trainable, with the run's own optimizer settings; compare
    that model with the adapter.

    Args:
        adapted: the run's PEFT model.
        passes: micro-batches per step, of all processes of the run: they become gradient
            accumulation, since this trains in one process.
        steps: optimizer steps that the run took; None: as the run file says.

    Returns:
        {"parameters", "seconds", "steps"} and what `against` returns, the new model as the rival.
    """
    import torch
    from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, set_seed

    settings: Json = {
        "eval_steps": None,
        "report_to": [],
        "gradient_accumulation_steps": passes,
        "max_steps": steps or run.train.max_steps,
    }
    train = run.train.model_copy(update=settings)
    prove = run.prove.model_copy(update={"metrics": []})
    run = run.model_copy(update={"prove": prove, "train": train})
    adapter_scores = task.score(adapted, data.eval, processor, data.facts, run)
    config = adapted.get_base_model().config.__class__.from_dict(adapted.config.to_dict())
    config.quantization_config = None
    set_seed(run.seed)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(run, Path(folder))
        arguments.save_strategy = "no"
        started = time.perf_counter()
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=data.train,
            data_collator=task.collate(processor),
        )
        trainer.remove_callback(PrinterCallback)
        trainer._loss_shifts_labels = True  # as for every model here, whatever its class is called
        trainer.train()
    seconds = time.perf_counter() - started
    model = model.to("cuda") if gpu_is_used() else model
    scratch_scores = task.score(model, data.eval, processor, data.facts, run)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(seconds, 1),
        "steps": trainer.state.global_step,
        **against("scratch", scratch_scores, adapter_scores, seed=0),
    }
