"""Loads a recipe file: its task and its `main`."""

from __future__ import annotations

import importlib.util
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from lora_kit.data.formats import FORMATS
from lora_kit.errors import LoraKitError, UserError, in_a_line
from lora_kit.run import nearest
from lora_kit.schema import Json
from lora_kit.tasks.task import Task
from lora_kit.trust import check_own

Main = Callable[..., Json]
_TUPLES = ("formats", "scores", "unread")
_NEEDED = ("encode", "collate", "score", "show")


class Recipe(NamedTuple):
    """`TASK` and `main(run, resume=False)` of a recipe file."""

    task: Task
    main: Main


def load_recipe(file: Path) -> Recipe:
    """Import a recipe file. It is not registered as a module, so recipes of the same name do not
    collide, and workers get its classes by value.

    Raises:
        UserError: it cannot be imported, defines no `TASK` or no `main(run, resume)`, or its task
            has an unknown format or no score.
    """
    if not file.is_file():
        raise UserError(f"recipe: {file}: no such file")
    check_own(file)
    spec = importlib.util.spec_from_file_location(f"recipe_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise UserError(f"recipe: {file}: not a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except LoraKitError:
        raise
    except (Exception, SystemExit) as error:  # the user's code can raise anything
        line = _line_in(error, file)
        why = in_a_line(error)
        raise UserError(f"recipe: {file}{line}: cannot be imported: {why}") from error
    task, main = getattr(module, "TASK", None), getattr(module, "main", None)
    problems = _problems(task)
    if not callable(main):
        problems.append("defines no main(run, resume)")
    if problems or not isinstance(task, Task) or not callable(main):
        raise UserError("\n".join(f"recipe: {file}: {problem}" for problem in problems))
    for kind in type(task).__mro__:
        if kind.__module__ == module.__name__:
            # For the cache key of rows: `inspect` only finds files of registered modules.
            kind.__file__ = str(file)  # type: ignore[attr-defined]
    return Recipe(task, main)


def _problems(task: object) -> list[str]:
    """What is wrong with a recipe's `TASK`, one line each."""
    if not isinstance(task, Task):
        return ["defines no TASK, an instance of lora_kit.recipe.Task"]
    wrong = [name for name in _TUPLES if not isinstance(getattr(task, name), (tuple, list))]
    if wrong:
        return [f"TASK.{name} is not a tuple of names, as in ('text',)" for name in wrong]
    known = ", ".join(FORMATS)
    unknown = [name for name in task.formats if name not in FORMATS]
    if unknown:
        hint = nearest(str(unknown[0]), list(FORMATS))
        return [f"TASK.formats: unknown format {unknown[0]!r}{hint} ({known})"]
    if not task.formats:
        return [f"TASK.formats is empty: name some of {known}"]
    if not task.scores:
        return ["TASK.scores is empty: name the scores that TASK.score returns"]
    missing = [name for name in _NEEDED if getattr(type(task), name) is getattr(Task, name)]
    if missing:
        return [f"TASK has no {', '.join(missing)}: see recipes/README.md"]
    return []


def _line_in(error: BaseException, file: Path) -> str:
    """`:12`, the line of the file at which an error was raised."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename) == file
    ]
    if isinstance(error, SyntaxError) and error.lineno:
        lines.append(error.lineno)
    return f":{lines[-1]}" if lines else ""
