"""Packing: every document in exactly one row, rows nearly full, no document seen by another."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared import spans, supervised

from lora_kit.data.rows import Rows
from lora_kit.errors import UserError
from lora_kit.tasks.batches import IGNORED, collator, real_tokens
from lora_kit.tasks.packing import Packed, check_isolation, first_fit_decreasing

PAD = 1
ROOM = 40
LENGTHS = (20, 11, 9, 17, 14, 3, 2, 40, 2)
SIZES: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT2: dict[str, Any] = {"vocab_size": 400, "n_embd": 64, "n_layer": 2, "n_head": 4}
OPT: dict[str, Any] = {
    **{"vocab_size": 400, "hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": 64},
}
# A window shorter than the documents, which every layer or every second one uses.
WINDOW: dict[str, Any] = {**SIZES, "sliding_window": 8}
APART = [
    ("LlamaConfig", SIZES),
    ("Qwen2Config", SIZES),
    ("GemmaConfig", {**SIZES, "head_dim": 16}),
    ("Gemma3TextConfig", {**WINDOW, "head_dim": 16}),
    ("MistralConfig", WINDOW),
    ("GPT2Config", GPT2),
]


def naive(lengths: list[int], room: int) -> list[list[int]]:
    """First-fit-decreasing as it is defined."""
    bins: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        for some in bins:
            if sum(lengths[n] for n in some) + lengths[item] <= room:
                some.append(item)
                break
        else:
            bins.append([item])
    return bins


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 64).flatmap(
    lambda room: st.tuples(st.just(room), st.lists(st.integers(1, room), max_size=120))
))  # fmt: skip
def test_it_is_first_fit_decreasing(case: tuple[int, list[int]]) -> None:
    room, lengths = case
    bins = first_fit_decreasing(lengths, room)
    assert bins == naive(lengths, room)
    assert sorted(n for some in bins for n in some) == list(range(len(lengths)))
    assert all(some and sum(lengths[n] for n in some) <= room for some in bins)


@pytest.mark.parametrize("mean", [5.0, 5.5, 6.2])
def test_rows_of_real_lengths_are_97_percent_full(mean: float) -> None:
    """Log-normal, as the answers of instruction sets are: medians of 150, 245 and 490 tokens."""
    drawn = np.random.default_rng(0).lognormal(mean, 0.9, 20_000)
    lengths = np.clip(drawn, 8, 2048).astype(int)
    bins = first_fit_decreasing(lengths, 2048)
    assert lengths.sum() / (2048 * len(bins)) >= 0.97


def test_a_document_longer_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="an item of 9 does not fit into 8"):
        first_fit_decreasing([3, 9], 8)


def documents(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> Rows:
    """Documents of random tokens; the first three of each have no loss, if it has more."""
    random = np.random.default_rng(seed)
    drawn = [random.integers(4, 400, length).tolist() for length in lengths]
    return spans(*((ids, [(3 if len(ids) > 3 else 0, len(ids))]) for ids in drawn))


def test_a_packed_row_is_its_documents_one_after_the_other() -> None:
    rows = documents()
    packed = Packed(rows, ROOM)
    assert len(packed) == len(packed.bins) < len(rows)
    for number, inside in enumerate(packed.bins):
        row, start = packed[number], 0
        assert row.keys() == {"input_ids", "labels", "position_ids"}
        for document in inside:
            part = {name: values[start : start + LENGTHS[document]] for name, values in row.items()}
            alone = rows[document]
            assert part["input_ids"].tolist() == alone["input_ids"].tolist()
            assert part["labels"][0] == IGNORED
            assert part["labels"][1:].tolist() == alone["labels"][1:].tolist()
            assert part["position_ids"].tolist() == list(range(LENGTHS[document]))
            start += LENGTHS[document]
        assert start == len(row["input_ids"]) <= ROOM
    assert packed.fill == sum(LENGTHS) / (ROOM * len(packed))
    learned = sum(int((row["labels"][1:] != IGNORED).sum()) for row in map(packed.__getitem__,
                  range(len(packed))))  # fmt: skip
    assert learned == supervised(rows)


def test_rows_are_not_changed_by_packing_them() -> None:
    rows = documents((5, 2))
    before = rows[1]["labels"].tolist()
    assert Packed(rows, ROOM)[0]["labels"].tolist().count(IGNORED) == 3 + 1
    assert rows[1]["labels"].tolist() == before


def model_of(config_name: str, options: dict[str, Any]) -> Any:
    """A random model as the trainer uses it: it has switched the cache off, with which
    transformers does not look for packed documents."""
    import transformers

    special = {"pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": 0, "use_cache": False}
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**options, **special)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def collated(packed: Packed) -> dict[str, torch.Tensor]:
    return collator(PAD)([packed[n] for n in range(len(packed))])


def places(packed: Packed) -> dict[int, tuple[int, slice]]:
    """Where each document stands in the batch of all rows."""
    found = {}
    for row, inside in enumerate(packed.bins):
        start = 0
        for document in inside:
            end = start + int(packed.sizes[document])
            found[document] = row, slice(start, end)
            start = end
    return found


@pytest.mark.parametrize(("config", "options"), APART, ids=[name for name, _ in APART])
def test_a_packed_document_is_computed_as_if_it_were_alone(
    config: str, options: dict[str, Any]
) -> None:
    model = model_of(config, options)
    rows = documents()
    packed = Packed(rows, ROOM)
    batch = collated(packed)
    assert (batch["input_ids"] == PAD).any()  # rows of several lengths: some are padded
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = model(**batch).logits
        loss = model(**batch, labels=labels).loss
    apart = torch.zeros(2)
    for document, (row, where) in places(packed).items():
        one = collator(PAD)([rows[document]])
        with torch.no_grad():
            alone = model(**one).logits[0]
        torch.testing.assert_close(logits[row, where], alone, atol=2e-6, rtol=1e-5)
        nats = torch.nn.functional.cross_entropy(
            alone[:-1], one["labels"][0, 1:], ignore_index=IGNORED, reduction="sum"
        )
        apart += torch.stack([nats, (one["labels"][0, 1:] != IGNORED).sum()])
    # The loss is of the same tokens, and the same.
    assert int((labels[:, 1:] != IGNORED).sum()) == int(apart[1])
    torch.testing.assert_close(loss, apart[0] / apart[1], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("config", "options"), APART, ids=[name for name, _ in APART])
def test_changing_one_document_changes_no_other(config: str, options: dict[str, Any]) -> None:
    model = model_of(config, options)
    packed = Packed(documents(), ROOM)
    batch = {name: t for name, t in collated(packed).items() if name != "labels"}
    found = places(packed)
    with torch.no_grad():
        before = model(**batch).logits
        for document, (row, where) in found.items():
            ids = batch["input_ids"].clone()
            ids[row, where] = (ids[row, where] - 4 + 7) % 396 + 4
            changed = (model(**{**batch, "input_ids": ids}).logits != before).any(dim=2)
            assert changed[row, where].all(), document
            changed[row, where] = False
            assert not changed.any(), document


def test_a_model_that_mixes_documents_is_found_and_named() -> None:
    for config, options in APART:
        check_isolation(model_of(config, options))
    model = model_of("OPTConfig", OPT)  # of those that look at no position_ids
    with pytest.raises(UserError, match=r"data\.packing: documents: OPTForCausalLM .*none"):
        check_isolation(model)


def test_looking_for_isolation_leaves_the_model_as_it_was() -> None:
    model = model_of("LlamaConfig", SIZES).train()
    state = torch.random.get_rng_state()
    check_isolation(model)
    assert model.training and torch.equal(torch.random.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(2, ROOM), min_size=1, max_size=30))
def test_padding_is_not_counted_as_tokens(lengths: list[int]) -> None:
    rows = documents(tuple(lengths))
    assert int(real_tokens(collated(Packed(rows, ROOM)))) == sum(lengths)
    batch = collator(PAD)([rows[n] for n in range(len(rows))])
    assert int(real_tokens(batch)) == sum(lengths)
