"""The bounds that a run must reach to count as done: `prove.gate`."""

from __future__ import annotations

from typing import Any

from lora_kit.prove.scores import NO_LANGUAGE_MODEL, better, compared_scores, not_measured
from lora_kit.schema import Gate

# A bound and the words that reach it.
_REACHED = {"better": {"better"}, "no different": {"better", "no different"}, "kept": {"kept"}}


def held(report: dict[str, Any], gate: Gate) -> dict[str, Any]:
    """Hold a report to a gate: {"passed": bool, "failed": [a line for each bound that is broken]}.

    What was not measured does not hold; general text is not asked for where the model has no
    language-model head that could forget it.
    """
    failed = []
    for part in ("domain", "general", "few_shot"):
        asked = getattr(gate, part)
        if part == "general" and NO_LANGUAGE_MODEL in (report.get("not_measured") or []):
            continue
        word = report["verdict"].get(part)
        if asked and word not in _REACHED[asked]:
            found = word or f"not measured: {not_measured(report, part)}"
            failed.append(f"{part}: {found} (asked for: {asked})")
    for problem in (report.get("audit") or {}).get("problems", []):
        failed.append(f"audit: {problem['what']}")
    scores = {**(report.get("metrics") or {}), **compared_scores(report["domain"])}
    if gate.loss is not None:
        failed += _broken("loss", report["domain"].get("loss"), gate.loss, " nats per token")
    for name, bound in gate.metrics.items():
        failed += _broken(name, scores.get(name), bound)
    return {"passed": not failed, "failed": failed}


def _broken(name: str, score: dict[str, Any] | None, bound: float, unit: str = "") -> list[str]:
    """A line if the adapted model's score is not measured or beyond its bound, else none."""
    lower = better(name, score or {}) == "lower"
    value = score["adapted"] if score else None
    if value is not None and (value <= bound if lower else value >= bound):
        return []
    found = "not measured" if value is None else f"{value}{unit}"
    return [f"{name}: {found} (asked for: {bound:g} at {'most' if lower else 'least'})"]
