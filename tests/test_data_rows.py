"""Rows of Arrow: as they were written, without copies, in any order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prepared import spans, supervised, tokens

from lora_kit.data.rows import Rows, RowsWriter, record_batches
from lora_kit.tasks.batches import IGNORED

ROWS = [
    {"input_ids": [1, 5, 6], "labels": [IGNORED, 5, 6], "unit": 0, "name": "a", "size": 0.5},
    {"input_ids": [8], "labels": [IGNORED], "unit": 1, "name": "ü", "size": 2.0},
    {"input_ids": [4, 7], "labels": [IGNORED, 7], "unit": 1, "name": "", "size": 0.0},
]


def write(file: Path) -> Rows:
    writer = RowsWriter(file)
    for row in ROWS:  # a piece for each
        for batch in record_batches([row]):
            writer.write(batch)
    return writer.close()


def plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


@pytest.mark.parametrize("on_disk", [False, True])
def test_rows_are_what_was_written(tmp_path: Path, on_disk: bool) -> None:
    rows = write(tmp_path / "rows.arrow") if on_disk else Rows.of(ROWS)
    assert len(rows) == 3
    found = [
        {
            name: value.tolist() if isinstance(value, np.ndarray) else value
            for name, value in r.items()
        }
        for r in rows
    ]
    assert found == ROWS
    assert rows[0]["input_ids"].dtype == np.int64
    assert rows.sizes("input_ids").tolist() == [3, 1, 2] and rows.units == 2
    assert rows.column("unit").tolist() == [0, 1, 1]
    assert rows.cell("name", 1) == "ü" and rows[-1]["input_ids"].tolist() == [4, 7]
    for beyond in (3, -4):
        with pytest.raises(IndexError):
            rows[beyond]


def test_what_is_on_disk_cannot_be_changed(tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.arrow")
    rows[0]["input_ids"][0] = 99  # a row handed out is a copy
    assert rows[0]["input_ids"][0] == 1


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_selection_keeps_its_order(tmp_path: Path, on_disk: bool) -> None:
    rows = write(tmp_path / "rows.arrow") if on_disk else Rows.of(ROWS)
    some = rows.select([2, 0])
    assert [row["input_ids"].tolist() for row in some] == [[4, 7], [1, 5, 6]]
    assert some.select([1])[0]["unit"] == 0
    assert some.sizes("labels").tolist() == [2, 3] and some.column("unit").tolist() == [1, 0]
    pieces = [(values.tolist(), ends.tolist()) for values, ends in some.chunks("input_ids")]
    assert [token for values, _ in pieces for token in values] == [4, 7, 1, 5, 6]
    more = some.with_column("reference", [[0.5, 1.5], [2.5, 3.5]])
    assert more[1]["reference"].tolist() == [2.5, 3.5] and "reference" not in rows.columns
    assert list(some.dataset()[0]) == rows.columns  # the same table for TRL's trainers


def test_no_rows_at_all(tmp_path: Path) -> None:
    empty = RowsWriter(tmp_path / "rows.arrow").close()
    assert len(empty) == len(Rows.of([])) == 0


def test_the_first_label_of_a_row_is_not_counted() -> None:
    rows = spans(([5, 6, 7], [(0, 1), (2, 3)]), ([8, 9], [(0, 2)]), ([8], [(0, 1)]))
    assert (len(rows), tokens(rows), supervised(rows)) == (3, 6, 2)
