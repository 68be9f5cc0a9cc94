"""Comparisons as tables in the terminal; and a model's completion of one prompt."""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING

from lora_kit.adapter.finished import FinishedRun
from lora_kit.adapter.load import load_model
from lora_kit.base.templates import context_token, prompt_text
from lora_kit.errors import harmless
from lora_kit.prove.charts import confused
from lora_kit.prove.report import PARTS, UNITS, contender_rows, findings, units_of
from lora_kit.prove.scores import better, compared_scores, decided_by
from lora_kit.schema import Json
from lora_kit.tasks.measure import generate

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def comparison(report: Json, title: str = "") -> None:
    """Print one report: a table of scores, one of contenders where there are several, and a line
    for each result. `title` is by default what is compared with what."""
    from rich.console import Console

    console = Console()
    console.print(_scores(report, title))
    _contenders(report, console)
    lines = []
    if report.get("classes"):
        mistakes = [
            f"{true} as {predicted} ({count} of {rows})"
            for true, predicted, count, rows in confused(report["classes"]).pairs[:5]
        ]
        if mistakes:
            lines.append(f"most frequent mistakes: {'; '.join(mistakes)}")
    for one in findings(report):
        if one.part != "gate":  # where it fails it is printed as an error
            lines.append(f"{one.part}: {one.sentence}")
    for line in lines:
        console.print(harmless(line), markup=False, highlight=False)


def _scores(report: Json, title: str) -> Table:
    """The table of all scores of the rival and the adapted model."""
    from rich.text import Text

    rival = report["domain"].get("rival", "base")
    first = "Base" if rival == "base" else harmless(rival)
    table = _table(title or f"{first} against adapted")
    table.add_column("score")
    for name in (units_of(report), "base" if rival == "base" else "rival", "adapted"):
        table.add_column(name, justify="right")
    table.add_column("change", justify="right")
    table.add_column("95% interval", justify="right")

    def add(label: str, count: int, score: Json, percent: bool = False) -> None:
        """A row; with `percent`, change and interval are in percent of the base."""
        scale, form = (score["base"], "+.1%") if percent and score["base"] else (1, "+.3f")
        bounds = [format(bound / scale, form) for bound in score["ci95"] or ()]
        change = format(score["difference"] / scale, form)
        figures = (f"{score['base']:.3f}", f"{score['adapted']:.3f}")
        table.add_row(Text(harmless(label)), str(count), *figures, change, " to ".join(bounds))

    few_shot = f"base with {(report.get('few_shot') or {}).get('shots')} examples"
    for part in PARTS:
        compared = report.get(part) or {}
        for name, score in compared_scores(compared).items():
            nats = name in ("loss", "bits_per_byte")
            label = f"{part}, {UNITS[name] if nats else name}"
            if part in ("few_shot", "scratch"):
                if name == "bits_per_byte" or "rows" in score:  # shown with the metrics below
                    continue
                label = few_shot if part == "few_shot" else "trained from scratch"
            add(label, compared["documents"], score, percent=nats)
    for name, score in {**(report.get("metrics") or {}), **(report.get("harness") or {})}.items():
        add(name, score["rows"], score)
        if score.get("few_shot") is not None:
            table.add_row(f"  {few_shot}", "", f"{score['few_shot']:.3f}")
    generated = report.get("generation") or {}
    for name, score in compared_scores(generated).items():
        label = f"generated, {name}"
        if UNITS.get(name):
            label += f" ({UNITS[name]})"
        add(label, generated.get("prompts", report["domain"]["documents"]), score)
    return table


def _contenders(report: Json, console: Console) -> None:
    """A table of all contenders by the score that decides, best first; the rival is marked."""
    from rich.text import Text

    names, rows = contender_rows(report)
    deciding, score = decided_by(report)
    if not rows or deciding not in names:
        return
    rival = report["domain"].get("rival", "base")
    table = _table("")
    table.add_column("contender")
    for name in names:
        table.add_column(Text(harmless(name)), justify="right")
    place = names.index(deciding)
    sign = 1 if better(deciding, score) == "lower" else -1

    def rank(row: tuple[str, list[float | None]]) -> float:
        value = row[1][place]
        return math.inf if value is None else sign * value

    for who, values in sorted(rows, key=rank):
        label = f"{who} (rival)" if who == rival else who
        cells = ["" if value is None else f"{value:.3f}" for value in values]
        table.add_row(Text(harmless(label)), *cells)
    console.print(table)


def _table(title: str) -> Table:
    from rich.table import Table

    return Table(box=None, pad_edge=False, title=title or None, title_justify="left")


def side_by_side(report: Json) -> None:
    """Print what base and adapted generated for some held-out rows."""
    for sample in report["samples"]:
        print(f"   chosen: {sample['chosen']}")
        for name in ("prompt", "base", "adapted", "expected"):
            text = printable(sample[name])
            print(f"{name:>9}: {text}")
        print()


def printable(text: str) -> str:
    """One line without control characters, at most 160 characters long."""
    line = harmless(" ".join(text.split()))
    return line if len(line) <= 160 else line[:157] + "..."


def complete(run: FinishedRun, prompt: str, base: bool, max_new_tokens: int) -> str:
    """A run's completion of a prompt: the assistant turn if it was trained on conversations, else
    the following text. `base`: without the adapter."""
    run.require_language_model("generate")
    model, tokenizer = load_model(run)
    lock = run.lock
    templated = lock.get("kind", "chat") == "chat" and bool(tokenizer.chat_template)
    if templated:
        prompt = prompt_text(tokenizer, [{"role": "user", "content": prompt}])
    else:
        prompt += lock.get("joiner", "")
    with model.disable_adapter() if base else contextlib.nullcontext():
        begin = [] if templated else context_token(tokenizer)
        ids = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
        return generate(model, tokenizer, [begin + ids], max_new_tokens)[0]
