"""The progress display and metrics.jsonl."""

from __future__ import annotations

import json
import math
import re
import resource
import sys
from numbers import Real
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from lora_kit.base.load import gpu_is_used
from lora_kit.folders import write_whole

_FIRST = ("loss", "eval_loss", "learning_rate", "grad_norm")
_LAST = ("tokens", "tokens_per_second", "seconds")
# Logged values that are not written: the step, evaluation speed, and TRL's token count, which
# restarts at 0 in a resumed run.
_NOT_KEPT = re.compile(r"epoch|step|(eval_)?num_tokens|eval_(\w+_)?(runtime|\w+_per_second)")


class Metrics(TrainerCallback):
    """Appends one JSON object per logged step to metrics.jsonl; only rank 0 writes.

    It has loss, tokens and seconds, and every other number that the trainer logs, such as rewards;
    null if not finite. On resume, rows after the checkpoint's step are removed, since those steps
    run again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        rows = read_metrics(self.path)
        kept = [row for row in rows if row["step"] <= state.global_step]
        write_whole(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not state.is_world_process_zero or not ({"loss", "eval_loss"} & logs.keys()):
            return
        others = [name for name in logs if name not in _FIRST + _LAST]
        kept = [name for name in others if not _NOT_KEPT.fullmatch(name)]
        row = {name: _number(logs[name]) for name in (*_FIRST, *kept, *_LAST) if name in logs}
        with self.path.open("a", encoding="utf-8") as opened:
            opened.write(json.dumps({"step": state.global_step, **row}) + "\n")


def _number(value: Any) -> float | None:
    """A logged value for JSON; None if it is no finite number."""
    if not isinstance(value, Real) or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(value)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, up to a line truncated by a crash."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if isinstance(row, dict):
            rows.append(row)
    return rows


class Progress(TrainerCallback):
    """A progress bar with losses, tokens/s, memory and time left; without a terminal, one line per
    logged step and evaluation."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.task: Any = None
        self.eval_loss = ""
        self.evaluating = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.is_world_process_zero or not sys.stderr.isatty():
            return
        from rich import progress
        from rich.console import Console

        parts = (
            *("{task.description}", progress.BarColumn(), progress.MofNCompleteColumn()),
            *("{task.fields[figures]}", progress.TimeRemainingColumn()),
        )
        self.bar = progress.Progress(*parts, console=Console(stderr=True))
        self.task = self.bar.add_task(
            "training", total=state.max_steps, completed=state.global_step, figures=""
        )
        self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero and not self.evaluating:
            self.evaluating = True
            self._show(state, "evaluating on held-out rows", description="evaluating")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        if "eval_loss" in logs:
            self.evaluating, self.eval_loss = False, f"  eval_loss {logs['eval_loss']:.3f}"
            self._show(state, self.eval_loss.strip(), description="training")
        elif "loss" in logs:
            figures = f"loss {logs['loss']:.3f}  {logs['tokens_per_second']:,.0f} tokens/s"
            figures += f"  {peak_mib():,.0f} MiB"
            self._show(state, figures, figures=figures + self.eval_loss)

    def _show(self, state: Any, line: str, **fields: str) -> None:
        if self.bar is not None:
            self.bar.update(self.task, **fields)
        else:
            print(f"step {state.global_step}/{state.max_steps}  {line}", file=sys.stderr)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Stop the bar, also after an error during training."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def peak_mib() -> float:
    """Peak memory of this process in MiB: allocated on the GPU if one is used, else resident."""
    import torch

    if gpu_is_used():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts in KiB
