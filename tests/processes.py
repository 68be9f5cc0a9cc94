"""What people type, run as a child process; and what it leaves behind."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil

from lora_kit import cli
from lora_kit import train as lora_kit_train
from lora_kit.errors import LoraKitError
from lora_kit.hashes import file_hash

# For what would hang. Never so short that a busy machine reaches it, and never what a test asserts.
LIMIT_S = 600.0

LORA_KIT = [sys.executable, "-c", "from lora_kit.cli import main; main()"]


def start(command: list[str]) -> subprocess.Popen[str]:
    """Start a command in the working folder, its output kept for `finish`."""
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=as_in_a_terminal,
    )


def as_in_a_terminal() -> None:
    """Signals that the tests' own process ignores, as one in the background does, are received."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait for it; returns exit code and stderr."""
    try:
        _, errors = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, errors


def lora_kit(*arguments: str | Path) -> tuple[int, str]:
    """`lora-kit ...` to its end; returns exit code and stderr."""
    return finish(start([*LORA_KIT, *map(str, arguments)]))


def here(*arguments: str) -> tuple[int, str]:
    """`lora-kit ...` in this process, without the seconds that its imports take; `train` runs the
    recipe without accelerate. Returns exit code and stderr."""
    said = io.StringIO()
    with redirect_stderr(said), redirect_stdout(io.StringIO()):
        try:
            if arguments[0] == "train":
                settings = [one for one in arguments[1:] if one != "--resume"]
                lora_kit_train(*settings, resume="--resume" in arguments)
                return 0, said.getvalue()
            with patch.object(sys, "argv", ["lora-kit", *arguments]):
                cli.main()
        except LoraKitError as error:
            return error.exit_code, f"{said.getvalue()}error: {error}"
        except SystemExit as ended:
            return int(ended.code or 0), said.getvalue()
    raise AssertionError("a verb ends with an exit code")


def run(command: Sequence[str | Path], **options: Any) -> subprocess.CompletedProcess[str]:
    """`subprocess.run`, both outputs kept as text."""
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, **options)


def until(what: Callable[[], bool]) -> bool:
    """Wait until it is so; returns whether it came to be."""
    end = time.monotonic() + LIMIT_S
    while time.monotonic() < end:
        if what():
            return True
        time.sleep(0.05)
    return what()


def left_over(mark: str) -> list[list[str]]:
    """Command lines of running processes that name `mark`."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if process.info["status"] != psutil.STATUS_ZOMBIE and any(mark in word for word in words):
            found.append(words)
    return found


def adapter_hash(run: str | Path = "runs/test") -> str:
    return file_hash(Path(run) / "adapter" / "adapter_model.safetensors")


def send_when(
    process: subprocess.Popen[str], ready: Callable[[], bool], number: signal.Signals
) -> None:
    """Signal the process alone, as soon as `ready`."""
    assert until(lambda: ready() or process.poll() is not None) and process.poll() is None, (
        "it did not get that far"
    )
    process.send_signal(number)
