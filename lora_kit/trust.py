"""May code run that is neither ours nor the user's? The one place that decides.

Code from the Hub (the script of a metric) runs only where `--trust-remote-code` stood on the
command line, or where a program of the user's sets the variable for itself; no key of a run file,
and nothing that a folder holds, can say so. Code of a base (auto_map) never runs. What `pull`
brought is data: no program at or below a folder with a pulled.json is run.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_kit.errors import UserError

VARIABLE = "LORA_KIT_TRUST_REMOTE_CODE"  # tells the processes that `lora-kit train` starts
PULLED = "pulled.json"


def say(allowed: bool) -> None:
    """What this command line says; a yes that an earlier one left behind does not count."""
    os.environ[VARIABLE] = str(int(allowed))


def pulled(path: str | Path) -> bool:
    """Whether `path`, or what a link there leads to, lies in a folder that `pull` brought."""
    lies = {Path(os.path.abspath(path)), Path(path).resolve()}
    return any((folder / PULLED).is_file() for p in lies for folder in (p, *p.parents))


def check_own(path: str | Path) -> None:
    """Raises UserError if a program at `path` was brought by `pull`."""
    if pulled(path):
        raise UserError(f"{path}: was pulled, and is not run: read it, and copy it out if you do")


@contextmanager
def metrics_checked() -> Iterator[list[UserError]]:
    """Inside, the evaluate library takes the script of a metric, for us or for a task of lm-eval,
    only if it may run. Yields what was refused: lm-eval goes on without the metric."""
    from evaluate import loading

    take, refused = loading.evaluation_module_factory, []

    def checked(path: str, *args: Any, **options: Any) -> Any:
        # As evaluate looks for it: a file, the file of its name in a folder, or else the Hub.
        named = path.endswith(".py")
        file = Path(path) if named else Path(path) / f"{Path(path).name}.py"
        try:
            if named or file.is_file():
                check_own(file)
            elif os.environ.get(VARIABLE) != "1":
                raise UserError(
                    f"{path}: no script here; one from the Hub would run with your rights: read "
                    "it there, then add --trust-remote-code"
                )
        except UserError as error:
            refused.append(error)
            raise
        return take(path, *args, **options)

    loading.evaluation_module_factory = checked
    try:
        yield refused
    finally:
        loading.evaluation_module_factory = take


def run_module(name: str) -> list[str]:
    """`python -m name`, without the working folder among what is imported from: it may be a model
    folder that somebody wrote a torch.py into."""
    return [sys.executable, "-P", "-m", name]


def no_kernels_from_the_hub() -> None:
    """Hide the package `kernels`, where it is installed: with it bitsandbytes 0.50 (on a CPU with
    AVX512-BF16) and transformers fetch compiled code from the Hub and run it, unasked."""
    if os.environ.get(VARIABLE) != "1":
        sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]


@contextmanager
def time_limit(seconds: float, error: str) -> Iterator[None]:
    """Raises UserError(error) after `seconds` in a template or a regular expression of somebody's.
    Only the main thread can be interrupted so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: Any) -> None:
        raise UserError(error)

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
