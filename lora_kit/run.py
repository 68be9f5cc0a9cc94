"""`run.yaml` -> `Run`: what one run is, every mistake in it reported at once.

Neither PEFT nor transformers is imported for a good file: the process that trains checks the fields
against the installed classes (`train.arguments.check_installed`). A run file that already has a
mistake is checked against them to complete the list.
"""

from __future__ import annotations

import difflib
import glob
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

from lora_kit import schema, trust
from lora_kit.errors import RunFileError, UserError
from lora_kit.schema import SECTIONS, Adapter, Run, Section

# What is an object wherever it stands in the files that a run writes about itself.
_OBJECTS = (
    *("base", "adapter", "data", "batch", "commits", "verdict", "domain", "general", "overfitting"),
    *("metrics", "harness", "audit", "training", "memory", "gate"),
)
# The keys of `data:` that name sources.
SOURCE_KEYS = ("train", "eval", "general", "decontaminate")
Models = Mapping[str, type[Section]]  # section -> its class, as `data.limits`
# The classes of sections inside others.
_INNER: Models = {"data.limits": schema.Limits, "prove.gate": schema.Gate}
_PROGRAMS = ("metrics", "harness")  # keys of `prove:` that may name some
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILE_ENDINGS = {
    *(".txt", ".md", ".rst", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow"),
    *(".gz", ".html", ".htm", ".pdf", ".docx", ".doc", ".odt", ".epub", ".xlsx", ".rtf"),
    *(".py", ".conll"),
}
# How `lora-kit train` tells its workers how many of them there should be.
WORLD_SIZE_VARIABLE = "LORA_KIT_WORLD_SIZE"
# A run file is a page; what is larger is something else, named by mistake.
_LARGEST_BYTES = 2**20

# Keys of the installed classes that another part of the run owns.
_OWNERS = {
    "train.output_dir": "`name:` decides it: the run is written to runs/<name>",
    "train.run_name": "`name:` decides it",
    "train.seed": "`seed:` at the top decides it",
    "train.data_seed": "`seed:` at the top decides it",
    "train.push_to_hub": "nothing is uploaded by training",
    "train.hub_token": "a token does not belong into a run file; log in with `hf auth login`",
    "train.bf16": "`base.dtype` decides it",
    "train.fp16": "`base.dtype` decides it",
    "train.deepspeed": "`--accelerate zero3` decides it",
    "train.fsdp": "`--accelerate fsdp_qlora` decides it",
    "train.use_cpu": "`--accelerate cpu` decides it",
    "train.resume_from_checkpoint": "`lora-kit train RUN --resume` asks for it",
    "train.eval_strategy": "`train.eval_steps` decides it",
    "train.save_strategy": "`train.save_steps` decides it",
    "train.logging_strategy": "`train.logging_steps` decides it",
    "train.metric_for_best_model": "the best adapter is that of the lowest eval_loss",
    "train.greater_is_better": "the best adapter is that of the lowest eval_loss",
    "train.logging_dir": "TensorBoard's files lie in runs/<name>/tensorboard",
    "train.disable_tqdm": "a bar is drawn where there is a terminal",
    "adapter.base_model_name_or_path": "`base.model` decides it",
    "adapter.revision": "`base.revision` decides it",
    "adapter.task_type": "a causal language model is always meant",
    "base.trust_remote_code": "code from a model repository is never run",
    **dict.fromkeys(
        ("train.trust_remote_code", "prove.trust_remote_code", "data.trust_remote_code"),
        "no file allows code from the Hub, only --trust-remote-code on the command line",
    ),
    "base.device_map": "accelerate places the model; see --accelerate",
    "base.load_in_4bit": "write `quantize: nf4`",
    "base.load_in_8bit": "write `quantize: int8`",
    "data.seed": "`seed:` at the top decides it",
    "data.against": "it is called `data.decontaminate` now",
}
# Other names that people know a key by, where the nearest spelling would be the wrong one.
_MEANT = {
    "adapter.rank": "r",
    "train.batch_size": "per_device_train_batch_size",
    "train.lr": "learning_rate",
    "train.early_stopping": "early_stopping_patience",
    "train.patience": "early_stopping_patience",
    **{f"data.{key}.path": "source" for key in SOURCE_KEYS},
}

# What a JSON schema calls a type or a bound, in words.
_TYPES = {
    **{"integer": "a whole number", "number": "a number", "string": "a text", "null": "null"},
    **{"boolean": "true or false", "array": "a list", "object": "a mapping"},
}
_SIGNS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but `2e-4` is a number, a date is text, a key may stand only
    once, and there are no aliases: a few of them, nested, stand for more than fits into memory."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(
                None, None, "aliases (*name) are not taken: write the value out", mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str) or key in seen:
                what = "stands twice" if isinstance(key, str) else "is not a word"
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} {what}", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads back: the name `1e4` in quotes."""


_FLOAT = re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$")
for _class in (_Loader, _Dumper):
    # `add_implicit_resolver` copies the table of SafeLoader before it adds to it.
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


class Keys(Protocol):
    """What a task tells about the run file's keys (see `tasks.task.Task`)."""

    settings: Mapping[str, type[Section]]
    unread: tuple[str, ...]


def load_run(
    path: str | Path,
    overrides: tuple[str, ...] | list[str] = (),
    needs_sources: bool = True,
    task_of: Callable[[Path], Keys] | None = None,
) -> Run:
    """Read a run file, apply `key=value` overrides, and check everything.

    Relative paths in `data:`, `base.model`, `adapter.start` and `recipe` are relative to the run
    file; the ones returned are absolute. A base or an adapter may be named relative to the working
    folder as well.

    Args:
        needs_sources: whether the data and the recipe must be there; a finished run is loaded
            without them.
        task_of: gives the task of a recipe's file, whose keys are taken and checked as well. Of a
            finished run, loaded without it, keys that only its task knows are passed over.

    Raises:
        UserError: the file is missing or not YAML.
        RunFileError: one or more keys are wrong; all of them are named.
    """
    path = Path(path)
    values = _read(path)
    problems = _programs(values) if trust.pulled(path) else []
    problems += [problem for item in overrides if (problem := _override(values, item))]
    if not needs_sources or (path.parent / "run.lock.json").is_file():
        data = _section(values, "data")
        if "against" in data:  # in a run directory, written by a version that called it so
            values["data"] = {k: v for k, v in data.items() if k != "against"}
            values["data"].setdefault("decontaminate", data["against"])
    values, relative = _absolute(values, path.resolve().parent)
    task: Keys | None = None
    # Looked at before the schema, so that all mistakes come at once.
    if needs_sources:
        missing = _missing_recipe(values)
        problems += _missing_sources(values) + missing
    else:
        missing = []
    if task_of is not None and not missing and isinstance(values.get("recipe"), str):
        try:
            task = task_of(recipe_file(values["recipe"]))
        except UserError as error:
            problems.append(str(error))
    problems += _twice_decided(values)
    if task is not None:
        problems += _unread(values, task)
    elif not needs_sources:
        values = _without_other_keys(values)
    try:
        run = validated(values, task)
    except ValidationError as error:
        models = _models(task)
        raise RunFileError(str(path), problems + _describe(error, values, models)) from None
    if problems:
        raise RunFileError(str(path), problems)
    run._relative = frozenset(relative)
    return run


def _read(path: Path) -> dict[str, Any]:
    """The values of a run file."""
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a run file, as in {path / 'run.yaml'}")
    try:
        if path.stat().st_size > _LARGEST_BYTES:
            raise UserError(f"{path}: larger than {_LARGEST_BYTES:,} bytes: this is no run file")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): name a run file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}): is it a run file?") from None
    values = _parse(text, str(path))
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a run file: `key: value` lines are expected")
    # A section of which nothing is left but its name takes its defaults.
    return {k: {} if v is None and k in SECTIONS else v for k, v in values.items()}


def validated(values: dict[str, Any], task: Keys | None) -> Run:
    """A run of these values, with the keys of a task. Raises pydantic's ValidationError."""
    return run_class(task).model_validate(values)


def run_class(task: Keys | None) -> type[Run]:
    """The class of a run file with the keys of a task."""
    return _run_class(tuple(sorted(task.settings.items()))) if task else Run


@lru_cache
def _run_class(settings: tuple[tuple[str, type[Section]], ...]) -> type[Run]:
    fields: dict[str, Any] = {}
    for section, kind in settings:
        needed = Run.model_fields[section].is_required()
        fields[section] = (kind, ... if needed else kind())
    return create_model("Run", __base__=Run, **fields) if fields else Run


def schema_of(task: Keys | None) -> dict[str, Any]:
    """The JSON schema of a run file, with the keys of a task and without those it does not read."""
    found = run_class(task).model_json_schema()
    for key in task.unread if task else ():
        section, name = key.split(".")
        reference = found["properties"][section]
        kind = (reference.get("$ref") or reference["allOf"][0]["$ref"]).rpartition("/")[2]
        found["$defs"][kind]["properties"].pop(name)
    return found


def section_fields(task: Keys) -> dict[str, set[str]]:
    """{section: the keys that a task adds to it}"""
    return {
        section: kind.model_fields.keys() - SECTIONS[section].model_fields.keys()
        for section, kind in task.settings.items()
    }


def _models(task: Keys | None) -> Models:
    return {**SECTIONS, **(task.settings if task else {}), **_INNER}


def _without_other_keys(values: dict[str, Any]) -> dict[str, Any]:
    """Values without keys that only the run's own task knows. Those that are mistakes have been
    refused when it was trained."""
    known = {
        name: {k: v for k, v in _section(values, name).items() if k in kind.model_fields}
        for name, kind in SECTIONS.items()
        if name in ("base", "data", "train") and isinstance(values.get(name), dict)
    }
    return {**values, **known}


def _unread(values: dict[str, Any], task: Keys) -> list[str]:
    """Keys that are set and that the task does not read."""
    problems = []
    for key in task.unread:
        section, name = key.split(".")
        field = SECTIONS[section].model_fields[name]
        default = field.get_default(call_default_factory=True)
        if name in (given := _section(values, section)) and given[name] != default:
            problems.append(f"{key}: recipe {values['recipe']} does not read it: leave it out")
    return problems


def write_run(run: Run, path: Path) -> None:
    """Write the resolved run with all defaults, so that the file alone repeats it. Paths are
    relative to the new file where the user wrote them relative, else absolute."""
    header = "# What ran, defaults included. Repeat it: lora-kit train THIS_FILE name=ANOTHER_NAME"

    def written(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: written(item) for key, item in value.items()}
        if isinstance(value, list):
            return [written(item) for item in value]
        return run.written(value, path.parent) if isinstance(value, str) else value

    values = written(run.model_dump(mode="json"))
    body = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    path.write_text(f"{header}\n{body}", encoding="utf-8")


def check_free(run: Run) -> None:
    """Raises UserError if the run's directory exists."""
    path = run.directory
    if not path.exists():
        return
    saved = any((path / "checkpoints").glob("*/seal.json"))
    unfinished = saved and not read_lock(path).get("finished")
    more = f"continue it (lora-kit train {path / 'run.yaml'} --resume), " if unfinished else ""
    raise UserError(f"{path} exists: {more}choose another with name=NAME, or remove it")


def read_lock(directory: str | Path) -> dict[str, Any]:
    """run.lock.json of a run directory; empty where there is none."""
    return read_json(Path(directory) / "run.lock.json")


def read_json(file: Path) -> dict[str, Any]:
    """An object that a run wrote about itself; empty where there is none.

    Raises:
        UserError: it is no JSON object, or a section of it is something else.
    """
    if not file.exists():
        return {}
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads(file.read_text(encoding="utf-8"))
        whole = isinstance(found, dict)
        if whole and all(isinstance(found.get(name) or {}, dict) for name in _OBJECTS):
            return dict(found)
    raise UserError(f"{file}: not the JSON that was written: changed by hand, or damaged")


def shipped(kind: Literal["recipes", "accelerate_configs"]) -> Path:
    """The folder of recipes or accelerate configs, in a checkout as in an installed package."""
    package = Path(__file__).resolve().parent
    inside = package / "shipped" / kind
    return inside if inside.is_dir() else package.parent / kind


def shipped_recipes() -> list[str]:
    """The names of the recipes that come with the package."""
    return sorted(file.stem for file in shipped("recipes").glob("*.py"))


def recipe_file(name: str) -> Path:
    """The file of a recipe: a shipped one by name, or the user's own."""
    return shipped("recipes") / f"{name}.py" if name in shipped_recipes() else Path(name)


def recipe_path(run: Run) -> Path:
    """The file of a run's recipe."""
    return recipe_file(run.recipe)


def nearest(word: str, known: list[str]) -> str:
    """`; did you mean X?` for the known word most like this one, or nothing."""
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
        raise UserError(f"{where}: nested too deeply for a run file") from None
    except (yaml.YAMLError, ValueError, LookupError, AttributeError) as error:
        # A value that its tag does not fit, such as `!!int abc`, is no YAMLError.
        raise UserError(f"{where}: not YAML: {' '.join(str(error).split())}") from None


def _override(values: dict[str, Any], item: str) -> str | None:
    """Set `a.b=c` in `values`; returns what is wrong with it, if anything."""
    key, equals, text = item.partition("=")
    if not equals or not key:
        return f"`{item}`: an override reads key=value, as in train.max_steps=200"
    parent: Any = values
    *path, last = key.split(".")
    for part in path:
        if parent.get(part) is None:
            parent[part] = {}
        parent = parent[part]
        if not isinstance(parent, dict):
            return f"`{item}`: {part} has no keys of its own"
    try:
        parent[last] = _parse(text, f"`{item}`")
    except UserError as error:
        return str(error)
    return None


def _absolute(values: dict[str, Any], folder: Path) -> tuple[dict[str, Any], set[str]]:
    """The values with absolute paths, and those of the paths that were relative.

    A name that is no path (a Hub id, `nano`, `nano:topics`, a metric) stays as it is.
    """
    relative: set[str] = set()

    def place(value: Any, *others: Path, must_exist: bool = False) -> Any:
        """`others`: further folders to look in. `must_exist`: what is not there is a name."""
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
            return found  # `link/../x`, where the link leads elsewhere
        if not os.path.isabs(expanded):
            relative.add(normal)
        return normal

    values = dict(values)
    data, base, adapter = (dict(_section(values, name)) for name in ("data", "base", "adapter"))
    for key in SOURCE_KEYS:
        if key in data:
            data[key] = place(data[key])
    if isinstance(data.get("labels"), str):  # a list holds the names themselves
        data["labels"] = place(data["labels"])
    # A base or a run (runs/x) may be named from the working folder as well.
    if "model" in base:
        base["model"] = place(base["model"], Path.cwd(), must_exist=True)
    if "start" in adapter:
        adapter["start"] = place(adapter["start"], Path.cwd(), must_exist=True)
    values |= {k: v for k, v in (("data", data), ("base", base), ("adapter", adapter)) if v}
    prove = _section(values, "prove")
    for key in _PROGRAMS:
        if isinstance(prove.get(key), list):
            # What looks like a path: `f1` is a metric even where a folder has this name.
            words = [
                place(v, must_exist=True) if set("/.") & set(str(v)) else v for v in prove[key]
            ]
            prove = {**prove, key: words}
            values["prove"] = prove
    recipe = values.get("recipe")
    if isinstance(recipe, str) and recipe.endswith(".py"):
        values["recipe"] = place(recipe)
    return values, relative


def _section(values: dict[str, Any], name: str) -> dict[str, Any]:
    found = values.get(name)
    return found if isinstance(found, dict) else {}


def is_hub_id(name: str) -> bool:
    """Whether a name can be a data set on the Hub (owner/name), if it is no path."""
    return bool(_HUB_ID.fullmatch(name)) and os.path.splitext(name)[1].lower() not in _FILE_ENDINGS


def _missing_sources(values: dict[str, Any]) -> list[str]:
    """Files, folders and embedded texts in `data:` that are not there."""
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
                continue  # the Hub is asked later
            elif not (os.path.exists(source) or glob.glob(source, recursive=True)):
                problems.append(f"data.{key}: {_short(source, 240)}: no such file or folder")
    labels = data.get("labels")
    if isinstance(labels, str) and not os.path.isfile(labels):
        problems.append(f"data.labels: {_short(labels, 240)}: no such file")
    return problems


def check_recipe(name: str) -> None:
    """Raises UserError: no recipe has this name, or no file."""
    if problems := _missing_recipe({"recipe": name}):
        raise UserError(problems[0])


def _missing_recipe(values: dict[str, Any]) -> list[str]:
    recipe = values.get("recipe")
    names = shipped_recipes()
    if not isinstance(recipe, str) or recipe in names:
        return []
    if not recipe.endswith(".py"):
        known = f"({', '.join(names)}, or a path to a .py)"
        hint = nearest(recipe, names)
        return [f"recipe: no recipe is called {_short(recipe)}{hint} {known}"]
    return [] if os.path.isfile(recipe) else [f"recipe: {_short(recipe, 240)}: no such file"]


def _programs(values: dict[str, Any]) -> list[str]:
    """Programs that a run file names which `pull` brought, wherever they lie."""
    prove = _section(values, "prove")
    named = {"recipe": values.get("recipe"), **{f"prove.{k}": prove.get(k) for k in _PROGRAMS}}
    return [
        f"{key}: {_short(word)}: a program, and this file was pulled: name it in one of your own"
        for key, words in named.items()
        for word in (words if isinstance(words, list) else [words])
        if set("/\\.~") & set(str(word or ""))
    ]


def _twice_decided(values: dict[str, Any]) -> list[str]:
    """Keys of the adapter that `adapter.start` or `train.trainable` decides; their defaults may
    stand there, as they do in a resolved run file."""
    adapter, fields = _section(values, "adapter"), Adapter.model_fields
    if adapter.get("start"):
        why = "taken over from adapter.start"
    elif _section(values, "train").get("trainable") == "head":
        why = "train.trainable: head trains without LoRA"
    else:
        return []
    return sorted(
        f"adapter.{key}: {why}; leave it out"
        for key in fields.keys() & adapter.keys() - {"start"}
        if adapter[key] != fields[key].get_default(call_default_factory=True)
    )


def _describe(error: ValidationError, values: dict[str, Any], models: Models) -> list[str]:
    """One line for each mistake: key, value, what is wanted, the nearest name."""
    lines: dict[str, str] = {}
    for item in error.errors():
        # A union reports each branch under the branch's own name (`str`, `list[...]`): drop those.
        known: list[str | int] = []
        for part in item["loc"]:
            here = _at(values, known)
            fields = _model(_key(known), models).model_fields if item["type"] == "missing" else {}
            listed = isinstance(part, int) and isinstance(here, list)
            if listed or (isinstance(here, dict) and part in {**here, **fields}):
                known.append(part)
        key = _key(known)
        value = _short(_at(values, known))
        if item["type"] == "extra_forbidden":
            lines[key] = _unknown(key, models)
        elif item["type"] == "missing":
            lines[key] = f"{key}: missing: {_wanted(known, models)}"
        elif item["loc"][-1] == "[key]":  # of data.columns, the one mapping with names of its own
            names = list(get_args(schema.Column))
            hint = nearest(str(known[-1]), names)
            lines[key] = f"{key}: no such column{hint} ({', '.join(names)})"
        elif item["type"] == "value_error":
            lines[key] = f"{key}: {value} is not usable: {item['ctx']['error']}"
        elif key not in lines:
            lines[key] = f"{key}: {value} is not usable: {_wanted(known, models)}"
    # Where the mistake is known more closely, the other branches of a union have nothing to say.
    closer = {key for key in lines for other in lines if other.startswith((f"{key}.", f"{key}["))}
    return [line for key, line in lines.items() if key not in closer]


def _at(values: Any, path: list[str | int]) -> Any:
    try:
        for part in path:
            values = values[part]
    except (KeyError, TypeError, IndexError):
        return None
    return values


def _key(path: list[str | int]) -> str:
    """`data.train[1].fraction`, as people write it."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return "".join(parts).removeprefix(".")


def _model(section: str, models: Models) -> Any:
    """The class whose keys are in a section, such as `base`, `data.limits` or `data.train[0]`."""
    plain = re.sub(r"\[\d+\]", "", section)
    if plain in {f"data.{key}" for key in SOURCE_KEYS}:
        return schema.Source
    return models.get(plain, Run)


def _short(value: Any, most: int = 60) -> str:
    """A value as a run file spells it, cut to `most` characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= most else text[: most - 3] + "..."


def _wanted(path: list[str | int], models: Models) -> str:
    """What a key takes, from its annotation and its description."""
    names = [part for part in path if isinstance(part, str)]
    if (inside := ".".join(names)) in models:
        return f"keys such as {', '.join(list(_model(inside, models).model_fields)[:4])}"
    model, name, inside = _model(".".join(names[:-1]), models), names[-1], ""
    if name not in model.model_fields:  # a key of a mapping
        model, name, inside = (
            _model(".".join(names[:-2]), models),
            names[-2],
            "additionalProperties",
        )
    elif isinstance(path[-1], int):
        inside = "items"
    return f"{_type_words(model, name, inside)}. {model.model_fields[name].description}"


def _type_words(model: Any, name: str, inside: str = "") -> str:
    """`a whole number >= 1`, `one of a, b`, from the JSON schema of the key, or of what is in it:
    `items` of a list, `additionalProperties` of a mapping."""
    node = model.model_json_schema()["properties"][name]
    node = next((o[inside] for o in node.get("anyOf", [node]) if inside in o), node)
    words = []
    for option in node.get("anyOf", [node]):
        if "enum" in option or "const" in option:
            choices = option.get("enum", [option.get("const")])
            words.append("one of " + ", ".join(map(str, choices)))
        else:
            bounds = [f"{sign} {option[key]}" for key, sign in _SIGNS.items() if key in option]
            word = _TYPES.get(option.get("type"), "keys of its own")
            words.append(f"{word} {' and '.join(bounds)}".rstrip())
    return " or ".join(words)


def _unknown(key: str, models: Models) -> str:
    """Why this key is not taken, and which one may be meant."""
    if key in _OWNERS:
        return f"{key}: not set here: {_OWNERS[key]}"
    section, _, name = key.rpartition(".")
    model = _model(section, models)
    elsewhere = [f"{s}.{name}" for s in SECTIONS if name in models[s].model_fields]
    plain = re.sub(r"\[\d+\]", "", key)
    if meant := [_MEANT[plain]] if plain in _MEANT else elsewhere:
        hint = f"; did you mean `{meant[0]}`?"
    else:
        hint = nearest(name, list(model.model_fields))
    return f"{key}: unknown key{_upstream(section, name)}{hint}"


def _upstream(section: str, name: str) -> str:
    """Says so when the installed PEFT or transformers has the field, but nothing here reads it."""
    import dataclasses
    import logging

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT brings it, and it chats
    upstream: Any = None
    if section == "adapter":
        from peft import LoraConfig as upstream
    elif section == "train":
        from transformers import TrainingArguments as upstream
    if upstream is None or name not in {field.name for field in dataclasses.fields(upstream)}:
        return ""
    return f" ({upstream.__name__} has it, but lora_kit does not read it)"
