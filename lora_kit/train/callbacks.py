"""Callbacks that measure and report: tokens and seconds, metrics.jsonl, the progress bar."""

from __future__ import annotations

import json
import math
import re
import resource
import sys
import time
from functools import partial
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from transformers import TrainerCallback, TrainerState

from lora_kit.base.load import gpu_is_used
from lora_kit.folders import write_whole
from lora_kit.schema import Json
from lora_kit.tasks.batches import real_tokens
from lora_kit.tasks.measure import terminal_bar
from lora_kit.tasks.task import Batch

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

_LONGEST_LINE = 2**20  # characters of metrics.jsonl
Logs = dict[str, float] | None
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

    def on_train_begin(self, args: object, state: TrainerState, *_: object, **__: object) -> None:
        if not state.is_world_process_zero:
            return
        rows = read_metrics(self.path)
        kept = [row for row in rows if row["step"] <= state.global_step]
        write_whole(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def on_log(
        self, args: object, state: TrainerState, control: object, logs: Logs = None, **_: object
    ) -> None:
        logs = logs or {}
        if not state.is_world_process_zero or not ({"loss", "eval_loss"} & logs.keys()):
            return
        row: Json = {"step": state.global_step}
        for name, value in logs.items():
            if not _NOT_KEPT.fullmatch(name):
                row[name] = _number(value)
        with self.path.open("a", encoding="utf-8") as opened:
            opened.write(json.dumps(row) + "\n")


def _number(value: object) -> float | None:
    """A logged value for JSON; None unless it is a finite number."""
    if not isinstance(value, Real) or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(value)


def read_metrics(path: Path) -> list[Json]:
    """The rows of metrics.jsonl, up to a line truncated by a crash."""
    if not path.is_file():
        return []
    rows = []
    with path.open(encoding="utf-8", errors="replace") as opened:
        for line in iter(partial(opened.readline, _LONGEST_LINE), ""):
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                break
            if isinstance(row, dict):
                rows.append(row)
    return rows


class Meter(TrainerCallback):
    """Counts tokens (without padding) and seconds of training, including the earlier parts of a
    resumed run. Both are saved in the seal of each checkpoint."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.seconds = 0.0
        self._tokens_before, self._seconds_before = 0, 0.0
        self._tokens_here: torch.Tensor | int = 0  # on this rank, on its device
        self._counted_to = 0.0  # time up to which `seconds` are counted

    def resume(self, tokens: int, seconds: float) -> None:
        """Continue from the counts of a checkpoint."""
        self._tokens_before = tokens
        self.seconds = self._seconds_before = seconds

    def count(self, batch: Batch) -> None:
        """Add the tokens of a micro-batch."""
        if "input_ids" in batch:
            self._tokens_here += real_tokens(batch)
        else:  # GRPO's sampled batches
            for name in ("prompt_mask", "completion_mask"):
                if name in batch:
                    self._tokens_here += batch[name].sum()

    def tokens(self) -> int:
        """Tokens on all ranks; a collective operation."""
        here = torch.as_tensor(self._tokens_here, device=self.accelerator.device)
        return self._tokens_before + int(self.accelerator.reduce(here, "sum").item())

    def figures(self) -> dict[str, float]:
        """Values for a logged step: totals of the run, and the mean tokens per second since this
        process began to train. A collective operation."""
        tokens = self.tokens()
        here, spent = tokens - self._tokens_before, self.seconds - self._seconds_before
        return {
            "tokens": tokens,
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(here / spent, 1) if spent > 0 else 0.0,
        }

    def on_step_end(self, *_: object, **__: object) -> None:
        now = time.perf_counter()
        self.seconds += now - self._counted_to
        self._counted_to = now

    # The time between two steps counts, except for evaluating and saving.
    def on_train_begin(self, *_: object, **__: object) -> None:
        self._counted_to = time.perf_counter()

    def on_evaluate(self, *_: object, **__: object) -> None:
        self._counted_to = time.perf_counter()

    def on_save(self, *_: object, **__: object) -> None:
        self._counted_to = time.perf_counter()


class Progress(TrainerCallback):
    """A progress bar with losses, tokens/s, memory and time left; without a terminal, one line per
    logged step and evaluation."""

    def __init__(self) -> None:
        self.bar: Bar | None = None
        self.eval_loss = ""
        self.evaluating = False

    def on_train_begin(self, args: object, state: TrainerState, *_: object, **__: object) -> None:
        if not state.is_world_process_zero:
            return
        self.bar = terminal_bar("{task.completed:.0f}/{task.total:.0f}", "{task.fields[figures]}")
        if self.bar is None:
            return
        total, done = state.max_steps, state.global_step
        self.bar.add_task("training", total=total, completed=done, figures="")
        self.bar.start()

    def on_step_end(self, args: object, state: TrainerState, *_: object, **__: object) -> None:
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=state.global_step)

    def on_prediction_step(
        self, args: object, state: TrainerState, *_: object, **__: object
    ) -> None:
        if state.is_world_process_zero and not self.evaluating:
            self.evaluating = True
            self._show(state, "evaluating on held-out rows", description="evaluating")

    def on_log(
        self, args: object, state: TrainerState, control: object, logs: Logs = None, **_: object
    ) -> None:
        logs = logs or {}
        if not state.is_world_process_zero:
            return
        if "eval_loss" in logs:
            self.evaluating = False
            line = f"eval_loss {logs['eval_loss']:.3f}"
            self.eval_loss = f"  {line}"
            self._show(state, line)
        elif "loss" in logs:
            figures = f"loss {logs['loss']:.3f}  {logs['tokens_per_second']:,.0f} tokens/s"
            figures += f"  {peak_mib():,.0f} MiB"
            self._show(state, figures, figures=figures + self.eval_loss)

    def _show(
        self, state: TrainerState, line: str, description: str = "training", figures: str = ""
    ) -> None:
        if self.bar is not None:
            (task,) = self.bar.tasks
            figures = figures or task.fields["figures"]
            self.bar.update(task.id, description=description, figures=figures)
        else:
            print(f"step {state.global_step}/{state.max_steps}  {line}", file=sys.stderr)

    def on_train_end(self, *_: object, **__: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the bar, also after an error during training."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def peak_mib() -> float:
    """Peak memory of this process in MiB: allocated on the GPU if one is used, else resident."""
    if gpu_is_used():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts in KiB
