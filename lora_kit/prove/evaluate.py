"""The adapted model and its contenders on held-out rows: one report for all tasks."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from lora_kit.adapter.files import open_adapter
from lora_kit.data.rows import Rows
from lora_kit.data.splits import take_units
from lora_kit.errors import CheckFailed, Interrupted, UserError, problems_of
from lora_kit.folders import sync_tree
from lora_kit.prove.harness import check_tasks, run_harness
from lora_kit.prove.into import original_weights
from lora_kit.prove.report import ahead, evaluated_text, in_lines, write_report
from lora_kit.prove.scores import (
    NO_LANGUAGE_MODEL,
    against,
    check_gate,
    classes,
    decided_by,
    deciding_in,
    values,
)
from lora_kit.schema import Json, Run
from lora_kit.speed.runtime import return_freed_memory
from lora_kit.tasks.bootstrap import retention, verdict
from lora_kit.tasks.encode import Prepared
from lora_kit.tasks.measure import COMPLETION_TOKENS, EvaluationBar, evaluation_bar, evaluation_mode
from lora_kit.tasks.task import Contender, Processor, Score, Task
from lora_kit.train.callbacks import read_metrics
from lora_kit.train.directory import add_to_lock, is_first_rank, say
from lora_kit.train.guards import Guards, best_step, stopped_early

_HALF = 0.5  # cost of a forward pass, compared with LoRA's forward and backward pass
_GAP_ROWS = 64  # training rows that are scored for the gap, at most
_EXAMINED = 64  # for the progress bar, `Task.examine` takes as long as so many completions
# Entries that are null unless measured.
_ABSENT = ("general", "few_shot", "scratch", "prompt_use", "metrics", "harness", "classes", "into")


def check_prove(task: Task, data: Prepared, processor: Processor, run: Run) -> None:
    """Check before training that what `prove:` asks for can be measured on these rows.

    Raises:
        UserError: nothing can be evaluated; or a metric or a task of the harness is unknown, or
            does not fit these rows.
    """
    problems = task.check(data, processor, data.facts, run)
    if run.prove.harness:
        problems += problems_of(check_tasks, run.prove.harness)
    gate = run.prove.gate
    if gate:
        if gate.general and task.general is not None and data.general is None:
            problems.append(
                f"prove.gate.general: {gate.general}: not measured without data.general: name "
                "general text there, or set it to null"
            )
        known = [*task.scores, *_extra_metrics(task, run)]
        unknown = ", ".join(name for name in gate.metrics if name not in known)
        if unknown:
            why = f"no score of this task, and not in prove.metrics (known: {', '.join(known)})"
            problems.append(f"prove.gate.metrics: {unknown}: {why}")
        if gate.few_shot and (run.prove.shots == 0 or "prove.shots" in task.unread):
            why = "this recipe" if run.prove.shots else "prove.shots: 0"
            problems.append(f"prove.gate.few_shot: not measured with {why}: leave it out")
        if gate.loss is not None and "loss" not in task.scores:
            why = f"this task has no score of that name (known: {', '.join(task.scores)})"
            problems.append(f"prove.gate.loss: {why}")
    if problems:
        raise UserError("\n".join(problems))


def prove(trainer: Guards, data: Prepared, processor: Processor, fresh: tuple[str, ...]) -> Json:
    """The last step of a recipe: compare the adapted model with its contenders on all ranks; the
    first writes report.json and report.html, and closes the lock file.

    Returns:
        The content of report.json.

    Raises:
        CheckFailed: the adapter did not train as it should, or `prove.gate` does not hold. The run
            is finished and reported all the same.
        Interrupted: SIGINT or SIGTERM; the adapter was saved before (exit code 130 or 143).
    """
    directory = trainer.guard.directory
    try:
        return _prove(trainer, data, processor, fresh)
    except Interrupted as stopped:
        raise Interrupted(
            stopped.exit_code - 128,
            f"stopped during the evaluation; the adapter is saved in {directory / 'adapter'}: "
            f"evaluate it with lora-kit compare {directory}",
        ) from None


def _prove(trainer: Guards, data: Prepared, processor: Processor, fresh: tuple[str, ...]) -> Json:
    guard, run, task = trainer.guard, trainer.guard.run, trainer.guard.task
    directory = guard.directory
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    model = trainer.model_wrapped if sharded else trainer.model
    trained = guard.meter.tokens()
    # Evaluation, too, has the micro-batch that fits into memory.
    size = guard.plan.choice.micro_batch if guard.plan else run.train.per_device_train_batch_size
    train = run.train.model_copy(update={"per_device_train_batch_size": size})
    as_trained = run.model_copy(update={"train": train})
    # A sharded model would have to generate on all ranks in step: it does not generate.
    report = evaluate(task, model, data, processor, as_trained, fresh, not sharded, trained)
    alone = trainer.accelerator.num_processes == 1
    if run.prove.harness and alone:
        add_harness(report, model, processor, run)
    if (run.prove.harness and not alone) or (_extra_metrics(task, run) and sharded):
        why = f"on several processes: measure it in one, with lora-kit compare {directory}"
        report["not_measured"].append(why)
    effect = report.pop("adapter_effect")
    if effect is not None:
        guard.audit.effect(effect)
    report["audit"] = guard.audit.report()
    report["overfitting"] |= {
        "best_step": best_step(trainer.state),
        "stopped_early": stopped_early(trainer.state, run.train.early_stopping_patience),
    }
    report["training"] = _training(trainer)
    report["memory"] = {
        "predicted_mib": guard.plan and round(guard.plan.total / 2**20, 1),
        "measured_mib": round(guard.peak_mib, 1),  # to the end of the training
    }
    report["gate"] = check_gate(report, run.prove.gate) if run.prove.gate else None
    if is_first_rank():
        report["layers"] = open_adapter(directory / "adapter").figures()
        write_report(directory, run, report)
        sync_tree(directory)  # metrics.jsonl, too
        add_to_lock(directory, finished=True)
        for line in in_lines(report):
            say(line)
        say(f"written to {directory}")
    failed = [f"{p['what']}: {p['cause']}; {p['fix']}" for p in report["audit"]["problems"]]
    if report["gate"]:
        failed += [f"gate: {line}" for line in report["gate"]["failed"]]
    if failed:
        raise CheckFailed("\n".join(failed))
    return report


def _training(trainer: Guards) -> Json:
    """`training` of report.json."""
    guard, plan = trainer.guard, trainer.guard.plan
    logged = read_metrics(guard.directory / "metrics.jsonl")
    speeds = [row.get("tokens_per_second", 0.0) for row in logged if "loss" in row]
    return {
        "steps": trainer.state.global_step,
        "epochs": round(trainer.state.epoch or 0.0, 3),
        "tokens": guard.meter.tokens(),
        "tokens_per_second": speeds[-1] if speeds else 0.0,
        "predicted_tokens_per_second": plan and plan.tokens_per_second,
        "seconds": round(guard.meter.seconds, 3),
        "trainable_parameters": sum(
            p.numel() for p in trainer.model.parameters() if p.requires_grad
        ),
        "world_size": trainer.accelerator.num_processes,
        "chosen": plan and asdict(plan.choice),
        "micro_batch_halved": guard.halving.times,
    }


def add_harness(report: Json, model: Any, processor: Processor, run: Run) -> None:
    """Add the figures of lm-evaluation-harness to a report, or why there are none."""
    try:
        report["harness"] = run_harness(model, processor, run.prove.harness, run.seed)
    except UserError as error:
        report["not_measured"].append(str(error))


def evaluate(
    task: Task,
    model: Any,
    data: Prepared,
    processor: Processor,
    run: Run,
    fresh: Sequence[str] = (),
    generates: bool = True,
    trained: int | None = None,
) -> Json:
    """A report of a PEFT model in memory; its adapter is switched off to score the base.

    Args:
        fresh: names of modules that the base has no weights for; with them the base is no
            contender, and the best rival that needs no adapter takes its place.
        generates: whether the model may generate: for the metrics of `prove.metrics` that are no
            scores of the task's own, and samples.
        trained: tokens that the adapter was trained on, for `prove.budget`; None: all rows are
            evaluated.

    Returns:
        The entries of report.json that an evaluation fills, and `adapter_effect` for the audit: the
        largest change of a unit's first score from the rival to the adapted model; None with fresh
        modules, which change the scores without an adapter.
    """
    subject = _Subject(task, model, data, processor, run)
    if not generates:
        subject = _without_extra_metrics(subject)
    with torch.no_grad(), evaluation_mode(model), evaluation_bar() as bar:
        contenders = _contenders(subject, fresh)
        subject, evaluated = _within_budget(replace(subject, bar=bar), contenders, trained)
        counted = "documents" if "loss" in task.scores else "rows"
        say(f"evaluating on {evaluated_text(evaluated, counted)}")
        if bar is not None:
            completions = _EXAMINED + (1 + len(contenders)) * subject.completions(subject.data.eval)
            bar.total = (evaluated["tokens"] or 0) + COMPLETION_TOKENS * completions
        report = _report(subject, contenders, generates)
    report["evaluated"] = evaluated
    rival, asked = contenders[0], task.deciding(run.prove)
    objection = task.objection(report)
    if fresh and rival.enter == model.disable_adapter:
        objection = "the rival is the base with an untrained head, which anything beats"
    elif asked not in {**(report["metrics"] or {}), **report["domain"]}:
        objection = f"{asked}, which decides, was not measured"
    _apply_objection(report, objection)
    if fresh:
        report["adapter_effect"] = None
    return report


@dataclass(frozen=True)
class _Subject:
    """A PEFT model in evaluation mode, and the rows of its run."""

    task: Task
    model: Any
    data: Prepared
    processor: Processor
    run: Run
    bar: EvaluationBar | None = None

    def score(self, rows: Rows, contender: Contender | None = None) -> list[Score]:
        """Scores of the adapted model, or of a contender."""
        contender = contender or Contender("adapted", contextlib.nullcontext)
        if contender.rows is not None:
            rows = contender.rows(rows)
        size = COMPLETION_TOKENS * self.completions(rows)
        size += int(self.task.tokens(rows).sum()) if self.bar else 0
        with contender.enter() as entered, self.phase(size):
            # PEFT's `disable_adapter` yields None: the model itself is scored. What others yield is
            # for the task's `score`.
            itself = contender.name == "adapted" or contender.enter == self.model.disable_adapter
            model = self.model if itself else entered
            return self.task.score(model, rows, self.processor, self.data.facts, self.run)

    def phase(self, size: int) -> AbstractContextManager[None]:
        """The context of a phase of the evaluation, which takes about as long as scoring `size`
        tokens."""
        return_freed_memory()  # of the training, or of another phase
        return self.bar.phase(size) if self.bar else contextlib.nullcontext()

    def completions(self, rows: Rows) -> int:
        """How many completions are generated to score the rows."""
        generates = bool(_extra_metrics(self.task, self.run))
        return min(self.run.prove.answers, len(rows)) if generates else 0

    def own_scores(self, scores: Sequence[Score]) -> list[Score]:
        """The task's own scores, the deciding one first if it is among them."""
        own = [score for score in scores if score.name not in _extra_metrics(self.task, self.run)]
        return sorted(own, key=lambda score: score.name != self.task.deciding(self.run.prove))


def _extra_metrics(task: Task, run: Run) -> list[str]:
    """The names in `prove.metrics` that are no scores of the task's own."""
    return [name for name in run.prove.metrics if name not in task.scores]


def _without_extra_metrics(subject: _Subject) -> _Subject:
    """The subject without the metrics that a model has to generate for."""
    run = subject.run
    own = [name for name in run.prove.metrics if name in subject.task.scores]
    prove = run.prove.model_copy(update={"metrics": own})
    return replace(subject, run=run.model_copy(update={"prove": prove}))


def _within_budget(
    subject: _Subject, contenders: Sequence[Contender], trained: int | None
) -> tuple[_Subject, Json]:
    """The subject with as many random held-out units as `prove.budget` allows, at least 20; and
    `evaluated` of report.json: {"budget", "tokens" that all contenders are scored on, "share" of
    the budget's tokens in those trained on, "domain": {"units", "of"}, "general"}."""
    task, data, budget = subject.task, subject.data, subject.run.prove.budget
    whole = {"domain": data.eval}
    if task.general is not None and data.general is not None:
        whole["general"] = data.general
    about: Json = {"budget": budget, "tokens": None, "share": None, "general": None}
    kept, costs = dict(whole), {}
    if trained:
        # Examples in the prompt are tokens, too.
        longer = sum(one.about.get("tokens", 0) for one in contenders if one.rows is not None)
        # On a quantized base the adapted model is also scored on the original weights.
        passes = 1 + len(contenders) + (subject.run.base.quantize != "none")
        costs = {"domain": task.tokens(data.eval) * passes + longer}
        if task.general is not None and data.general is not None:
            costs["general"] = task.general.tokens(data.general) * 2  # base and adapted
        most = math.inf if budget is None else budget * trained / _HALF - _gap_tokens(subject)
        later = sum(int(cost.sum()) for cost in costs.values())
        for number, (use, cost) in enumerate(list(costs.items())):
            # What the later use leaves, at least an equal share; the last has what is left.
            later -= int(cost.sum())
            room = max(most / (len(costs) - number), most - later)
            chosen = take_units(whole[use].column("unit"), cost, room, subject.run.seed)
            kept[use], costs[use] = whole[use].select(chosen), cost[chosen]
            most -= int(costs[use].sum())
    for use, rows in kept.items():
        about[use] = {"units": _units(rows), "of": _units(whole[use])}
    data = replace(data, eval=kept["domain"], general=kept.get("general", data.general))
    subject = replace(subject, data=data)
    if trained:
        tokens = sum(int(cost.sum()) for cost in costs.values()) + _gap_tokens(subject)
        about |= {"tokens": tokens, "share": round(_HALF * tokens / trained, 4)}
    return subject, about


def _units(rows: Rows) -> int:
    return len(np.unique(rows.column("unit")))


def _report(subject: _Subject, contenders: Sequence[Contender], generates: bool) -> Json:
    """The entries of `evaluate` before objections, of a model in evaluation mode."""
    task, model, data, run = subject.task, subject.model, subject.data, subject.run
    processor, facts, rival = subject.processor, subject.data.facts, contenders[0]
    # {contender or `adapted`: scores, extra metrics included}
    scores = {"adapted": subject.score(data.eval)}
    _check_scores(task, scores["adapted"])
    for contender in contenders:
        scores[contender.name] = subject.score(data.eval, contender)
    report: Json = {"verdict": {}, **dict.fromkeys(_ABSENT), "not_measured": []}
    before, after = subject.own_scores(scores[rival.name]), subject.own_scores(scores["adapted"])
    report["domain"] = against(rival.name, before, after, run.seed)
    report["contenders"] = {name: values(found) for name, found in scores.items()}
    report["classes"] = classes(scores["adapted"])
    if extra := _extra_metrics(task, run):
        report["metrics"] = _metrics(extra, scores, rival.name, run.seed)
    if run.prove.metrics:
        report["domain"]["decided_by"] = task.deciding(run.prove)
    for contender in contenders[1:]:
        if contender.rows is not None:  # the base with another prompt: a part of its own
            prompted = subject.own_scores(scores[contender.name])
            found = against(contender.name, prompted, after, run.seed)
            deciding = task.deciding(run.prove)
            if deciding in (report["metrics"] or {}):
                found |= _metrics([deciding], scores, contender.name, run.seed)
            report[contender.name] = {**contender.about, **found}
    if task.general is not None and data.general is not None:
        report["general"] = _general(subject, task.general, data.general)
    if task.general is None:
        report["not_measured"].append(NO_LANGUAGE_MODEL)
    report["overfitting"] = _gap(subject, rival, report["domain"])
    if run.base.quantize != "none":
        report["into"] = _into(subject, report, generates)
    if generates:
        with subject.phase(_EXAMINED * COMPLETION_TOKENS):
            more = task.examine(model, data, scores, processor, facts, run)
        report["not_measured"] += more.pop("not_measured", [])
        report |= more
    report.setdefault("samples", [])
    report["verdict"] = _verdicts(task, report, contenders[1:])
    change = scores["adapted"][0].sums[:, 0] - scores[rival.name][0].sums[:, 0]
    report["adapter_effect"] = float(np.abs(change).max())
    return report


def _contenders(subject: _Subject, fresh: Sequence[str]) -> list[Contender]:
    """The contenders, the rival first: the base, unless it has a fresh module."""
    facts, run = subject.data.facts, subject.run
    found = subject.task.rivals(subject.model, subject.data, subject.processor, facts, run)
    named = any(contender.name == "base" for contender in found)
    if not found or (not fresh and not named):
        return [Contender("base", subject.model.disable_adapter), *found]
    return found


def _check_scores(task: Task, scores: object) -> None:
    """Raises UserError unless a task's scores are those that it declares."""
    names = [score.name for score in scores] if isinstance(scores, list) else []
    if names[: len(task.scores)] != list(task.scores):
        asked = ", ".join(task.scores)
        raise UserError(f"TASK.score: gives {', '.join(names) or 'none'}; TASK.scores: {asked}")


def _metrics(names: Sequence[str], scores: dict[str, list[Score]], rival: str, seed: int) -> Json:
    """Extra metrics of the rival, of the base with examples, and of the adapted model."""
    found: Json = {}
    by_name = {who: {score.name: score for score in each} for who, each in scores.items()}
    for name in names:
        before, after = by_name[rival][name], by_name["adapted"][name]
        prompted = by_name.get("few_shot", {}).get(name)
        found[name] = {
            "rows": len(after.sums),
            "few_shot": prompted and round(prompted.figure, 4),
            **against(rival, [before], [after], seed)[name],
        }
    return found


def _general(subject: _Subject, task: Task, rows: Rows) -> Json:
    """How base and adapted model score on general text."""
    general = _without_extra_metrics(replace(subject, task=task))
    adapted = general.score(rows)
    base = general.score(rows, Contender("base", subject.model.disable_adapter))
    return against("base", base, adapted, subject.run.seed)


def _into(subject: _Subject, report: Json, whole: bool) -> Json | None:
    """`into` of report.json: the adapted model's own scores on the quantized base, that is the
    dequantized one, and on the original; either can be merged into. None: see `not_measured`.

    Args:
        whole: whether each process has the whole model.
    """
    on_original = Contender("base", partial(original_weights, subject.model))
    # DoRA's norms are of the quantized weights.
    if not whole or subject.model.peft_config["default"].use_dora:
        report["not_measured"].append("into: not measured with DoRA, or with a sharded model")
        return None
    try:
        scores = _without_extra_metrics(subject).score(subject.data.eval, on_original)
    except UserError as error:
        report["not_measured"].append(f"into: {error}")
        return None
    base = values(subject.own_scores(scores))
    return {"base": base, "dequantized": {n: report["domain"][n]["adapted"] for n in base}}


def _gap_rows(subject: _Subject) -> Rows:
    """Random training rows, as many as there are held-out ones, at most _GAP_ROWS."""
    rows = subject.data.rows("train")
    most = min(len(subject.data.eval), _GAP_ROWS)
    return rows.select(np.random.default_rng(subject.run.seed).permutation(len(rows))[:most])


def _gap_tokens(subject: _Subject) -> int:
    """Tokens that `_gap` scores: of its rows, by the rival and by the adapted model."""
    return 2 * int(subject.task.tokens(_gap_rows(subject)).sum())


def _gap(subject: _Subject, rival: Contender, domain: Json) -> Json:
    """`overfitting` of report.json: how much more the adapter gained on training rows than on
    held-out ones, by the deciding score; by the task's first one if that needs generated text."""
    some, quick = _gap_rows(subject), _without_extra_metrics(subject)
    before = subject.own_scores(quick.score(some, rival))[0]
    after = subject.own_scores(quick.score(some))[0]
    held_out = domain[after.name]["difference"]
    trained = after.figure - before.figure
    gap = held_out - trained if after.better == "lower" else trained - held_out
    figures = {"base": round(before.figure, 4), "adapted": round(after.figure, 4)}
    return {f"train_{after.name}": figures, "gap": round(gap, 4)}


def _verdicts(task: Task, report: Json, others: Sequence[Contender]) -> Json:
    """`verdict` of report.json, from the scores alone."""
    found: Json = {}
    for name, metric in (report["metrics"] or {}).items():
        found[name] = verdict(metric, metric["rows"])
    deciding, score = decided_by(report)
    found["domain"] = found.get(deciding) or verdict(score, report["domain"]["documents"])
    for contender in others:
        if contender.rows is not None:
            part = report[contender.name]
            _, score = deciding_in(part, deciding)
            found[contender.name] = verdict(score, score.get("rows", part["documents"]))
    general = report["general"]
    if task.general is not None and general is not None:
        found["general"] = retention(general[task.general.scores[0]], general["documents"])
    return found


def _apply_objection(report: Json, objection: str | None) -> None:
    """Record an objection, or a contender that scores better: with it `better` becomes
    `no different`, on the domain and against few-shot."""
    word = report["verdict"]
    above = ahead(report)
    if word["domain"] == "better" and above and not objection:
        objection = f"{above[0]} reached {above[1]:.3f}"
    for part in ("domain", "few_shot"):
        if objection and word.get(part) == "better":
            report["domain"]["objection"] = objection
            word[part] = "no different"
