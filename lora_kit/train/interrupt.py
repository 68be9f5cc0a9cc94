"""SIGINT, SIGTERM and SIGHUP: finish the step, save and stop. Also: exit when the parent process
exits."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import sys
import termios
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_kit.errors import Interrupted

# The folder in which a worker writes its exit code and message for `start.start`: accelerate
# reports every failure as 1, with a traceback.
OUTCOME_VARIABLE = "LORA_KIT_OUTCOME"
CONFIRMED = ".confirmed"  # suffix of the file with which a rank confirms a signal
_PR_SET_PDEATHSIG = 1


def stop_signals() -> tuple[signal.Signals, ...]:
    """SIGINT, SIGTERM, and SIGHUP unless it is ignored, as under nohup."""
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        return (signal.SIGINT, signal.SIGTERM)
    return (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def leave_terminal() -> None:
    """Discard further output to a terminal that was closed (SIGHUP); writing to it would fail."""
    for stream in (1, 2):
        try:
            termios.tcgetattr(stream)
        except termios.error as error:
            if error.args[0] == errno.EIO:
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, stream)
                os.close(null)


class StopSignal:
    """Records the first of `stop_signals`. While `saving` is set, the trainer stops at the end of
    its step; otherwise there is nothing to save and `Interrupted` is raised immediately."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self.saving = False

    def _received(self, signum: int, frame: Any) -> None:
        if self.signum is not None:  # ignore a second one, for example from the launcher
            return
        self.signum = signum
        leave_terminal()
        if folder := os.environ.get(OUTCOME_VARIABLE):
            with contextlib.suppress(OSError):  # the disk is full
                (Path(folder) / f"{os.environ.get('LOCAL_RANK', '0')}{CONFIRMED}").touch()
        if not self.saving:
            raise Interrupted(signum)

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopSignal]:
        """Handle `stop_signals` inside the block (main thread only)."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        numbers = stop_signals()
        before = [signal.signal(number, self._received) for number in numbers]
        try:
            yield self
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)


def die_with_parent() -> None:
    """Have Linux send SIGTERM to this process when its parent exits.

    `accelerate launch` (1.15) leaves a single worker running when it is killed.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it exited before prctl was called
        os.kill(os.getpid(), signal.SIGTERM)
