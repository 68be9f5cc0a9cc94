"""Collators: padded batches, and batches concatenated without padding; splitting a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lora_kit.data.rows import Row, Rows
from lora_kit.tasks.task import Batch, Collate

if TYPE_CHECKING:
    import torch

IGNORED = -100  # torch's ignore_index


def labels_with_loss(rows: Rows, column: str) -> int:
    """How many labels of a column have a loss. The first of a row has none: nothing predicts it."""
    count = 0
    for labels, offsets in rows.chunks(column):
        firsts = labels[offsets[:-1][np.diff(offsets) > 0]]  # of rows that are not empty
        count += int((labels != IGNORED).sum()) - int((firsts != IGNORED).sum())
    return count


def padded(sequences: Sequence[np.ndarray], padding: int) -> torch.Tensor:
    """Integers, (tokens,) each -> (sequences, longest), padded on the right."""
    import torch

    parts = [torch.as_tensor(sequence) for sequence in sequences]
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=padding)


def collator(pad_id: int) -> Collate:
    """Pads a batch on the right to its longest row.

    The returned function takes rows with `input_ids` and `labels` and returns int64 tensors of
    shape (rows, longest): `input_ids`, `labels` (padding is -100) and, if there is padding,
    `attention_mask` (0 on padding). Packed rows also have `position_ids` and no mask: the model
    separates documents by their positions; each padding token has position 0, like a document of
    its own.
    """

    def collate(rows: Sequence[Row]) -> Batch:
        ids = [row["input_ids"] for row in rows]
        batch = {
            "input_ids": padded(ids, pad_id),
            "labels": padded([row["labels"] for row in rows], IGNORED),
        }
        if "position_ids" in rows[0]:
            batch["position_ids"] = padded([row["position_ids"] for row in rows], 0)
        elif any(len(row) < batch["input_ids"].shape[1] for row in ids):
            batch["attention_mask"] = padded([np.ones(len(row), np.int64) for row in ids], 0)
        return batch

    return collate


def in_one_row(rows: Sequence[Row]) -> Batch:
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
        starts = np.flatnonzero(row.get("position_ids", np.zeros(1)) == 0)  # [0] if not packed
        documents += np.diff([*starts, len(row["input_ids"])]).tolist()
    firsts = np.cumsum([0, *documents[:-1]])
    labels = np.concatenate([row["labels"] for row in rows])
    labels[firsts] = IGNORED
    position_ids = np.concatenate([np.arange(length) for length in documents])
    ids = np.concatenate([row["input_ids"] for row in rows])
    return {
        "input_ids": torch.from_numpy(ids)[None],
        "labels": torch.from_numpy(labels)[None],
        "position_ids": torch.from_numpy(position_ids)[None],
        "documents": documents,
        "numbers": [int(row["row"]) for row in rows if "row" in row],
        "places": torch.from_numpy(np.flatnonzero(labels[1:] != IGNORED)),
    }


def halves(batch: Batch, together: int = 1) -> list[tuple[Batch, list[int]]]:
    """Split a batch in two parts whose losses add up to its own; [] if it cannot be split.

    Padded rows are sorted by length first, which reduces padding. Documents without padding are cut
    near the middle.

    Args:
        batch: of `collator` or `in_one_row`.
        together: how many consecutive rows, or documents, stay in one part: 2 for pairs.

    Returns:
        Of each part its tensors (and `documents`), and the indices of its rows in the batch.
    """
    flat = "documents" in batch
    lengths = np.reshape(batch["documents"] if flat else _lengths(batch), (-1, together))
    if len(lengths) < 2:
        return []
    if flat:
        ends = np.cumsum(lengths.sum(1))
        order = np.arange(len(lengths))
        middle = int(np.argmin(abs(ends[:-1] - ends[-1] / 2))) + 1
    else:
        order = np.argsort(-lengths.max(1), kind="stable")
        middle = len(lengths) // 2
    groups = np.arange(lengths.size).reshape(-1, together)[order]
    parts = []
    for some in (groups[:middle], groups[middle:]):
        rows = some.reshape(-1).tolist()
        parts.append((_select_documents(batch, rows) if flat else _select_rows(batch, rows), rows))
    return parts


def _lengths(batch: Batch) -> list[int]:
    """Tokens of the rows of a padded batch; packed rows count their padding."""
    rows, width = batch["input_ids"].shape
    mask = batch.get("attention_mask")
    return [width] * rows if mask is None else mask.sum(1).tolist()


def _select_rows(batch: Batch, rows: list[int]) -> Batch:
    """The tensors of a padded batch with these rows only, as wide as the longest of them."""
    import torch

    lengths, width = _lengths(batch), batch["input_ids"].shape[1]
    longest = max(lengths[row] for row in rows)
    part: Batch = {}
    for name, values in batch.items():
        if torch.is_tensor(values) and len(values) == len(lengths):
            some = values[rows]
            part[name] = some[:, :longest] if some.shape[1:] == (width,) else some
    return part


def _select_documents(batch: Batch, documents: list[int]) -> Batch:
    """A batch without padding with these documents only."""
    import torch

    part: Batch = {}
    for name in ("input_ids", "labels", "position_ids"):
        each = batch[name][0].split(batch["documents"])
        part[name] = torch.cat([each[number] for number in documents])[None]
    part["documents"] = [batch["documents"][number] for number in documents]
    part["places"] = (part["labels"][0, 1:] != IGNORED).nonzero().squeeze(1)
    return part


def real_tokens(batch: Batch) -> int | torch.Tensor:
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
