"""Labelled tokens, and how a batch of them is padded."""

from __future__ import annotations

import torch

from lora_kit.data.labelled import IGNORED, Labelled, collator


def test_the_first_label_of_a_row_is_not_counted() -> None:
    labelled = Labelled()
    labelled.add([5, 6, 7], [5, IGNORED, 7], 0)
    labelled.add([8, 9], [8, 9], 1)
    assert (len(labelled), labelled.tokens, labelled.supervised_tokens) == (2, 5, 2)
    assert labelled.summary() == "2 rows, 5 tokens, 2 of them (40%) learned from"


def test_a_batch_is_padded_on_the_right_to_its_longest_row() -> None:
    rows = [
        {"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]},
        {"input_ids": [8], "labels": [8]},
    ]
    batch = collator(pad_id=1)(rows)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 1, 1]],
        "labels": [[IGNORED, 6, 7], [8, IGNORED, IGNORED]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
    }
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_rows_of_one_length_need_no_mask() -> None:
    rows = [{"input_ids": [5, 1], "labels": [5, 1]}] * 2
    batch = collator(pad_id=1)(rows)
    assert batch.keys() == {"input_ids", "labels"}
    assert batch["labels"].tolist() == [[5, 1], [5, 1]]  # a real token like the pad is learned


def test_the_arrow_table_holds_ids_and_labels() -> None:
    table = Labelled([[1, 2]], [[IGNORED, 2]], [0], [1]).to_dataset()
    assert table[0] == {"input_ids": [1, 2], "labels": [IGNORED, 2]}
