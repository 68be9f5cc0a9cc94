"""The wheel carries recipes, configs and nano, and an installed lora_kit finds them."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

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
            "import lora_kit.run as r; from lora_kit.launch import accelerate_config as a\n"
            "run = r.load_run(r.shipped('recipes') / 'configs' / 'nano-cpt.yaml')\n"
            "print(r.__file__); print(r.recipe_path(run)); print(a('cpu'))",
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    for line in found.stdout.splitlines():
        assert Path(line).is_relative_to(installed) and Path(line).is_file()
