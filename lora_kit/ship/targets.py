"""Problems of an adapter in a serving runtime, and the command that fixes each."""

from __future__ import annotations

import contextlib
import shlex
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TypedDict

from lora_kit import nano, schema
from lora_kit.adapter.attach import load_adapter
from lora_kit.adapter.files import WEIGHTS, Adapter, open_adapter
from lora_kit.adapter.finished import FinishedRun
from lora_kit.adapter.loaders import VLLM_RANKS, Fix, LoaderIssue, loader_issues, vllm_rank
from lora_kit.base.load import base_on_meta
from lora_kit.base.tensors import stored_in
from lora_kit.errors import UserError, in_a_line
from lora_kit.prove.into import cost_of_original
from lora_kit.run import is_hub_id, nearest, read_json
from lora_kit.ship.gguf import needs_untied, open_source
from lora_kit.ship.mlx import check_mlx

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
    """The output of `check --json`. `loads`: the target loads the adapter exactly; `notes`: what
    was not checked, and what else its user must know."""

    target: str
    loads: bool
    problems: list[Problem]
    notes: list[str]


def check(run: FinishedRun, target: str) -> Checked:
    """Whether `target` loads an adapter as it is, onto the base that it names.

    Of the base only config.json and the names of its tensors are read, if they are on this machine.
    llama.cpp and Ollama load GGUF: the adapter is checked for llama.cpp's own converter. MLX has no
    converter.

    Raises:
        UserError: unknown target, not a language model's adapter, or see `open_adapter`.
    """
    if target not in _LOADERS:
        raise UserError(
            f"--target {target}: unknown{nearest(target, list(TARGETS))}: {', '.join(TARGETS)}"
        )
    run.require_language_model(f"check --target {target}")
    notes: list[str] = []
    problems = [problem for _, problem in _problems(run, target, notes)]
    if cost := cost_of_original(run):
        notes.append(cost)
    return {"target": target, "loads": not problems, "problems": problems, "notes": notes}


def check_settings(adapter: schema.Adapter, target: str) -> list[Problem]:
    """The problems that an adapter with these settings would have. What a server flag fixes (a rank
    over 16) is not a problem. With adapter.start, that adapter's files are checked."""
    if adapter.start:
        found = _problems(FinishedRun(adapter.start), target, [])
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


def _problems(run: FinishedRun, target: str, notes: list[str]) -> list[tuple[str, Problem]]:
    """Each problem with the kind of its fix; adds to `notes` what could not be checked."""
    run.refuse_changed()
    adapter = open_adapter(run.folder)
    config, file = (str(adapter.folder / name) for name in ("adapter_config.json", WEIGHTS))
    rank = max((adapter.rank_and_scale(module)[0] for module in adapter.factors), default=1)
    folder = _base_folder(run)
    values = read_json(folder / "config.json") if folder else {}
    found: list[tuple[str, Problem]] = [
        (one.fix, _problem(one, f"{config}: {one.key}", _fix(one.fix, target, run, rank)))
        for one in loader_issues(adapter.config, adapter.factors, adapter.others, _tied(values))
        if _LOADERS[target] in one.who
    ]
    if target == "mlx" and not found:
        fix = _fix("portable", target, run, rank)
        found.append(("layout", _problem("PEFT's layout: not loaded", config, fix)))
    broken = [module for module in adapter.factors if not adapter.update(module).finite]
    if broken:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        what = f"NaN or infinite values: generates noise: {broken[0]}{more}"
        found.append(("train", _problem(what, file, "train again")))
    elif adapter.misnamed:
        unwrapped = "save it again from PEFT's own model, not from its compiled or wrapped one"
        found.append(("train", _problem(adapter.misnamed, file, unwrapped)))
    elif folder is None:
        missing = "the base is not on this machine (name it with --base FOLDER)"
        notes.append(f"{missing}: names and shapes were not compared with it")
    elif misfit := _misfit(run, adapter, folder, notes):
        named = "name the base that it was trained on with --base FOLDER_OR_ID"
        found.append(("train", _problem(misfit, file, named)))
    elif all(kind != "merge" for kind, _ in found) and (
        unmapped := _unmapped(adapter, target, folder, values, notes)
    ):
        found.append(("merge", _problem(unmapped, file, _fix("merge", "", run, rank))))
    return found


def _problem(what: LoaderIssue | str, where: str, fix: str) -> Problem:
    words = what if isinstance(what, str) else f"{what.what}: {what.happens}"
    return Problem(what=words, where=where, fix=fix)


def _base_folder(run: FinishedRun) -> Path | None:
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


def _misfit(run: FinishedRun, adapter: Adapter, folder: Path, notes: list[str]) -> str | None:
    """What PEFT does not load onto the base of this folder, tried on a model without weights."""
    try:
        skeleton = base_on_meta(run.base, folder)
    except Exception as error:  # a model of another kind; and parsers raise anything
        notes.append(f"names and shapes were not compared with the base: {in_a_line(error)}")
        return None
    # Of initialisations from the base's weights there are none.
    plain = replace(adapter, config={**adapter.config, "init_lora_weights": True})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing is copied to the meta device
        try:
            load_adapter(skeleton, plain)
        except UserError as error:
            return str(error).removeprefix(f"{adapter.folder}: ")
    return None


def _unmapped(
    adapter: Adapter, target: str, folder: Path, values: schema.Json, notes: list[str]
) -> str | None:
    """What the target's loader finds no place for, though PEFT does."""
    modules = list(adapter.factors)
    kernels = [name for name, pair in adapter.factors.items() if len(pair["A"].shape) > 2]
    if kernels and target != "transformers":
        return f"{kernels[0]} is a convolution: not loaded"
    try:
        if target == "mlx":
            check_mlx(adapter, values)
        elif target in GGUF:
            source = open_source(folder)
            needs_untied(adapter, source)
            lost = [module for module in modules if source.name(f"{module}.weight") is None]
            return f"llama.cpp has no tensor for {lost[0]}" if lost else None
    except ImportError:
        notes.append("names were not mapped to GGUF: pip install 'lora-kit[llamacpp]'")
    except UserError as error:
        return str(error).removeprefix(f"{folder}: ").removeprefix(f"{adapter.folder}: ")
    if target == "vllm" and "ForConditionalGeneration" in str(values.get("architectures")):
        # vLLM maps names as those of the base's files.
        with contextlib.suppress(UserError):  # no weights here
            names = stored_in(folder).keys()
            inside = any("language_model." in name for name in names)
            lost = [m for m in modules if "language_model." not in m and f"{m}.weight" not in names]
            if inside and lost:
                return f"ignored, silently: vLLM has no {lost[0]}, but one in language_model"
    return None


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
