"""The loss on held-out rows during training, without side effects on the training."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from lora_kit.errors import CheckFailed


def held_out_loss(trainer: Any) -> float:
    """The mean loss over all items of the held-out rows: sum of `task.loss` / sum of `task.items`.

    It does not depend on batch size and number of ranks; transformers' is a mean over batches, of
    which the last may be smaller. All ranks must call it.

    Raises:
        CheckFailed: it is NaN or infinite.
    """
    guard, args = trainer.guard, trainer.args
    task, rows = guard.task, trainer.eval_dataset
    size, ranks = args.per_device_eval_batch_size, args.world_size
    starts = range(0, len(rows), size)
    order = task.tokens(rows).argsort(kind="stable")  # by length, for little padding
    sums = torch.zeros(2, dtype=torch.float64, device=args.device)  # losses, items
    trainer.model_wrapped.eval()
    with torch.no_grad(), trainer.compute_loss_context_manager():
        for turn in range(0, len(starts), ranks):
            mine = turn + args.process_index
            # Every rank runs the same number of batches, as a sharded model needs.
            first = starts[min(mine, len(starts) - 1)]
            chosen = [rows[number] for number in order[first : first + size].tolist()]
            batch = trainer._prepare_inputs(trainer.data_collator(chosen))
            items = torch.as_tensor(task.items(batch), device=args.device)
            loss = task.loss(trainer.model_wrapped, batch, 1, guard.run.train)
            if mine < len(starts):
                sums += torch.stack([loss.double(), items.double()])
            trainer.callback_handler.on_prediction_step(args, trainer.state, trainer.control)
    trainer.model_wrapped.train()
    total, items = trainer.accelerator.reduce(sums, "sum").tolist()
    mean = total / items if items else math.nan
    check_finite(mean, trainer.state.global_step, f" over {items:.0f} held-out labels")
    return mean


def check_finite(loss: float, step: int, over: str = "") -> None:
    """Raises CheckFailed if eval_loss is NaN or infinite."""
    if not math.isfinite(loss):
        raise CheckFailed(
            f"step {step}: eval_loss is {loss}{over}: check data.eval, or lower train.learning_rate"
        )


@contextlib.contextmanager
def own_random_numbers(seed: int) -> Iterator[None]:
    """Inside the block, random numbers start from `seed`; afterwards the earlier state is restored,
    so that evaluations do not change the training."""
    from transformers import set_seed

    before = random.getstate(), np.random.get_state()
    gpus = range(torch.cuda.device_count())
    with torch.random.fork_rng(gpus):
        set_seed(seed)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
