"""How long OpenMP's threads spin: decided before torch is imported, by how busy the machine is."""

from __future__ import annotations

import os
import sys

import processes
import pytest

IMPORTED = """
import os, pathlib
os.cpu_count = lambda: 4
def loadavg(path, *_, **__):
    assert str(path) == "/proc/loadavg"
    if {running} is None:
        raise FileNotFoundError(path)
    return "0.10 0.20 0.30 {running}/300 4711"
pathlib.Path.read_text = loadavg
import lora_kit
print(os.environ.get("GOMP_SPINCOUNT"))
"""


@pytest.mark.parametrize(
    ("running", "users", "expected"),
    [
        (1, {}, "5000"),
        (4, {}, "5000"),  # this process, and a core for each of the others
        (5, {}, "2000"),
        (None, {}, "5000"),  # not Linux
        (5, {"GOMP_SPINCOUNT": "7"}, "7"),
        (5, {"OMP_WAIT_POLICY": "ACTIVE"}, "None"),
    ],
)
def test_threads_spin_less_where_others_take_the_cores(
    running: int | None, users: dict[str, str], expected: str
) -> None:
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    inherited = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, "-c", IMPORTED.format(running=running)]
    done = processes.run(command, env=inherited | users)
    assert done.stdout.strip() == expected, done.stderr
