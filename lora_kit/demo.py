"""The demo: every step on the embedded model: CPT, SFT, compare, merge, reload, generate."""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from lora_kit.errors import UserError
from lora_kit.folders import writer_of
from lora_kit.launch import gpu_count, prepare_process
from lora_kit.run import load_run, read_json, read_lock, shipped
from lora_kit.schema import Json
from lora_kit.start import start

CPT, SFT, MERGED = Path("runs/demo/cpt"), Path("runs/demo/sft"), Path("runs/demo/merged")
QUESTION = "What does `zipfile.ZipFile.read` do?"


def run_demo() -> None:
    """Adapt nano to Python's language reference (QLoRA), then to questions; evaluate both.

    Writes runs/demo/cpt, runs/demo/sft and runs/demo/merged, replacing those of an earlier demo.

    Raises:
        UserError: one of these folders exists and is not from a demo.
    """
    from rich.console import Console

    console = Console()
    _remove_earlier()
    started = time.monotonic()
    prepare_process()
    from lora_kit.adapter.finished import FinishedRun
    from lora_kit.prove.show import comparison, printable
    from lora_kit.ship.merge import merge
    from lora_kit.speed.runtime import float32_is_faster

    options, dtype = [], None
    if not gpu_count() and float32_is_faster():
        print("bfloat16 is slow on this CPU: the demo uses float32.", file=sys.stderr)
        options, dtype = ["base.dtype=float32"], "float32"

    _step(1, "Continued pre-training on Python's language reference (QLoRA, 4 bits)")
    start(_config("cpt"), ["name=demo/cpt", *options])

    _step(2, "Instruction tuning, starting from that adapter: what does a function do?")
    start(_config("sft"), ["name=demo/sft", f"adapter.start={CPT}", *options])

    _step(3, "Merge the adapter into the base, reload it from disk, compare the logits")
    merged = merge(FinishedRun(SFT), MERGED, dtype, verify="logits")

    _step(4, "Generate with the merged model, loaded with transformers alone")
    answer = _ask(MERGED, QUESTION)
    reports = [read_json(folder / "report.json") for folder in (CPT, SFT)]
    console.rule("Result")
    comparison(reports[0], "1. Continued pre-training; domain: the language reference")
    console.print()
    comparison(reports[1], "2. Instruction tuning; domain: questions about functions")
    trained = reports[0]["training"]["trainable_parameters"]
    console.print(
        f"\nLower is better. The base's 3.8 million parameters are unchanged; an adapter with "
        f"{trained:,} parameters was trained. Total time: {time.monotonic() - started:.0f} s.\n"
        f"Merged model: {merged.out}, its logits within {merged.max_logit_difference:.2g} of the "
        f"adapter's (the adapter's own effect: {merged.adapter_effect:.2g}).",
        highlight=False,
    )
    console.print(f"\nQ: {QUESTION}\nA: {printable(answer)}", markup=False, highlight=False)
    console.print(
        "(a model this small gets the form of an answer right, rarely its content)\n\n"
        f"Report, for a browser:      {SFT / 'report.html'}\n"
        "Next, with your own data:   lora-kit copy sft my-field",
        markup=False,
        highlight=False,
    )


def _step(number: int, title: str) -> None:
    print(f"\n[{number}/4] {title}", file=sys.stderr, flush=True)


def _config(recipe: str) -> Path:
    """The run file of a step."""
    return shipped("recipes") / "configs" / f"nano-{recipe}.yaml"


def _remove_earlier() -> None:
    """Remove what an earlier demo wrote. Raises UserError, before anything is removed, if one of
    its folders exists and is not recognised as such, or is in use."""
    trained = read_lock(SFT).get("adapter", {}).get("sha256")
    merged = trained and read_json(MERGED / "merge.json").get("adapter") == {"sha256": trained}
    own = {CPT: _is_own(CPT, "cpt"), SFT: _is_own(SFT, "sft"), MERGED: merged}
    for folder, known in own.items():
        empty = folder.is_dir() and not any(folder.iterdir())
        if os.path.lexists(folder) and (folder.is_symlink() or not (known or empty)):
            raise UserError(f"{folder} exists and is not from a demo: move it away")
        if writer := writer_of(folder):
            raise UserError(f"{folder}: in use by {writer}: wait until it ends, or stop it")
    for folder in own:
        if folder.exists():
            shutil.rmtree(folder)


def _is_own(folder: Path, recipe: str) -> bool:
    """Whether a run is the demo's: of the settings of its run file, on the same data and base."""
    if not (folder / "run.yaml").is_file():
        return False

    def settings(file: Path) -> Json:
        values = load_run(file, needs_sources=False).model_dump()
        for section, key in (("base", "dtype"), ("base", "revision"), ("adapter", "start")):
            values[section].pop(key)  # set by the demo, or recorded
        return {**values, "name": None}

    try:
        return settings(folder / "run.yaml") == settings(_config(recipe))
    except UserError:  # an invalid run file
        return False


def _ask(folder: Path, question: str) -> str:
    """The merged model's answer, by transformers' pipeline alone."""
    from transformers import pipeline

    model: Any = pipeline("text-generation", str(folder), trust_remote_code=False)
    asked = [{"role": "user", "content": question}]
    generated = model(asked, max_new_tokens=48, do_sample=False, return_full_text=False)
    return generated[0]["generated_text"]
