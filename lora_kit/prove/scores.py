"""The scores in report.json: comparisons, contenders, classes; and the gate on them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lora_kit.schema import Gate, Json
from lora_kit.tasks import metrics
from lora_kit.tasks.bootstrap import compared, counted, verdict
from lora_kit.tasks.task import Score

# For `not_measured`: a model without a language-model head has no general text to forget.
NO_LANGUAGE_MODEL = "general: this model has no language-model head"
IN_ANOTHER_UNIT = ("bits_per_byte",)  # the loss in another unit: it has no verdict of its own


def against(rival: str, base: Sequence[Score], adapted: Sequence[Score], seed: int) -> Json:
    """The scores of a rival and of the adapted model on the same units: `domain` of report.json,
    and `general`, `few_shot`, `scratch` and `generation`, which have the same form.

    Args:
        rival: the contender whose scores `base` are.
        base, adapted: the same scores in the same order, the deciding one first.

    Returns:
        {"documents": units that the first score counts, "rival", each score's name: what
        `bootstrap.compared` returns}.

    Raises:
        CheckFailed: a score is not finite.
    """
    found: Json = {"documents": int(counted(base[0], adapted[0]).sum()), "rival": rival}
    for before, after in zip(base, adapted, strict=True):
        if before.name != after.name:
            raise ValueError(f"{before.name} is compared with {after.name}")
        found[after.name] = compared(before, after, seed)
    return found


def values(scores: Sequence[Score]) -> dict[str, float]:
    """{name: value of the score over all units}, as in `contenders.NAME` of report.json.

    >>> values([Score("accuracy", np.array([[1.0, 1.0], [0.0, 1.0], [1.0, 1.0]]))])
    {'accuracy': 0.6667}
    """
    return {score.name: round(score.figure, 4) for score in scores}


def compared_scores(part: Json) -> dict[str, Json]:
    """The scores of a part that `against` returned, without its other entries (`documents`,
    `rival`, ...), which are not objects."""
    return {name: found for name, found in part.items() if isinstance(found, dict)}


def decided_by(report: Json) -> tuple[str, Json]:
    """Name and figures of the score that decides `verdict.domain`: the one that
    `domain.decided_by` names, from the domain or from `metrics`; else the first of the domain."""
    scores = compared_scores(report["domain"])
    name = report["domain"].get("decided_by") or next(iter(scores), "loss")
    return name, {**(report.get("metrics") or {}), **scores}[name]


def deciding_in(part: Json, name: str) -> tuple[str, Json]:
    """Name and figures of the score by which a part such as `few_shot` is compared: the deciding
    one if the part has it, else its first."""
    scores = compared_scores(part)
    name = name if name in scores else next(iter(scores))
    return name, scores[name]


def other_verdicts(report: Json) -> dict[str, str]:
    """{score: its verdict}, of every measured score but the deciding one: of the domain,
    `metrics` and `harness`; `not evaluated` without an interval."""
    domain = report["domain"]
    measured = compared_scores(domain)
    measured |= {**(report.get("metrics") or {}), **(report.get("harness") or {})}
    words = {}
    for name, found in measured.items():
        if name in (decided_by(report)[0], *IN_ANOTHER_UNIT):
            continue
        if found["ci95"] is None:
            words[name] = "not evaluated"
        else:
            units = found.get("rows", domain["documents"])
            computed = verdict({**found, "better": better(name, found)}, units)
            words[name] = report["verdict"].get(name, computed)
    return words


def better(name: str, score: Json) -> str:
    """`lower` or `higher`, whichever is better for a score. Entries of the harness have
    `higher_is_better` instead of `better`, and reports of older versions neither."""
    if score.get("higher_is_better") is False or name in ("loss", "bits_per_byte"):
        return "lower"
    return str(score.get("better", "higher"))


def not_measured(report: Json, part: str) -> str:
    """Why `general` or `few_shot` of the report is null."""
    for line in reversed(report.get("not_measured") or []):
        if line.startswith(f"{part}: "):
            return str(line.removeprefix(f"{part}: "))
    if part == "few_shot":
        return "prove.shots: 0, or no room for examples in the base's context"
    return "set data.general to text that must not be forgotten"


def classes(scores: Sequence[Score]) -> Json | None:
    """What a classifier got right and wrong: `classes` of report.json; None without classes.

    Args:
        scores: of the adapted model; `about` of one of them holds `labels` and `confusion`: how
            many rows of a true class (first axis) were given a predicted one (second axis).
    """
    about = next((score.about for score in scores if "confusion" in score.about), None)
    if about is None:
        return None
    confusion = np.asarray(about["confusion"], dtype=np.int64)  # (classes, classes)
    return metrics.classes([str(label) for label in about["labels"]], confusion)


# ------------------------------------------------------------------ the gate
# {bound: the verdicts that satisfy it}
_REACHED = {"better": {"better"}, "no different": {"better", "no different"}, "kept": {"kept"}}


def check_gate(report: Json, gate: Gate) -> Json:
    """`gate` of report.json: {"passed": bool, "failed": [a line for each bound of `prove.gate` that
    does not hold, and for each problem of the audit]}.

    A bound on something that was not measured does not hold, except for general text where the
    model has no language-model head.
    """
    failed = []
    for part in ("domain", "general", "few_shot"):
        bound: str | None = getattr(gate, part)
        if part == "general" and NO_LANGUAGE_MODEL in (report.get("not_measured") or []):
            continue
        word = report["verdict"].get(part)
        if bound and word not in _REACHED[bound]:
            found = word or f"not measured: {not_measured(report, part)}"
            failed.append(f"{part}: {found} (asked for: {bound})")
    if gate.scores:
        worse = [name for name, word in other_verdicts(report).items() if word == "worse"]
        failed += [f"{name}: worse (asked for: {gate.scores})" for name in worse]
    for problem in (report.get("audit") or {}).get("problems", []):
        failed.append(f"audit: {problem['what']}")
    scores = {**(report.get("metrics") or {}), **compared_scores(report["domain"])}
    if gate.loss is not None:
        failed += _broken("loss", report["domain"].get("loss"), gate.loss, " nats per token")
    for name, limit in gate.metrics.items():
        failed += _broken(name, scores.get(name), limit)
    return {"passed": not failed, "failed": failed}


def _broken(name: str, score: Json | None, bound: float, unit: str = "") -> list[str]:
    """A line if the adapted model's score is not measured or beyond its bound, else none."""
    lower = better(name, score or {}) == "lower"
    value = score["adapted"] if score else None
    if value is not None and (value <= bound if lower else value >= bound):
        return []
    found = "not measured" if value is None else f"{value}{unit}"
    return [f"{name}: {found} (asked for: {bound:g} at {'most' if lower else 'least'})"]
