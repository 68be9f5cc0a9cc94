"""Labelled tokens, in memory and on disk, and how a batch of them is padded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lora_kit.tasks.batches import IGNORED, Labelled, LabelledWriter, collator, real_tokens


def write(path: Path | None = None) -> Labelled:
    """Three rows: a conversation, and a document in two windows."""
    writer = LabelledWriter(path)
    writer.add([1, 5, 6, 2, 7, 2], [(2, 4), (5, 6)], unit_bytes=3, place=(0, 12))
    writer.add([8, 9, 4], [(1, 3)], unit_bytes=5, place=(1, 3))
    writer.add([4, 7], [(1, 2)], unit_bytes=5, place=(1, 3), same_unit=True)
    assert len(writer) == 3
    return writer.finish()


@pytest.mark.parametrize("on_disk", [False, True])
def test_rows_are_what_was_written(tmp_path: Path, on_disk: bool) -> None:
    rows = write(tmp_path / "rows" if on_disk else None)
    assert len(rows) == 3
    found = [{name: values.tolist() for name, values in rows[n].items()} for n in range(3)]
    assert found == [
        {
            "input_ids": [1, 5, 6, 2, 7, 2],
            "labels": [IGNORED, IGNORED, 6, 2, IGNORED, 2],
        },
        {"input_ids": [8, 9, 4], "labels": [IGNORED, 9, 4]},
        {"input_ids": [4, 7], "labels": [IGNORED, 7]},
    ]
    assert {values.dtype for values in rows[0].values()} == {np.dtype(np.int64)}
    assert rows.lengths.tolist() == [6, 3, 2] and rows.tokens == 11
    assert rows.units.tolist() == [0, 1, 1] and rows.unit_bytes.tolist() == [3, 5]
    assert rows.files.tolist() == [0, 1, 1] and rows.numbers.tolist() == [12, 3, 3]
    assert rows[-1]["input_ids"].tolist() == [4, 7]
    for beyond in (3, -4):
        with pytest.raises(IndexError):
            rows[beyond]


def test_what_is_on_disk_is_mapped_and_cannot_be_changed(tmp_path: Path) -> None:
    write(tmp_path / "rows")
    rows = Labelled.open(tmp_path / "rows")
    assert isinstance(rows.ids, np.memmap) and not rows.ids.flags.writeable
    rows[0]["input_ids"][0] = 99  # a row handed out is a copy
    assert rows[0]["input_ids"][0] == 1


@pytest.mark.parametrize("on_disk", [False, True])
def test_no_rows_at_all(tmp_path: Path, on_disk: bool) -> None:
    rows = LabelledWriter(tmp_path / "rows" if on_disk else None).finish()
    assert (len(rows), rows.tokens, rows.supervised_tokens) == (0, 0, 0)


def test_the_first_label_of_a_row_is_not_counted() -> None:
    writer = LabelledWriter()
    writer.add([5, 6, 7], [(0, 1), (2, 3)])
    writer.add([8, 9], [(0, 2)])
    writer.add([8], [(0, 1)])
    rows = writer.finish()
    assert (len(rows), rows.tokens, rows.supervised_tokens) == (3, 6, 2)


def rows_of(*rows: tuple[list[int], list[int]]) -> list[dict[str, Any]]:
    return [{"input_ids": np.array(ids), "labels": np.array(labels)} for ids, labels in rows]


def test_a_batch_is_padded_on_the_right_to_its_longest_row() -> None:
    batch = collator(pad_id=1)(rows_of(([5, 6, 7], [IGNORED, 6, 7]), ([8], [8])))
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 1, 1]],
        "labels": [[IGNORED, 6, 7], [8, IGNORED, IGNORED]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
    }
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert int(real_tokens(batch)) == 4


def test_rows_of_one_length_need_no_mask() -> None:
    batch = collator(pad_id=1)(rows_of(([5, 1], [5, 1]), ([5, 1], [5, 1])))
    assert batch.keys() == {"input_ids", "labels"}
    assert batch["labels"].tolist() == [[5, 1], [5, 1]]  # a real token like the pad is learned
    assert real_tokens(batch) == 4


def test_packed_rows_are_padded_by_documents_of_their_own() -> None:
    """No mask: transformers then finds the documents by their positions."""
    rows = rows_of(([5, 6, 7, 8, 9], [IGNORED, 6, IGNORED, 8, 9]), ([4, 3], [IGNORED, 3]))
    for row, positions in zip(rows, ([0, 1, 0, 1, 2], [0, 1]), strict=True):
        row["position_ids"] = np.array(positions)
    batch = collator(pad_id=1)(rows)
    assert batch.keys() == {"input_ids", "labels", "position_ids"}
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2], [0, 1, 0, 0, 0]]
    assert batch["labels"].tolist()[1] == [IGNORED, 3, IGNORED, IGNORED, IGNORED]
    assert batch["input_ids"].tolist()[1] == [4, 3, 1, 1, 1]
    assert int(real_tokens(batch)) == 7
