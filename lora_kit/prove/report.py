"""report.json and report.html: what a run came to, in figures and in one page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lora_kit.run import Run, read_lock
from lora_kit.train.callbacks import read_metrics
from lora_kit.train.checkpoint import write_json

_TEMPLATE = Path(__file__).with_name("report.html.jinja")
_WORDS = {
    "better": "better than the base on text it never saw",
    "worse": "worse than the base: negative transfer. Do not ship it",
    "no different": "no different from the base: the training bought nothing",
    "too little data": "not judged: fewer than 20 held-out documents",
    "kept": "what the base knew of general text is kept",
    "forgot": "general text got worse: the adapter forgets",
}


def write_report(directory: Path, run: Run, report: dict[str, Any]) -> None:
    """Write both files of a finished run; all text from data is escaped."""
    write_json(directory / "report.json", report)
    page = _page(directory, run, report)
    partial = directory / "report.html.partial"
    partial.write_text(page, encoding="utf-8")
    partial.replace(directory / "report.html")


def in_words(verdict: str) -> str:
    """One sentence for a verdict's word."""
    return _WORDS[verdict]


def in_lines(report: dict[str, Any]) -> list[str]:
    """A line for each text that was judged: bits per byte, change, interval, verdict."""
    lines = []
    for part, word in report["verdict"].items():
        found = report[part]["bits_per_byte"]
        low, high = (bound / found["base"] for bound in found["ci95"])
        lines.append(
            f"{part}: {found['base']:.3f} -> {found['adapted']:.3f} bits per byte "
            f"({found['difference'] / found['base']:+.1%}, 95% {low:+.1%} to {high:+.1%}): "
            f"{in_words(word)}"
        )
    return lines


def _page(directory: Path, run: Run, report: dict[str, Any]) -> str:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    rows = read_metrics(directory / "metrics.jsonl")
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        run=run,
        report=report,
        words=_WORDS,
        lock=read_lock(directory),
        curve=_curve([(row["step"], row["loss"]) for row in rows if "loss" in row]),
        settings=json.dumps(run.model_dump(mode="json"), indent=1, ensure_ascii=False),
    )


def _curve(points: list[tuple[int, float]], width: int = 640, height: int = 200) -> dict[str, Any]:
    """Points of an SVG polyline, in a box of width × height, and the ends of both axes."""
    steps, losses = zip(*points, strict=True) if points else ((), ())
    if len(set(steps)) < 2:
        return {}
    low, high = min(losses), max(losses)
    spread = (high - low) or 1.0
    line = " ".join(
        f"{(s - steps[0]) / (steps[-1] - steps[0]) * width:.1f},{(high - v) / spread * height:.1f}"
        for s, v in points
    )
    ends = {"first": steps[0], "last": steps[-1], "low": f"{low:.2f}", "high": f"{high:.2f}"}
    return {"line": line, "width": width, "height": height, **ends}
