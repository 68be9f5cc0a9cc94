"""Examples stand before a row; what is judged of it stays the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_tokenizer
from families import FAMILIES
from prepared import supervised, unit_bytes
from trained import labelled

from lora_kit.base.load import load_tokenizer
from lora_kit.tasks.batches import IGNORED
from lora_kit.tasks.few_shot import after_examples, choose_examples, concatenated, opening

# What they write after the last exchange alone (an end of text, empty thoughts) stays between two.
TWICE = {"phi-3", "qwen3"}


def rows() -> Any:
    """Three rows of two units: all learned, an answer learned, one token."""
    return labelled(
        [
            ([7, 10, 11, 12], [7, 10, 11, 12]),
            ([7, 20, 21, 22, 23], [IGNORED, IGNORED, 21, 22, IGNORED]),
            ([30], [30]),
        ],
        [0, 1, 1],
        [9, 5],
    )


def test_labels_units_and_bytes_stay() -> None:
    judged = rows()
    longer = after_examples(judged, [[7, 1, 2], [7, 3]], opening=[7])
    assert longer[0]["input_ids"].tolist() == [7, 1, 2, 3, 10, 11, 12]
    # The first token of a row was not predicted from anything: it is not judged here either.
    assert longer[0]["labels"].tolist() == [IGNORED] * 4 + [10, 11, 12]
    assert longer[1]["labels"].tolist() == [IGNORED] * 5 + [21, 22, IGNORED]
    assert set(longer[2]["labels"].tolist()) == {IGNORED}
    assert supervised(longer) == supervised(judged) == 5
    assert longer.column("unit").tolist() == [0, 1, 1] and unit_bytes(longer) == [9, 5]


def test_labels_stay_with_their_tokens_where_the_opening_is_taken_away() -> None:
    """With `data.supervise: all`, the tokens of the opening have labels as well."""
    row = labelled([([7, 8, 20, 21], [IGNORED, 8, 20, 21])], [0], [1])
    longer = after_examples(row, [[7, 8, 1, 2]], opening=[7, 8])
    assert longer[0]["input_ids"].tolist() == [7, 8, 1, 2, 20, 21]
    assert longer[0]["labels"].tolist() == [IGNORED] * 4 + [20, 21]


def test_without_an_opening_nothing_is_taken_away() -> None:
    assert concatenated([[1, 2], [1, 3]], []) == [1, 2, 1, 3]
    assert concatenated([[7, 2], [1, 3], [7, 4]], [7]) == [7, 2, 1, 3, 4]


def test_examples_are_drawn_with_the_seed_and_fit() -> None:
    train = labelled(
        [([n] * (2 + n % 7), [n] * (2 + n % 7)) for n in range(50)], range(50), [1] * 50
    )
    chosen = choose_examples(train, longest=20, room=35, shots=3, chat=True, seed=0)
    assert len(chosen) == 3 and all(len(example) <= 5 for example in chosen)
    assert all(len(example) == 2 + example[0] % 7 for example in chosen)  # whole ones
    assert chosen == choose_examples(train, longest=20, room=35, shots=3, chat=True, seed=0)
    assert chosen != choose_examples(train, longest=20, room=35, shots=3, chat=True, seed=1)
    # Texts are cut, and where there is no room there are none.
    cut = choose_examples(train, longest=20, room=29, shots=3, chat=False, seed=0)
    assert len(cut) == 3 and all(len(example) <= 3 for example in cut)
    assert choose_examples(train, longest=20, room=22, shots=3, chat=False, seed=0) == []
    assert len(choose_examples(train, longest=20, room=10**6, shots=100, chat=True, seed=0)) == 50


@pytest.mark.parametrize("name", FAMILIES)
def test_a_conversation_opens_once(name: str, tmp_path: Path) -> None:
    """Two exchanges concatenated are what the template writes for both of them."""
    family = FAMILIES[name]
    make_tokenizer(tmp_path, chat_template=family.source, bos=True)
    tokenizer = load_tokenizer(tmp_path)
    turns = [
        {"role": role, "content": text}
        for role, text in (
            *(("user", "the fox"), ("assistant", "jumps")),
            *(("user", "a dog"), ("assistant", "bakes bread")),
        )
    ]

    def ids(some: Any) -> list[int]:
        text = tokenizer.apply_chat_template(some, tokenize=False)
        return tokenizer(text, add_special_tokens=False).input_ids

    both = concatenated([ids(turns[:2]), ids(turns[2:])], opening(tokenizer))
    text = tokenizer.decode(both)
    if name not in TWICE:
        assert text == tokenizer.decode(ids(turns))
    assert text.count("the fox") == text.count("bakes bread") == 1


def test_without_a_template_there_is_no_opening(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    assert opening(load_tokenizer(tmp_path)) == []
    refuses = "{% if messages|length > 2 %}{{ raise_exception('no') }}{% endif %}"
    make_tokenizer(tmp_path, chat_template=refuses + "{{ messages[0].content }}")
    assert opening(load_tokenizer(tmp_path)) == []


def test_the_draw_covers_all_rows() -> None:
    train = labelled([([n, n], [n, n]) for n in range(20)], range(20), [1] * 20)
    seen = {choose_examples(train, 2, 100, 1, True, seed)[0][0] for seed in range(200)}
    assert len(np.unique(list(seen))) == 20
