"""`run.yaml` -> `Run`: loads a run file and reports all mistakes in it at once.

Neither PEFT nor transformers is imported for a valid file: the training process checks the fields
against the installed classes (`train.arguments.check_installed`). For a file with an unknown key
they are imported to improve the message.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import yaml
from pydantic import ValidationError, create_model
from pydantic_core import ErrorDetails

from lora_kit import schema, trust
from lora_kit.errors import RunFileError, UserError
from lora_kit.folders import writer_of
from lora_kit.schema import SECTIONS, Adapter, Json, Run, Section

# Keys that must be objects or null in JSON files (run.lock.json, report.json).
_OBJECTS = (
    "base", "adapter", "data", "batch", "commits", "uses", "verdict", "domain", "general",
    "overfitting", "metrics", "harness", "audit", "training", "memory", "gate", "evaluated",
    "settings", "checkpoints", "tokenizer",
)  # fmt: skip
KeyPath = list[str | int]  # `data.train[1].fraction` as ["data", "train", 1, "fraction"]
# The keys of `data:` that name sources.
SOURCE_KEYS = ("train", "eval", "general", "decontaminate")
# Keys that may change on resume, and be edited in a run directory's run.yaml: they do not affect
# the training. eval_steps does: it determines the best adapter and early stopping.
# load_best_model_at_end does not: the last adapter is used if the best checkpoint is corrupt. The
# base is compared by the hashes of its files.
FREE_TO_CHANGE = {
    "train.logging_steps", "train.save_steps", "train.save_total_limit", "train.report_to",
    "train.dataloader_num_workers", "train.ddp_timeout", "train.per_device_eval_batch_size",
    "train.load_best_model_at_end", "data.workers", "base.model", "base.revision",
}  # fmt: skip
# Keys by section with the paths of files.
_PATHS = {"data": (*SOURCE_KEYS, "against", "labels"), "adapter": ("start",)}
# The class of each section, also of nested ones such as `data.limits`.
Models = Mapping[str, type[Section]]
_PROGRAMS = ("metrics", "harness")  # keys of `prove:` that may name programs
# owner/name on the Hub.
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/\w[\w.-]{0,95}")
# A name with such an ending is a file, although it may look like a Hub id (`data/rows.jsonl`).
_FILE_ENDINGS = {
    ".txt", ".md", ".rst", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow",
    ".gz", ".html", ".htm", ".pdf", ".docx", ".doc", ".odt", ".epub", ".xlsx", ".rtf", ".py",
    ".conll",
}  # fmt: skip
# Set by `lora-kit train` for its workers: the requested number of processes.
WORLD_SIZE_VARIABLE = "LORA_KIT_WORLD_SIZE"
# Larger files are not run files.
_LARGEST_BYTES = 2**17
_MOST_MISTAKES = 50  # are described

_REMOTE_CODE = "use --trust-remote-code on the command line; a file cannot allow code from the Hub"
# Keys of the installed classes that are set elsewhere.
_OWNERS = {
    "train.output_dir": "set `name:`; the run is written to runs/<name>",
    "train.run_name": "set `name:`",
    "train.seed": "set the top-level `seed:`",
    "train.data_seed": "set the top-level `seed:`",
    "train.push_to_hub": "training does not upload; use `lora-kit push`",
    "train.hub_token": "do not put tokens into a run file; log in with `hf auth login`",
    "train.bf16": "set `base.dtype`",
    "train.fp16": "set `base.dtype`",
    "train.deepspeed": "use `--accelerate zero3`",
    "train.fsdp": "use `--accelerate fsdp_qlora`",
    "train.use_cpu": "use `--accelerate cpu`",
    "train.resume_from_checkpoint": "use `lora-kit train RUN --resume`",
    "train.eval_strategy": "set `train.eval_steps`",
    "train.save_strategy": "set `train.save_steps`",
    "train.logging_strategy": "set `train.logging_steps`",
    "train.metric_for_best_model": "the best adapter is the one with the lowest eval_loss",
    "train.greater_is_better": "the best adapter is the one with the lowest eval_loss",
    "train.logging_dir": "TensorBoard files are in runs/<name>/tensorboard",
    "train.disable_tqdm": "a progress bar is shown only on a terminal",
    "adapter.base_model_name_or_path": "set `base.model`",
    "adapter.revision": "set `base.revision`",
    "adapter.task_type": "the recipe sets it",
    "base.trust_remote_code": "code from a model repository is never run",
    "train.trust_remote_code": _REMOTE_CODE,
    "prove.trust_remote_code": _REMOTE_CODE,
    "data.trust_remote_code": _REMOTE_CODE,
    "base.device_map": "accelerate places the model; see --accelerate",
    "base.load_in_4bit": "write `quantize: nf4`",
    "base.load_in_8bit": "write `quantize: int8`",
    "data.seed": "set the top-level `seed:`",
    "data.against": "renamed to `data.decontaminate`",
}
# Common other names of keys, where the nearest spelling would be a wrong suggestion.
_MEANT = {
    "adapter.rank": "r",
    "train.batch_size": "per_device_train_batch_size",
    "train.lr": "learning_rate",
    "train.early_stopping": "early_stopping_patience",
    "train.patience": "early_stopping_patience",
    "data.train.path": "source",
    "data.eval.path": "source",
    "data.general.path": "source",
    "data.decontaminate.path": "source",
}

# Types and bounds of a JSON schema, in words.
_TYPES = {
    "integer": "an integer",
    "number": "a number",
    "string": "a string",
    "null": "null",
    "boolean": "true or false",
    "array": "a list",
    "object": "a mapping",
}
_SIGNS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, except: `2e-4` is a number, dates are strings, duplicate keys
    and aliases are errors (nested aliases can expand to more than fits into memory)."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(
                None, None, "aliases (*name) are not supported: write out the value", mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str) or key in seen:
                what = "is duplicate" if isinstance(key, str) else "is not a string"
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} {what}", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes YAML that `_Loader` reads back, such as the name `1e4` in quotes."""


_FLOAT = re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$")
for _class in (_Loader, _Dumper):
    # `add_implicit_resolver` copies SafeLoader's table before adding to it.
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


class TaskKeys(Protocol):
    """The part of `tasks.task.Task` about the run file's keys."""

    settings: Mapping[str, type[Section]]
    unread: tuple[str, ...]


def load_run(
    path: str | Path,
    overrides: tuple[str, ...] | list[str] = (),
    needs_sources: bool = True,
    task_of: Callable[[Path], TaskKeys] | None = None,
) -> Run:
    """Read a run file, apply `key=value` overrides, and check everything.

    Relative paths in `data:`, `base.model`, `adapter.start` and `recipe` are relative to the run
    file; returned paths are absolute. A base or an adapter may also be relative to the working
    folder.

    Args:
        needs_sources: whether data and recipe must exist; finished runs are loaded without them.
        task_of: returns the task of a recipe file, whose keys are then accepted and checked.
            Without it, keys of the task are ignored in a finished run.

    Raises:
        UserError: the file is missing or not YAML.
        RunFileError: one or more keys are wrong; all of them are named.
    """
    path = Path(path)
    values = _read(path)
    problems = _programs(values) if trust.pulled(path) else []
    problems += [problem for item in overrides if (problem := _override(values, item))]
    if (path.parent / "run.lock.json").is_file():  # a run directory
        data = _section(values, "data")
        if "against" in data:  # the key's former name
            values["data"] = {k: v for k, v in data.items() if k != "against"}
            values["data"].setdefault("decontaminate", data["against"])
        # All keys are written there: one without this is of a version that evaluated all rows.
        values["prove"] = {"budget": None, **_section(values, "prove")}
    values, relative = _absolute(values, path.resolve().parent)
    task: TaskKeys | None = None
    # Checked before the schema, so that all mistakes are reported at once.
    missing = _missing_recipe(values) if needs_sources else []
    problems += missing
    if needs_sources:
        problems += _missing_sources(values)
    if task_of is not None and not missing and isinstance(values.get("recipe"), str):
        try:
            task = task_of(recipe_file(values["recipe"]))
        except UserError as error:
            problems.append(str(error))
    problems += _overridden(values)
    if task is not None:
        problems += _unread(values, task)
    elif not needs_sources:
        values = _without_other_keys(values)
    try:
        run = run_class(task).model_validate(values)
    except ValidationError as error:
        models = _models(task)
        raise RunFileError(str(path), problems + _describe(error, values, models)) from None
    if problems:
        raise RunFileError(str(path), problems)
    run._relative = frozenset(relative)
    return run


def _read(path: Path) -> Json:
    """The values of a run file."""
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a run file, such as {path / 'run.yaml'}")
    try:
        if path.stat().st_size > _LARGEST_BYTES:
            raise UserError(f"{path}: larger than {_LARGEST_BYTES:,} bytes: not a run file")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): name a run file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}): is it a run file?") from None
    values = _parse(text, str(path))
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a run file: expected `key: value` lines")
    # An empty section has its defaults.
    return {k: {} if v is None and k in SECTIONS else v for k, v in values.items()}


def run_class(task: TaskKeys | None) -> type[Run]:
    """The class of a run file with the keys of a task; equal settings give the same class."""
    return _run_class(tuple(sorted(task.settings.items()))) if task else Run


@lru_cache
def _run_class(settings: tuple[tuple[str, type[Section]], ...]) -> type[Run]:
    fields: dict[str, Any] = {}
    for section, kind in settings:
        needed = Run.model_fields[section].is_required()
        fields[section] = (kind, ... if needed else kind())
    return create_model("Run", __base__=Run, **fields) if fields else Run


def schema_of(task: TaskKeys | None) -> Json:
    """The JSON schema of a run file, with a task's own keys and without those it does not read."""
    found = run_class(task).model_json_schema()
    for key in task.unread if task else ():
        section, name = key.split(".")
        reference = found["properties"][section]
        kind = (reference.get("$ref") or reference["allOf"][0]["$ref"]).rpartition("/")[2]
        found["$defs"][kind]["properties"].pop(name)
    return found


def section_fields(task: TaskKeys) -> dict[str, set[str]]:
    """{section: keys that the task adds}"""
    return {
        section: kind.model_fields.keys() - SECTIONS[section].model_fields.keys()
        for section, kind in task.settings.items()
    }


def _models(task: TaskKeys | None) -> Models:
    """The class of each section of a run file with a task's keys."""
    inner: Models = {"data.limits": schema.Limits, "prove.gate": schema.Gate}
    return {**SECTIONS, **(task.settings if task else {}), **inner}


def _without_other_keys(values: Json) -> Json:
    """Values without unknown keys, which are those of the run's task: mistakes were rejected when
    it was trained."""
    known = {
        name: {k: v for k, v in _section(values, name).items() if k in kind.model_fields}
        for name, kind in SECTIONS.items()
        if name in ("base", "data", "train") and isinstance(values.get(name), dict)
    }
    return {**values, **known}


def _unread(values: Json, task: TaskKeys) -> list[str]:
    """Problems: keys that are set but not read by the task."""
    problems = []
    for key in task.unread:
        section, name = key.split(".")
        field = SECTIONS[section].model_fields[name]
        default = field.get_default(call_default_factory=True)
        given = _section(values, section)
        if name in given and given[name] != default:
            problems.append(f"{key}: recipe {values['recipe']} does not read it: remove it")
    return problems


def write_run(run: Run, path: Path) -> None:
    """Write the resolved run with all defaults, so that the file alone reproduces it. Paths are
    relative to the new file where the user wrote them relative, else absolute."""
    header = "# The full run, with defaults. Repeat: lora-kit train THIS_FILE name=ANOTHER_NAME"

    def written(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: written(item) for key, item in value.items()}
        if isinstance(value, list):
            return [written(item) for item in value]
        return run.written(value, path.parent) if isinstance(value, str) else value

    values = written(run.model_dump(mode="json"))
    body = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    path.write_text(f"{header}\n{body}", encoding="utf-8")


def check_free(path: Path) -> None:
    """Raises UserError if a run directory exists."""
    if not path.exists():
        return
    if writer := writer_of(path):
        raise UserError(f"{path}: in use by {writer}: choose another with name=NAME, or stop it")
    saved = any((path / "checkpoints").glob("*/seal.json"))
    unfinished = saved and not read_lock(path).get("finished")
    more = f"resume it (lora-kit train {path / 'run.yaml'} --resume), " if unfinished else ""
    raise UserError(f"{path} exists: {more}choose another with name=NAME, or remove it")


def settings_hashes(path: Path) -> dict[str, str]:
    """Hashes of a run file's settings, by section: of all that a user may not change in a run
    directory. These may: the name, `prove:`, FREE_TO_CHANGE, and paths, whose files are compared by
    their content."""
    hashes = {}
    for section, values in sorted(_read(path).items()):
        if section in ("name", "recipe", "prove"):
            continue
        if isinstance(values, dict):
            values = {k: v for k, v in values.items() if f"{section}.{k}" not in FREE_TO_CHANGE}
            for key in _PATHS.get(section, ()):
                if key != "labels" or not isinstance(values.get(key), list):  # a list of names
                    values[key] = _without_text(values.get(key))
        text = json.dumps(values, sort_keys=True, default=str)
        hashes[section] = hashlib.sha256(text.encode()).hexdigest()
    return hashes


def _without_text(value: object) -> object:
    """A value of the run file with its texts, which name files, replaced."""
    if isinstance(value, dict):
        return {key: _without_text(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_text(item) for item in value]
    return "" if isinstance(value, str) else value


def check_settings(directory: Path) -> None:
    """Raises UserError if the settings in a run directory's run.yaml were changed since the run
    began. Runs of older versions do not have their hashes."""
    locked, file = read_lock(directory).get("settings"), directory / "run.yaml"
    if not locked:
        return
    found = settings_hashes(file)
    changed = [name for name in locked.keys() | found.keys() if locked.get(name) != found.get(name)]
    if changed:
        raise UserError(
            f"{file}: {', '.join(sorted(changed))}: changed since the run began (only name, prove "
            "and paths may be edited): restore it, or train again with name=NAME"
        )


def read_lock(directory: str | Path) -> Json:
    """run.lock.json of a run directory; {} if there is none."""
    return read_json(Path(directory) / "run.lock.json")


def read_json(file: Path) -> Json:
    """A JSON file of a run or of a model folder; {} if there is none.

    Raises:
        UserError: it is not a JSON object, or one of the keys in _OBJECTS is not.
    """
    if not file.exists():
        return {}
    with suppress(OSError, ValueError):
        found = trust.read_json(file)
        whole = isinstance(found, dict)
        if whole and all(isinstance(found.get(name) or {}, dict) for name in _OBJECTS):
            return dict(found)
    raise UserError(f"{file}: invalid: edited or corrupt")


def shipped(kind: Literal["recipes", "accelerate_configs"]) -> Path:
    """The folder of recipes or accelerate configs, in a checkout or an installed package."""
    package = Path(__file__).resolve().parent
    inside = package / "shipped" / kind
    return inside if inside.is_dir() else package.parent / kind


def shipped_recipes() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(file.stem for file in shipped("recipes").glob("*.py"))


def recipe_file(name: str) -> Path:
    """The file of a recipe: shipped, by name; or the user's."""
    return shipped("recipes") / f"{name}.py" if name in shipped_recipes() else Path(name)


def nearest(word: str, known: list[str]) -> str:
    """`; did you mean X?` for the most similar known word, or ""."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean `{close[0]}`?" if close else ""


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{where}:{mark.line + 1}" if mark else where
        why = ", ".join(filter(None, (error.context, error.problem)))
        raise UserError(f"{place}: not YAML: {why}") from None
    except RecursionError:
        raise UserError(f"{where}: nesting too deep for a run file") from None
    except (yaml.YAMLError, ValueError, LookupError, AttributeError) as error:
        # An invalid value for a tag, such as `!!int abc`, is not a YAMLError.
        raise UserError(f"{where}: not YAML: {' '.join(str(error).split())}") from None


def _override(values: Json, item: str) -> str | None:
    """Set `a.b=c` in `values`; returns an error message, or None."""
    key, equals, text = item.partition("=")
    if not equals or not key:
        return f"`{item}`: expected key=value, as in train.max_steps=200"
    parent: Any = values
    *path, last = key.split(".")
    for part in path:
        if parent.get(part) is None:
            parent[part] = {}
        parent = parent[part]
        if not isinstance(parent, dict):
            return f"`{item}`: {part} is not a section"
    try:
        parent[last] = _parse(text, f"`{item}`")
    except UserError as error:
        return str(error)
    return None


def _absolute(values: Json, folder: Path) -> tuple[Json, set[str]]:
    """The values with absolute paths, and the paths that were relative.

    Names that are not paths (a Hub id, `nano`, `nano:topics`, a metric) are unchanged.
    """
    relative: set[str] = set()

    # Any: a value of YAML, of which only texts, lists and sources are changed.
    def place(value: Any, *others: Path, must_exist: bool = False) -> Any:
        """A value with its paths absolute. `others`: further folders to search. `must_exist`: what
        does not exist is a name instead of a path."""
        if isinstance(value, list):
            return [place(item, *others, must_exist=must_exist) for item in value]
        if isinstance(value, dict) and "source" in value:
            return {**value, "source": place(value["source"])}
        if not isinstance(value, str) or not value or value.startswith("nano:") or value == "nano":
            return value
        expanded = os.path.expanduser(value)
        candidates = [str(Path(above, expanded)) for above in (folder, *others)]
        found = next(filter(os.path.exists, candidates), None)
        if found is None:
            # `./base` and `../base` can only be paths.
            named = must_exist and value.split("/")[0] not in (os.curdir, os.pardir)
            if named or is_hub_id(value):
                return value
            found = candidates[0]
        normal = os.path.normpath(found)
        if os.path.exists(found) and os.path.realpath(normal) != os.path.realpath(found):
            return found  # `link/../x`, where link points elsewhere
        if not os.path.isabs(expanded):
            relative.add(normal)
        return normal

    values = dict(values)
    names = ("data", "base", "adapter", "prove")
    data, base, adapter, prove = (dict(_section(values, name)) for name in names)
    for key in SOURCE_KEYS:
        if key in data:
            data[key] = place(data[key])
    if isinstance(data.get("labels"), str):  # a list has the names themselves
        data["labels"] = place(data["labels"])
    # A base or a run (runs/x) may also be relative to the working folder.
    if "model" in base:
        base["model"] = place(base["model"], Path.cwd(), must_exist=True)
    if "start" in adapter:
        adapter["start"] = place(adapter["start"], Path.cwd(), must_exist=True)
    for key in _PROGRAMS:
        if isinstance(prove.get(key), list):
            # Only values that look like paths: `f1` is a metric even if a folder has this name.
            prove[key] = [
                place(v, must_exist=True) if set("/.") & set(str(v)) else v for v in prove[key]
            ]
    sections = zip(names, (data, base, adapter, prove), strict=True)
    values |= {name: section for name, section in sections if section}
    recipe = values.get("recipe")
    if isinstance(recipe, str) and recipe.endswith(".py"):
        values["recipe"] = place(recipe)
    return values, relative


def _section(values: Json, name: str) -> Json:
    """A section of a run file; {} if it is missing or not a mapping."""
    found = values.get(name)
    return found if isinstance(found, dict) else {}


def is_hub_id(name: str) -> bool:
    """Whether a name that is not a path can be a Hub id (owner/name)."""
    return bool(HUB_ID.fullmatch(name)) and os.path.splitext(name)[1].lower() not in _FILE_ENDINGS


def _missing_sources(values: Json) -> list[str]:
    """Problems: missing files, folders and embedded texts of `data:`."""
    problems, data = [], _section(values, "data")
    for key in SOURCE_KEYS:
        sources = data.get(key)
        for item in sources if isinstance(sources, list) else [sources]:
            source = item.get("source") if isinstance(item, dict) else item
            if not isinstance(source, str) or not source or source in schema.EMBEDDED:
                continue
            if source.startswith("nano:"):
                hint = nearest(source, list(schema.EMBEDDED))
                problems.append(f"data.{key}: {source}: no such embedded text{hint}")
            elif is_hub_id(source):
                continue  # checked later, on the Hub
            elif not (os.path.exists(source) or glob.glob(source, recursive=True)):
                problems.append(f"data.{key}: {_short(source, 240)}: no such file or folder")
    labels = data.get("labels")
    if isinstance(labels, str) and not os.path.isfile(labels):
        problems.append(f"data.labels: {_short(labels, 240)}: no such file")
    return problems


def check_recipe(name: str) -> None:
    """Raises UserError if there is no such recipe."""
    if problems := _missing_recipe({"recipe": name}):
        raise UserError(problems[0])


def _missing_recipe(values: Json) -> list[str]:
    recipe = values.get("recipe")
    names = shipped_recipes()
    if not isinstance(recipe, str) or recipe in names:
        return []
    if not recipe.endswith(".py"):
        known = f"({', '.join(names)}, or a path to a .py)"
        hint = nearest(recipe, names)
        return [f"recipe: unknown recipe {_short(recipe)}{hint} {known}"]
    return [] if os.path.isfile(recipe) else [f"recipe: {_short(recipe, 240)}: no such file"]


def _programs(values: Json) -> list[str]:
    """Problems: programs named in a run file that was fetched by `pull`. A word with a character of
    paths is one; the names of shipped recipes, metrics and tasks have none."""
    prove = _section(values, "prove")
    named = {"recipe": values.get("recipe"), **{f"prove.{k}": prove.get(k) for k in _PROGRAMS}}
    return [
        f"{key}: {_short(word)}: a pulled run file must not name programs: use a file of your own"
        for key, words in named.items()
        for word in (words if isinstance(words, list) else [words])
        if set("/\\.~") & set(str(word or ""))
    ]


def _overridden(values: Json) -> list[str]:
    """Problems: adapter keys that `adapter.start` or `train.trainable` overrides; default values
    are allowed, since a resolved run file has them."""
    adapter, fields = _section(values, "adapter"), Adapter.model_fields
    if adapter.get("start"):
        why = "taken over from adapter.start"
    elif _section(values, "train").get("trainable") == "head":
        why = "train.trainable: head trains without LoRA"
    else:
        return []
    return sorted(
        f"adapter.{key}: {why}; remove it"
        for key in fields.keys() & adapter.keys() - {"start"}
        if adapter[key] != fields[key].get_default(call_default_factory=True)
    )


def _describe(error: ValidationError, values: Json, models: Models) -> list[str]:
    """One line per mistake: key, value, expected type, nearest name."""
    lines: dict[str, str] = {}
    for item in error.errors()[:_MOST_MISTAKES]:
        path = _path_in_file(item, values, models)
        key, value = _key(path), _short(_at(values, path))
        if item["type"] == "extra_forbidden":
            lines[key] = _unknown(key, models)
        elif item["type"] == "missing":
            lines[key] = f"{key}: missing: {_wanted(path, models)}"
        elif item["loc"][-1] == "[key]":  # of data.columns, the only mapping with known names
            names = list(get_args(schema.Column))
            hint = nearest(str(path[-1]), names)
            lines[key] = f"{key}: no such column{hint} ({', '.join(names)})"
        elif item["type"] == "value_error":
            lines[key] = f"{key}: {value} is invalid: {item['ctx']['error']}"
        elif key not in lines:
            lines[key] = f"{key}: {value} is invalid: {_wanted(path, models)}"
    # Drop messages of other union branches if there is a more specific one.
    closer = {key for key in lines for other in lines if other.startswith((f"{key}.", f"{key}["))}
    return [line for key, line in lines.items() if key not in closer]


def _path_in_file(item: ErrorDetails, values: Json, models: Models) -> KeyPath:
    """The path of a mistake, without the names of union branches (`str`, `list[...]`) that pydantic
    adds to it."""
    path: KeyPath = []
    for part in item["loc"]:
        here = _at(values, path)
        # A missing key is not in the file.
        missing = item["type"] == "missing" and part in _model(_key(path), models).model_fields
        listed = isinstance(part, int) and isinstance(here, list)
        if listed or (isinstance(here, dict) and (part in here or missing)):
            path.append(part)
    return path


# Any: a value of YAML at any depth.
def _at(values: Any, path: KeyPath) -> Any:
    """The value at a path; None if there is none."""
    try:
        for part in path:
            values = values[part]
    except (KeyError, TypeError, IndexError):
        return None
    return values


def _key(path: KeyPath) -> str:
    """The path as a key, such as `data.train[1].fraction`."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return "".join(parts).removeprefix(".")


def _model(section: str, models: Models) -> type[Section]:
    """The pydantic class of a section, such as `base`, `data.limits` or `data.train[0]`; for
    anything else that of the whole file."""
    plain = re.sub(r"\[\d+\]", "", section)
    if plain in {f"data.{key}" for key in SOURCE_KEYS}:
        return schema.Source
    return models.get(plain, Run)


def _short(value: object, most: int = 60) -> str:
    """A value as in a run file, cut to `most` characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= most else text[: most - 3] + "..."


def _wanted(path: KeyPath, models: Models) -> str:
    """The expected type of a key and its description."""
    names = [part for part in path if isinstance(part, str)]
    if section := models.get(".".join(names)):
        return f"keys such as {', '.join(list(section.model_fields)[:4])}"
    *sections, name = names
    inside = "items" if isinstance(path[-1], int) else ""
    model = _model(".".join(sections), models)
    if name not in model.model_fields:  # a key of a mapping
        *sections, name = sections
        inside = "additionalProperties"
        model = _model(".".join(sections), models)
    return f"{_type_words(model, name, inside)}. {model.model_fields[name].description}"


def _type_words(model: type[Section], name: str, inside: str = "") -> str:
    """`an integer >= 1`, `one of a, b`, from the JSON schema of the key, or of its `items` (list)
    or `additionalProperties` (mapping)."""
    node = model.model_json_schema()["properties"][name]
    node = next((o[inside] for o in node.get("anyOf", [node]) if inside in o), node)
    words = []
    for option in node.get("anyOf", [node]):
        if "enum" in option or "const" in option:
            choices = option.get("enum", [option.get("const")])
            words.append("one of " + ", ".join(map(str, choices)))
        else:
            bounds = [f"{sign} {option[key]}" for key, sign in _SIGNS.items() if key in option]
            word = _TYPES.get(option.get("type"), "a section")
            words.append(f"{word} {' and '.join(bounds)}".rstrip())
    return " or ".join(words)


def _unknown(key: str, models: Models) -> str:
    """The message for an unknown key, with a suggestion."""
    if key in _OWNERS:
        return f"{key}: not set here: {_OWNERS[key]}"
    section, _, name = key.rpartition(".")
    model = _model(section, models)
    elsewhere = [f"{s}.{name}" for s in SECTIONS if name in models[s].model_fields]
    meant = _MEANT.get(re.sub(r"\[\d+\]", "", key)) or next(iter(elsewhere), None)
    hint = f"; did you mean `{meant}`?" if meant else nearest(name, list(model.model_fields))
    return f"{key}: unknown key{_upstream(section, name)}{hint}"


def _upstream(section: str, name: str) -> str:
    """A note if the installed PEFT or transformers has the field, but lora_kit does not read it."""
    import dataclasses
    import logging

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # imported by PEFT
    upstream: Any = None
    if section == "adapter":
        from peft import LoraConfig as upstream
    elif section == "train":
        from transformers import TrainingArguments as upstream
    if upstream is None or name not in {field.name for field in dataclasses.fields(upstream)}:
        return ""
    return f" ({upstream.__name__} has it, but lora_kit does not read it)"
