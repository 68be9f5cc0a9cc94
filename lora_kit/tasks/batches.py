"""Labelled tokens: what a model sees and which of it it learns from."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

IGNORED = -100  # torch's and transformers' label for "not learned from"
_ARRAYS = ("offsets", "spans", "span_offsets", "units", "unit_bytes", "files", "numbers")


class Labelled:
    """Rows of token ids, and the spans of each that are learned from; on disk, or in memory.

    A unit is what is judged as one: a document, or a row. `units[i]` is the unit of row i,
    `unit_bytes[u]` the UTF-8 bytes that the labels of unit u spell. `files[i]`, `numbers[i]` say
    where row i begins.

    >>> rows = LabelledWriter()
    >>> rows.add([1, 5, 6, 2], [(2, 3)], unit_bytes=3)
    >>> rows.finish()[0]["labels"].tolist()
    [-100, -100, 6, -100]
    """

    def __init__(self, ids: np.ndarray, arrays: dict[str, np.ndarray]) -> None:
        self.ids = ids  # int32: all rows, one after the other
        self.offsets = arrays["offsets"]  # int64, (rows + 1,)
        self.spans = arrays["spans"].reshape(-1, 2)  # int32: first, last + 1
        self.span_offsets = arrays["span_offsets"]  # int64, (rows + 1,)
        self.units, self.unit_bytes = arrays["units"], arrays["unit_bytes"]
        self.files, self.numbers = arrays["files"], arrays["numbers"]

    @classmethod
    def open(cls, path: Path) -> Labelled:
        """Map what a `LabelledWriter` wrote; nothing is read before it is asked for."""
        with np.load(path.with_suffix(".npz")) as stored:
            arrays = {name: stored[name] for name in _ARRAYS}
        return cls(mapped(path.with_suffix(".bin"), int(arrays["offsets"][-1])), arrays)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        """`input_ids` and `labels` of a row: int64, (tokens,); a label of -100 is not learned."""
        if not -len(self) <= row < len(self):
            raise IndexError(row)
        row %= len(self)
        ids = self.ids[self.offsets[row] : self.offsets[row + 1]].astype(np.int64)
        labels = np.full_like(ids, IGNORED)
        for first, last in self.spans[self.span_offsets[row] : self.span_offsets[row + 1]]:
            labels[first:last] = ids[first:last]
        return {"input_ids": ids, "labels": labels}

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row."""
        return np.diff(self.offsets)

    @property
    def tokens(self) -> int:
        return len(self.ids)

    @property
    def supervised_tokens(self) -> int:
        """Labels that a loss is computed for; the first of a row has nothing before it."""
        return int((self.spans[:, 1] - np.maximum(self.spans[:, 0], 1)).clip(0).sum())


def mapped(file: Path, count: int) -> np.ndarray:
    """The token ids of a file: int32, (count,)."""
    return np.memmap(file, np.int32, "r", shape=(count,)) if count else np.zeros(0, np.int32)


class LabelledWriter:
    """Collects rows, their tokens in a file where there is a path, else in memory."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.file: IO[bytes] = path.with_suffix(".bin").open("wb") if path else BytesIO()
        # Arrays of machine integers: four bytes a row, where a list would take forty.
        self.offsets, self.span_offsets = array("q", [0]), array("I", [0])
        self.spans, self.files, self.units = array("i"), array("i"), array("I")
        self.unit_bytes, self.numbers = array("I"), array("I")

    def __len__(self) -> int:
        return len(self.units)

    def add(
        self,
        ids: Any,
        spans: Any,
        unit_bytes: int = 0,
        place: tuple[int, int] = (0, 0),
        same_unit: bool = False,
    ) -> None:
        """Add a row.

        Args:
            ids: tokens. spans: pairs (first, last + 1) of those learned from.
            unit_bytes: what the row's unit spells. same_unit: it is the unit of the row before.
        """
        self.file.write(np.asarray(ids, dtype=np.int32).tobytes())
        self.offsets.append(self.offsets[-1] + len(ids))
        for span in spans:
            self.spans.extend(span)
        self.span_offsets.append(len(self.spans) // 2)
        if not same_unit:
            self.unit_bytes.append(unit_bytes)
        self.units.append(len(self.unit_bytes) - 1)
        self.files.append(place[0])
        self.numbers.append(place[1])

    def finish(self) -> Labelled:
        stored = {name: getattr(self, name) for name in _ARRAYS}
        arrays = {name: np.frombuffer(a, a.typecode) for name, a in stored.items()}
        if not self.path:
            self.file.seek(0)
            return Labelled(np.frombuffer(self.file.read(), np.int32), arrays)
        self.file.close()
        np.savez(self.path.with_suffix(".npz"), **arrays)  # type: ignore[arg-type]
        return Labelled.open(self.path)


def collator(pad_id: int) -> Callable[[Sequence[dict[str, Any]]], dict[str, torch.Tensor]]:
    """Pads a batch on the right to its longest row.

    The function returned takes rows with `input_ids` and `labels` and gives int64 tensors of shape
    (rows, longest): `input_ids`, `labels` (padding is -100), and, where there is padding,
    `attention_mask` (0 on padding). Packed rows have `position_ids` as well: they go without a
    mask, because from the positions alone the model keeps documents apart; each token of padding
    has position 0, as a document of its own.
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
    """The rows of a batch one after the other, without padding, in a single row.

    >>> batch = in_one_row([{"input_ids": [1, 5, 6], "labels": [-100, 5, 6]},
    ...                     {"input_ids": [1, 7], "labels": [1, 7]}])
    >>> batch["labels"].tolist(), batch["documents"], batch["places"].tolist()
    ([[-100, 5, 6, -100, 7]], [3, 2], [0, 1, 3])

    Returns:
        `input_ids`, `labels`, `position_ids`: int64 (1, tokens). Positions count from 0 in each
        document, whose first label is left out. `documents`: their lengths; a packed row has
        several. `numbers`: those of the rows in the data set, where they say `row`. `places`:
        int64, where in labels[:, 1:] there is something to learn.
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


def halves(batch: dict[str, Any]) -> list[dict[str, Any]]:
    """A batch in two, where it holds two rows at least; the losses of both add up to its own.
    Padded rows go by length, so that less of it is padding."""
    documents = batch.get("documents")
    if documents is None:
        rows, width = batch["input_ids"].shape
        mask = batch.get("attention_mask")
        lengths = batch["labels"].new_full((rows,), width) if mask is None else mask.sum(1)
        order = lengths.argsort(descending=True, stable=True)
        sides = [side for side in (order[: rows // 2], order[rows // 2 :]) if len(side)]
        longest = [int(lengths[side].max()) for side in sides]
        return [
            {name: values[side][:, :most] for name, values in batch.items()}
            for side, most in zip(sides, longest, strict=True)
        ]
    if len(documents) < 2:
        return [batch]
    ends = np.cumsum(documents)
    last = int(np.argmin(abs(ends[:-1] - ends[-1] / 2))) + 1  # of documents in the first half
    cut, parts = int(ends[last - 1]), []
    for some, tokens in ((slice(last), slice(cut)), (slice(last, None), slice(cut, None))):
        part = {k: batch[k][:, tokens] for k in ("input_ids", "labels", "position_ids")}
        places = (part["labels"][0, 1:] != IGNORED).nonzero().squeeze(1)
        parts.append({**part, "documents": documents[some], "places": places})
    return parts


def real_tokens(batch: dict[str, Any]) -> Any:
    """How many tokens of a collated batch are no padding: a number, or an int64 tensor ()."""
    if "documents" in batch:
        return batch["input_ids"].numel()
    if "position_ids" in batch:
        # A document has two tokens at least: a 0 before a 0, or at the end, is padding.
        starts = batch["position_ids"] == 0
        following = starts.roll(-1, dims=1)
        following[:, -1] = True
        return (~(starts & following)).sum()
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else mask.sum()
