"""An unexpected error is one line too: what, where, its file; no secret in either."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lora_kit.cli
from lora_kit import launch
from lora_kit.errors import (
    Interrupted,
    LoraKitError,
    RankLost,
    UnexpectedError,
    UserError,
    in_a_line,
    out_of_memory,
    reason_of,
    redact_tracebacks,
    unexpected,
)

SECRET = "hf_abcdefghijklmnopqrstuvwxyz123456"
Run = Callable[..., tuple[int, str]]


def broken(run: Any, resume: bool = False) -> None:
    # 1. The data: read.
    made = []
    # 2. The run directory; and more. Of it
    made.append(run)
    if run.name == "directory":
        run.directory.mkdir(parents=True)
    raise KeyError(f"Bearer of {SECRET}")


@pytest.fixture
def started(
    run_file: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """Start a recipe's main as accelerate does; returns its exit code and stderr."""
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(launch, "die_with_parent", lambda: None)
    monkeypatch.setenv("HF_TOKEN", SECRET)

    def run(main: Any, *arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["recipe.py", str(run_file()), *arguments])
        with monkeypatch.context() as patch:
            patch.setattr(sys, "excepthook", sys.excepthook)
            patch.setattr(threading, "excepthook", threading.excepthook)
            code = launch.recipe_main(main)
        return code, capsys.readouterr().err

    return run


@pytest.mark.parametrize("name", ["directory", "nothing"])
def test_an_unexpected_error_is_one_line(name: str, started: Run) -> None:
    code, said = started(broken, f"name={name}")
    (line,) = (line for line in said.splitlines() if "error" in line)
    assert code == 3
    assert line.startswith("error: KeyError: 'Bearer of ***' (during step 2. The run directory, ")
    found = re.search(r"test_errors\.py:(\d+); traceback: (.*)\)$", line)
    assert found and "raise KeyError" in Path(__file__).read_text().splitlines()[int(found[1]) - 1]
    log = Path(found[2])
    assert (log == Path("runs/directory/error.log")) == (name == "directory")
    written = log.read_text()
    log.unlink()
    assert "in broken" in written and "KeyError" in written
    assert "Traceback" not in said and SECRET not in said + written


class PanicException(BaseException):
    """Named as that of libraries in Rust."""


def test_a_panic_of_a_tokenizer_is_one_line(
    started: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(run: Any, resume: bool = False) -> None:
        # 6. Train.
        raise PanicException("index out of bounds")

    def fail(*_: Any) -> None:
        raise PanicException("index out of bounds")

    code, recipe = started(main)
    monkeypatch.setattr(lora_kit.cli, "_opened", fail)
    monkeypatch.setattr(sys, "argv", ["lora-kit", "inspect", "x"])
    with pytest.raises(SystemExit) as caught:
        lora_kit.cli.main()
    assert code == caught.value.code == 3
    for said in (recipe, capsys.readouterr().err):
        (line,) = (line for line in said.splitlines() if line.startswith("error: "))
        assert line.startswith("error: PanicException: index out of bounds (during ")
        assert line.endswith(": the base's tokenizer is not usable: use another base")
        Path(line.partition("traceback: ")[2].partition(")")[0]).unlink()


def test_an_error_before_the_recipe_says_so(started: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_run(*_: Any) -> None:
        raise TypeError("no such thing")

    monkeypatch.setattr(launch, "read_run", read_run)
    code, said = started(broken)
    assert code == 3 and "error: TypeError: no such thing (during the start; traceback: " in said


def test_a_secret_is_removed_before_the_line_is_cut() -> None:
    error = ValueError("x " * 140 + SECRET)
    for size in range(80, 140):
        cut = ValueError("x " * size + SECRET)
        assert "hf_" not in in_a_line(cut) + reason_of(cut)
    found = str(unexpected(error, "a test", Path("no/such/folder/error.log")))
    Path(found.rpartition(": ")[2].rstrip(")")).unlink()
    assert "x x (during" in found or "***" in found
    assert "hf_" not in found


def test_a_reason_is_a_line_and_never_empty() -> None:
    assert reason_of(ValueError("two\n  lines ")) == "two lines"
    assert reason_of(ValueError("\n")) == "ValueError"
    assert len(reason_of(ValueError("x" * 999))) == 200


def test_a_verb_with_an_unexpected_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError(SECRET)

    monkeypatch.setattr(lora_kit.cli, "_opened", fail)
    monkeypatch.setattr(sys, "argv", ["lora-kit", "inspect", "x"])
    with pytest.raises(SystemExit) as caught:
        lora_kit.cli.main()
    said = capsys.readouterr().err
    assert caught.value.code == 3
    assert said.startswith("error: ZeroDivisionError: *** (during lora-kit inspect; traceback: ")
    assert said.count("\n") == 1
    Path(said.rpartition(": ")[2].strip().rstrip(")")).unlink()


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("could not create a primitive"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        OSError(12, "Cannot allocate memory"),
        MemoryError(),
        OutOfMemoryError(),
    ],
    ids=str,
)
def test_out_of_memory_is_recognized(error: Exception, started: Run) -> None:
    def fit(run: Any) -> None:
        raise error

    def prove(run: Any) -> None:
        try:
            fit(run)
        except Exception as cause:
            raise ValueError("of the library's own") from cause

    def main(run: Any, resume: bool = False) -> None:
        # 6. Train.
        (fit if run.seed == 0 else prove)(run)

    assert out_of_memory(error) and not out_of_memory(RuntimeError("shapes differ"))
    for seed, phase in ((0, "training"), (1, "evaluation")):
        code, said = started(main, f"seed={seed}")
        assert code == 2 and launch.NO_MEMORY[phase] in said
        assert "error: out of memory (during step 6. Train, " in said


def test_a_lost_rank_is_not_an_error_of_ours(started: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def main(run: Any, resume: bool = False) -> None:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer")

    assert started(main)[0] == 3
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, said = started(main)
    assert code == RankLost.exit_code
    assert "error: another rank died or does not respond (" in said


def test_an_interruption_is_no_error(started: Run) -> None:
    def main(run: Any, resume: bool = False) -> None:
        raise Interrupted(2, "stopped after step 5")

    code, said = started(main)
    assert (code, said.splitlines()[-1]) == (130, "stopped after step 5")


def test_each_error_has_its_code() -> None:
    from lora_kit.start import _as_error

    for error in (UserError("x"), RankLost("x"), UnexpectedError("x"), Interrupted(15, "x")):
        found = _as_error(error.exit_code, "x")
        assert found.exit_code == error.exit_code and found.prefix == error.prefix
        assert isinstance(error, LoraKitError)


def test_tracebacks_of_threads_hold_no_secret(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise ValueError(SECRET)

    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    redact_tracebacks()
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    said = capsys.readouterr().err
    assert "ValueError: ***" in said and SECRET not in said
