"""The whole journey on the embedded model: CPT, SFT, compare, merge, reload, generate."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import Any

from lora_kit.errors import UserError
from lora_kit.launch import gpu_count, prepare_process, start
from lora_kit.run import read_json, shipped

CPT, SFT, MERGED = Path("runs/demo/cpt"), Path("runs/demo/sft"), Path("runs/demo/merged")
QUESTION = "What does `zipfile.ZipFile.read` do?"


def run_demo() -> None:
    """Adapt nano to Python's language reference (QLoRA), then to answering questions; prove it.

    Writes runs/demo/cpt, runs/demo/sft and runs/demo/merged, replacing those of an earlier demo.

    Raises:
        UserError: one of these folders exists and was not made by a demo.
    """
    from rich.console import Console

    console = Console()
    for folder in (CPT, SFT, MERGED):
        _remove_own(folder)
    configs = shipped("recipes") / "configs"
    started = time.monotonic()
    prepare_process()
    from lora_kit.adapter.finished import FinishedRun
    from lora_kit.prove.show import comparison, printable
    from lora_kit.ship.merge import merge
    from lora_kit.speed.runtime import float32_is_faster

    options = []
    if not gpu_count() and float32_is_faster():
        print("This CPU has no instructions for bfloat16: the demo uses float32.", file=sys.stderr)
        options = ["base.dtype=float32"]

    _step(1, "Continued pre-training: nano reads Python's language reference (QLoRA, 4 bits)")
    start(configs / "nano-cpt.yaml", ["name=demo/cpt", *options])

    _step(2, "Instruction tuning, going on from that adapter: what does a function do?")
    start(configs / "nano-sft.yaml", ["name=demo/sft", f"adapter.start={CPT}", *options])

    _step(3, "Merge the adapter into the base, reload it from disk, compare the logits")
    merged = merge(FinishedRun(SFT), MERGED, verify="logits")

    _step(4, "Ask the merged model, loaded by transformers alone")
    answer = _ask(MERGED, QUESTION)
    reports = [read_json(folder / "report.json") for folder in (CPT, SFT)]
    console.rule("Result")
    comparison(reports[0], "1. Reading: the language reference is the domain")
    console.print()
    comparison(reports[1], "2. Answering: questions about functions are the domain")
    trained = reports[0]["training"]["trainable_parameters"]
    console.print(
        f"\nLower is better. The base's 3.8 million parameters stayed as they were; an adapter of "
        f"{trained:,} beside them was trained. {time.monotonic() - started:.0f} s in all.\n"
        f"Merged model: {merged.out}, its logits within {merged.max_logit_difference:.2g} of the "
        f"adapter's (the adapter's own effect: {merged.adapter_effect:.2g}).",
        highlight=False,
    )
    console.print(f"\nQ: {QUESTION}\nA: {printable(answer)}", markup=False, highlight=False)
    console.print(
        "(a model this small writes the form of an answer, seldom the truth)\n\n"
        f"The report, for a browser:  {SFT / 'report.html'}\n"
        "Now your own data:          lora-kit copy sft my-field",
        markup=False,
        highlight=False,
    )


def _step(number: int, title: str) -> None:
    print(f"\n[{number}/4] {title}", file=sys.stderr, flush=True)


def _remove_own(folder: Path) -> None:
    """Remove what an earlier demo wrote, finished or not; anything else is the user's."""
    if not folder.exists():
        return
    mine = (folder / "run.yaml").is_file() or (folder / "config.json").is_file()
    if folder.is_symlink() or not folder.is_dir() or not (mine or not any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not a demo's: move it away")
    shutil.rmtree(folder)


def _ask(folder: Path, question: str) -> str:
    """The merged model's answer; nothing of lora_kit is in between, only its greedy `generate`."""
    from transformers import pipeline

    model: Any = pipeline("text-generation", str(folder), trust_remote_code=False)
    asked = [{"role": "user", "content": question}]
    said = model(asked, max_new_tokens=48, do_sample=False, return_full_text=False)
    return said[0]["generated_text"]
