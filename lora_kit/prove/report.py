"""report.json and report.html: what a run came to, in figures and in one page."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from lora_kit.errors import UserError
from lora_kit.folders import write_whole
from lora_kit.pages import render
from lora_kit.prove.bootstrap import verdict_of_scores
from lora_kit.prove.charts import curves, forest, heat
from lora_kit.run import read_json, read_lock
from lora_kit.schema import Run
from lora_kit.train.callbacks import read_metrics
from lora_kit.train.checkpoint import write_json

_TEMPLATE = Path(__file__).with_name("report.html.jinja")
_PARTS = {
    "domain": "Domain",
    "general": "General text",
    "few_shot": "Against examples in the prompt",
    "scratch": "Against training from scratch",
}
_WORDS = {
    "better": "better than the base on text it never saw",
    "worse": "worse than the base: negative transfer. Do not ship it",
    "no different": "no different from the base: the training bought nothing",
    "too little data": "not judged: fewer than 20 held-out documents",
    "kept": "what the base knew of general text is kept",
    "forgot": "general text got worse: the adapter forgets",
}
LARGEST_UNSEEN = 2.0  # percent of loss that may be lost before `kept` is said with a but
_BLIND = (
    "the loss fell, but the answers hardly depend on their prompts: what was learned is which "
    "answers occur, not which of them belongs to a prompt. Look for shuffled labels"
)
_AGAINST = {
    "few_shot": "the base with examples in its prompt",
    "scratch": "a model of its shape trained from scratch",
}


class Finding(NamedTuple):
    """One thing that was judged; `part` is its key in the report. `gain` is how much better the
    adapter is and its 95% interval, in `unit`: percent of the base, or points of 100."""

    part: str
    title: str
    word: str
    sentence: str
    figures: str = ""
    unit: str = ""
    gain: tuple[float, float, float] = (0.0, 0.0, 0.0)


def write_report(directory: Path, run: Run, report: dict[str, Any]) -> None:
    """Write both files of a finished run; all text from data is escaped.

    Raises:
        UserError: the run directory cannot be written to.
    """
    page = _page(directory, run, report)
    try:
        write_json(directory / "report.json", report)
        write_whole(directory / "report.html", page)
    except OSError as error:
        raise UserError(f"{directory}: the report cannot be written ({error.strerror})") from None


def in_words(verdict: str, part: str = "domain") -> str:
    """One sentence for a verdict's word; `part` is what was judged, also the name of a metric."""
    if part in ("domain", "general") or verdict == "too little data":
        return _WORDS[verdict]
    joined = {"better": "better than", "worse": "worse than", "no different": "no different from"}
    return f"{joined[verdict]} {_AGAINST.get(part, 'the base')}"


def in_lines(report: dict[str, Any]) -> list[str]:
    """A line for everything that was judged, as `train` ends with: figures, interval, verdict."""
    return [
        ": ".join(filter(None, (found.part, found.figures, found.sentence)))
        for found in findings(report)
    ]


def findings(report: dict[str, Any]) -> list[Finding]:
    """What was judged, in the order of importance; what is not known is said too."""
    report, found = _filled(report), []
    for part, title in _PARTS.items():
        if report[part]:
            word, loss = report["verdict"][part], report[part]["loss"]
            gain = _gain(loss, -100 / loss["base"])
            change = "{:+.1f}%, 95% {:+.1f}% to {:+.1f}%".format(*(-gain[n] for n in (0, 2, 1)))
            figures = f"{loss['base']:.3f} -> {loss['adapted']:.3f} nats per token ({change})"
            used, sentence = report["prompt_use"] or {"blind": False}, in_words(word, part)
            if part == "domain" and word == "no different" and gain[1] > 0 and used["blind"]:
                sentence = _BLIND
            if part == "general" and word == "kept" and -gain[1] > LARGEST_UNSEEN:
                sentence = f"no forgetting was shown, but up to {-gain[1]:+.1f}% is possible"
            found.append(Finding(part, title, word, sentence, figures, "%", gain))
        elif part == "general":
            why = "data.general names no text that should not be forgotten"
            found.append(Finding(part, title, "not known", f"not known: {why}"))
    for name, score in {**(report["metrics"] or {}), **(report["harness"] or {})}.items():
        base, change = score["base"], f"{score['difference']:+.3f}"
        figures = f"{base:.3f} -> {score['adapted']:.3f}"
        if score["ci95"] is None:
            why = "not judged: it is no mean over rows, so it has no interval"
            found.append(Finding(name, name, "not judged", why, f"{figures} ({change})"))
            continue
        change += ", 95% {:+.3f} to {:+.3f}".format(*score["ci95"])
        higher = score.get("higher_is_better", True)
        value, *bounds = _gain(score, 1 if higher else -1)
        judged = verdict_of_scores({"difference": value, "ci95": bounds}, score["rows"])
        word = report["verdict"].get(name, judged)
        # A share of 1 in points; of what has no upper end a share of the base can be told.
        unit = " points" if higher and 0 <= base <= 1 else "%" if base else ""
        gain = _gain(score, (1 if higher else -1) * 100 / (abs(base) if unit == "%" else 1))
        sentence = in_words(word, name)
        found.append(Finding(name, name, word, sentence, f"{figures} ({change})", unit, gain))
    if gate := report["gate"]:
        word = "passed" if gate["passed"] else "failed"
        found.append(Finding("gate", "Gate", word, "; ".join([word, *gate["failed"]])))
    if audit := report["audit"]:
        problems = [f"{p['what']}. {p['cause']}. {p['fix']}" for p in audit["problems"]]
        failed = [c["found"] for c in audit["checks"] if c["passed"] is False]
        word = "failed" if problems or failed else "passed"
        why = "; ".join(problems or failed or ["every check passed that could be made"])
        found.append(Finding("audit", "Did it train", word, why))
    else:
        why = "not known: no training that came to its end was checked"
        found.append(Finding("audit", "Did it train", "not known", why))
    for line in report["not_measured"] or []:
        found.append(Finding("not measured", "Not measured", "not known", line))
    return found


def _gain(found: dict[str, Any], factor: float) -> tuple[float, float, float]:
    """A difference and its interval as an improvement, times `factor`."""
    low, high = sorted(factor * bound for bound in found["ci95"])
    return factor * found["difference"], low, high


def _filled(report: dict[str, Any]) -> dict[str, Any]:
    """What was not measured, or not yet known to an older version, is null."""
    return defaultdict(lambda: None, report)


def _page(directory: Path, run: Run, report: dict[str, Any]) -> str:
    report, found = _filled(report), findings(report)
    best_step = (report["overfitting"] or {}).get("best_step")
    plots = {unit: [f for f in found if f.unit == unit] for unit in ("%", " points")}
    return render(
        _TEMPLATE,
        run=run,
        report=report,
        findings=found,
        parts=_PARTS,
        plots=[(u, rows, forest([f.gain for f in rows])) for u, rows in plots.items() if rows],
        curves=curves(read_metrics(directory / "metrics.jsonl"), best_step),
        heat=heat(report["layers"]) if report["layers"] else None,
        lock=read_lock(directory),
        census=read_json(directory / "census.json") or None,
        settings=json.dumps(run.model_dump(mode="json"), indent=1, ensure_ascii=False),
    )
