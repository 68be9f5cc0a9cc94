"""What must hold for a run to count as done."""

from __future__ import annotations

from typing import Any

from lora_kit.schema import Gate

# A bound and the words that reach it.
_REACHED = {"better": {"better"}, "no different": {"better", "no different"}, "kept": {"kept"}}
_UNKNOWN = {
    "general": "not known: name data.general",
    "few_shot": "not known: prove.shots: 0, or no room for examples in the base's context",
}


def held(report: dict[str, Any], gate: Gate) -> dict[str, Any]:
    """Hold a report to a gate: {"passed": bool, "failed": [a line for each bound that is broken]}.

    What was not measured does not hold.
    """
    failed = []
    for part in ("domain", "general", "few_shot"):
        asked = getattr(gate, part)
        word = report["verdict"].get(part)
        if asked and word not in _REACHED[asked]:
            failed.append(f"{part}: {word or _UNKNOWN[part]} (asked for: {asked})")
    for problem in (report.get("audit") or {}).get("problems", []):
        failed.append(f"audit: {problem['what']}")
    loss = report["domain"]["loss"]["adapted"]
    if gate.loss is not None and loss > gate.loss:
        failed.append(f"loss: {loss} nats per token (asked for: {gate.loss:g} at most)")
    for name, least in gate.metrics.items():
        figures = (report["metrics"] or {}).get(name)
        if figures is None or figures["adapted"] < least:
            found = figures["adapted"] if figures else "not measured"
            failed.append(f"{name}: {found} (asked for: {least:g} at least)")
    return {"passed": not failed, "failed": failed}
