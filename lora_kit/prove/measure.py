"""Loss by unit, and what a model says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_kit.data.labelled import Labelled, collator


@dataclass(frozen=True)
class Losses:
    """By unit, arrays of shape (units,): summed loss in nats, labels predicted, bytes they spell."""

    nats: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray


def measure(model: Any, labelled: Labelled, pad_id: int, rows_at_once: int = 8) -> Losses:
    """The loss of every label, summed by unit.

    Rows are sorted by length, so that little padding is computed, and dealt out to the ranks if
    there are several; every rank returns the whole result.

    Args:
        model: a causal language model, on its device.
        rows_at_once: as many rows of the longest length as fit into memory together.
    """
    import torch
    import torch.distributed as dist

    collate = collator(pad_id)
    device = next(model.parameters()).device
    order = sorted(range(len(labelled)), key=lambda n: -len(labelled.input_ids[n]))
    batches = _batches(labelled, order, rows_at_once)
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if ranks > 1 else 0
    sums = torch.zeros((2, len(labelled.unit_bytes)), dtype=torch.float64)
    training = model.training
    model.eval()
    with torch.inference_mode():
        for turn in range(-(-len(batches) // ranks)):
            mine = turn * ranks + rank
            # Every rank runs as many passes as the others: a sharded model needs all of them.
            rows = batches[min(mine, len(batches) - 1)]
            batch = collate(
                [{"input_ids": labelled.input_ids[n], "labels": labelled.labels[n]} for n in rows]
            )
            targets = batch.pop("labels").to(device)[:, 1:]
            logits = model(**{k: v.to(device) for k, v in batch.items()}).logits[:, :-1]
            # (rows, length - 1) nats; -100 gives 0
            nats = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), targets.flatten(), reduction="none"
            ).view(targets.shape)
            if mine < len(batches):
                units = torch.tensor([labelled.units[n] for n in rows])
                sums[0].index_add_(0, units, nats.sum(1).double().cpu())
                sums[1].index_add_(0, units, (targets != -100).sum(1).double().cpu())
    model.train(training)
    if ranks > 1:
        shared = sums.to(device)
        dist.all_reduce(shared)
        sums = shared.cpu()
    return Losses(sums[0].numpy(), sums[1].numpy(), np.array(labelled.unit_bytes, dtype=float))


def _batches(labelled: Labelled, order: list[int], rows_at_once: int) -> list[list[int]]:
    """Rows in batches of at most `rows_at_once` times the longest row's tokens."""
    budget = rows_at_once * max(map(len, labelled.input_ids))
    batches: list[list[int]] = []
    width = 0
    for n in order:
        length = len(labelled.input_ids[n])
        if batches and (len(batches[-1]) + 1) * width <= budget:
            batches[-1].append(n)
        else:
            batches.append([n])
            width = length
    return batches


def generate(model: Any, tokenizer: Any, prompts: list[str], max_new_tokens: int) -> list[str]:
    """Greedy continuations of prompts that are complete texts (templates applied), batched.

    Padding stands on the left, so that each continuation follows its prompt directly.
    """
    import torch

    device = next(model.parameters()).device
    padding, tokenizer.padding_side = tokenizer.padding_side, "left"
    try:
        inputs = tokenizer(
            prompts,
            return_tensors="pt",
            padding=True,
            add_special_tokens=not tokenizer.chat_template,
            return_token_type_ids=False,
        ).to(device)
    finally:
        tokenizer.padding_side = padding
    with torch.inference_mode():
        out = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=end_tokens(model, tokenizer),
        )
    new = out[:, inputs["input_ids"].shape[1] :]
    return tokenizer.batch_decode(new, skip_special_tokens=True)


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Where generation stops: the base's own end tokens, and the tokenizer's."""
    known = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = known if isinstance(known, list) else [known]
    return sorted({n for n in [*ids, tokenizer.eos_token_id] if n is not None})
