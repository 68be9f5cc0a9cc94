"""Problems of an adapter in a serving runtime, and the command that fixes each."""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path
from typing import TypedDict

from lora_kit import nano, schema
from lora_kit.adapter.files import open_adapter
from lora_kit.adapter.finished import FinishedRun
from lora_kit.adapter.loaders import VLLM_RANKS, Fix, LoaderIssue, loader_issues, vllm_rank
from lora_kit.errors import UserError
from lora_kit.run import is_hub_id, nearest, read_json

# A target's name -> its name in the table of loaders. Ollama runs llama.cpp.
_LOADERS = {
    "vllm": "vLLM",
    "sglang": "SGLang",
    "llama.cpp": "llama.cpp",
    "ollama": "llama.cpp",
    "mlx": "MLX",
    "transformers": "PEFT",
}
TARGETS = tuple(_LOADERS)
GGUF = ("llama.cpp", "ollama")  # targets that load GGUF instead of PEFT's files
# The command that writes an adapter for a target, and the one for a whole model.
_ADAPTER = {
    "llama.cpp": "export {run} --to gguf --what adapter --out {run}-gguf",
    "ollama": "export {run} --to ollama --out {run}-ollama",
    "mlx": "export {run} --to mlx --out {run}-mlx",
}
_MODEL = {
    "llama.cpp": "export {run} --to gguf --out {run}-gguf",
    "ollama": "export {run} --to ollama --what merged --out {run}-ollama",
}
# Values of `adapter:` that every target loads.
_LOADABLE = {
    "use_dora": "false",
    "use_rslora": "false",
    "rank_pattern": "{}",
    "alpha_pattern": "{}",
    "target_modules": "all-linear",
    "r": str(VLLM_RANKS[-1]),
}


class Problem(TypedDict):
    """`what` a target does not load, `where` it is set (file and key), and the `fix`."""

    what: str
    where: str
    fix: str


class Checked(TypedDict):
    """The output of `check --json`. `loads`: the target loads the adapter exactly."""

    target: str
    loads: bool
    problems: list[Problem]


def check(run: FinishedRun, target: str) -> Checked:
    """Whether `target` loads an adapter as it is.

    Of the base only config.json is read, if it is on this machine. llama.cpp and Ollama load GGUF:
    the adapter is checked for llama.cpp's own converter. MLX has no converter.

    Raises:
        UserError: unknown target, not a language model's adapter, or see `open_adapter`.
    """
    if target not in _LOADERS:
        raise UserError(
            f"--target {target}: unknown{nearest(target, list(TARGETS))}: {', '.join(TARGETS)}"
        )
    run.require_language_model(f"check --target {target}")
    problems = [problem for _, problem in _problems(run, target)]
    return {"target": target, "loads": not problems, "problems": problems}


def check_settings(adapter: schema.Adapter, target: str) -> list[Problem]:
    """The problems that an adapter with these settings would have. What a server flag fixes (a rank
    over 16) is not a problem. With adapter.start, that adapter's files are checked."""
    if adapter.start:
        found = _problems(FinishedRun(adapter.start), target)
        return [problem for fix, problem in found if fix not in ("flag", "layout")]
    targets = adapter.target_modules
    ends = targets if isinstance(targets, list) else []
    return [
        _problem(one, f"adapter.{one.key}", f"set adapter.{one.key}={_LOADABLE[one.key]}")
        for one in loader_issues(adapter.model_dump(), ends)
        if _LOADERS[target] in one.who and one.fix != "flag"
    ]


def refuse_settings(adapter: schema.Adapter, target: str) -> None:
    """Raises UserError, one line per problem, if `ship.target` would not load such an adapter."""
    problems = check_settings(adapter, target)
    if problems:
        raise UserError("\n".join(f"ship.target: {target}: {in_words(p)}" for p in problems))


def in_words(problem: Problem) -> str:
    """A problem in one line."""
    return f"{problem['what']} ({problem['where']}): {problem['fix']}"


def _problems(run: FinishedRun, target: str) -> list[tuple[str, Problem]]:
    """Each problem with the kind of its fix."""
    adapter = open_adapter(run.folder)
    config = str(adapter.folder / "adapter_config.json")
    rank = max((adapter.rank_and_scale(module)[0] for module in adapter.factors), default=1)
    tied = _tied(run)
    found: list[tuple[str, Problem]] = [
        (one.fix, _problem(one, f"{config}: {one.key}", _fix(one.fix, target, run, rank)))
        for one in loader_issues(adapter.config, adapter.factors, adapter.others, tied)
        if _LOADERS[target] in one.who
    ]
    if target == "mlx" and not found:
        fix = _fix("portable", target, run, rank)
        found.append(("layout", _problem("PEFT's layout: not loaded", config, fix)))
    if broken := [module for module in adapter.factors if not adapter.update(module).finite]:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        what = f"NaN or infinite values: generates noise:  {broken[0]}{more}"
        file = str(adapter.factors[broken[0]]["A"].file)
        found.append(("train", _problem(what, file, "train again")))
    return found


def _problem(what: LoaderIssue | str, where: str, fix: str) -> Problem:
    words = what if isinstance(what, str) else f"{what.what}: {what.happens}"
    return Problem(what=words, where=where, fix=fix)


def _tied(run: FinishedRun) -> bool:
    """Whether embeddings and head are tied, according to the base's config.json if available."""
    from huggingface_hub import try_to_load_from_cache

    values: schema.Json = {}
    with contextlib.suppress(UserError):  # no base is named
        base = run.base
        file = (nano.MODEL if base.model == "nano" else Path(base.model)) / "config.json"
        if is_hub_id(base.model) and not file.is_file():
            cached = try_to_load_from_cache(base.model, "config.json", revision=base.revision)
            file = Path(cached) if isinstance(cached, str) else file
        values = read_json(file)
    text = {**values, **(values.get("text_config") or {})}
    return bool(text.get("tie_word_embeddings", str(values.get("model_type")).startswith("gemma")))


def _fix(kind: Fix, target: str, opened: FinishedRun, rank: int) -> str:
    """The command that fixes a problem of an adapter of this rank."""
    run = shlex.quote(opened.path.rstrip("/"))
    if kind == "train":
        return "train again without it"
    if kind == "flag":
        size = vllm_rank(rank)
        return f"vllm serve BASE --enable-lora --lora-modules NAME={run} --max-lora-rank {size}"
    if kind == "portable":
        words = _ADAPTER.get(target, "export {run} --to portable --out {run}-portable")
    else:
        words = _MODEL.get(target, "merge {run} --out {run}-merged")
    return "lora-kit " + words.format(run=run)
