"""Labelled tokens: what a model sees and which of it it learns from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import datasets
    import torch

IGNORED = -100  # torch's and transformers' label for "not learned from"


@dataclass
class Labelled:
    """Rows of token ids and labels of equal length; a label of -100 is not learned from.

    A unit is what is judged as one: a document, or a row. `units[i]` is the unit of row i,
    `unit_bytes[u]` the UTF-8 bytes that the labels of unit u spell.

    >>> Labelled([[1, 5, 6, 2]], [[-100, -100, 6, 2]], [0], [3]).supervised_tokens
    2
    """

    input_ids: list[list[int]] = field(default_factory=list)
    labels: list[list[int]] = field(default_factory=list)
    units: list[int] = field(default_factory=list)
    unit_bytes: list[int] = field(default_factory=list)

    def add(self, input_ids: list[int], labels: list[int], unit: int) -> None:
        assert len(input_ids) == len(labels)
        self.input_ids.append(input_ids)
        self.labels.append(labels)
        self.units.append(unit)

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def tokens(self) -> int:
        return sum(map(len, self.input_ids))

    @property
    def supervised_tokens(self) -> int:
        """Labels that a loss is computed for; the first of a row has nothing before it."""
        return sum(label != IGNORED for row in self.labels for label in row[1:])

    def summary(self) -> str:
        share = self.supervised_tokens / max(1, self.tokens)
        return (
            f"{len(self)} rows, {self.tokens:,} tokens, "
            f"{self.supervised_tokens:,} of them ({share:.0%}) learned from"
        )

    def to_dataset(self) -> datasets.Dataset:
        """An Arrow table with the columns `input_ids` and `labels`."""
        import datasets

        return datasets.Dataset.from_dict({"input_ids": self.input_ids, "labels": self.labels})


def collator(pad_id: int) -> Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]:
    """Pads a batch on the right to its longest row.

    The function returned takes rows with `input_ids` and `labels` and gives int64 tensors of shape
    (rows, longest): `input_ids`, `labels` (padding is -100), and, where there is padding,
    `attention_mask` (0 on padding).
    """

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        import torch

        lengths = [len(row["input_ids"]) for row in rows]
        width = max(lengths)
        ids = torch.full((len(rows), width), pad_id)
        labels = torch.full((len(rows), width), IGNORED)
        for n, row in enumerate(rows):
            ids[n, : lengths[n]] = torch.tensor(row["input_ids"])
            labels[n, : lengths[n]] = torch.tensor(row["labels"])
        batch = {"input_ids": ids, "labels": labels}
        if min(lengths) < width:
            batch["attention_mask"] = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
        return batch

    return collate
