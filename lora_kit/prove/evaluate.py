"""The adapted model and its contenders on held-out rows: one report for all tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lora_kit.data.rows import Rows
from lora_kit.errors import UserError
from lora_kit.prove.harness import check_tasks, run_harness
from lora_kit.prove.report import ahead
from lora_kit.prove.scores import NO_LANGUAGE_MODEL, against, classes, decided_by, values
from lora_kit.schema import Run
from lora_kit.tasks.bootstrap import retention, verdict
from lora_kit.tasks.encode import Prepared
from lora_kit.tasks.task import Contender, Processor, Score, Task

_GAP_ROWS = 64  # training rows that are scored for the gap, at most
# Entries that some reports have.
_ABSENT = ("general", "few_shot", "scratch", "prompt_use", "metrics", "harness", "classes")


def check_prove(task: Task, data: Prepared, processor: Processor, run: Run) -> None:
    """What `prove:` asks for can be measured on these rows; asked before anything trains.

    Raises:
        UserError: nothing can be evaluated; or a metric or a task of the harness is not there, or
            does not fit these rows.
    """
    problems = task.check(data, processor, data.facts, run)
    gate = run.prove.gate
    if run.prove.harness:
        try:
            check_tasks(run.prove.harness)
        except UserError as error:
            problems.append(str(error))
    if gate:
        if gate.general and task.general is not None and data.general is None:
            problems.append(
                f"prove.gate.general: {gate.general}: not measured without data.general: name "
                "general text there, or set it to null"
            )
        known = [*task.scores, *_further(task, run)]
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


def evaluate(
    task: Task,
    model: Any,
    data: Prepared,
    processor: Processor,
    run: Run,
    fresh: Sequence[str] = (),
    generates: bool = True,
) -> dict[str, Any]:
    """A report of a PEFT model in memory; its adapter is switched off to score the base.

    Args:
        fresh: names of modules that the base has no weights for; with them the base is no
            contender, and the best rival that needs no adapter takes its place.
        generates: whether the model may generate: for the metrics of `prove.metrics` that are no
            scores of the task's own, and samples.

    Returns:
        What report.json holds of an evaluation, and `adapter_effect`: the largest difference that
        the adapter makes to a unit's part of the first score; None where the base is no contender.
    """
    import torch

    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return _evaluated(task, model, data, processor, run, fresh, generates)
    finally:
        model.train(training)


def _evaluated(
    task: Task,
    model: Any,
    data: Prepared,
    processor: Processor,
    run: Run,
    fresh: Sequence[str],
    generates: bool,
) -> dict[str, Any]:
    """`evaluate` of a model that is in evaluation mode, without gradients."""
    facts, seed = data.facts, run.seed
    if not generates:
        run = _without_further(task, run)
    contenders = task.rivals(model, data, processor, facts, run)
    base = Contender("base", model.disable_adapter)
    if not contenders or (not fresh and not any(c.name == "base" for c in contenders)):
        contenders = [base, *contenders]
    rival = contenders[0]
    scores = {"adapted": task.score(model, data.eval, processor, facts, run)}
    given = scores["adapted"]
    names = [score.name for score in given] if isinstance(given, list) else []
    if names[: len(task.scores)] != list(task.scores):
        asked = ", ".join(task.scores)
        raise UserError(f"TASK.score: gives {', '.join(names) or 'none'}; TASK.scores: {asked}")
    for contender in contenders:
        scores[contender.name] = _score(task, contender, model, data.eval, processor, facts, run)
    report: dict[str, Any] = {"verdict": {}, **dict.fromkeys(_ABSENT), "not_measured": []}
    further = _further(task, run)
    own = {name: _own(task, found, run) for name, found in scores.items()}
    report["domain"] = against(rival.name, own[rival.name], own["adapted"], seed)
    report["contenders"] = {name: values(found) for name, found in scores.items()}
    report["classes"] = classes(scores["adapted"])
    if further:
        report["metrics"] = _metrics(further, scores, rival.name, seed)
    word: dict[str, str] = report["verdict"]
    for name, found in (report["metrics"] or {}).items():
        word[name] = verdict(found, found["rows"])
    if run.prove.metrics:
        report["domain"]["decided_by"] = task.deciding(run.prove)
    deciding, found = decided_by(report)
    word["domain"] = word.get(deciding) or verdict(found, report["domain"]["documents"])
    for contender in contenders[1:]:
        if contender.rows is not None:  # the same base, prompted otherwise
            found = against(contender.name, own[contender.name], own["adapted"], seed)
            report[contender.name] = {**contender.about, **found}
            word[contender.name] = verdict(found[own["adapted"][0].name], found["documents"])
    report |= _general(task, model, data, processor, run)
    if task.general and report["general"]:
        first = report["general"][task.general.scores[0]]
        word["general"] = retention(first, report["general"]["documents"])
    elif task.general is None:
        report["not_measured"].append(NO_LANGUAGE_MODEL)
    report["overfitting"] = _gap(task, model, data, processor, run, report["domain"], rival)
    if generates:
        more = task.examine(model, data, scores, processor, facts, run)
        report["not_measured"] += more.pop("not_measured", [])
        report |= more
    report.setdefault("samples", [])
    objection = task.objection(report)
    if fresh and rival.enter == model.disable_adapter:
        objection = "the rival is the base with an untrained head, which anything beats"
    elif word["domain"] == "better" and (above := ahead(report)):
        name, value = above[0]
        objection = objection or f"{name} reached {value:.3f}"
    if objection:
        report["domain"]["objection"] = objection
        for part in ("domain", "few_shot"):
            if word.get(part) == "better":
                word[part] = "no different"
    effect = None
    if not fresh:
        change = scores["adapted"][0].sums[:, 0] - scores[rival.name][0].sums[:, 0]
        effect = float(np.abs(change).max())
    return report | {"adapter_effect": effect}


def measure_tasks(report: dict[str, Any], model: Any, processor: Any, tasks: list[str]) -> None:
    """Add the harness's figures to a report, or why there are none."""
    try:
        report["harness"] = run_harness(model, processor, tasks)
    except UserError as error:
        report["not_measured"].append(str(error))


def _score(
    task: Task,
    contender: Contender,
    model: Any,
    rows: Rows,
    processor: Processor,
    facts: dict[str, Any],
    run: Run,
) -> list[Score]:
    """A contender's scores. PEFT's own context yields nothing: the model itself is meant."""
    if contender.rows is not None:
        rows = contender.rows(rows)
    with contender.enter() as entered:
        inside = model if contender.enter == model.disable_adapter else entered
        return task.score(inside, rows, processor, facts, run)


def _further(task: Task, run: Run) -> list[str]:
    """`prove.metrics` without the scores that the task has anyway."""
    return [name for name in run.prove.metrics if name not in task.scores]


def _own(task: Task, scores: Sequence[Score], run: Run) -> list[Score]:
    """The scores that the task has anyway, the deciding one first if it is among them."""
    own = [score for score in scores if score.name not in _further(task, run)]
    return sorted(own, key=lambda score: score.name != task.deciding(run.prove))


def _metrics(
    names: Sequence[str], scores: Mapping[str, Sequence[Score]], rival: str, seed: int
) -> dict[str, dict[str, Any]]:
    """Further metrics of the rival, of the base with examples, and of the adapted model."""
    found = {}
    by_name = {who: {score.name: score for score in each} for who, each in scores.items()}
    for name in names:
        before, after = by_name[rival][name], by_name["adapted"][name]
        prompted = by_name.get("few_shot", {}).get(name)
        compared = against(rival, [before], [after], seed)
        found[name] = {
            "rows": len(after.sums),
            "few_shot": prompted and round(prompted.figure, 4),
            **compared[name],
        }
    return found


def _general(
    task: Task, model: Any, data: Prepared, processor: Processor, run: Run
) -> dict[str, Any]:
    """How base and adapted model score on general text."""
    if task.general is None or data.general is None:
        return {"general": None}
    run = _without_further(task.general, run)
    args = (data.general, processor, data.facts, run)
    adapted = task.general.score(model, *args)
    with model.disable_adapter():
        base = task.general.score(model, *args)
    return {"general": against("base", base, adapted, run.seed)}


def _gap(
    task: Task,
    model: Any,
    data: Prepared,
    processor: Processor,
    run: Run,
    domain: Mapping[str, Any],
    rival: Contender,
) -> dict[str, Any]:
    """How much more the adapter gained on training rows than on held-out ones, by the deciding
    score; by the first of the task's own where the model would have to generate for that one."""
    rows = data.rows("train")
    drawn = np.random.default_rng(run.seed).permutation(len(rows))[: min(len(data.eval), _GAP_ROWS)]
    some = rows.select(drawn)
    cheap = _without_further(task, run)
    found = _score(task, rival, model, some, processor, data.facts, cheap)
    before = _own(task, found, run)[0]
    after = _own(task, task.score(model, some, processor, data.facts, cheap), run)[0]
    held_out = domain[after.name]["difference"]
    trained = after.figure - before.figure
    gap = held_out - trained if after.better == "lower" else trained - held_out
    figures = {"base": round(before.figure, 4), "adapted": round(after.figure, 4)}
    return {f"train_{after.name}": figures, "gap": round(gap, 4)}


def _without_further(task: Task, run: Run) -> Run:
    """The run without the metrics that a model has to generate for."""
    own = [name for name in run.prove.metrics if name in task.scores]
    prove = run.prove.model_copy(update={"metrics": own})
    return run.model_copy(update={"prove": prove})
