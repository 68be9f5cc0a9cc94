"""Tasks of lm-evaluation-harness (EleutherAI), on the base and on the adapted model."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import sys
from functools import cache
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from lora_kit.errors import Interrupted, UserError, in_a_line
from lora_kit.run import nearest
from lora_kit.schema import Json
from lora_kit.tasks.bootstrap import compared
from lora_kit.tasks.measure import evaluation_mode
from lora_kit.tasks.metrics import check_each
from lora_kit.tasks.task import Processor, mean_score
from lora_kit.trust import check_own, metrics_checked


def check_tasks(tasks: list[str]) -> None:
    """Load the tasks with their data, before training, so that nothing is missing afterwards.

    A task is a name that the harness knows, or the path of a task's .yaml; the data files it names
    are relative to the working folder. Such a file may name Python (`!function`), which runs here.

    Raises:
        UserError: the harness is not installed, a task is unknown, or its data is not available.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        why = "needs lm-evaluation-harness: pip install 'lora-kit[harness]'"
        raise UserError(f"prove.harness: {why}") from None

    def check(task: str) -> None:
        try:
            with _quiet():
                loaded = _load([task])["tasks"].values()
        except UserError:
            raise
        except Exception as error:  # data, templates and functions are the task's own
            raise UserError(f"{task}: cannot be loaded: {in_a_line(error)}") from None
        if any(getattr(one, "UNSAFE_CODE", False) for one in loaded):
            raise UserError(f"{task}: runs code that the model wrote, which is not done here")

    check_each("prove.harness", tasks, check)


def run_harness(
    model: Any, tokenizer: Processor, tasks: list[str], seed: int, at_once: int = 8
) -> dict[str, Json]:
    """Figures of the base and of the adapted model on the same rows of each task.

    Prompts are the task's own, without the chat template, as is the harness's default. Every rank
    runs all of it.

    Args:
        model: a PEFT model; its adapter is switched off to evaluate the base.
        at_once: rows per forward pass.

    Returns:
        "task/metric" -> {"rows", "base", "adapted", "difference", "ci95", "higher_is_better"}.
        `ci95` is None for a figure that is no mean over rows, such as a perplexity.

    Raises:
        UserError: a task cannot be loaded or evaluated.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from transformers import set_seed

    with _quiet(), metrics_checked(), evaluation_mode(model):
        loaded = _load(tasks)
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config("num_fewshot", 0)
            task.set_fewshot_seed(seed)
        # In bfloat16 the likelihoods of two choices are often the same number.
        wrapped = HFLM(
            pretrained=model, tokenizer=tokenizer, batch_size=at_once, softmax_dtype="float32"
        )
        try:
            with model.disable_adapter():
                set_seed(seed)  # for tasks that sample
                base = lm_eval.evaluate(wrapped, loaded, bootstrap_iters=0)
            set_seed(seed)
            adapted = lm_eval.evaluate(wrapped, loaded, bootstrap_iters=0)
        except Interrupted:
            raise
        except Exception as error:  # templates and functions are the task's own
            raise UserError(f"prove.harness: {in_a_line(error)}") from None
    return compared_results(base, adapted, seed)


def compared_results(base: Json, adapted: Json, seed: int) -> dict[str, Json]:
    """The return value of `run_harness`, from two results of `lm_eval.evaluate`. A group with an
    aggregated figure replaces its tasks."""
    grouped: set[str] = set()
    for group in adapted.get("groups", {}):  # only those with a figure
        grouped.update(_tasks_of(group, adapted))
    rows: dict[str, Json] = {}
    for name, figures in adapted["results"].items():
        if name in grouped:
            continue
        for key, after in figures.items():
            metric, comma, filtered = key.partition(",")  # `exact_match,strict-match`
            if not comma or metric.endswith("_stderr"):
                continue
            higher = adapted["higher_is_better"].get(name, {}).get(metric) is not False
            before = base["results"][name][key]
            base_values = _values(base, name, metric, filtered)
            values = _values(adapted, name, metric, filtered)
            # Only a figure that is the mean of its rows can be resampled by rows.
            if np.allclose([_mean(base_values), _mean(values)], [before, after]):
                better = "higher" if higher else "lower"
                first = mean_score(metric, np.array(base_values, dtype=float), better)
                second = mean_score(metric, np.array(values, dtype=float), better)
                row = compared(first, second, seed)
            else:
                row = {
                    "base": round(float(before), 4),
                    "adapted": round(float(after), 4),
                    "difference": round(float(after - before), 4),
                    "ci95": None,
                }
            title = f"{name}/{metric}" + (f" ({filtered})" if filtered != "none" else "")
            rows[title] = {"rows": len(values), **row, "higher_is_better": higher}
    return rows


def _tasks_of(name: str, result: Json) -> list[str]:
    """The tasks of a group and of the groups in it; of a task, itself."""
    if name in result["samples"]:
        return [name]
    children = result["group_subtasks"].get(name, [])
    return [task for child in children for task in _tasks_of(child, result)]


def _values(result: Json, name: str, metric: str, filtered: str) -> list[object]:
    """The metric's value of each row: a number, or an intermediate result (such as a pair) that the
    metric aggregates over all rows."""
    samples = [row for task in _tasks_of(name, result) for row in result["samples"][task]]
    return [row[metric] for row in samples if row["filter"] == filtered and metric in row]


def _mean(values: list[Any]) -> float:
    """The mean; NaN, which equals no figure, if there are no rows or they are not numbers."""
    numbers = all(isinstance(value, Real | np.bool_) for value in values)
    return float(np.mean(values)) if values and numbers else math.nan


@cache
def _manager(shipped: bool) -> Any:
    """A task manager, with the `shipped` tasks or for files alone: indexing the harness's 14,000
    tasks takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=shipped)


def _load(tasks: list[str]) -> dict[str, Any]:
    files = {task for task in tasks if task.endswith((".yaml", ".yml")) and Path(task).is_file()}
    manager = _manager(len(files) < len(tasks))
    for task in tasks:
        if task not in files and task not in manager.all_tasks:
            hint = nearest(task, manager.all_tasks)
            raise UserError(f"{task}: no task of the harness, and no .yaml file{hint}")
    for file in files:
        check_own(file)
    with metrics_checked() as refused:
        try:
            loaded: dict[str, Any] = manager.load(list(tasks))
        finally:
            if refused:  # whether or not the harness went on without it
                raise UserError(f"{tasks[0]}: metric {refused[0]}") from None
    return loaded


def _quiet() -> contextlib.redirect_stderr[Any]:
    """The harness warns about intended settings; its progress bars are for a terminal."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return contextlib.redirect_stderr(sys.stderr if sys.stderr.isatty() else io.StringIO())
