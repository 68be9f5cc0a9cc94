"""Whether third-party code may run: the one place that decides.

Code from the Hub (a metric's script) runs only with `--trust-remote-code` on the command line, or
if the user's own program sets the environment variable; run files and folders cannot allow it. Code
of a base (auto_map) never runs. Pulled files are data: no program in or below a folder with a
pulled.json is run. Also here: starting a module without the working folder in its path, and bounds
for third-party files, templates and regular expressions.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from lora_kit.errors import UserError

VARIABLE = "LORA_KIT_TRUST_REMOTE_CODE"  # inherited by the processes of `lora-kit train`
PULLED = "pulled.json"
LARGEST_JSON = 2**24  # bytes of a JSON file, other than a tokenizer's


def allow_remote_code(allowed: bool) -> None:
    """Set VARIABLE from --trust-remote-code of this command; an inherited value is overwritten."""
    os.environ[VARIABLE] = str(int(allowed))


def pulled(path: str | Path) -> bool:
    """Whether `path`, or the target of a link, is in a folder created by `pull`."""
    paths = {Path(os.path.abspath(path)), Path(path).resolve()}
    return any((folder / PULLED).is_file() for p in paths for folder in (p, *p.parents))


def check_own(path: str | Path) -> None:
    """Raises UserError if a program at `path` was fetched by `pull`."""
    if pulled(path):
        raise UserError(f"{path}: pulled programs are not run: review it, then copy it elsewhere")


@contextmanager
def metrics_checked() -> Iterator[list[UserError]]:
    """Inside, the evaluate library loads a metric's script, for us or for lm-eval, only if it may
    run. Yields the rejected ones, without which lm-eval continues."""
    from evaluate import loading

    load = loading.evaluation_module_factory
    rejected: list[UserError] = []

    # Any: passed on unread.
    def checked(path: str, *args: Any, **options: Any) -> Any:
        # evaluate's search order: a file, a file of that name in a folder, else the Hub.
        named = path.endswith(".py")
        file = Path(path) if named else Path(path) / f"{Path(path).name}.py"
        try:
            if named or file.is_file():
                check_own(file)
            elif os.environ.get(VARIABLE) != "1":
                raise UserError(
                    f"{path}: no local script; one from the Hub would run with your rights: review "
                    "it there, then add --trust-remote-code"
                )
        except UserError as error:
            rejected.append(error)
            raise
        return load(path, *args, **options)

    loading.evaluation_module_factory = checked
    try:
        yield rejected
    finally:
        loading.evaluation_module_factory = load


def run_module(name: str) -> list[str]:
    """`python -m name` without the working folder in sys.path, which could have a torch.py."""
    return [sys.executable, "-P", "-m", name]


def no_kernels_from_the_hub() -> None:
    """Hide the package `kernels`: with it, bitsandbytes 0.50 (on a CPU with AVX512-BF16) and
    transformers download compiled code from the Hub and run it."""
    if os.environ.get(VARIABLE) != "1":
        sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]


@contextmanager
def bounded(seconds: float, error: str, mib: int = 256) -> Iterator[None]:
    """Raises UserError(error) after `seconds`, or beyond `mib` MiB of further memory, for
    third-party templates and regular expressions. Only works in the main thread; the memory only on
    Linux."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        raise UserError(error)

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    with suppress(OSError, ValueError):  # other systems have no /proc; a lower limit stays
        pages = int(Path("/proc/self/statm").read_text().split()[5])
        most = pages * resource.getpagesize() + (mib << 20)
        if soft == resource.RLIM_INFINITY or most < soft:
            resource.setrlimit(resource.RLIMIT_DATA, (most, hard))
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except MemoryError:
        raise UserError(error) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


# Any: JSON.
def read_json(file: Path, most: int = LARGEST_JSON) -> Any:
    """The content of a third-party JSON file. Raises OSError; or ValueError if it has more than
    `most` bytes, or is no JSON."""
    with file.open("rb") as opened:
        content = opened.read(most + 1)
    if len(content) > most:
        raise ValueError(f"larger than {most:,} bytes")
    try:
        return json.loads(content.decode("utf-8"))
    except RecursionError:
        raise ValueError("nesting too deep") from None
