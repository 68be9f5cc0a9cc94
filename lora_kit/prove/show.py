"""Comparisons for people, as tables in the terminal; and a model's answer to one prompt."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from lora_kit.adapter.load import load, run_home
from lora_kit.data.templates import prompt_text
from lora_kit.prove.measure import generate
from lora_kit.prove.report import in_words
from lora_kit.run import read_lock


def comparison(report: dict[str, Any], title: str = "Base against adapted") -> None:
    """Print one report as a table, lower is better, and its verdicts in words."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(box=None, pad_edge=False, title=title, title_justify="left")
    table.add_column("held-out text")
    for name in ("documents", "base", "adapted", "change", "95% interval"):
        table.add_column(name, justify="right")
    for part in ("domain", "general"):
        for measure, unit in (("loss", "nats per token"), ("bits_per_byte", "bits per byte")):
            if report[part] is None:
                continue
            found = report[part][measure]
            low, high = (bound / found["base"] for bound in found["ci95"])
            table.add_row(
                f"{part}, {unit}",
                str(report[part]["documents"]),
                f"{found['base']:.3f}",
                f"{found['adapted']:.3f}",
                f"{found['difference'] / found['base']:+.1%}",
                f"{low:+.1%} to {high:+.1%}",
            )
    console.print(table)
    for part, word in report["verdict"].items():
        console.print(f"{part}: {in_words(word)}", markup=False, highlight=False)
    if report["general"] is None:
        console.print("general: not known, data.general names no text", highlight=False)


def side_by_side(report: dict[str, Any]) -> None:
    """Print what base and adapted said to the first held-out examples."""
    for sample in report["samples"]:
        for name in ("prompt", "base", "adapted", "expected"):
            text = printable(sample[name])
            print(f"{name:>9}: {text}")
        print()


def harmless(text: str) -> str:
    """Text without what would steer a terminal; line ends stay."""
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text)


def printable(text: str) -> str:
    """One line, without what would steer a terminal; no longer than 160 characters."""
    line = harmless(" ".join(text.split()))
    return line if len(line) <= 160 else line[:157] + "..."


def say(run: str | Path, prompt: str, base: bool, max_new_tokens: int) -> str:
    """What a run's model says to a prompt: the answer, where it learned from conversations, else
    the text that follows."""
    model, tokenizer = load(run)
    lock = read_lock(run_home(run))
    templated = lock.get("kind") == "chat" and bool(tokenizer.chat_template)
    if templated:
        prompt = prompt_text(tokenizer, [{"role": "user", "content": prompt}])
    else:
        prompt += lock.get("joiner", "")
    with model.disable_adapter() if base else contextlib.nullcontext():
        return generate(model, tokenizer, [prompt], max_new_tokens, templated)[0]
