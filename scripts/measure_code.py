"""How much there is to read: files and lines of code, by recipe and by room.

    python scripts/measure_code.py             # this checkout
    python scripts/measure_code.py CHECKOUT    # another one, to compare with

Lines of code are lines without blank ones, comments and docstrings. What a recipe reaches are the
files of the package that its imports lead to, also imports inside functions; the public names of
`lora_kit/__init__.py`, which are imported on first use, are not followed. An annotation counts as
`Any` where the name occurs in the signature of a public function or method.
"""

from __future__ import annotations

import argparse
import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LONGEST = 12  # functions that are listed
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Function(NamedTuple):
    """A function, its lines of code without its docstring, and the `Any`s of its signature."""

    place: str
    lines: int
    anys: int
    public: bool


def files_of(root: Path) -> dict[str, Path]:
    """{dotted name: file} of the package's modules."""
    found = {}
    for file in sorted((root / "lora_kit").rglob("*.py")):
        name = ".".join(file.relative_to(root).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = file
    return found


def lines_of_code(source: str) -> int:
    """Lines without blank ones, comments and docstrings.

    >>> lines_of_code('def f():\\n    "Docs."\\n\\n    # a comment\\n    return 1\\n')
    2
    """
    documented = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, *DEFINITIONS)) and ast.get_docstring(node):
            docstring = node.body[0]
            documented |= set(range(docstring.lineno, (docstring.end_lineno or 0) + 1))
    count = 0
    for number, line in enumerate(map(str.strip, source.splitlines()), 1):
        count += bool(line) and not line.startswith("#") and number not in documented
    return count


def imported(source: str, files: dict[str, Path]) -> set[str]:
    """The modules of the package that a file imports; those of a package's parts, not itself."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            parts = {f"{node.module}.{alias.name}" for alias in node.names} & files.keys()
            names |= parts or {node.module}
    return names & files.keys() - {"lora_kit"}


def reached(recipe: Path, files: dict[str, Path]) -> set[Path]:
    """The files that a recipe's imports lead to, itself among them."""
    found: set[Path] = set()
    waiting = [recipe]
    while waiting:
        file = waiting.pop()
        if file not in found:
            found.add(file)
            names = imported(file.read_text(encoding="utf-8"), files)
            waiting += [files[name] for name in names]
    return found


def functions(file: Path, root: Path) -> Iterator[Function]:
    """The functions and methods of a file, nested ones within those that hold them."""
    source = file.read_text(encoding="utf-8")
    lines = source.splitlines()

    def inside(node: ast.AST, public: bool) -> Iterator[Function]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                yield from inside(child, public and not child.name.startswith("_"))
            elif isinstance(child, DEFINITIONS):
                first, last = child.lineno, child.end_lineno or child.lineno
                text = "\n".join(line[child.col_offset :] for line in lines[first - 1 : last])
                own = child.args
                arguments = [*own.posonlyargs, *own.args, *own.kwonlyargs, own.vararg, own.kwarg]
                annotations = [a.annotation for a in arguments if a] + [child.returns]
                anys = sum(
                    any(isinstance(n, ast.Name) and n.id == "Any" for n in ast.walk(annotation))
                    for annotation in annotations
                    if annotation
                )
                place = f"{file.relative_to(root)}:{first} {child.name}"
                shown = public and (not child.name.startswith("_") or child.name.startswith("__"))
                yield Function(place, lines_of_code(text), anys, shown)

    return inside(ast.parse(source), True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("checkout", type=Path, nargs="?", default=ROOT)
    root = parser.parse_args().checkout.resolve()
    files = files_of(root)
    lines = {file: lines_of_code(file.read_text(encoding="utf-8")) for file in files.values()}
    for recipe in sorted((root / "recipes").glob("*.py")):
        found = reached(recipe, files)
        count = sum(lines_of_code(file.read_text(encoding="utf-8")) for file in found)
        print(f"{recipe.relative_to(root)!s:24} reaches {len(found):3} files, {count:6,} lines")
    rooms = Counter[str]()
    for file, count in lines.items():
        rooms[file.relative_to(root / "lora_kit").parts[0]] += count
    print(f"\nlora_kit: {len(files)} files, {sum(lines.values()):,} lines")
    for room, count in rooms.most_common():
        print(f"  {room:16} {count:6,}")
    every = [one for file in files.values() for one in functions(file, root)]
    print(f"\nAny in public signatures: {sum(one.anys for one in every if one.public)}")
    print("longest functions, lines of code:")
    for one in sorted(every, key=lambda one: -one.lines)[:LONGEST]:
        print(f"  {one.lines:4} {one.place}")


if __name__ == "__main__":
    main()
