"""What trains: `train.trainable` and `train.top_layers`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RunMaker
from guarded import KINDS, language_model, make
from processes import adapter_hash
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, set_seed

import lora_kit as package
from lora_kit.adapter import files
from lora_kit.adapter.attach import attach, describe, load_adapter
from lora_kit.adapter.audit import coverage
from lora_kit.errors import CheckFailed, RunFileError, UserError
from lora_kit.run import load_run
from lora_kit.schema import Adapter, Train
from lora_kit.speed.prefix import first_trained_layer
from lora_kit.train.strategies import choose
from lora_kit.train.trainer import fit

SIZES = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 1,
}
TARGETS = ["q_proj", "down_proj"]


def classifier() -> Any:
    set_seed(0)
    config = LlamaConfig(**SIZES, num_labels=3)
    return LlamaForSequenceClassification(config).requires_grad_(False)


def generator() -> Any:
    set_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).requires_grad_(False)


def trained(model: Any) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


# ------------------------------------------------------------------ top layers
def test_top_layers_hold_the_adapter() -> None:
    strategy = choose(Train(top_layers=1), Adapter(target_modules=TARGETS), generator(), ())
    assert strategy.adapter.layers_to_transform == [3]
    model = attach(generator(), strategy.adapter, (), 0)
    assert coverage(model).modules == {"q_proj": 1, "down_proj": 1}
    assert all(".layers.3." in name for name in trained(model))
    assert first_trained_layer(model) == 3  # what the frozen prefix goes by
    groups: Any = {"adapter": lambda name: ".lora_" in name}
    assert strategy.groups(groups) == groups


@pytest.mark.slow
def test_top_layers_are_layers_to_transform(run_file: RunMaker) -> None:
    file = run_file("sft")
    package.train(file, "name=top", "train.top_layers=1")
    package.train(file, "name=named", "adapter.layers_to_transform=[1]")
    assert adapter_hash("runs/top") == adapter_hash("runs/named")
    package.train(file, "name=all")
    assert adapter_hash("runs/all") != adapter_hash("runs/top")
    package.train(file, "name=both", "train.top_layers=2")
    names = [
        load_file(f"runs/{name}/adapter/adapter_model.safetensors") for name in ("all", "both")
    ]
    assert names[0].keys() == names[1].keys()


# ------------------------------------------------------------------ the head alone
def test_the_head_alone(tmp_path: Path) -> None:
    """No LoRA is made; the file holds the head, and can be put on the base again."""
    adapter = Adapter(target_modules=TARGETS, rank_pattern={"q_proj": 2})
    strategy = choose(Train(trainable="head"), adapter, classifier(), ("score",))
    assert not strategy.lora
    model = attach(classifier(), strategy.adapter, ("score",), 0)
    assert trained(model) == ["base_model.model.score.modules_to_save.default.weight"]
    assert describe(model).startswith("no LoRA: 96 trainable parameters ")
    with torch.no_grad():
        model.get_parameter(trained(model)[0]).add_(1)
    model.save_pretrained(tmp_path)
    (name,) = load_file(tmp_path / "adapter_model.safetensors")
    assert name == "base_model.model.score.weight"
    again = load_adapter(classifier(), files.open_adapter(tmp_path))
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model.eval()(ids).logits)


def test_the_head_alone_is_audited(tmp_path: Path) -> None:
    task = KINDS["classifier"].task
    adapter = Adapter(target_modules=TARGETS)
    strategy = choose(Train(trainable="head"), adapter, classifier(), ("score",))
    groups: Any = strategy.groups(task.groups(("score",)))
    assert list(groups) == ["head"]
    model = attach(classifier(), strategy.adapter, ("score",), 0)
    trainer = make("classifier", tmp_path, model=model, groups=groups, max_steps=3)
    fit(trainer, resume=False)
    audit = trainer.guard.audit
    assert audit.problems == []
    trainer.save_model(str(tmp_path / "saved"))
    audit.check_saved(tmp_path / "saved" / "adapter_model.safetensors")
    assert audit.checks[-1] == {
        "name": "saved",
        "passed": True,
        "found": "1 of 1 tensors of the head are complete in adapter_model.safetensors",
    }
    # An adapter that was not asked for is no part of it.
    with pytest.raises(CheckFailed, match="trainable, but not part of the head"):
        make("classifier", tmp_path / "other", model=language_model(3), groups=groups)


# ------------------------------------------------------------------ mistakes
START = Adapter(start="runs/other")
MISTAKES: dict[str, tuple[Train, Adapter, tuple[str, ...], str]] = {
    "head of a language model": (
        *(Train(trainable="head"), Adapter(), ()),
        "train.trainable: head: this task adds no new head",
    ),
    "head and start": (
        *(Train(trainable="head"), START, ("score",)),
        "train.trainable: head: conflicts with adapter.start",
    ),
    "too many layers": (
        *(Train(top_layers=5), Adapter(), ()),
        "train.top_layers: 5: the base has 4 layers",
    ),
    "layers twice": (
        *(Train(top_layers=1), Adapter(layers_to_transform=[0]), ()),
        "train.top_layers: conflicts with adapter.layers_to_transform",
    ),
    "layers and start": (
        *(Train(top_layers=1), START, ()),
        "train.top_layers: conflicts with adapter.start",
    ),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes_are_one_line(what: str) -> None:
    train, adapter, fresh, words = MISTAKES[what]
    with pytest.raises(UserError) as caught:
        choose(train, adapter, generator(), fresh)
    assert str(caught.value).startswith(words)
    assert "\n" not in str(caught.value)


def test_head_and_layers_together(run_file: RunMaker) -> None:
    with pytest.raises(RunFileError) as caught:
        load_run(run_file(adapter={}), ["train.trainable=head", "train.top_layers=1"])
    (problem,) = caught.value.problems
    assert problem == (
        "train.top_layers: 1 is invalid: conflicts with train.trainable: head: remove one of "
        "the two"
    )


def test_a_run_that_cannot_leaves_nothing_behind(run_file: RunMaker) -> None:
    for override in ("train.trainable=head", "train.top_layers=3"):
        with pytest.raises(UserError, match=r"train\.(trainable|top_layers): "):
            package.train(run_file(adapter={}), override)
        assert not Path("runs").exists()
