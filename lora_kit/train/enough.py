"""Whether there is enough to learn from, said before the start: figures, why, what to change."""

from __future__ import annotations

from lora_kit.data.prepare import Prepared
from lora_kit.schema import Run
from lora_kit.train.directory import batch_geometry

# A rule of thumb: no bound is known. A parameter stores about 2 bits (Allen-Zhu & Li 2024,
# arXiv:2404.05405), so that almost any adapter could hold its rows by heart, and most still learn
# more than them: 750,000 tokens in 15 passes were enough to tune all of 65B parameters (LIMA: Zhou
# et al. 2023, arXiv:2305.11206). Only what is far below a usual run is spoken of: with 42M
# parameters (8B, r = 16), 2,000 answers of 150 tokens in 3 passes are a token for 47 of them, 90
# answers a token for 1,000.
PARAMETERS_PER_TOKEN = 1_000
# The same tokens again are worth nearly as much as new ones up to 4 passes, and little beyond 16
# (Muennighoff et al. 2023, arXiv:2305.16264).
PASSES = 10


def too_little(run: Run, data: Prepared, trainable: int) -> list[str]:
    """A line for each way in which rows × passes are few; none for a usual run.

    Args:
        trainable: parameters of the adapter.
    """
    rows, tokens = len(data.train), data.rows("train").supervised_tokens
    passes = run.train.num_train_epochs
    if run.train.max_steps:
        passes = run.train.max_steps * batch_geometry(run)["rows_per_step"] / max(1, rows)
    lines = []
    if trainable > PARAMETERS_PER_TOKEN * tokens * passes:
        lines.append(
            f"warning: {tokens * passes:,.0f} tokens to learn from ({tokens:,} in {passes:.1f} "
            f"passes) for {trainable:,} trainable parameters: few to learn more than these rows by "
            "heart; add to data.train, or lower adapter.r"
        )
    # Where the best adapter is kept, too many passes cost only time.
    if passes > PASSES and not (run.train.eval_steps and run.train.load_best_model_at_end):
        key = "max_steps" if run.train.max_steps else "num_train_epochs"
        lines.append(
            f"warning: {passes:.1f} passes over {tokens:,} tokens: beyond about {PASSES} rows are "
            f"learned by heart; lower train.{key}, or set train.eval_steps, and the best adapter "
            "is kept"
        )
    return lines
