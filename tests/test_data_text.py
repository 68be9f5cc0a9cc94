"""Text -> tokens: every token is learned from, or judged, exactly once."""

from __future__ import annotations

import random
from typing import Any

import pytest
from conftest import WORDS, make_tokenizer

from lora_kit.data.formats import Example
from lora_kit.data.labelled import IGNORED
from lora_kit.data.splits import hold_out
from lora_kit.data.text import context_token, documents, running_text
from lora_kit.errors import UserError

EOS, BOS = 0, 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), bos=True)


def some_examples(seed: int) -> list[Example]:
    chooser = random.Random(seed)
    lengths = [chooser.choice([1, 2, 5, 30, 200]) for _ in range(12)]
    words = [*WORDS, "ä😀", "\n"]
    return [
        Example(f"f:{n}", text=" ".join(chooser.choices(words, k=k)), joins=n % 3 == 2)
        for n, k in enumerate(lengths)
    ]


@pytest.mark.parametrize("seed", range(8))
def test_running_text_loses_and_doubles_no_token(tokenizer: Any, seed: int) -> None:
    examples = some_examples(seed)
    length = random.Random(seed).choice([8, 9, 33])
    labelled = running_text(examples, tokenizer, length)
    stream = [token for row in labelled.input_ids for token in row]
    texts: list[str] = []
    for example in examples:
        text = example.text or ""
        texts[-1:] = [texts[-1] + text] if example.joins and texts else [*texts[-1:], text]
    expected = [t for text in texts for t in [*tokenizer(text).input_ids, EOS]]
    # A last chunk of one token predicts nothing and is left out.
    assert stream == (expected[:-1] if len(expected) % length == 1 else expected)
    assert labelled.labels == labelled.input_ids
    assert all(len(row) == length for row in labelled.input_ids[:-1])
    assert 2 <= len(labelled.input_ids[-1]) <= length
    assert labelled.supervised_tokens == labelled.tokens - len(labelled)


def test_blocks_are_joined_before_they_are_tokenized(tokenizer: Any) -> None:
    whole = running_text([Example("f:1", text="every morning")], tokenizer, 64)
    halves = [Example("f:1", text="every mor"), Example("f:1", text="ning", joins=True)]
    assert running_text(halves, tokenizer, 64).input_ids == whole.input_ids


def test_a_training_text_has_no_seam_into_what_is_held_out(tokenizer: Any) -> None:
    blocks = [Example(f"f:{n}", text=f"block {n}. ", joins=n > 0) for n in range(30)]
    train, _ = hold_out(blocks, 0.5, seed=0)
    (row,) = running_text(train, tokenizer, 10_000).input_ids
    runs = 1 + sum(not example.joins for example in train[1:])
    assert row.count(EOS) == runs > 2


def test_a_tokenizer_that_adds_a_beginning_writes_one_for_each_document(with_bos: Any) -> None:
    examples = [Example("f:1", text="the fox"), Example("f:2", text="a queen")]
    (row,) = running_text(examples, with_bos, 64).input_ids
    assert row.count(BOS) == row.count(EOS) == 2
    assert row[0] == BOS and row[-1] == EOS and row[row.index(EOS) + 1] == BOS


@pytest.mark.parametrize("seed", range(8))
def test_documents_score_every_token_once(tokenizer: Any, with_bos: Any, seed: int) -> None:
    examples = some_examples(seed)
    length = random.Random(seed).choice([8, 9, 33])
    for chosen, first in ((tokenizer, EOS), (with_bos, BOS)):
        labelled = documents(examples, chosen, length)
        assert labelled.unit_bytes == [len((e.text or "").encode()) for e in examples]
        scored: list[list[int]] = [[] for _ in examples]
        before: dict[int, int] = {}
        for ids, labels, unit in zip(
            labelled.input_ids, labelled.labels, labelled.units, strict=True
        ):
            assert len(ids) <= length and labels[0] == IGNORED and labels[1:] == ids[1:]
            # A window goes on from the last token of the one before it.
            assert ids[0] == before.get(unit, first)
            scored[unit] += labels[1:]
            before[unit] = ids[-1]
        texts = [e.text or "" for e in examples]
        assert scored == [chosen(t, add_special_tokens=False).input_ids for t in texts]


def test_what_stands_before_a_text_is_what_the_tokenizer_adds(
    tokenizer: Any, with_bos: Any
) -> None:
    assert context_token(tokenizer) == [EOS]
    assert context_token(with_bos) == [BOS]


def test_too_little_text_is_refused(tokenizer: Any) -> None:
    with pytest.raises(UserError, match="less than two tokens"):
        running_text([Example("f:1", text="")], tokenizer, 8)
