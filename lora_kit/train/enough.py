"""Whether there is enough to train on, reported before the start: figures, why, what to change."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_kit.schema import Run
from lora_kit.tasks.task import Task
from lora_kit.train.directory import batch_geometry

if TYPE_CHECKING:
    from lora_kit.tasks.encode import Prepared

# A rule of thumb: no bound is known. A parameter stores about 2 bits (Allen-Zhu & Li 2024,
# arXiv:2404.05405), so that almost any adapter could hold its rows by heart, and most still learn
# more than them: 750,000 tokens in 15 epochs were enough to tune all of 65B parameters (LIMA: Zhou
# et al. 2023, arXiv:2305.11206). Only what is far below a usual run is warned of: with 42M
# parameters (8B, r = 16), 2,000 completions of 150 tokens in 3 epochs are a label for 47 of them,
# 90 completions a label for 1,000.
PARAMETERS_PER_LABEL = 1_000
# The same tokens again are worth nearly as much as new ones up to 4 epochs, and little beyond 16
# (Muennighoff et al. 2023, arXiv:2305.16264).
EPOCHS = 10


def too_little(task: Task, run: Run, data: Prepared, trainable: int) -> list[str]:
    """A line for each way in which rows × epochs are few; none for a usual run.

    Args:
        trainable: parameters that train.
    """
    rows, labels = len(data.train), task.supervised(data.rows("train"))
    epochs = run.train.num_train_epochs
    if run.train.max_steps:
        epochs = run.train.max_steps * batch_geometry(run)["rows_per_step"] / max(1, rows)
    lines = []
    if trainable > PARAMETERS_PER_LABEL * labels * epochs:
        lines.append(
            f"warning: {labels * epochs:,.0f} labels to train on ({labels:,} in {epochs:.1f} "
            f"epochs) for {trainable:,} trainable parameters: few to learn more than these rows by "
            "heart; add to data.train, or lower adapter.r"
        )
    # Where the best adapter is kept, too many epochs cost only time.
    if epochs > EPOCHS and not (run.train.eval_steps and run.train.load_best_model_at_end):
        key = "max_steps" if run.train.max_steps else "num_train_epochs"
        lines.append(
            f"warning: {epochs:.1f} epochs over {labels:,} labels: beyond about {EPOCHS} rows are "
            f"learned by heart; lower train.{key}, or set train.eval_steps, and the best adapter "
            "is kept"
        )
    return lines
