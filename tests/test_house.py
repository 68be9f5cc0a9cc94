"""The house holds: who may import whom, how long it may get, what lies where."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from measure_code import files_of, functions, lines_of_code, reached

ROOT = Path(__file__).resolve().parent.parent
# From the ground up; rooms on one floor do not import each other.
FLOORS = (
    {"errors", "hashes", "nano"},
    {"schema", "folders", "hub_errors", "trust", "pages"},
    {"run", "cache"},
    {"data", "base", "speed"},
    {"adapter"},
    {"tasks"},
    {"train"},
    {"prove"},
    {"ship"},
    {"plan", "launch", "preview", "quiet_launch"},
    {"start"},
    {"demo", "doctor", "recipe"},
    {"cli"},
)
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# A public name of lora_kit may lead anywhere: it is for the rooms above these.
PUBLIC = FLOOR_OF["launch"]
# Libraries that only some rooms import, other than their types for annotations.
LIBRARIES = {
    "peft": (
        *("lora_kit.adapter", "lora_kit.ship", "lora_kit.speed.linear"),
        *("lora_kit.run", "lora_kit.train.arguments"),  # the fields of LoraConfig
    ),
    "trl": ("lora_kit.tasks",),
}
# Files of tasks/ that hold a kind of work; what they share is in the others.
TASKS = {"causal", "preference", "sequence"}
FILES_TODAY = 120
RECIPES_TODAY = 4
# What there is to read, by scripts/measure_code.py: lowered whenever it shrinks. A line is never
# made denser for it.
LINES_OF_THE_PACKAGE = 19_617
FILES_A_RECIPE_REACHES, LINES_A_RECIPE_REACHES = 86, 13_893
ANYS_IN_PUBLIC_SIGNATURES = 32
LINES_OF_A_FUNCTION = 60
LINES_OF_A_RECIPE = 80
TOP_LEVEL = {
    *("lora_kit", "recipes", "tests", "scripts", "accelerate_configs"),
    *("pyproject.toml", "README.md", "LICENSE"),
}
A_MACHINES_PATH = re.compile(r"(?<![\w.~/>}-])/(work|root|home)(/|\b)")


def imports(source: str, module: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, also inside functions; relative ones made absolute."""
    package = module.split(".")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            before = package[: len(package) - node.level + 1] if node.level else []
            stem = [*before[:-1], *(node.module or "").split(".")] if node.level else [node.module]
            base = ".".join(filter(None, stem))
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def lines_of_types(source: str) -> set[int]:
    """The lines of `if TYPE_CHECKING:`, which never run."""
    found: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            found |= set(range(node.lineno, (node.end_lineno or 0) + 1))
    return found


def broken(source: str, module: str) -> list[str]:
    """What `module` imports and must not."""
    types = lines_of_types(source)
    room = module.split(".")[1] if "." in module else ""
    problems = []
    for line, name in imports(source, module):
        parts = name.split(".")
        if parts[0] == "recipes":
            problems.append(f"{module}:{line}: {name}: nothing imports a recipe")
        rooms = LIBRARIES.get(parts[0])
        if rooms and line not in types and not module.startswith(rooms):
            problems.append(f"{module}:{line}: {parts[0]} is imported by {', '.join(rooms)} only")
        if parts[0] != "lora_kit" or not room:
            continue
        other = parts[1] if len(parts) > 1 else ""
        floor = FLOOR_OF.get(other, PUBLIC)
        if floor > FLOOR_OF[room] or (floor == FLOOR_OF[room] and other != room):
            problems.append(f"{module}:{line}: {room} must not import {name}")
        of_task = set(parts[2:3]) & TASKS if other == room == "tasks" else set()
        if of_task - {module.split(".")[-1]} - {"causal"}:
            problems.append(f"{module}:{line}: a task must not import {name}")
    return problems


def modules() -> list[tuple[Path, str]]:
    found = []
    for file in sorted((ROOT / "lora_kit").rglob("*.py")):
        parts = list(file.relative_to(ROOT).with_suffix("").parts)
        found.append((file, ".".join(parts)))
    return found


def tracked() -> list[Path]:
    """Files of the checkout that git tracks or would, by their path below the root."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [Path(line) for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


def test_every_room_imports_only_what_stands_before_it() -> None:
    found = modules()
    assert len(found) >= FILES_TODAY
    unknown = {name.split(".")[1] for _, name in found} - FLOOR_OF.keys() - {"__init__"}
    assert not unknown, f"rooms without a floor: {unknown}"
    problems = []
    for file, name in found:
        source = file.read_text(encoding="utf-8")
        problems += broken(source, "lora_kit" if name == "lora_kit.__init__" else name)
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("lora_kit.data.text", "from lora_kit.base.load import load_base"),
        ("lora_kit.data.text", "def f():\n    import lora_kit.train.save"),
        ("lora_kit.base.load", "from lora_kit.speed import runtime"),
        ("lora_kit.train.guards", "from peft import PeftModel"),
        ("lora_kit.prove.compare", "def f():\n    import trl"),
        ("lora_kit.tasks.sequence", "from lora_kit.tasks.preference import Preference"),
        ("lora_kit.adapter.load", "from lora_kit.tasks.task import Task"),
        ("lora_kit.train.save", "from ..prove import compare"),
        ("lora_kit.train.save", "from lora_kit import ship"),
        ("lora_kit.prove.compare", "import lora_kit\nlora_kit.compare"),
        ("lora_kit.ship.merge", "from lora_kit.cli import app"),
        ("lora_kit.launch", "from recipes.sft import main"),
        ("lora_kit.run", "from .data.readers import documents"),
        ("lora_kit", "import recipes.sft"),
    ],
)
def test_a_broken_import_is_seen(module: str, source: str) -> None:
    assert broken(source, module)


def test_allowed_imports_are_not_called_broken() -> None:
    source = "from . import formats\nfrom .rows import Rows\nfrom lora_kit import nano\nimport re"
    assert broken(source, "lora_kit.data.text") == []
    assert broken("from lora_kit.start import start\nimport lora_kit", "lora_kit.demo") == []
    assert broken("from lora_kit.train.save import save_run", "lora_kit.prove.evaluate") == []
    assert broken("from lora_kit.tasks.chat import x", "lora_kit.tasks.preference") == []
    assert broken("import trl, numpy", "lora_kit.tasks.preference") == []
    assert broken("if TYPE_CHECKING:\n    import peft", "lora_kit.tasks.preference") == []


def test_the_package_stays_small() -> None:
    total = sum(lines_of_code(path.read_text(encoding="utf-8")) for path, _ in modules())
    assert total <= LINES_OF_THE_PACKAGE


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.py")), ids=lambda r: r.stem)
def test_what_a_recipe_reaches_stays_small(recipe: Path) -> None:
    found = reached(recipe, files_of(ROOT))
    assert recipe in found and ROOT / "lora_kit/tasks/task.py" in found
    lines = sum(lines_of_code(file.read_text(encoding="utf-8")) for file in found)
    assert len(found) <= FILES_A_RECIPE_REACHES
    assert lines <= LINES_A_RECIPE_REACHES


def test_public_signatures_name_their_types() -> None:
    every = [one for file, _ in modules() for one in functions(file, ROOT) if one.public]
    assert sum(one.anys for one in every) <= ANYS_IN_PUBLIC_SIGNATURES


def test_functions_are_read_at_a_glance() -> None:
    every = [one for file, _ in modules() for one in functions(file, ROOT)]
    long = [one.place for one in every if one.lines > LINES_OF_A_FUNCTION]
    assert len(every) > 1000 and not long, long


def test_code_is_counted_without_what_explains_it() -> None:
    source = (
        '"""Docs,\ntwo lines."""\n\n# a comment\ndef f():\n    """More."""\n    return """x"""\n'
    )
    assert lines_of_code(source) == 2


def test_a_recipe_is_read_in_one_go_and_imports_no_other() -> None:
    recipes = sorted((ROOT / "recipes").glob("*.py"))
    assert len(recipes) >= RECIPES_TODAY
    names = {recipe.stem for recipe in recipes}
    for recipe in recipes:
        source = recipe.read_text(encoding="utf-8")
        assert len(source.splitlines()) <= LINES_OF_A_RECIPE, recipe.name
        roots = {name.split(".")[0] for _, name in imports(source, recipe.stem)}
        assert not roots & (names | {"recipes"}), recipe.name


def test_the_top_level_holds_only_what_the_house_allows() -> None:
    top = {file.parts[0] for file in tracked()}
    assert {"lora_kit", "recipes", "tests", "pyproject.toml"} <= top
    assert {name for name in top if not name.startswith(".")} <= TOP_LEVEL


def test_no_file_names_a_path_of_one_machine() -> None:
    files = tracked()
    assert len(files) >= FILES_TODAY
    found = []
    for file in files:
        if file.name == "tokenizer.json":  # its tokens may spell anything
            continue
        try:
            text = (ROOT / file).read_text(encoding="utf-8")
        except UnicodeDecodeError:  # the weights
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if A_MACHINES_PATH.search(line):
                found.append(f"{file}:{number}: {line.strip()[:100]}")
    assert not found, "\n".join(found)


def test_a_machines_path_is_told_from_a_part_of_another() -> None:
    for text in ("cd {}work/main", '"{}home/me"', "={}root"):
        text = text.format("/")  # or this file would name one
        assert A_MACHINES_PATH.search(text), text
    for text in ("https://x.org/home/", "shared/work/", "~/work", "runs/root"):
        assert not A_MACHINES_PATH.search(text), text
