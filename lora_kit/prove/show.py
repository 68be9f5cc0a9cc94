"""Comparisons for people, as tables in the terminal; and a model's answer to one prompt."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from lora_kit.adapter.load import load, run_home
from lora_kit.base.templates import context_token, prompt_text
from lora_kit.errors import harmless
from lora_kit.prove.report import findings
from lora_kit.run import read_lock
from lora_kit.tasks.measure import generate


def comparison(report: dict[str, Any], title: str = "Base against adapted") -> None:
    """Print one report as a table and its verdicts in words. Losses fall, scores rise."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table(box=None, pad_edge=False, title=title, title_justify="left")
    table.add_column("held-out text")
    for name in ("documents", "base", "adapted", "change", "95% interval"):
        table.add_column(name, justify="right")
    shots = (report.get("few_shot") or {}).get("shots")

    def add(name: str, count: int, found: dict[str, Any], base: float, form: str) -> None:
        """A row, its change and interval in units of `base`."""
        bounds = [format(bound / base, form) for bound in found["ci95"] or ()]
        figures = (f"{found['base']:.3f}", f"{found['adapted']:.3f}")
        change = format(found["difference"] / base, form)
        table.add_row(Text(harmless(name)), str(count), *figures, change, " to ".join(bounds))

    for part, measure, name in (
        ("domain", "loss", "domain, nats per token"),
        ("domain", "bits_per_byte", "domain, bits per byte"),
        ("general", "loss", "general, nats per token"),
        ("general", "bits_per_byte", "general, bits per byte"),
        ("few_shot", "loss", f"base with {shots} examples"),
        ("scratch", "loss", "trained from scratch"),
    ):
        if report.get(part):
            found = report[part][measure]
            add(name, report[part]["documents"], found, found["base"], "+.1%")
    for name, found in {**(report.get("metrics") or {}), **(report.get("harness") or {})}.items():
        add(name, found["rows"], found, 1, "+.3f")
        if found.get("few_shot") is not None:
            table.add_row(f"  base with {shots} examples", "", f"{found['few_shot']:.3f}")
    console.print(table)
    for one in findings(report):
        if one.part != "gate":  # that is said as an error where it failed
            line = harmless(f"{one.part}: {one.sentence}")
            console.print(line, markup=False, highlight=False)


def side_by_side(report: dict[str, Any]) -> None:
    """Print what base and adapted said to some held-out rows."""
    for sample in report["samples"]:
        print(f"   chosen: {sample['chosen']}")
        for name in ("prompt", "base", "adapted", "expected"):
            text = printable(sample[name])
            print(f"{name:>9}: {text}")
        print()


def printable(text: str) -> str:
    """One line, without what would steer a terminal; no longer than 160 characters."""
    line = harmless(" ".join(text.split()))
    return line if len(line) <= 160 else line[:157] + "..."


def say(run: str | Path, prompt: str, base: bool, max_new_tokens: int) -> str:
    """What a run's model says to a prompt: the answer, where it learned from conversations, else
    the text that follows."""
    model, tokenizer = load(run)
    lock = read_lock(run_home(run))
    templated = lock.get("kind", "chat") == "chat" and bool(tokenizer.chat_template)
    if templated:
        prompt = prompt_text(tokenizer, [{"role": "user", "content": prompt}])
    else:
        prompt += lock.get("joiner", "")
    with model.disable_adapter() if base else contextlib.nullcontext():
        begin = [] if templated else context_token(tokenizer)
        ids = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
        return generate(model, tokenizer, [begin + ids], max_new_tokens)[0]
