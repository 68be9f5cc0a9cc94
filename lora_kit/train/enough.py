"""Warnings about too little data or too many epochs, before training starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_kit.schema import Run
from lora_kit.tasks.task import Task
from lora_kit.train.directory import batch_geometry

if TYPE_CHECKING:
    from lora_kit.tasks.encode import Prepared

# A rule of thumb, no known bound. A parameter stores about 2 bits (Allen-Zhu & Li 2024,
# arXiv:2404.05405), so almost any adapter could memorize its rows, and most still generalize:
# 750,000 tokens in 15 epochs were enough for full fine-tuning of 65B parameters (LIMA: Zhou et al.
# 2023, arXiv:2305.11206). So the warning is for runs far below the usual: with 42M parameters
# (8B, r = 16), 2,000 completions of 150 tokens in 3 epochs are one label per 47 parameters; 90
# completions are one per 1,000.
PARAMETERS_PER_LABEL = 1_000
# Repeated tokens are worth nearly as much as new ones up to 4 epochs, and little beyond 16
# (Muennighoff et al. 2023, arXiv:2305.16264).
EPOCHS = 10


def too_little(task: Task, run: Run, data: Prepared, trainable: int) -> list[str]:
    """Warnings about few supervised tokens or many epochs; none for a usual run.

    Args:
        trainable: number of trainable parameters.
    """
    rows, labels = len(data.train), task.supervised(data.rows("train"))
    epochs = run.train.num_train_epochs
    if run.train.max_steps:
        epochs = run.train.max_steps * batch_geometry(run)["rows_per_step"] / max(1, rows)
    lines = []
    if trainable > PARAMETERS_PER_LABEL * labels * epochs:
        lines.append(
            f"warning: little data: {labels * epochs:,.0f} labels ({labels:,} x {epochs:.1f} "
            f"epochs) for {trainable:,} trainable parameters; the adapter may memorize these rows: "
            "add data, or lower adapter.r"
        )
    # If the best adapter is kept, too many epochs only cost time.
    if epochs > EPOCHS and not (run.train.eval_steps and run.train.load_best_model_at_end):
        key = "max_steps" if run.train.max_steps else "num_train_epochs"
        lines.append(
            f"warning: {epochs:.1f} epochs over {labels:,} labels: beyond about {EPOCHS}, models "
            f"overfit; lower train.{key}, or set train.eval_steps to keep the best adapter"
        )
    return lines
