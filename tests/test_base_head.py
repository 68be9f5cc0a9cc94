"""A base with a new head: what is fresh, how it is adapted, saved, quantized and merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from classifiers import FAMILIES, make_body
from conftest import make_tokenizer
from tokenizers import processors

from lora_kit.adapter.attach import _freeze_statistics, attach, load_adapter
from lora_kit.adapter.audit import coverage
from lora_kit.adapter.files import open_adapter
from lora_kit.base.head import SEQUENCE, Head, load_with_head, with_head_on_meta
from lora_kit.base.load import check_causal, load_base
from lora_kit.base.pin import Pinned
from lora_kit.errors import UserError
from lora_kit.schema import Adapter, Base

LABELS = ("card", "cash", "rate")
FRESH = {
    "Bert": ("classifier",),
    "Roberta": ("classifier.dense", "classifier.out_proj"),
    "DistilBert": ("pre_classifier", "classifier"),
    "DebertaV2": ("pooler.dense", "classifier"),
    "Electra": ("classifier.dense", "classifier.out_proj"),
    "ModernBert": ("head.dense", "head.norm", "classifier"),
    "Llama": ("score",),
    "Qwen3": ("score",),
    "GPT2": ("score",),
}


def loaded(folder: Path, pooling: str | None = None, seed: int = 0, **base: Any) -> Any:
    """The classifier of a folder and its fresh modules."""
    settings = Base(model=str(folder), **{"dtype": "float32", **base})
    return load_with_head(settings, Pinned("x", str(folder)), Head(SEQUENCE, LABELS, pooling), seed)


def batch(rows: int = 4) -> dict[str, torch.Tensor]:
    """Texts of 5 to 5 + rows tokens."""
    ids = torch.arange(rows * (5 + rows)).reshape(rows, -1) % 350 + 10
    mask = (torch.arange(5 + rows)[None] < torch.arange(5, 5 + rows)[:, None]).long()
    return {"input_ids": torch.where(mask == 1, ids, 1), "attention_mask": mask}


def logits(model: Any, given: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(**(given or batch())).logits


def trained(model: Any) -> Any:
    """The model with other values in all that trains."""
    torch.manual_seed(7)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.05
    return model


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_head_is_trained_whole_and_comes_again_exactly(
    family: str, quantize: str, tmp_path: Path
) -> None:
    folder = make_body(tmp_path / "base", family)
    model, fresh = loaded(folder, quantize=quantize)
    assert fresh == FRESH[family]
    heads = [model.get_submodule(name) for name in fresh]
    assert not any("Linear4bit" in type(head).__name__ for head in heads)
    assert {p.dtype for head in heads for p in head.parameters()} == {torch.float32}
    model = trained(attach(model, Adapter(r=4), fresh, 0))
    assert set(coverage(model).whole) == set(fresh)
    assert not any(".lora_" in n and ".modules_to_save." in n for n, _ in model.named_parameters())
    wanted = logits(model)
    with model.disable_adapter():
        before = logits(model)
    assert (before - wanted).abs().max() > 0.01

    model.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["task_type"] is None
    again, _ = loaded(folder, quantize=quantize)
    again = load_adapter(again, open_adapter(tmp_path / "adapter"))
    assert torch.equal(logits(again), wanted)
    with again.disable_adapter():
        assert torch.equal(logits(again), before)  # the random head is that of the seed
    if quantize == "none":
        model.merge_and_unload().save_pretrained(tmp_path / "merged")
        from transformers import AutoModelForSequenceClassification

        merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
        assert (logits(merged) - wanted).abs().max() < 1e-5
        assert tuple(merged.config.id2label.values()) == LABELS


def test_the_seed_decides_the_head(tmp_path: Path) -> None:
    folder = make_body(tmp_path / "base")
    first, other = (loaded(folder, seed=seed)[0].classifier.weight for seed in (0, 1))
    assert torch.equal(first, loaded(folder)[0].classifier.weight)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("family", ["Bert", "DebertaV2", "ModernBert", "Llama"])
def test_a_head_in_float32_fits_a_base_in_bfloat16(family: str, tmp_path: Path) -> None:
    model, fresh = loaded(make_body(tmp_path / "base", family), dtype="bfloat16")
    body = [p.dtype for n, p in model.named_parameters() if not n.startswith(fresh)]
    assert set(body) == {torch.bfloat16}
    model = attach(model, Adapter(r=4), fresh, 0).train()
    model(**batch()).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_pooling_layer_that_the_files_lack_is_fresh(tmp_path: Path) -> None:
    folder = make_body(tmp_path / "base", kind="ForMaskedLM")
    assert loaded(folder)[1] == ("bert.pooler.dense", "classifier")


def test_a_missing_weight_of_the_body_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_body(tmp_path / "base")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["encoder.layer.1.output.dense.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    for pooling in ("cls", "mean"):
        with pytest.raises(UserError, match=r"weights are missing: .*layer\.1\.output\.dense"):
            loaded(folder, pooling)


def test_a_head_for_other_labels_is_made_anew_and_one_for_these_is_kept(tmp_path: Path) -> None:
    folder = make_body(tmp_path / "base", "Roberta")
    first = loaded(folder)[0]
    first.save_pretrained(folder)  # a classifier for LABELS
    kept, fresh = loaded(folder)
    weight = first.classifier.out_proj.weight
    assert fresh == () and torch.equal(kept.classifier.out_proj.weight, weight)
    for labels in (("rate", "cash", "card"), ("card", "cash", "rate", "top_up")):
        base = Base(model=str(folder), dtype="float32")
        model, fresh = load_with_head(base, Pinned("x", str(folder)), Head(SEQUENCE, labels), 3)
        assert fresh == ("classifier.out_proj",)
        assert torch.equal(model.classifier.dense.weight, first.classifier.dense.weight)
        new = model.classifier.out_proj.weight
        assert new.shape == (len(labels), 64) and not torch.equal(new[:3], weight)


POOLINGS = [
    ("Bert", None, "cls"),
    ("Bert", "cls", "cls"),
    ("Bert", "mean", "own module"),
    ("Bert", "last", "own module"),
    ("ModernBert", "mean", "mean"),
    ("ModernBert", None, "cls"),
    ("Llama", None, "last"),
    ("Llama", "mean", "own module"),
]


@pytest.mark.parametrize(("family", "asked", "found"), POOLINGS)
def test_poolings_by_family(family: str, asked: str | None, found: str, tmp_path: Path) -> None:
    model, fresh = loaded(make_body(tmp_path / "base", family), asked)
    if found == "own module":
        assert type(model).__name__ == "PooledClassifier" and fresh == ("score",)
        assert model.pooling == asked
    else:
        assert type(model).__name__ == f"{family}ForSequenceClassification"
        assert model.pooling == found
    alone = logits(model, {k: v[:1, :5] for k, v in batch().items()})
    assert torch.allclose(logits(model)[:1], alone, atol=1e-5)  # whatever the padding


def test_a_folder_of_sentence_transformers_says_its_pooling(tmp_path: Path) -> None:
    folder = make_body(tmp_path / "base")
    (folder / "1_Pooling").mkdir()
    modes = folder / "1_Pooling" / "config.json"
    modes.write_text('{"pooling_mode_mean_tokens": true}')
    assert loaded(folder)[0].pooling == "mean"
    modes.write_text('{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}')
    assert loaded(folder)[0].pooling == "cls"


def test_poolings_and_heads_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="decoder, whose first token does not see"):
        loaded(make_body(tmp_path / "llama", "Llama"), "cls")
    headless = make_body(tmp_path / "base", "Bert", model_type="bert-generation")
    config = json.loads((headless / "config.json").read_text())
    (headless / "config.json").write_text(json.dumps(config | {"model_type": "bert-generation"}))
    with pytest.raises(
        UserError, match=r"no classifier for bert-generation: set base\.pooling: mean"
    ):
        loaded(headless)


@pytest.mark.parametrize("family", ["Bert", "Llama"])
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_an_own_pooling_is_adapted_and_comes_again(
    family: str, quantize: str, tmp_path: Path
) -> None:
    folder = make_body(tmp_path / "base", family)
    model, fresh = loaded(folder, "mean", quantize=quantize)
    model = trained(attach(model, Adapter(r=4), fresh, 0))
    wanted = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"auto_mapping": None}))  # as `save_run` leaves it
    again = load_adapter(
        loaded(folder, "mean", quantize=quantize)[0], open_adapter(tmp_path / "adapter")
    )
    assert torch.equal(logits(again), wanted)


def test_shapes_alone_are_those_of_the_loaded_model(tmp_path: Path) -> None:
    for family, kind, pooling in (
        ("Bert", "Model", None),
        ("Bert", "ForMaskedLM", None),  # without a pooling layer
        ("Llama", "ForCausalLM", "mean"),
        ("ModernBert", "Model", "mean"),
    ):
        folder = make_body(tmp_path / f"{family}{kind}{pooling}", family, kind)
        model, fresh = loaded(folder, pooling, dtype="bfloat16")
        base = Base(model=str(folder), dtype="bfloat16")
        head = Head(SEQUENCE, LABELS, pooling)
        shapes, planned = with_head_on_meta(base, Pinned("x", str(folder)), head)
        assert planned == fresh
        found = {n: (p.shape, p.dtype) for n, p in shapes.named_parameters()}
        assert found == {n: (p.shape, p.dtype) for n, p in model.named_parameters()}


def test_batch_norm_stays_as_it_is_in_training() -> None:
    layer = torch.nn.BatchNorm1d(3)
    holder = torch.nn.Sequential(layer, torch.nn.Linear(3, 3)).eval()
    _freeze_statistics(holder)
    holder.train()
    assert holder.training and not layer.training
    before = layer.running_mean.clone()  # type: ignore[union-attr]
    holder(torch.ones(4, 3))
    assert torch.equal(layer.running_mean, before)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["Bert", "Roberta", "Electra"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_encoder_is_no_causal_model(family: str, dtype: str, tmp_path: Path) -> None:
    # Initialised as narrowly as transformers does: the smallest leak there is.
    kind = {"Bert": "LMHeadModel"}.get(family, "ForCausalLM")
    folder = make_body(tmp_path, family, kind, initializer_range=0.02)
    base, pinned = Base(model=str(folder), dtype=dtype), Pinned("x", str(folder))
    model = load_base(base, pinned)
    with pytest.raises(UserError, match=r"^base.model: x: \w+ is not causal: ") as raised:
        check_causal(model, pinned)
    assert "\n" not in str(raised.value)


DECODERS = [
    ("Llama", "float32", "none"),
    ("Llama", "bfloat16", "nf4"),
    ("Llama", "bfloat16", "int8"),
    ("GPT2", "bfloat16", "none"),
    ("Mixtral", "bfloat16", "none"),
    ("Bert", "float32", "none"),  # with a decoder's attention
]


@pytest.mark.parametrize(("family", "dtype", "quantize"), DECODERS)
def test_decoders_are_causal_and_checking_them_draws_no_random_number(
    family: str, dtype: str, quantize: str, tmp_path: Path
) -> None:
    kind = {"GPT2": "LMHeadModel", "Bert": "LMHeadModel"}.get(family, "ForCausalLM")
    more = {"is_decoder": True} if family == "Bert" else {}
    folder = make_body(tmp_path, family, kind, **more)
    pinned = Pinned("x", str(folder))
    model = load_base(Base(model=str(folder), dtype=dtype, quantize=quantize), pinned)
    state = torch.get_rng_state()
    check_causal(model, pinned)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_a_head_is_described_in_the_lock_and_beside_the_adapter(tmp_path: Path) -> None:
    head = Head(SEQUENCE, LABELS, "mean")
    lock = {"auto": SEQUENCE, "facts": {"labels": list(LABELS)}, "pooling": "mean"}
    assert Head.of(lock) == head and Head.of({}) == Head()
    assert Head.read(tmp_path) is None
    head.write(tmp_path)
    assert Head.read(tmp_path) == head
    (tmp_path / "head.json").write_text("{}")
    with pytest.raises(UserError, match=r"head\.json: corrupt"):
        Head.read(tmp_path)


def test_a_model_of_pictures_does_not_classify_texts(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel

    folder = tmp_path / "base"
    make_tokenizer(folder)
    small = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 32}
    ViTModel(ViTConfig(intermediate_size=64, **small)).save_pretrained(folder)
    for pooling in (None, "mean"):
        with pytest.raises(
            UserError, match="its input is pixel_values, not text: use another base"
        ):
            loaded(folder, pooling)


def test_an_encoder_decoder_needs_a_tokenizer_that_ends_the_text(tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    folder = tmp_path / "base"
    backend = make_tokenizer(folder).backend_tokenizer
    small = {"d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    special = {"pad_token_id": 1, "eos_token_id": 0, "decoder_start_token_id": 1}
    config = T5Config(vocab_size=400, **small, **special)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    with pytest.raises(UserError, match=r"t5 classifies at the end-of-text token .*does not add"):
        loaded(folder)
    ends = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 0)])
    backend.post_processor = ends
    backend.save(str(folder / "tokenizer.json"))
    assert loaded(folder)[0].pooling == "last"
