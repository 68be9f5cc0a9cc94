"""What can go wrong, and the exit code each kind ends with.

A message is one line: the cause, the place, the fix. Nothing here prints; `cli` and `launch` do.
"""

from __future__ import annotations


class LoraKitError(Exception):
    """Anything lora_kit says in one line instead of a traceback."""

    exit_code = 2


class UserError(LoraKitError, ValueError):
    """Something the user wrote, named or pointed at is not usable. Exit code 2."""


class RunFileError(UserError):
    """The run file has mistakes. `problems` holds every one of them, a line each."""

    def __init__(self, path: str, problems: list[str]) -> None:
        self.path = path
        self.problems = problems
        super().__init__("\n".join(f"{path}: {problem}" for problem in problems))


class CheckFailed(LoraKitError):
    """A check or gate that failed, or a training that cannot go on (NaN loss). Exit code 1."""

    exit_code = 1


class Interrupted(LoraKitError):
    """Stopped by SIGINT or SIGTERM after saving. Exit code 130 or 143 (128 + the signal)."""

    def __init__(self, signum: int, message: str) -> None:
        self.exit_code = 128 + signum
        super().__init__(message)


def harmless(text: str) -> str:
    """Text without what would steer a terminal; line ends stay."""
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text)
