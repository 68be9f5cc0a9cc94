"""The verbs of `lora-kit`. Modules are imported when a verb runs, so that --help is fast."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from lora_kit import __version__
from lora_kit.errors import (
    CheckFailed,
    Interrupted,
    LoraKitError,
    UserError,
    harmless,
    is_panic,
    out_of_memory,
    reason_of,
    redact,
    redact_tracebacks,
    report,
    unexpected,
)
from lora_kit.train.interrupt import leave_terminal, stop_signals
from lora_kit.trust import no_kernels_from_the_hub

if TYPE_CHECKING:
    from lora_kit.adapter.finished import FinishedRun

app = typer.Typer(
    name="lora-kit",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Adapt a language model to your field, prove that it got better, ship it.",
    epilog="A first try that needs no network: lora-kit demo",
)
# typer's error for wrong verbs and options, which has no public name.
_WrongUsage: Any = typer.BadParameter.__base__
RunDir = Annotated[Path, typer.Argument(help="A finished run, such as runs/demo/sft.")]
BaseOption = Annotated[
    str | None,
    typer.Option(
        "--base", metavar="FOLDER_OR_ID", help="A folder or Hub id of the base, if it has moved."
    ),
]
RunFile = Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings that override the run file."),
]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Allow a metric's script from the Hub to run.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Out = Annotated[Path, typer.Option(help="Output folder; must not exist.")]
Adapter = Annotated[Path, typer.Argument(help="A run, or the folder of a PEFT LoRA adapter.")]
Into = Annotated[
    Literal["auto", "base", "dequantized"],
    typer.Option(help="The original weights, the NF4-dequantized ones, or the better ones."),
]


def _answer(found: Mapping[str, object], as_json: bool, show: Callable[[Any], None] | str) -> None:
    """Print a verb's result: as one JSON object; else `show`, a text, or by calling it."""
    if as_json or isinstance(show, str):
        print(json.dumps(found) if as_json else show)
    else:
        show(found)


def _say(text: str) -> None:
    """Print to stderr, without secrets and control characters."""
    print(harmless(redact(text)), file=sys.stderr, flush=True)


def _fail(error: LoraKitError) -> NoReturn:
    """Report an error and exit; with --debug, the traceback first."""
    if os.environ.get("LORA_KIT_DEBUG"):
        print(redact(traceback.format_exc()), file=sys.stderr)
    report(error)
    raise SystemExit(error.exit_code) from None


def _opened(path: Path, base: str | None = None) -> FinishedRun:
    """Open a finished run, or the folder of an adapter."""
    from lora_kit.adapter.finished import FinishedRun

    return FinishedRun(path, base)


def _prepare() -> None:
    """Set up the process, before large imports."""
    from lora_kit.launch import prepare_process

    prepare_process()


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
    """Run every step on the embedded model: adapt, evaluate, merge, generate.

    Example: lora-kit demo
    """
    from lora_kit.demo import run_demo

    run_demo()


@app.command()
def train(
    run_file: RunFile,
    overrides: Overrides = None,
    accelerate: Annotated[
        str | None, typer.Option(help="A config by name or path; default: by the devices.")
    ] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="Number of processes.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    trust_remote_code: Trust = False,
) -> None:
    """Train a run file's adapter with `accelerate launch`, then compare it with the base.

    Example: lora-kit train run.yaml train.max_steps=200 --accelerate cpu
    """
    from lora_kit import trust
    from lora_kit.start import start

    trust.allow_remote_code(trust_remote_code)
    start(run_file, overrides or [], accelerate, processes, resume)


@app.command()
def plan(run_file: RunFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Estimate what a run needs (memory by cause, time, disk) and how `train` will make it fit. No
    weights are loaded or downloaded.

    Example: lora-kit plan run.yaml train.max_length=2048
    """
    from lora_kit.launch import read_run

    run, recipe = read_run(run_file, overrides or [])
    _prepare()
    from lora_kit import plan as planning

    made = planning.plan(run, recipe.task)
    _answer(made.to_json(), as_json, str(made))


@app.command()
def preview(
    run_file: RunFile,
    overrides: Overrides = None,
    samples: Annotated[int, typer.Option(min=0, help="Number of samples to show.")] = 3,
    split: Annotated[
        Literal["train", "eval", "general"], typer.Option(help="Split of the samples.")
    ] = "train",
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write an HTML page.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what a run would train on, token by token, and what would stop it; no model is loaded.

    Example: lora-kit preview run.yaml --html preview.html
    """
    from lora_kit.launch import read_run

    run, recipe = read_run(run_file, overrides or [])
    from lora_kit import preview as view

    if html is not None:
        view.check_page(html)  # fail early
    from lora_kit.base.load import quiet_libraries
    from lora_kit.base.pin import pin
    from lora_kit.tasks.encode import rows_of

    quiet_libraries()
    task = recipe.task
    processor, data = rows_of(task, run, pin(run.base, weights=False), limits=False)
    problems = data.census.problems(run.data.limits)
    if html is not None:
        view.write_page(html, task, run, data, processor, problems)
        _say(f"{html}: written; open it in a browser")
    if as_json:
        print(json.dumps(view.to_json(task, run, data, problems)))
    else:
        view.show(task, data, processor, split, samples)
    for problem in problems:
        _say(f"training would stop: {problem}")


@app.command()
def compare(
    run: RunDir,
    overrides: Overrides = None,
    base: BaseOption = None,
    gate: Annotated[bool, typer.Option("--gate", help="Exit 1 unless prove.gate holds.")] = False,
    scratch: Annotated[
        bool,
        typer.Option(
            "--scratch", help="Also train a randomly initialised model of the same architecture."
        ),
    ] = False,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Evaluate base, base with few-shot examples and adapter of a finished run again.

    Example: lora-kit compare runs/demo/sft prove.metrics=[f1] --gate
    """
    _prepare()
    import lora_kit
    from lora_kit import trust
    from lora_kit.prove.show import comparison, side_by_side

    trust.allow_remote_code(trust_remote_code)
    with contextlib.redirect_stdout(sys.stderr):  # third-party metrics print to stdout
        report = lora_kit.compare(run, overrides or [], base=base, gate=gate, scratch=scratch)
    if not as_json:
        side_by_side(report)
    _answer(report, as_json, comparison)
    if report["gate"] and not report["gate"]["passed"]:
        raise CheckFailed("\n".join(f"gate: {line}" for line in report["gate"]["failed"]))


@app.command()
def generate(
    run: RunDir,
    prompt: Annotated[str, typer.Argument(help="The prompt.")],
    no_adapter: Annotated[
        bool, typer.Option("--no-adapter", help="Use the base without the adapter.")
    ] = False,
    base: BaseOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens.")] = 64,
) -> None:
    """Generate a completion of a prompt, greedily, with or without the adapter.

    Example: lora-kit generate runs/demo/sft "What does `heapq.heappush` do?"
    """
    _prepare()
    from lora_kit.prove.show import complete

    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise UserError("PROMPT: not UTF-8: convert it, for example with iconv")

    answer = complete(_opened(run, base), prompt, no_adapter, max_new_tokens)
    print(harmless(answer) if sys.stdout.isatty() else answer)


@app.command()
def merge(
    run: RunDir,
    out: Out,
    base: BaseOption = None,
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"] | None,
        typer.Option(help="Default: each tensor's own."),
    ] = None,
    into: Into = "auto",
    verify: Annotated[
        Literal["tensors", "logits"], typer.Option(help="Verify tensors, or logits as well.")
    ] = "tensors",
    as_json: Json = False,
) -> None:
    """Write base + adapter as one model, tensor by tensor, in less than 1 GB of memory; every file
    is read back before success is reported.

    Example: lora-kit merge runs/demo/sft --out merged --verify logits
    """
    _prepare()
    from lora_kit.ship.merge import merge as run_merge

    merged = run_merge(_opened(run, base), out, dtype, into=into, verify=verify)
    for note in merged.notes:
        _say(f"note: {note}")
    words = (
        f"{merged.out}: {merged.bytes_written / 2**20:,.1f} MiB in {merged.seconds:,.0f} s; "
        f"{merged.changed} tensors changed, {merged.copied} copied unchanged; all verified"
    )
    if merged.max_logit_difference is not None:
        words += (
            "\nlogits of merged model and adapter differ by at most "
            f"{merged.max_logit_difference:.2g} (the adapter's effect: "
            f"{merged.adapter_effect:.2g}); same top token at {merged.greedy_agreement:.0%} of "
            "positions"
        )
    _answer({**asdict(merged), "out": str(merged.out)}, as_json, words)


@app.command()
def push(
    run: Annotated[Path, typer.Argument(help="A finished run, or the folder of an adapter.")],
    repo: Annotated[
        str, typer.Argument(metavar="OWNER/NAME", help="Target repository on the Hub.")
    ],
    public: Annotated[bool, typer.Option("--public", help="Make the repository public.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show the plan; no network.")
    ] = False,
    with_samples: Annotated[
        bool,
        typer.Option("--with-samples", help="Include sample rows of your data from the report."),
    ] = False,
    merged: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Upload this merged model instead of the adapter."),
    ] = None,
    base: BaseOption = None,
    as_json: Json = False,
) -> None:
    """Upload a run's adapter with a model card, private unless told otherwise, in one commit.

    All files are listed first and scanned for secrets, e-mail addresses and home folders. The token
    is HF_TOKEN, or that of `hf auth login`.

    Example: lora-kit push runs/demo/sft me/my-sft --dry-run
    """
    from lora_kit.ship import hub

    opened = _opened(run, base)
    plan = hub.make_plan(opened, repo, public=public, with_samples=with_samples, merged=merged)
    _say(str(plan))
    done = plan.to_json() if dry_run else hub.push(plan, _say)
    words = f"{repo}: dry run, nothing was uploaded"
    if not dry_run:
        state = "uploaded" if done["committed"] else "already up to date"
        words = f"{done['url']}: {state}, {done['visibility']}, commit {done['commit']}"
    _answer(done, as_json, words)


@app.command()
def pull(
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="An adapter or a model.")],
    out: Out,
    revision: Annotated[str | None, typer.Option(help="Default: the newest commit.")] = None,
    as_json: Json = False,
) -> None:
    """Download an adapter from the Hub, pinned to a commit and verified; no pickles, no code.

    Example: lora-kit pull me/my-sft --out my-sft
    """
    from lora_kit.ship import hub

    done = hub.pull(repo, out, revision, _say)
    if done["left"]:
        more = f" and {len(done['left']) - 5} more" if len(done["left"]) > 5 else ""
        _say(f"not downloaded: {', '.join(done['left'][:5])}{more}")
    words = f"{out}: {len(done['files'])} files of {repo} at {done['revision']}, verified"
    _answer(done, as_json, words)


@app.command()
def serve(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Runs of the same base.")],
    base: BaseOption = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: any free one.")] = 8080,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    kind: Annotated[
        Literal["f32", "f16", "bf16", "q8_0"], typer.Option("--type", help="Type of the weights.")
    ] = "f16",
    context: Annotated[int, typer.Option(min=1, help="Context length in tokens.")] = 4096,
    public: Annotated[bool, typer.Option("--public", help="Allow a non-local host.")] = False,
) -> None:
    """Serve the base and adapters as an OpenAI-compatible API, on llama.cpp, until Ctrl-C.

    Clients select with `model`: base, or a run's name.
    Example: lora-kit serve runs/demo/sft runs/demo/cpt --port 8080
    """
    from lora_kit.ship.serve import serve as run_server

    opened = [_opened(run, base) for run in runs]
    run_server(opened, host, port, kind=kind, context=context, public=public)


@app.command()
def combine(
    adapters: Annotated[list[Path], typer.Argument(help="Two or more, of the same base.")],
    out: Out,
    method: Annotated[
        Literal["linear", "svd", "ties", "dare"] | None,
        typer.Option(help="Default: linear; with --on, the best of all methods."),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Such as 0.7,0.3; default: equal, sum 1.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Rank; default: the largest; linear: the sum.")
    ] = None,
    density: Annotated[float, typer.Option(help="Share of entries that ties and dare keep.")] = 0.5,
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Random seed for DARE's drop mask.")
    ] = 0,
    on: Annotated[list[Path] | None, typer.Option(help="A run to evaluate on; repeatable.")] = None,
    base: BaseOption = None,
    as_json: Json = False,
) -> None:
    """Combine several adapters of one base into one, and evaluate it.

    Example: lora-kit combine runs/a runs/b --out both --on runs/a --on runs/b
    """
    try:
        numbers = [float(one) for one in weights.split(",")] if weights else None
    except ValueError:
        raise UserError(
            f"--weights {weights}: expected numbers separated by commas, as 0.7,0.3"
        ) from None
    opened = [_opened(path, base) for path in adapters]
    if on:
        _prepare()
        from lora_kit.ship.combined import combine_and_measure, show

        runs = [_opened(path, base) for path in on]
        found = combine_and_measure(
            opened, out, runs, method, rank=rank, density=density, seed=seed, weights=numbers
        )
    else:
        from lora_kit.adapter.combine import combine as run_combine

        found = run_combine(
            opened, out, method or "linear", rank=rank, density=density, seed=seed, weights=numbers
        )
    for note in found["notes"]:
        _say(f"note: {note}")
    if on and not as_json:
        show(found)
    words = f"{out}: {found['method']}, rank {found['rank']}, {found['modules']} modules"
    _answer(found, as_json, words)


@app.command()
def extract(
    base: Annotated[str, typer.Argument(help="The original model: a folder or Hub id.")],
    tuned: Annotated[str, typer.Argument(help="The fully fine-tuned model.")],
    out: Out,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapter.")] = 16,
    as_json: Json = False,
) -> None:
    """Extract a LoRA from a full fine-tune, and show the error by rank.

    Example: lora-kit extract base-model tuned-model --out adapter --rank 32
    """
    from lora_kit.adapter import extract as extraction

    _answer(extraction.extract(base, tuned, out, rank), as_json, extraction.show)


@app.command()
def export(
    run: RunDir,
    to: Annotated[str, typer.Option(metavar="FORM", help="portable, merged, gguf, ollama or mlx.")],
    out: Out,
    kind: Annotated[
        str | None, typer.Option("--type", help="GGUF: f32, f16, bf16 or q8_0.")
    ] = None,
    what: Annotated[str | None, typer.Option(help="GGUF: adapter, merged or base.")] = None,
    base: BaseOption = None,
    into: Into = "auto",
    as_json: Json = False,
) -> None:
    """Export an adapter for another runtime; it is loaded there and compared before success.

    Example: lora-kit export runs/demo/sft --to portable --out portable
    """
    _prepare()
    from lora_kit.ship.export import export as run_export

    done = run_export(_opened(run, base), to, out, kind, what, into)
    for note in done["notes"]:
        _say(f"note: {note}")
    words, found = "not tested here", done["reloaded"]
    if found:
        words = (
            f"reloaded: log-probabilities of {found['tokens']} tokens differ by at most "
            f"{found['max_difference']:.2g} (the adapter's effect: "
            f"{found['adapter_effect']:.2g})"
        )
    _answer(done, as_json, f"{out}: {done['bytes_written'] / 2**20:,.1f} MiB; {words}")


@app.command()
def check(
    adapter: Adapter,
    target: Annotated[
        str | None, typer.Option(help="vllm, sglang, llama.cpp, ollama, mlx, transformers.")
    ] = None,
    fidelity: Annotated[
        bool, typer.Option("--fidelity", help="For nf4: the loss of merging.")
    ] = False,
    base: BaseOption = None,
    as_json: Json = False,
) -> None:
    """Show what a runtime would reject or load incorrectly in an adapter, and how to fix it.

    Example: lora-kit check runs/demo/sft --target vllm
    """
    if fidelity and target:
        raise UserError(f"--fidelity --target {target}: use only one of them")
    _prepare()
    if fidelity:
        from lora_kit.ship import fidelity as view

        return _answer(view.fidelity(_opened(adapter, base)), as_json, view.show)
    from lora_kit.ship import targets
    from lora_kit.ship.check import check as run_check

    if target is None:
        raise UserError(f"--target is missing: one of {', '.join(targets.TARGETS)}; or --fidelity")
    found = run_check(_opened(adapter, base), target)
    for note in found["notes"]:
        _say(f"note: {note}")
    if as_json or found["loads"]:
        words = "loads it correctly as it is"
        if target in targets.GGUF:
            words = "supports all of it, as GGUF: lora-kit export"
        _answer(found, as_json, f"{adapter}: {target} {words}")
    if not found["loads"]:
        raise CheckFailed("\n".join(map(targets.in_words, found["problems"])))


@app.command()
def inspect(
    adapter: Adapter,
    other: Annotated[Path | None, typer.Argument(help="A second adapter to compare with.")] = None,
    as_json: Json = False,
) -> None:
    """Show an adapter's contents without its base: which layers changed, what cannot load it.

    Example: lora-kit inspect runs/demo/sft runs/demo/cpt
    """
    from lora_kit.adapter import inspect as view

    if other:
        found = view.difference(_opened(adapter), _opened(other))
        _answer(found, as_json, view.show_difference)
    else:
        _answer(view.inspect(_opened(adapter)), as_json, view.show)


@app.command()
def copy(
    name: Annotated[str, typer.Argument(help="A recipe, or a shipped run file.")],
    folder: Annotated[Path, typer.Argument(help="Target folder; created if missing.")],
) -> None:
    """Copy a recipe and its run file, to edit.

    Example: lora-kit copy sft my-field
    """
    from lora_kit.run import nearest, shipped, shipped_recipes

    recipes = shipped_recipes()
    configs = {file.stem: file for file in (shipped("recipes") / "configs").glob("*.yaml")}
    known = [*recipes, *sorted(configs)]
    if name not in known:
        raise UserError(f"unknown name `{name}`{nearest(name, known)} ({', '.join(known)})")
    config = configs.get(name) or configs.get(f"nano-{name}")
    if config is None:  # a recipe that the embedded model does not support
        config = next(c for c in configs.values() if f"\nrecipe: {name}\n" in c.read_text("utf-8"))
    text = config.read_text(encoding="utf-8")
    recipe = next(r for r in recipes if f"\nrecipe: {r}\n" in text)
    files = (folder / f"{recipe}.py", folder / "run.yaml")
    if there := [str(file) for file in files if file.exists()]:
        raise UserError(f"{', '.join(there)} exists: name another folder")
    # Adapt the commands in the file's comments to its new place.
    text = re.sub(r"(?m)^#   lora-kit copy [^;\n]*\n|(?<=#   )lora-kit copy [^;\n]*; ", "", text)
    text = text.replace(f"recipes/configs/{config.name}", "run.yaml").replace("my-field/", "")
    text = text.replace(f"recipe: {recipe}", f"recipe: {recipe}.py", 1)
    text = text.replace(f"name: {config.stem}", f"name: my-{name}", 1)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(shipped("recipes") / f"{recipe}.py", files[0])
        files[1].write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from None
    print(f"Edit {files[1]} and {files[0]}. Then:")
    print(f"  lora-kit train {shlex.quote(str(files[1]))}")


@app.command()
def schema(
    recipe: Annotated[
        str | None, typer.Argument(help="Include this recipe's keys: a name or .py file.")
    ] = None,
) -> None:
    """Print the JSON schema of the run file, for editors.

    Example: lora-kit schema > run.schema.json
    """
    from lora_kit.run import check_recipe, recipe_file, schema_of
    from lora_kit.tasks.recipe import load_recipe

    if recipe:
        check_recipe(recipe)
    task = load_recipe(recipe_file(recipe)).task if recipe else None
    print(json.dumps(schema_of(task), indent=2))


@app.command()
def doctor(
    overrides: Overrides = None,
    loss: Annotated[
        Path | None, typer.Option(metavar="RUN.yaml", help="Check a run's loss.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check versions, devices and memory, and what is missing; or check a run's loss: it must be
    the same with accumulation, packing, padding and two processes.

    Example: lora-kit doctor --loss run.yaml
    """
    from lora_kit import doctor as view

    if loss is not None:
        from lora_kit.prove.self_test import show

        tested = view.check_loss(loss, overrides or [])
        _answer(tested, as_json, show)
        failed = [one for one in tested["comparisons"] if one["passed"] is False]
        if failed:
            raise CheckFailed("\n".join(f"{one['name']}: {one['note']}" for one in failed))
        return
    if overrides:
        raise UserError(f"{overrides[0]}: settings need --loss RUN.yaml")
    found = view.examine()
    _answer(found, as_json, view.show)
    if found["problems"]:
        raise typer.Exit(1)


def _terminated(signum: int, frame: FrameType | None) -> None:
    """Raise, so that partial output is removed, as after Ctrl-C."""
    leave_terminal()
    raise Interrupted(signum)


def _in_one_line(error: BaseException, verb: str) -> LoraKitError:
    """What an exception of a library is for the user, in one line."""
    if out_of_memory(error):
        from lora_kit.launch import no_memory

        return no_memory(traceback.extract_tb(error.__traceback__), verb)
    if isinstance(error, (OSError, UnicodeError)):  # for instance invalid paths
        return UserError(f"{reason_of(error, most=1000)} (more: lora-kit --debug)")
    return unexpected(error, verb)


def main() -> None:
    """Run a verb; errors become one line on stderr and an exit code."""
    no_kernels_from_the_hub()
    redact_tracebacks()
    for number in stop_signals()[1:]:  # not SIGINT
        signal.signal(number, _terminated)
    for stream in (sys.stdout, sys.stderr):  # paths may not be valid text
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # Accept --debug anywhere, since it is usually appended to a failed command.
    debug = ["--debug"] if "--debug" in sys.argv[1:] else []
    arguments = debug + [a for a in sys.argv[1:] if a != "--debug"]
    try:
        code = app(arguments, prog_name="lora-kit", standalone_mode=False)
    except LoraKitError as error:
        _fail(error)
    except typer.Abort:
        _fail(Interrupted(signal.SIGINT))
    except _WrongUsage as error:
        verb = error.ctx.command_path if error.ctx else "lora-kit"
        _fail(UserError(f"{' '.join(error.format_message().split())} (see {verb} --help)"))
    except BaseException as error:
        if not (isinstance(error, Exception) or is_panic(error)):
            raise
        _fail(_in_one_line(error, f"lora-kit {' '.join(arguments[len(debug) :][:1])}"))
    raise SystemExit(code or 0)
