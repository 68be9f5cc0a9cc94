"""The verbs. A stage of the journey is imported when its verb runs, so that --help is quick."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lora_kit import __version__
from lora_kit.errors import CheckFailed, LoraKitError, UserError, harmless

app = typer.Typer(
    name="lora-kit",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Adapt a language model to your field, prove that it got better, ship it.",
    epilog="A first try that needs no network: lora-kit demo",
)
# What typer raises for a verb or an option that is wrong; it has no public name of its own.
_WrongUsage: Any = typer.BadParameter.__base__
RunDir = Annotated[Path, typer.Argument(help="A finished run, such as runs/demo/sft.")]
RunFile = Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings that replace the file's."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one machine-readable object.")]


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    if show_version:
        print(__version__)
        raise typer.Exit
    if debug:
        os.environ["LORA_KIT_DEBUG"] = "1"
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def demo() -> None:
    """Run the whole journey on the embedded model: adapt, judge, merge, generate.

    Example: lora-kit demo
    """
    from lora_kit.demo import run_demo

    run_demo()


@app.command()
def train(
    run_file: RunFile,
    overrides: Overrides = None,
    accelerate: Annotated[
        str | None,
        typer.Option(help="A config of accelerate_configs/, or a path; default: what fits."),
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="How many, instead of the config's number.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the interrupted run of this name.")
    ] = False,
) -> None:
    """Train a run file's adapter with `accelerate launch`, then judge it against the base.

    Example: lora-kit train run.yaml train.max_steps=200 --accelerate cpu
    """
    from lora_kit.launch import start

    start(run_file, overrides or [], accelerate, processes, resume)


@app.command()
def preview(
    run_file: RunFile,
    overrides: Overrides = None,
    samples: Annotated[int, typer.Option(min=0, help="How many to show; 0: none.")] = 3,
    split: Annotated[
        Literal["train", "eval", "general"], typer.Option(help="Whose samples are shown.")
    ] = "train",
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page to browse as well.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what a run would learn from, token by token, and what would stop it; no model is loaded.

    Example: lora-kit preview run.yaml --html preview.html
    """
    from lora_kit.run import load_run

    run = load_run(run_file, overrides or [])
    from lora_kit.data import preview as view

    if html is not None:
        view.check_page(html)  # before the work, not after it
    from lora_kit.base.load import load_tokenizer, quiet_libraries
    from lora_kit.base.pin import pin
    from lora_kit.data.prepare import kind_of, prepare
    from lora_kit.data.templates import set_template

    quiet_libraries()
    tokenizer = load_tokenizer(pin(run.base, weights=False))
    set_template(tokenizer, run.data.chat_template)
    kind, length = kind_of(run.recipe), run.train.max_length
    data = prepare(run.data, kind, tokenizer, length, run.seed, limits=False)
    problems = data.census.problems(run.data.limits)
    if html is not None:
        view.write_page(html, run, data, tokenizer, problems)
        print(f"{html}: written; open it in a browser", file=sys.stderr)
    if as_json:
        print(json.dumps(view.to_json(run, data, problems)))
    else:
        view.show(data, tokenizer, split, samples)
    for problem in problems:
        print(f"a run would stop here: {view.harmless(problem)}", file=sys.stderr)


@app.command()
def compare(
    run: RunDir,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[prove.KEY=VALUE]...", help="What to measure besides."),
    ] = None,
    gate: Annotated[
        bool, typer.Option("--gate", help="Exit 1 unless prove.gate, or its defaults, hold.")
    ] = False,
    scratch: Annotated[
        bool,
        typer.Option("--scratch", help="Train a model of the base's shape from nothing beside it."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure base, base with examples and adapter on a finished run's held-out text, again.

    Example: lora-kit compare runs/demo/sft prove.metrics=[f1] --gate
    """
    from lora_kit.launch import prepare_process

    prepare_process()
    import lora_kit
    from lora_kit.prove.show import comparison, side_by_side

    with contextlib.redirect_stdout(sys.stderr):  # of metrics and tasks, which print what they like
        report = lora_kit.compare(run, overrides or [], gate=gate, scratch=scratch)
    if as_json:
        print(json.dumps(report))
    else:
        side_by_side(report)
        comparison(report)
    if report["gate"] and not report["gate"]["passed"]:
        raise CheckFailed("\n".join(f"gate: {line}" for line in report["gate"]["failed"]))


@app.command()
def generate(
    run: RunDir,
    prompt: Annotated[str, typer.Argument(help="What to say to the model.")],
    base: Annotated[bool, typer.Option("--base", help="Without the adapter.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens at most.")] = 64,
) -> None:
    """Let a run's model answer or continue a prompt, greedily, with or without its adapter.

    Example: lora-kit generate runs/demo/sft "What does `heapq.heappush` do?"
    """
    from lora_kit.launch import prepare_process

    prepare_process()
    from lora_kit.prove.show import say

    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise UserError("PROMPT: not UTF-8: mend its bytes, for example with iconv")

    answer = say(run, prompt, base, max_new_tokens)
    print(harmless(answer) if sys.stdout.isatty() else answer)


@app.command()
def merge(
    run: RunDir,
    out: Annotated[Path, typer.Option(help="The folder to write; it must not exist.")],
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16 or float32; default: the run's.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write base + adapter as one model, reloaded and its logits compared before success is said.

    Example: lora-kit merge runs/demo/sft --out merged
    """
    if dtype not in (None, "bfloat16", "float32"):
        raise UserError(f"--dtype {dtype}: bfloat16 or float32")
    from lora_kit.launch import prepare_process

    prepare_process()
    from lora_kit.ship.merge import merge as run_merge

    merged = run_merge(run, out, dtype)
    if as_json:
        print(json.dumps({**asdict(merged), "out": str(merged.out)}))
        return
    print(
        f"{merged.out}: {merged.bytes_written / 2**20:,.1f} MiB; logits of merged and adapter "
        f"differ by {merged.max_logit_difference:.2g} at most (the adapter's effect: "
        f"{merged.adapter_effect:.2g}), greedy tokens agree at {merged.greedy_agreement:.0%}"
    )


@app.command()
def inspect(
    adapter: Annotated[Path, typer.Argument(help="A run, or the folder of a PEFT LoRA adapter.")],
    other: Annotated[
        Path | None, typer.Argument(help="A second one: how far the two are apart.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what an adapter holds, without its base: which layers learned, and who would trip.

    Example: lora-kit inspect runs/demo/sft runs/demo/cpt
    """
    from lora_kit.adapter import inspect as view

    found = view.difference(adapter, other) if other else view.inspect(adapter)
    if as_json:
        print(json.dumps(found))
    else:
        (view.show_difference if other else view.show)(found)


@app.command()
def copy(
    name: Annotated[str, typer.Argument(help="cpt, sft, or a shipped run file's name.")],
    folder: Annotated[Path, typer.Argument(help="Where to; made if it is not there.")],
) -> None:
    """Give you a recipe and its run file, to read and to change.

    Example: lora-kit copy sft my-field
    """
    from lora_kit.run import nearest, shipped
    from lora_kit.schema import SHIPPED_RECIPES

    configs = {file.stem: file for file in (shipped("recipes") / "configs").glob("*.yaml")}
    known = [*SHIPPED_RECIPES, *sorted(configs)]
    if name not in known:
        raise UserError(f"nothing is called `{name}`{nearest(name, known)} ({', '.join(known)})")
    config = configs[f"nano-{name}" if name in SHIPPED_RECIPES else name]
    text = config.read_text(encoding="utf-8")
    recipe = next(r for r in SHIPPED_RECIPES if f"\nrecipe: {r}\n" in text)
    if there := sorted(
        str(folder / f) for f in (f"{recipe}.py", "run.yaml") if (folder / f).exists()
    ):
        raise UserError(f"{', '.join(there)} exists: name another folder")
    # What the file says of how it is started must be true where it lies now.
    text = re.sub(r"(?m)^#   lora-kit copy [^;\n]*\n|(?<=#   )lora-kit copy [^;\n]*; ", "", text)
    text = text.replace(f"recipes/configs/{config.name}", "run.yaml").replace("my-field/", "")
    text = text.replace(f"recipe: {recipe}", f"recipe: {recipe}.py", 1)
    text = text.replace(f"name: {config.stem}", f"name: my-{name}", 1)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(shipped("recipes") / f"{recipe}.py", folder)
        (folder / "run.yaml").write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from None
    print(f"{folder / 'run.yaml'} and {folder / f'{recipe}.py'} are yours to change. Then:")
    print(f"  lora-kit train {shlex.quote(str(folder / 'run.yaml'))}")


@app.command()
def schema() -> None:
    """Print the JSON schema of the run file, for editors.

    Example: lora-kit schema > run.schema.json
    """
    from lora_kit.schema import Run

    print(json.dumps(Run.model_json_schema(), indent=2))


@app.command()
def doctor(
    overrides: Overrides = None,
    loss: Annotated[
        Path | None,
        typer.Option(metavar="RUN.yaml", help="Check how this run's loss is computed, instead."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Tell versions, devices, memory, what is missing and how to get it; or check a run's loss:
    accumulated, packed, padded and in two processes it must be the same.

    Example: lora-kit doctor --loss run.yaml
    """
    from lora_kit.doctor import check_loss, examine

    if loss is not None:
        _self_test(check_loss(loss, overrides or []), as_json)
        return
    if overrides:
        raise UserError(f"{overrides[0]}: settings belong to --loss RUN.yaml")
    found = examine()
    if as_json:
        print(json.dumps(found))
    else:
        _print_doctor(found)
    if found["problems"]:
        raise typer.Exit(1)


def _self_test(found: dict[str, Any], as_json: bool) -> None:
    from lora_kit.prove.self_test import show

    if as_json:
        print(json.dumps(found))
    else:
        show(found)
    failed = [one for one in found["comparisons"] if one["passed"] is False]
    if failed:
        raise CheckFailed("\n".join(f"{one['name']}: {one['note']}" for one in failed))


def _print_doctor(found: dict[str, Any]) -> None:
    print(f"Python {found['python']} on {found['system']}, {found['cores']} cores")
    print(f"memory: {found['memory_mib']:,} MiB, {found['memory_free_mib']:,} free")
    print(f"disk here: {found['disk_free_mib']:,} MiB free; Hub: {found['hub']}")
    for device in found["devices"]:
        memory = f", {device['memory_mib']:,} MiB" if device["memory_mib"] else ""
        print(f"device: {device['name']}{memory}")
    print(", ".join(f"{name} {number}" for name, number in found["versions"].items() if number))
    for name, (what, how) in found["missing"].items():
        print(f"not installed: {name}, for {what}: {how}")
    for problem in found["problems"]:
        print(f"PROBLEM: {problem['what']}: {problem['fix']}")
    if not found["problems"]:
        print("Ready.")


def main() -> None:
    """Run a verb; a mistake becomes one line on stderr and its exit code."""
    # --debug is taken wherever it stands: it is added at the end of a line that failed.
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    arguments = ["--debug"] * (len(arguments) < len(sys.argv) - 1) + arguments
    try:
        code = app(arguments, prog_name="lora-kit", standalone_mode=False)
    except LoraKitError as error:
        if os.environ.get("LORA_KIT_DEBUG"):
            traceback.print_exc()
        for line in str(error).splitlines():
            # Names and texts of the user's may hold what steers a terminal.
            print(f"error: {harmless(line)}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except typer.Abort:
        print("error: stopped by SIGINT", file=sys.stderr)
        raise SystemExit(130) from None
    except _WrongUsage as error:
        verb = error.ctx.command_path if error.ctx else "lora-kit"
        line = " ".join(error.format_message().split())
        print(f"error: {line} (see {verb} --help)", file=sys.stderr)
        raise SystemExit(2) from None
    raise SystemExit(code or 0)
