"""Collators: padded batches, and batches concatenated without padding; splitting a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_kit.data.rows import Rows

if TYPE_CHECKING:
    import torch

IGNORED = -100  # torch's ignore_index


def labels_with_loss(rows: Rows, column: str) -> int:
    """How many labels of a column have a loss; the first of a row is predicted from nothing."""
    count = 0
    for labels, ends in rows.chunks(column):
        firsts = labels[ends[:-1][np.diff(ends) > 0]]
        count += int((labels != IGNORED).sum()) - int((firsts != IGNORED).sum())
    return count


def collator(pad_id: int) -> Callable[[Sequence[dict[str, Any]]], dict[str, torch.Tensor]]:
    """Pads a batch on the right to its longest row.

    The returned function takes rows with `input_ids` and `labels` and returns int64 tensors of
    shape (rows, longest): `input_ids`, `labels` (padding is -100) and, if there is padding,
    `attention_mask` (0 on padding). Packed rows also have `position_ids` and no mask: the model
    separates documents by their positions; each padding token has position 0, like a document of
    its own.
    """

    def collate(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        import torch

        def padded(name: str, padding: int) -> torch.Tensor:
            parts = [torch.as_tensor(row[name]) for row in rows]
            return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=padding)

        batch = {"input_ids": padded("input_ids", pad_id), "labels": padded("labels", IGNORED)}
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        if "position_ids" in rows[0]:
            batch["position_ids"] = padded("position_ids", 0)
        elif lengths.min() < lengths.max():
            real = torch.arange(int(lengths.max())) < lengths[:, None]
            batch["attention_mask"] = real.long()
        return batch

    return collate


def in_one_row(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Concatenate the rows of a batch into a single row, without padding.

    >>> batch = in_one_row([{"input_ids": [1, 5, 6], "labels": [-100, 5, 6]},
    ...                     {"input_ids": [1, 7], "labels": [1, 7]}])
    >>> batch["labels"].tolist(), batch["documents"], batch["places"].tolist()
    ([[-100, 5, 6, -100, 7]], [3, 2], [0, 1, 3])

    Returns:
        `input_ids`, `labels`, `position_ids`: int64 (1, tokens). Positions start at 0 in each
        document, whose first label is -100. `documents`: document lengths; a packed row has
        several. `numbers`: row indices in the data set, if the rows have `row`. `places`: int64,
        positions of supervised labels in labels[:, 1:].
    """
    import torch

    documents: list[int] = []
    for row in rows:
        starts = np.flatnonzero(row["position_ids"] == 0) if "position_ids" in row else np.zeros(1)
        documents += np.diff([*starts, len(row["input_ids"])]).astype(int).tolist()
    firsts = np.cumsum([0, *documents[:-1]])
    labels = np.concatenate([row["labels"] for row in rows])
    labels[firsts] = IGNORED
    positions = np.concatenate([np.arange(length) for length in documents])
    ids = np.concatenate([row["input_ids"] for row in rows])
    return {
        "input_ids": torch.from_numpy(ids)[None],
        "labels": torch.from_numpy(labels)[None],
        "position_ids": torch.from_numpy(positions)[None],
        "documents": documents,
        "numbers": [int(row["row"]) for row in rows if "row" in row],
        "places": torch.from_numpy(np.flatnonzero(labels[1:] != IGNORED)),
    }


def collators(pad_id: int) -> Callable[[bool], Callable[[Sequence[Any]], dict[str, Any]]]:
    """(flat) -> `in_one_row` if flat, else `collator(pad_id)`."""
    return lambda flat: in_one_row if flat else collator(pad_id)


def halves(batch: dict[str, Any]) -> list[dict[str, Any]]:
    """Split a batch of at least two rows in two, whose losses add up to its own. Padded rows are
    sorted by length, to reduce padding."""
    documents = batch.get("documents")
    if documents is None:
        rows, width = batch["input_ids"].shape
        mask = batch.get("attention_mask")
        lengths = batch["labels"].new_full((rows,), width) if mask is None else mask.sum(1)
        order = lengths.argsort(descending=True, stable=True)
        parts = [part for part in (order[: rows // 2], order[rows // 2 :]) if len(part)]
        longest = [int(lengths[part].max()) for part in parts]
        return [
            {name: values[part][:, :most] for name, values in batch.items()}
            for part, most in zip(parts, longest, strict=True)
        ]
    if len(documents) < 2:
        return [batch]
    ends = np.cumsum(documents)
    last = int(np.argmin(abs(ends[:-1] - ends[-1] / 2))) + 1  # documents in the first half
    cut, parts = int(ends[last - 1]), []
    for some, tokens in ((slice(last), slice(cut)), (slice(last, None), slice(cut, None))):
        part = {k: batch[k][:, tokens] for k in ("input_ids", "labels", "position_ids")}
        places = (part["labels"][0, 1:] != IGNORED).nonzero().squeeze(1)
        parts.append({**part, "documents": documents[some], "places": places})
    return parts


def real_tokens(batch: dict[str, Any]) -> Any:
    """Number of tokens of a collated batch without padding: an int, or an int64 tensor ()."""
    if "documents" in batch:
        return batch["input_ids"].numel()
    if "position_ids" in batch:
        # A document has at least two tokens: a 0 before a 0, or at the end, is padding.
        starts = batch["position_ids"] == 0
        following = starts.roll(-1, dims=1)
        following[:, -1] = True
        return (~(starts & following)).sum()
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else mask.sum()
