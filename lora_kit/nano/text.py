"""English text that ships with CPython: docstrings and the topics of `help()`.

The split is defined here: a hash of a docstring's qualified name decides whether `nano` was trained
on it, so that training, evaluation and adaptation agree.
"""

import ast
import hashlib
import importlib
import importlib.machinery
import inspect
import re
import sys
import sysconfig
import types
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

# Hash bins, out of 100.
GENERAL = range(0, 5)
INSTRUCTIONS = range(5, 25)

# pydoc_data is the domain of the demo. lib2to3 reads Python 2; the encodings are tables; turtledemo
# opens windows and has no prose.
SKIPPED = {"site-packages", "pydoc_data", "lib2to3", "encodings", "turtledemo", "__pycache__"}
TESTS = {"test", "tests", "idle_test"}

# The C and Python versions of a module need the same name, to be in the same split.
ALIASES = {
    "posix": "os",
    "nt": "os",
    "_pyio": "io",
    "_pydecimal": "decimal",
    "_pydatetime": "datetime",
    "_collections_abc": "collections.abc",
}
# readline prints an escape sequence on some terminals; the others are CPython's test helpers.
UNIMPORTED = re.compile(r"readline|_?xx.*|_test.*|_ctypes_test|idlelib")

Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@cache
def topics() -> list[tuple[str, str]]:
    """The topics of `help()` as (name, text), sorted by name; nano was not trained on them."""
    from pydoc_data.topics import topics as texts

    return sorted((name, text.strip()) for name, text in texts.items())


def held_out(name: str) -> str | None:
    """Which held-out set a qualified name belongs to: "general", "instructions", or None.

    >>> held_out("heapq.heappush") == held_out("heapq.heappush")
    True
    """
    chosen = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % 100
    if chosen in GENERAL:
        return "general"
    return "instructions" if chosen in INSTRUCTIONS else None


def sources(tests: bool = False) -> Iterator[tuple[str, Path]]:
    """(module, file) of the standard library's Python files, sorted; with its tests if asked."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED.intersection(parts) or any("-" in part for part in parts):
            continue
        if not tests and TESTS.intersection(parts):
            continue
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def parse(path: Path) -> tuple[str, ast.Module] | None:
    """A file's text and syntax tree, or None if it is invalid on purpose."""
    try:
        text = path.read_text("utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return text, ast.parse(text)
    except (SyntaxError, ValueError):
        return None


def definitions(
    module: str, tree: ast.Module, nested: bool = True
) -> Iterator[tuple[str, Definition, ast.Constant]]:
    """(qualified name, node, docstring node) of everything in a module that has a docstring.

    Without `nested`, definitions inside functions are skipped.
    """

    def walk(node: ast.AST, name: str) -> Iterator[tuple[str, Definition, ast.Constant]]:
        if isinstance(node, Definition) and node.body:
            first = node.body[0]
            value = first.value if isinstance(first, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield name, node, value
        if not nested and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            return
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield from walk(child, f"{name}.{child.name}")
            elif isinstance(child, ast.stmt):  # an `if` or a `try` around definitions
                yield from walk(child, name)

    yield from walk(tree, ALIASES.get(module, module))


@cache
def docstrings() -> list[tuple[str, str]]:
    """(qualified name, docstring) of the running standard library, in a fixed order.

    Python modules are parsed, not run; builtin and extension modules are imported. If a definition
    exists in Python and in C, the Python version is used.
    """
    found: dict[str, str] = {}
    for module, path in sources():
        parsed = parse(path)
        for name, _, constant in definitions(module, parsed[1], nested=False) if parsed else ():
            found.setdefault(name, inspect.cleandoc(str(constant.value)).strip())
    for name, text in _compiled():
        found.setdefault(name, inspect.cleandoc(text).strip())
    return [(name, text) for name, text in found.items() if text]


@cache
def general() -> list[tuple[str, str]]:
    """Held-out docstrings of at least 200 bytes, to measure forgetting."""
    chosen: dict[str, tuple[str, str]] = {}
    for name, text in docstrings():
        if held_out(name) == "general" and len(text.encode()) >= 200:
            chosen.setdefault(squeeze(text), (name, text))
    return list(chosen.values())


@cache
def instructions() -> list[dict[str, str]]:
    """Rows {"prompt", "completion"} from docstrings that nano was not trained on.

    >>> instructions()[0]["prompt"].startswith("What does `")
    True
    """
    taken = {squeeze(text) for name, text in docstrings() if held_out(name) == "general"}
    rows: dict[str, dict[str, str]] = {}
    for name, text in docstrings():
        public = not any(part.startswith("_") for part in name.split("."))
        sentence = _sentence(text)
        if held_out(name) != "instructions" or not public or not sentence:
            continue
        if squeeze(text) not in taken:
            row = {"prompt": f"What does `{name}` do?", "completion": sentence}
            rows.setdefault(sentence.lower().rstrip("."), row)
    return list(rows.values())


def squeeze(text: str) -> str:
    """Text with single spaces, for comparison."""
    return " ".join(text.split())


def _sentence(text: str) -> str | None:
    """The first sentence of a docstring, on one line, if it is prose of 3 words to 200 chars."""
    paragraph = squeeze(text.split("\n\n")[0])
    if re.match(r"[\w.]+\s*\(", paragraph) or "->" in paragraph or not paragraph[:1].isalpha():
        return None  # a signature, a table, a list
    ended = re.match(r".+?(?<!e\.g)(?<!i\.e)(?<!etc)[.!?](?=\s+[A-Z]|$)", paragraph)
    sentence = ended.group() if ended else paragraph
    prose = len(sentence.split()) >= 3 and len(sentence) <= 200
    return sentence if prose and re.search(r"[\w)'\"`][.!?]?$", sentence) else None


def _compiled() -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of the builtin and extension modules' contents."""
    folders = (Path(sysconfig.get_path("stdlib"), "lib-dynload"), Path(sys.base_prefix, "DLLs"))
    suffixes = tuple(importlib.machinery.EXTENSION_SUFFIXES)
    files = (file.name for folder in folders if folder.is_dir() for file in folder.iterdir())
    extensions = {name.split(".")[0] for name in files if name.endswith(suffixes)}
    for module_name in sorted(extensions | set(sys.builtin_module_names)):
        if UNIMPORTED.fullmatch(module_name):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                module = importlib.import_module(module_name)
        except Exception:  # not available in this build or on this system
            continue
        public = _public(module_name)
        if module.__doc__:
            yield public or "builtins", module.__doc__
        for name, value in sorted(vars(module).items()):
            if module is sys:  # libraries such as `typer` install hooks there
                value = getattr(sys, f"__{name}__", value)
            if isinstance(value, types.BuiltinFunctionType) and value.__doc__:
                yield f"{public}.{name}".lstrip("."), value.__doc__
            elif isinstance(value, type):
                yield from _class(value)


def _class(kind: type) -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of a class written in C and of its own members."""
    members = dict(vars(kind))
    if any(isinstance(member, types.FunctionType) for member in members.values()):
        return  # written in Python: parsed from source
    prefix = f"{_public(kind.__module__)}.{kind.__qualname__}".lstrip(".")
    if isinstance(members.get("__doc__"), str):
        yield prefix, members["__doc__"]
    for name, member in sorted(members.items()):
        text = None if name in ("__doc__", "__class__") else getattr(member, "__doc__", None)
        if isinstance(text, str) and (callable(member) or inspect.isdatadescriptor(member)):
            yield f"{prefix}.{name}", text


def _public(module: str) -> str:
    """The public name of a compiled module: `_heapq` is `heapq`."""
    return "" if module == "builtins" else ALIASES.get(module, module.removeprefix("_"))
