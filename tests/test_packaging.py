"""The wheel carries recipes, configs and nano, and an installed lora_kit finds them. All that the
tests install is pinned."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent


def test_an_installed_wheel_finds_what_it_ships(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "site"
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(installed)
        names = set(opened.namelist())
    for folder in ("recipes", "accelerate_configs"):
        for file in (ROOT / folder).rglob("*"):
            if file.suffix in (".py", ".yaml"):
                assert f"lora_kit/shipped/{file.relative_to(ROOT)}" in names
    assert "lora_kit/nano/model/model.safetensors" in names
    assert "lora_kit/prove/report.html.jinja" in names
    assert "lora_kit/py.typed" in names
    found = subprocess.run(
        [
            sys.executable,
            "-c",
            "import lora_kit.run as r; from lora_kit.start import accelerate_config as a\n"
            "run = r.load_run(r.shipped('recipes') / 'configs' / 'nano-cpt.yaml')\n"
            "print(r.__file__); print(r.recipe_file(run.recipe)); print(a('cpu'))",
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    for line in found.stdout.splitlines():
        assert Path(line).is_relative_to(installed) and Path(line).is_file()


def names_below(requirements: list[str]) -> set[str]:
    """Names of the distributions that these lead to, as far as they are installed here."""
    waiting = [(Requirement(line), "") for line in requirements]
    seen: set[tuple[str, str]] = set()
    while waiting:
        requirement, asked = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": asked}):
            continue
        name = canonicalize_name(requirement.name)
        for extra in ("", *requirement.extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            try:
                lines = requires(name) or []
            except PackageNotFoundError:
                continue
            waiting += [(Requirement(line), extra) for line in lines]
    return {name for name, _ in seen}


def test_everything_that_the_tests_install_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = list(project["dependencies"])
    for extra in project["optional-dependencies"].values():
        lines += [line for line in extra if not line.startswith("lora-kit[")]
    needed = names_below(lines)
    assert {"torch", "trl", "mlx-lm", "lm-eval", "tokenizers"} <= needed
    constraints = (ROOT / "scripts" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {canonicalize_name(line.split("==")[0]) for line in constraints}
    # What torch's CUDA build brings is left to torch.
    ours = {name for name in needed if not name.startswith(("nvidia-", "cuda-", "triton"))}
    assert ours <= pinned, ours - pinned
