"""How a batch of tokens is padded."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from lora_kit.tasks.batches import IGNORED, collator, real_tokens


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
