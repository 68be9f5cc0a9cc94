"""Which tests run in which tier, and that CI skips none of them."""

from __future__ import annotations

import os
import re
import sys
import tomllib
from pathlib import Path

import pytest
from processes import run

ROOT = Path(__file__).resolve().parent.parent
QUICK, ALL = re.findall(r'tier="(.*)"', (ROOT / "scripts" / "test.sh").read_text())
TESTS = """
import pytest

def test_quick():
    pass

@pytest.mark.slow
def test_slow():
    pass

@pytest.mark.slow
@pytest.mark.quick
def test_journey():
    pass

@pytest.mark.gpu
def test_gpu():
    pass

@pytest.mark.slow
def test_skipped():
    pytest.importorskip("a_package_that_is_missing")
"""
SKIPPED = """
import pytest

pytest.importorskip("another_one")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ci", "tier", "expected"),
    [
        ("", QUICK, "2 passed, 1 skipped, 3 deselected"),
        ("", ALL, "3 passed, 2 skipped, 1 deselected"),
        ("true", ALL, "1 failed, 3 passed, 1 deselected, 1 error"),
    ],
)
def test_tiers(tmp_path: Path, ci: str, tier: str, expected: str) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "test_skipped.py").write_text(SKIPPED)
    settings = ["-p", "conftest", "-c", str(ROOT / "pyproject.toml")]
    command = [sys.executable, "-m", "pytest", *settings, "--continue-on-collection-errors"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "CI": ci}
    done = run([*command, "-m", tier, str(tmp_path)], env=environment, cwd=tmp_path)
    assert re.sub(r" in .*s$", "", done.stdout.splitlines()[-1]) == expected, done.stdout


def test_no_tier_has_what_needs_a_gpu() -> None:
    """Wherever arguments go to pytest as well."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "-m 'not gpu'" in project["tool"]["pytest"]["ini_options"]["addopts"]
    assert QUICK == "(quick or not slow) and not gpu" and ALL == "not gpu"
