"""Problems of an adapter in a serving runtime, and the command that fixes each."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TypedDict

from lora_kit import nano, schema
from lora_kit.adapter.files import WEIGHTS, open_adapter
from lora_kit.adapter.finished import FinishedRun
from lora_kit.adapter.loaders import VLLM_RANKS, Fix, LoaderIssue, loader_issues, vllm_rank
from lora_kit.errors import UserError
from lora_kit.run import is_hub_id, read_json

# A target's name -> its name in the table of loaders. Ollama runs llama.cpp.
LOADERS = {
    "vllm": "vLLM",
    "sglang": "SGLang",
    "llama.cpp": "llama.cpp",
    "ollama": "llama.cpp",
    "mlx": "MLX",
    "transformers": "PEFT",
}
TARGETS = tuple(LOADERS)
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


def check_settings(adapter: schema.Adapter, target: str) -> list[Problem]:
    """The problems that an adapter with these settings would have. What a server flag fixes (a rank
    over 16) is not a problem. With adapter.start, that adapter's files are checked."""
    if adapter.start:
        start = FinishedRun(adapter.start)
        found = file_problems(start, target, base_folder(start))
        return [problem for fix, problem in found if fix not in ("flag", "layout")]
    targets = adapter.target_modules
    ends = targets if isinstance(targets, list) else []
    return [
        _problem(one, f"adapter.{one.key}", f"set adapter.{one.key}={_LOADABLE[one.key]}")
        for one in loader_issues(adapter.model_dump(), ends)
        if LOADERS[target] in one.who and one.fix != "flag"
    ]


def refuse_settings(adapter: schema.Adapter, target: str) -> None:
    """Raises UserError, one line per problem, if `ship.target` would not load such an adapter."""
    problems = check_settings(adapter, target)
    if problems:
        raise UserError("\n".join(f"ship.target: {target}: {in_words(p)}" for p in problems))


def in_words(problem: Problem) -> str:
    """A problem in one line."""
    return f"{problem['what']} ({problem['where']}): {problem['fix']}"


def file_problems(run: FinishedRun, target: str, folder: Path | None) -> list[tuple[str, Problem]]:
    """The problems of an adapter's files, each with the kind of its fix; `folder`: of its base."""
    run.refuse_changed()
    adapter = open_adapter(run.folder)
    config, file = (str(adapter.folder / name) for name in ("adapter_config.json", WEIGHTS))
    rank = max((adapter.rank_and_scale(module)[0] for module in adapter.factors), default=1)
    tied = _tied(read_json(folder / "config.json") if folder else {})
    found: list[tuple[str, Problem]] = [
        (one.fix, _problem(one, f"{config}: {one.key}", _fix(one.fix, target, run, rank)))
        for one in loader_issues(adapter.config, adapter.factors, adapter.others, tied)
        if LOADERS[target] in one.who
    ]
    if target == "mlx" and not found:
        fix = _fix("portable", target, run, rank)
        found.append(("layout", _problem("PEFT's layout: not loaded", config, fix)))
    broken = [module for module in adapter.factors if not adapter.update(module).finite]
    if broken:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        what = f"NaN or infinite values: generates noise: {broken[0]}{more}"
        found.append(("broken", _problem(what, file, "train again")))
    elif adapter.misnamed:
        unwrapped = "save it again from PEFT's own model, not from its compiled or wrapped one"
        found.append(("broken", _problem(adapter.misnamed, file, unwrapped)))
    return found


def _problem(what: LoaderIssue | str, where: str, fix: str) -> Problem:
    words = what if isinstance(what, str) else f"{what.what}: {what.happens}"
    return Problem(what=words, where=where, fix=fix)


def base_folder(run: FinishedRun) -> Path | None:
    """The base's folder, if its config.json is on this machine: nothing is fetched.

    Raises:
        UserError: it is not the base that the run was trained on.
    """
    from huggingface_hub import try_to_load_from_cache

    try:
        base = run.base
    except UserError:  # no base is named
        return None
    folder = nano.MODEL if base.model == "nano" else Path(base.model)
    if (folder / "config.json").is_file():
        return Path(run.located.folder) if run.hashes else folder
    if not is_hub_id(base.model):
        return None
    cached = try_to_load_from_cache(base.model, "config.json", revision=base.revision)
    return Path(cached).parent if isinstance(cached, str) else None


def _tied(values: schema.Json) -> bool:
    """Whether embeddings and head are tied, according to the base's config.json."""
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
