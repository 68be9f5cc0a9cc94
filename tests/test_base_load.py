"""A base in memory: its types, what trains, and what is refused instead of guessed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_base
from safetensors.torch import load_file, save_file
from trained import labelled

from lora_kit.adapter.attach import attach
from lora_kit.base.load import load_base, load_tokenizer
from lora_kit.base.pin import Pinned, pin
from lora_kit.errors import UserError
from lora_kit.schema import Adapter, Base
from lora_kit.tasks.batches import IGNORED, collator
from lora_kit.tasks.measure import measure


def settings(folder: Path, **values: Any) -> Base:
    return Base(model=str(folder), **values)


def layers(model: Any) -> list[Any]:
    """The linear layers of the decoder, the head apart."""
    return [
        m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n
    ]


@pytest.fixture
def copied(base: Path, tmp_path: Path) -> Path:
    """A base that a test may damage."""
    return Path(shutil.copytree(base, tmp_path / "model"))


def edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(file.read_text(encoding="utf-8"))
    change(values)
    file.write_text(json.dumps(values), encoding="utf-8")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_base_is_loaded_in_its_type_frozen_and_evaluating(base: Path, dtype: str) -> None:
    run = settings(base, dtype=dtype)
    model = load_base(run, pin(run))
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert not any(p.requires_grad for p in model.parameters()) and not model.training
    assert len(layers(model)) == 14
    stored = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(model.get_input_embeddings().weight, stored.to(getattr(torch, dtype)))


@pytest.mark.parametrize(("quantize", "dtype"), [("nf4", "bfloat16"), ("int8", "float32")])
def test_a_quantized_base_is_what_was_asked_for_and_trains_after_measuring(
    base: Path, quantize: str, dtype: str
) -> None:
    import bitsandbytes as bnb

    run = settings(base, dtype=dtype, quantize=quantize)
    model = load_base(run, pin(run))
    found = layers(model)
    assert len(found) == 14 and not any(p.requires_grad for p in model.parameters())
    if quantize == "nf4":
        assert all(isinstance(m, bnb.nn.Linear4bit) for m in found)
        state = found[0].weight.quant_state
        assert (state.quant_type, state.blocksize, state.nested) == ("nf4", 64, True)
        assert found[0].compute_dtype == torch.bfloat16
        assert found[0].weight.numel() == 64 * 64 // 2  # two weights a byte
    else:
        assert all(isinstance(m, bnb.nn.Linear8bitLt) for m in found)
        assert found[0].weight.dtype == torch.int8
    assert model.get_output_embeddings().weight.dtype == getattr(torch, dtype)

    # Close to the original, and not the original.
    plain = load_base(settings(base, dtype=dtype), pin(run))
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        change = (model(ids).logits.float() - plain(ids).logits.float()).abs().max().item()
        size = plain(ids).logits.float().abs().max().item()
    assert 0 < change < 0.5 * size

    # Evaluating in between changes no gradient: bitsandbytes' CPU kernel for evaluation has none.
    adapted = attach(load_base(run, pin(run)), Adapter(r=4, lora_alpha=8), fresh=(), seed=0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    before = gradients(adapted, ids)
    rows = labelled([(list(range(9)), list(range(9)))], [0], [9])
    measure(adapted, rows, pad_id=1)
    after = gradients(adapted, ids)
    assert len(before) == 28 and all(g.abs().sum() > 0 for g in before)
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one, other)


def gradients(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """Of every parameter that trains, in training mode."""
    model.train()
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


def _missing(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name in ("down_proj", "up_proj"):
        del tensors[f"model.layers.1.mlp.{name}.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _truncated(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def _empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def _other_shape(folder: Path) -> None:
    edit(folder / "config.json", lambda c: c.update(intermediate_size=192))


def _unknown_type(folder: Path) -> None:
    edit(folder / "config.json", lambda c: c.update(model_type="no_such"))


def _not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{", encoding="utf-8")


def _a_list(folder: Path) -> None:
    (folder / "config.json").write_text("[1]", encoding="utf-8")


def _wrong_value(folder: Path) -> None:
    edit(folder / "config.json", lambda c: c.update(hidden_size="many"))


def _quantized(folder: Path) -> None:
    edit(folder / "config.json", lambda c: c.update(quantization_config={"quant_method": "gptq"}))


def _outside(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    index = {"weight_map": {"model.norm.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _kernel(folder: Path) -> None:
    edit(folder / "config.json", lambda c: c.update(attn_implementation="someone/kernel"))


def _encoder(folder: Path) -> None:
    edit(folder / "config.json", lambda c: c.update(model_type="t5", architectures=["T5Model"]))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_missing, r"weights are missing: model.layers.1.mlp.down_proj.weight, .*up_proj"),
        (_truncated, "corrupt safetensors file"),
        (_empty, "corrupt safetensors file"),
        (_other_shape, "cannot be loaded"),
        (_unknown_type, "cannot be loaded: .*no_such"),
        (_not_json, "not a JSON object"),
        (_a_list, "not a JSON object"),
        (_wrong_value, "cannot be loaded"),
        (_quantized, r"already quantized \(gptq\)"),
        (_encoder, "has no AutoModelForCausalLM for T5Config: use another base"),
        (_outside, "a file outside of its folder"),
        (_kernel, "attn_implementation names code"),
    ],
)
def test_a_broken_base_is_refused_in_one_line(
    copied: Path, damage: Callable[[Path], None], words: str
) -> None:
    damage(copied)
    with pytest.raises(UserError, match=words) as raised:
        load_base(settings(copied, dtype="float32"), Pinned("x", str(copied)))
    message = str(raised.value)
    assert message.startswith("base.model: ") and str(copied) in message
    assert "\n" not in message and len(message) < 500


def test_tied_weights_are_not_missing_and_untied_ones_are(tmp_path: Path) -> None:
    untied = make_base(tmp_path / "untied", tie_word_embeddings=False)
    load_base(settings(untied), Pinned("x", str(untied)))
    tensors = load_file(untied / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, untied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"weights are missing: lm_head\.weight"):
        load_base(settings(untied), Pinned("x", str(untied)))


def _no_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def _broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model": 1}', encoding="utf-8")


def _slow_tokenizer(folder: Path) -> None:
    _no_tokenizer(folder)
    (folder / "vocab.json").write_text('{"a": 0}', encoding="utf-8")
    config = {"tokenizer_class": "CTRLTokenizer", "eos_token": "a", "unk_token": "a"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "merges.txt").write_text("#version\n", encoding="utf-8")


def _no_end(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", lambda c: c.pop("eos_token"))
    special = folder / "special_tokens_map.json"
    if special.is_file():
        edit(special, lambda c: c.pop("eos_token"))


def _few_embeddings(folder: Path) -> None:
    edit(folder / "config.json", lambda c: c.update(vocab_size=300))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_no_tokenizer, "no usable tokenizer"),
        (_broken_tokenizer, "no usable tokenizer"),
        (_slow_tokenizer, "no fast tokenizer|no usable tokenizer"),
        (_no_end, "no end-of-text token"),
        (_few_embeddings, r"has \d+ tokens, the base 300 embeddings"),
        (_not_json, "no usable tokenizer|not a JSON object"),
    ],
)
def test_a_tokenizer_that_would_train_nonsense_is_refused(
    copied: Path, damage: Callable[[Path], None], words: str
) -> None:
    damage(copied)
    with pytest.raises(UserError, match=words) as raised:
        load_tokenizer(copied)
    assert str(copied) in str(raised.value) and "\n" not in str(raised.value)


def test_padding_falls_back_to_the_end_token_and_is_not_learned_from(copied: Path) -> None:
    assert load_tokenizer(copied).pad_token == "<pad>"
    edit(copied / "tokenizer_config.json", lambda c: c.pop("pad_token"))
    tokenizer = load_tokenizer(copied)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 0
    assert tokenizer.padding_side == "right"
    # The end token is learned where it ends a row; as padding it is neither seen nor learned.
    rows = [{"input_ids": row, "labels": row} for row in ([5, 6, 7, 0], [8, 0])]
    batch = collator(tokenizer.pad_token_id)(rows)
    assert batch["labels"].tolist() == [[5, 6, 7, 0], [8, 0, IGNORED, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
