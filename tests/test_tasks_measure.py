"""Losses are those of a plain loop; a batch says what its prompts say one by one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_tokenizer, sentences
from prepared import prepared
from trained import labelled as make_labelled

from lora_kit.adapter.load import end_tokens
from lora_kit.base.load import load_base, load_tokenizer
from lora_kit.base.pin import Pinned
from lora_kit.base.templates import context_token
from lora_kit.data.rows import Rows
from lora_kit.errors import CheckFailed
from lora_kit.schema import Base
from lora_kit.tasks import measure as module
from lora_kit.tasks.batches import IGNORED
from lora_kit.tasks.measure import generate, measure


@pytest.fixture(scope="module")
def model(base: Path) -> Any:
    """Initialised ten times as wide as usual, so that it is sure of what it says."""
    loaded = load_base(Base(model=str(base), dtype="float32"), Pinned("x", str(base)))
    with torch.no_grad():
        for parameter in loaded.parameters():
            if parameter.dim() == 2:
                parameter.mul_(10)
    return loaded


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> Any:
    return load_tokenizer(base)


@pytest.fixture
def labelled() -> Rows:
    """Seven rows of 1 to 60 tokens in four units, out of order, partly ignored."""
    random = np.random.default_rng(0)
    rows = []
    for length in (5, 60, 1, 33, 34, 2, 17):
        ids = random.integers(2, 400, length).tolist()
        rows.append((ids, [IGNORED if n % 3 == 0 else i for n, i in enumerate(ids)]))
    return make_labelled(rows, [3, 0, 2, 0, 1, 3, 1], [10, 20, 30, 40])


def naive(model: Any, labelled: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Row by row, label by label, in float64."""
    nats, tokens = np.zeros(4), np.zeros(4)
    for row, unit in zip(labelled, labelled.column("unit"), strict=True):
        ids = torch.as_tensor(row["input_ids"])
        with torch.no_grad():
            chances = model(ids[None]).logits[0].double().log_softmax(-1)
        for place, label in enumerate(row["labels"][1:]):
            if label != IGNORED:
                nats[unit] -= chances[place, label].item()
                tokens[unit] += 1
    return nats, tokens


@pytest.mark.parametrize("rows_at_once", [1, 2, 8, 100])
@pytest.mark.parametrize("logits", [1, 2**28])
def test_measure_equals_a_plain_loop(
    model: Any, labelled: Rows, rows_at_once: int, logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(module.LOGITS_AT_ONCE, "cpu", logits)
    model.train()
    found = measure(model, labelled, pad_id=1, rows_at_once=rows_at_once)
    assert model.training
    model.eval()
    nats, tokens = naive(model, labelled)
    np.testing.assert_allclose(found.nats, nats, rtol=1e-5, atol=1e-5)
    assert found.tokens.tolist() == tokens.tolist() and found.tokens[2] == 0
    assert found.bytes.tolist() == [10, 20, 30, 40]


@pytest.mark.parametrize(("rows_at_once", "logits"), [(3, 2**28), (100, 400 * 130)])
def test_a_batch_is_no_larger_than_what_it_is_allowed(
    model: Any,
    labelled: Rows,
    rows_at_once: int,
    logits: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(module.LOGITS_AT_ONCE, "cpu", logits)
    shapes: list[tuple[int, int]] = []
    hook = model.register_forward_pre_hook(
        lambda _, __, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    measure(model, labelled, pad_id=1, rows_at_once=rows_at_once)
    hook.remove()
    assert sum(rows for rows, _ in shapes) == len(labelled) and len(shapes) < len(labelled)
    assert all(rows * width <= min(rows_at_once * 60, logits // 400) for rows, width in shapes)


def test_broken_weights_are_no_loss(base: Path, labelled: Rows) -> None:
    broken = load_base(Base(model=str(base), dtype="float32"), Pinned("x", str(base)))
    with torch.no_grad():
        broken.get_input_embeddings().weight[labelled[1]["input_ids"][3]] = float("nan")
    with pytest.raises(CheckFailed, match=r"held-out row 1 of 7 is not finite"):
        measure(broken, labelled, pad_id=1)


@pytest.mark.parametrize("bos", [True, False])
def test_bits_per_byte_by_hand(model: Any, tmp_path: Path, bos: bool) -> None:
    make_tokenizer(tmp_path, bos=bos)
    tokenizer = load_tokenizer(tmp_path)
    text = "the quick brown föx 🦊 jumps over the lazy dog."
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": text}))
    (tmp_path / "other.jsonl").write_text('{"text": "a text to learn from"}')
    data = {"train": str(tmp_path / "other.jsonl"), "eval": str(tmp_path / "rows.jsonl")}
    whole = prepared(tokenizer, "text", **data).eval
    assert len(whole) == 1
    ids = whole[0]["input_ids"].tolist()
    assert ids[0] == (2 if bos else 0) and tokenizer.decode(ids[1:]) == text
    with torch.no_grad():
        chances = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    nats = -sum(chances[n, token].item() for n, token in enumerate(ids[1:]))
    found = measure(model, whole, pad_id=1)
    assert found.bytes.tolist() == [len(text.encode())] == [50]
    assert found.tokens.tolist() == [len(ids) - 1]
    assert found.nats[0] / np.log(2) / 50 == pytest.approx(nats / np.log(2) / 50, rel=1e-5)
    # In windows every token is scored once all the same.
    cut = prepared(tokenizer, "text", max_length=8, **data).eval
    assert len(cut) > 2 and measure(model, cut, pad_id=1).tokens.tolist() == found.tokens.tolist()


@pytest.mark.parametrize("training", [True, False])
def test_an_error_leaves_the_model_in_the_mode_that_it_had(
    base: Path, tokenizer: Any, labelled: Rows, training: bool
) -> None:
    loaded = load_base(Base(model=str(base), dtype="float32"), Pinned("x", str(base)))
    loaded.train(training)

    def broken(*_: Any) -> None:
        raise RuntimeError("no room")

    loaded.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="no room"):
        measure(loaded, labelled, pad_id=1)
    assert loaded.training is training
    with pytest.raises(RuntimeError, match="no room"):
        generate(loaded, tokenizer, [[5, 6]], 4)
    assert loaded.training is training


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return [
        *context_token(tokenizer),
        *tokenizer(text, add_special_tokens=False).input_ids,
    ]


@pytest.fixture
def steered(model: Any) -> Iterator[dict[str, Any]]:
    """A model whose next token is set: after token t comes step[t], else t + 1."""
    step: dict[str, Any] = {"after": {}}

    def head(_: Any, args: Any, kwargs: Any, out: Any) -> Any:
        ids = kwargs["input_ids"]
        out.logits = torch.zeros(*ids.shape, 400)
        for row, place in np.ndindex(*ids.shape):
            token = ids[row, place].item()
            out.logits[row, place, step["after"].get(token, min(token + 1, 399))] = 9.0
        out.logits = out.logits[:, -1:]
        return out

    hook = model.register_forward_hook(head, with_kwargs=True)
    yield step
    hook.remove()


def test_a_batch_says_what_its_prompts_say_one_by_one(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["the", " ".join(sentences(3)), "", "seven wizards make", "a 🦊"]
    prompts = [ids_of(tokenizer, text) for text in texts]
    together = generate(model, tokenizer, prompts, 12)
    assert together == [generate(model, tokenizer, [prompt], 12)[0] for prompt in prompts]
    with monkeypatch.context() as patch:
        patch.setattr(module, "_PROMPTS_AT_ONCE", 2)
        assert together == generate(model, tokenizer, prompts, 12)
    assert len(set(together)) > 2  # not all the same babble
    # And what transformers says to the very ids that training would show it.
    ids = prompts[1]
    with torch.no_grad():
        plain = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(plain[0, len(ids) :], skip_special_tokens=True) == together[1]


def test_generation_stops_where_an_answer_ends(
    model: Any, tokenizer: Any, plain_base: Path, steered: dict[str, Any]
) -> None:
    # <eos> is 0; <|im_end|> is 3, which only the chat template calls an end.
    assert end_tokens(model, tokenizer) == [0, 3]
    [first] = tokenizer(" bake", add_special_tokens=False).input_ids[:1]
    steered["after"] = {first: 3, 3: 100}
    assert generate(model, tokenizer, [[first]], 20) == [""]
    plain = load_tokenizer(plain_base)
    assert end_tokens(model, plain) == [0]
    assert generate(model, plain, [[0, first]], 20) != [""]
    steered["after"] = {first: 50, 50: 51, 51: 0, 0: 60}
    assert generate(model, plain, [[0, first]], 20) == [plain.decode([50, 51])]
