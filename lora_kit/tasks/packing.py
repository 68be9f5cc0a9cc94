"""Packing: several short documents in one row, isolated from each other.

First-fit-decreasing (Johnson 1973): documents by decreasing length, each into the first row with
enough room; at most 11/9 of the optimal number of rows, plus one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lora_kit.data.rows import Rows
from lora_kit.errors import UserError
from lora_kit.tasks.batches import IGNORED

if TYPE_CHECKING:
    import torch


def first_fit_decreasing(lengths: Sequence[int] | np.ndarray, room: int) -> list[list[int]]:
    """Pack items into bins.

    >>> first_fit_decreasing([3, 5, 2, 4], room=7)
    [[1, 2], [3, 0]]

    Args:
        lengths: of the items, none above `room`.

    Returns:
        The indices of the items in each bin; every item is in exactly one.

    Raises:
        ValueError: an item is longer than a bin.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if len(sizes) and sizes.max() > room:
        raise ValueError(f"an item of {sizes.max()} does not fit into {room}")
    # A segment tree over the bins: each node has the largest room below it, so the first bin with
    # enough room is found in log2(items) steps. Unused bins are empty.
    leaves = 1 << max(0, len(sizes) - 1).bit_length()
    tree = [room] * (2 * leaves)
    bins: list[list[int]] = []
    for item in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[item])
        node = 1
        while node < leaves:
            node *= 2
            if tree[node] < size:
                node += 1
        number = node - leaves
        if number == len(bins):
            bins.append([])
        bins[number].append(item)
        tree[node] -= size
        while node > 1:
            node //= 2
            tree[node] = max(tree[2 * node], tree[2 * node + 1])
    return bins


class Packed:
    """Packed rows: `input_ids`, `labels` and `position_ids`, which start at 0 in each document. The
    first label of a document is ignored: its token would be predicted from another document.

    Args:
        room: most tokens of a packed row.
    """

    def __init__(self, rows: Rows, room: int) -> None:
        self.rows = rows
        self.room = room
        self.sizes = rows.sizes("input_ids")
        self.bins = first_fit_decreasing(self.sizes, room)

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        ids = [self.rows.cell("input_ids", row) for row in self.bins[number]]
        labels = [self.rows.cell("labels", row) for row in self.bins[number]]
        for some in labels:
            some[0] = IGNORED
        return {
            "input_ids": np.concatenate(ids),
            "labels": np.concatenate(labels),
            "position_ids": np.concatenate([np.arange(len(some)) for some in ids]),
        }

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row."""
        return np.array([self.sizes[some].sum() for some in self.bins])

    @property
    def fill(self) -> float:
        """The share of all positions, `room` per row, that hold a token."""
        return float(self.sizes.sum()) / max(1, len(self.bins) * self.room)


def content_hash(rows: Rows | Packed) -> str:
    """A hash of the tokens of all rows and of how they are packed."""
    packed = rows.bins if isinstance(rows, Packed) else None
    table = rows.rows if isinstance(rows, Packed) else rows
    names = [name for name in table.columns if name.endswith("input_ids")]
    digest = hashlib.sha256(str(packed).encode())
    digest.update(table.content(*names))
    return digest.hexdigest()


def check_isolation(model: torch.nn.Module) -> None:
    """Check that a packed document's logits do not depend on the document before it.

    transformers isolates packed documents by `position_ids` in most architectures; in those that do
    not use positions (OPT, BLOOM, Falcon, Mamba) each document sees the previous ones.

    Raises:
        UserError: the logits change by more than rounding.
    """
    import torch

    device = next(model.parameters()).device
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]], device=device)
    training = model.training
    model.eval()
    logits = []
    with torch.no_grad():
        for before in ([9, 10, 11, 12], [13, 14, 15, 16]):
            ids = torch.tensor([[*before, 5, 6, 7, 8]], device=device)
            logits.append(model(input_ids=ids, position_ids=positions).logits[0, 4:])
    model.train(training)
    first, second = logits
    # In a mixture of experts, other tokens change the rounding of sums.
    if (first - second).abs().max() > 0.05 * first.std():
        named = getattr(model, "get_base_model", lambda: model)()
        raise UserError(
            f"data.packing: documents: {type(named).__name__} does not isolate packed documents: "
            "use none, or running for text"
        )
