"""Exceptions and their exit codes.

A message is one line with cause, place and fix. `cli` and `launch` print it.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import tempfile
import threading
import traceback
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

# Zero-width joiners are harmless and part of ordinary words in many scripts.
_KEPT = "\n\t\u200c\u200d"
# The start of a token, also after an escaped line end in JSON.
_EDGE = r"(?:(?<![A-Za-z0-9])|(?<=\\[nrt]))"
# Patterns of tokens and keys.
TOKENS = {
    "a Hugging Face token": _EDGE + r"(?:hf|api_org)_[A-Za-z0-9]{16,}",
    "a GitHub token": _EDGE + r"(?:gh[opsur]_|github_pat_)\w{20,}",
    "a GitLab token": _EDGE + r"glpat-[\w-]{20,}",
    "a JSON web token": _EDGE + r"eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]*",
    "a bearer token": _EDGE + r"[Bb]earer (?=[\w.~+/-]{0,200}\d)[\w.~+/-]{20,}",
    "a password in an address": r"(?<=://)[^\s/:@{<$]{1,64}:[^\s/:@{<$]{3,64}(?=@\w)",
    "an AWS key": _EDGE + r"A[KS]IA[0-9A-Z]{16}(?![A-Za-z0-9])",
    "an API key": _EDGE + r"(?:sk-(?=[\w-]{0,80}\d)|AIza)[\w-]{20,}",
    "a Slack token": _EDGE + r"xox[abeoprs]-[\w-]{10,}",
    "a private key": r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----",
}
_SECRET_NAME = re.compile(
    r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|(?:PG)?PASS|CREDENTIALS?"
    r"|(?:API|ACCESS|PRIVATE)?_?KEYS?)(?:_(?:ID|KEY))?$",
    re.IGNORECASE,
)

# Messages of torch's CPU allocator, oneDNN, C++, CUDA and the operating system, of which not all
# have an exception type of their own.
_NO_MEMORY = (
    "DefaultCPUAllocator",
    "could not create a primitive",
    "std::bad_alloc",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Cannot allocate memory",
)


class LoraKitError(Exception):
    """An error that is reported in one line instead of a traceback."""

    exit_code = 2
    prefix = "error: "  # of its lines on stderr


class UserError(LoraKitError, ValueError):
    """A mistake in the user's settings, files or data. Exit code 2."""


class RunFileError(UserError):
    """The run file has mistakes. `problems`: all of them, one line each."""

    def __init__(self, path: str, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(f"{path}: {problem}" for problem in problems))


def problems_of(check: Callable[..., None], *given: object) -> list[str]:
    """The message of a UserError that a check raises; without one no message."""
    try:
        check(*given)
    except UserError as error:
        return [str(error)]
    return []


class CheckFailed(LoraKitError):
    """A check or gate failed, or training cannot continue (NaN loss). Exit code 1."""

    exit_code = 1


class Interrupted(LoraKitError):
    """Stopped by SIGINT, SIGTERM or SIGHUP after saving. Exit code 130, 143 or 129 (128 + the
    signal)."""

    prefix = ""  # not an error

    def __init__(self, signum: int, message: str = "") -> None:
        self.exit_code = 128 + signum
        super().__init__(message or f"stopped by {signal.Signals(signum).name}")


class RankLost(CheckFailed):
    """Another rank died or stopped responding: the cause is there. Exit code 1."""


class UnexpectedError(LoraKitError):
    """An unexpected error; its traceback is in a file. Exit code 3."""

    exit_code = 3


class NotUsable(Exception):
    """A row is dropped. `reason` completes "42 rows dropped: rows ..."; `detail`: the part of the
    row that causes it; `length`: the train.max_length that would keep it, 0 if that is no help."""

    def __init__(self, reason: str, detail: str = "", length: int = 0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail
        self.length = length


def is_panic(error: BaseException) -> bool:
    """Whether a library in Rust (tokenizers) panicked: its error is not an Exception."""
    return type(error).__name__ == "PanicException"


def in_a_line(error: BaseException, most: int = 200) -> str:
    """An exception's type and message in one line of at most `most` characters, without secrets."""
    return reason_of(error, most, f"{type(error).__name__}: ")


def reason_of(error: BaseException, most: int = 200, before: str = "") -> str:
    """An exception's message in one line of at most `most` characters, without secrets, after the
    text `before`; its type if that is empty."""
    # Redacted before it is cut: a part of a secret would no longer be recognized.
    return " ".join(redact(f"{before}{error}").split())[:most] or type(error).__name__


def report(error: LoraKitError) -> None:
    """Print an error's lines to stderr, without secrets and control characters."""
    for line in redact(str(error)).splitlines():
        print(f"{error.prefix}{harmless(line)}", file=sys.stderr)


def unexpected(error: BaseException, where: str, log: Path | None = None) -> UnexpectedError:
    """An unexpected error in one line: its type and message, where it happened, and the
    file with its traceback.

    Args:
        where: completes "during ...".
        log: the file; None, or one that cannot be written: a temporary file.
    """
    text = redact("".join(traceback.format_exception(error)))
    place = "above"
    with suppress(OSError):  # every disk is full
        place = str(_write_log(text, log))
    if place == "above":
        print(text, file=sys.stderr)
    fix = ": the base's tokenizer is not usable: use another base" if is_panic(error) else ""
    return UnexpectedError(f"{in_a_line(error, 300)} (during {where}; traceback: {place}){fix}")


def _write_log(text: str, log: Path | None) -> Path:
    if log is not None:
        with suppress(OSError):
            log.write_text(text, encoding="utf-8")
            return log
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", prefix="lora-kit-", suffix=".log", delete=False
    ) as file:
        file.write(text)
    return Path(file.name)


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one of its causes, is an out-of-memory error of a GPU or of the CPU."""
    while error is not None:
        named = type(error).__name__ == "OutOfMemoryError"  # torch's
        texts = isinstance(error, (RuntimeError, OSError)) and any(
            text in str(error) for text in _NO_MEMORY
        )
        if named or texts or isinstance(error, MemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False


def redact_tracebacks() -> None:
    """Remove secrets from the tracebacks that Python itself prints, also those of threads."""

    def show(
        kind: type[BaseException], error: BaseException | None, trace: TracebackType | None
    ) -> None:
        lines = traceback.format_exception(kind, error, trace)
        print(redact("".join(lines)), end="", file=sys.stderr)

    sys.excepthook = show
    threading.excepthook = lambda given: show(given.exc_type, given.exc_value, given.exc_traceback)


def harmless(text: str) -> str:
    """Text with control and bidirectional formatting characters replaced by their code points."""
    kept = {
        c for c in set(text) if c.isprintable() or c in _KEPT or unicodedata.category(c) == "Zs"
    }
    return "".join(c if c in kept else f"⟨U+{ord(c):04X}⟩" for c in text)


def secret_values() -> dict[str, str]:
    """Environment variables named like secrets, and passwords in URLs: {name: value}."""
    found = {name: value for name, value in os.environ.items() if _SECRET_NAME.search(name)}
    for name, value in os.environ.items():
        if password := re.search(r"://[^\s/:@]*:([^\s/@]+)@", value):
            found.setdefault(name, password[1])
    return {name: value for name, value in found.items() if len(value) >= 8}


def redact(text: str) -> str:
    """Text without secrets: those matching a token pattern, and those in the environment."""
    for value in secret_values().values():
        text = text.replace(value, "***")
    return re.sub("|".join(TOKENS.values()), "***", text)
