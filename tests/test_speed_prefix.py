"""Frozen layers: without autograd, run once, and the same is learned."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from trained import labelled

from lora_kit.speed import prefix as module
from lora_kit.speed.fast import documents_loss, make_fast
from lora_kit.speed.prefix import Prefix, first_trained_layer
from lora_kit.tasks.batches import collator, in_one_row
from lora_kit.tasks.packing import Packed, content_hash

LAYERS = 4
SHAPE = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 1,
}


@pytest.fixture(autouse=True)
def root(own_cache: Path) -> Path:
    return own_cache


def base(family: str = "llama", **changes: Any) -> Any:
    import transformers as t

    torch.manual_seed(0)
    if family == "gpt2":
        sizes = {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "vocab_size": 120, "eos_token_id": 0}
        quiet = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "bos_token_id": 0}
        return t.GPT2LMHeadModel(t.GPT2Config(**{**sizes, **quiet, **changes}))
    if family == "opt":
        sizes = {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}
        return t.OPTForCausalLM(t.OPTConfig(**{**SHAPE, **sizes, **changes}))
    if family == "gemma2":  # layers of two kinds, a limit on the logits
        sizes = {"head_dim": 8, "sliding_window": 4}
        return t.Gemma2ForCausalLM(t.Gemma2Config(**{**SHAPE, **sizes, **changes}))
    return t.LlamaForCausalLM(t.LlamaConfig(**{**SHAPE, **changes}))


TOP = {
    "llama": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [2, 3]},
    "gemma2": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [2, 3]},
    "opt": {"target_modules": ["q_proj", "fc2"], "layers_to_transform": [2, 3]},
    "gpt2": {"target_modules": r".*\.h\.[23]\.attn\.c_attn", "fan_in_fan_out": True},
}


def adapted(family: str = "llama", model: Any = None, **settings: Any) -> Any:
    model = (base(family) if model is None else model).requires_grad_(False)
    torch.manual_seed(1)
    config = LoraConfig(task_type="CAUSAL_LM", **(settings or TOP[family]))
    return get_peft_model(model, config).train()


def data(count: int = 7, seed: int = 0) -> Any:
    chooser = np.random.default_rng(seed)
    rows = [chooser.integers(2, 120, chooser.integers(5, 20)).tolist() for _ in range(count)]
    return labelled([(row, row) for row in rows], list(range(count)), [1] * count)


def keep(prefix: Prefix, rows: Any, passes: float) -> str:
    lengths = rows.lengths if isinstance(rows, Packed) else rows.sizes("input_ids")
    return prefix.keep(lengths, content_hash(rows), passes)


class Calls:
    """Counts how often each layer computes."""

    def __init__(self, model: Any) -> None:
        layers = module.decoder_layers(model)
        self.counts = [0] * len(layers)
        for number, layer in enumerate(layers):
            mlp = getattr(layer, "mlp", None) or layer.fc1
            mlp.register_forward_pre_hook(lambda *_, n=number: self.count(n))

    def count(self, number: int) -> None:
        self.counts[number] += 1

    def new(self) -> list[int]:
        counts, self.counts = self.counts, [0] * len(self.counts)
        return counts


def step(model: Any, rows: Any, numbers: list[int], prefix: Prefix | None = None) -> Any:
    batch = in_one_row([rows[n] for n in numbers])
    given = {k: batch[k] for k in ("input_ids", "labels", "position_ids")}
    with prefix.batch(numbers) if prefix else nullcontext():
        loss = model(**given, use_cache=False).loss
        loss.backward()
    return loss.detach()


def train(
    model: Any, rows: Any, prefix: Prefix | None = None, epochs: int = 3, shuffled: bool = False
) -> tuple[list[float], dict[str, Any]]:
    """Losses and adapter after some epochs, two rows a batch."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 3e-2)
    torch.manual_seed(2)
    chooser, losses = np.random.default_rng(0), []
    for _ in range(epochs):
        order = (chooser.permutation(len(rows)) if shuffled else np.arange(len(rows))).tolist()
        for first in range(0, len(order), 2):
            losses.append(float(step(model, rows, order[first : first + 2], prefix)))
            optimizer.step()
            optimizer.zero_grad()
    return losses, {k: v.clone() for k, v in get_peft_model_state_dict(model).items()}


def same(one: Any, other: Any, atol: float = 0.0) -> None:
    torch.testing.assert_close(one[0], other[0], rtol=0, atol=atol)
    torch.testing.assert_close(one[1], other[1], rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_the_same_is_learned_and_the_layers_run_once(family: str, dtype: torch.dtype) -> None:
    """Bit for bit, also with LoRA's own dropout, which draws from the same generator."""
    rows, settings = data(), {**TOP[family], "lora_dropout": 0.2}
    expected = train(adapted(model=base(family).to(dtype), **settings), rows)
    model = adapted(model=base(family).to(dtype), **settings)
    prefix = Prefix(model)
    said = keep(prefix, rows, 3)
    assert "first 2 run without gradients" in said and said.endswith("later epochs skip them")
    calls = Calls(model)
    found = train(model, rows, prefix)
    same(found, expected)
    batches = 4
    assert calls.new() == [batches, batches, 3 * batches, 3 * batches]
    assert sum(expected[0][-batches:]) < sum(expected[0][:batches]) - 0.1
    # The next run, or this one continued, has them from its first batch.
    prefix.close()
    again = adapted(model=base(family).to(dtype), **settings)
    prefix, calls = Prefix(again), Calls(again)
    assert keep(prefix, rows, 1).endswith("reusing an earlier run's")
    calls.new()
    same(train(again, rows, prefix), expected)
    assert calls.new() == [0, 0, 3 * batches, 3 * batches]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_is_kept_is_what_was_computed_though_rows_are_padded(family: str) -> None:
    model, rows = adapted(family, base(family).to(torch.bfloat16)), data(2)
    assert make_fast(model, documents_loss(model, collator(0), in_one_row)) == {}
    prefix, calls = Prefix(model), Calls(model)
    keep(prefix, rows, 3)
    calls.new()
    passes = []
    for _ in range(2):
        batch = in_one_row([rows[n] for n in (0, 1)])
        model.zero_grad()
        with prefix.batch([0, 1]):
            loss = model(**batch).loss
            loss.backward()
        passes.append([loss, *(p.grad for p in model.parameters() if p.requires_grad)])
    torch.testing.assert_close(passes[0], passes[1], rtol=0, atol=0)
    assert calls.new() == [1, 1, 2, 2]


@pytest.mark.parametrize("packed", [False, True])
def test_in_other_batches_it_is_the_same_to_rounding(packed: bool) -> None:
    rows = Packed(data(11), 40) if packed else data(11)
    expected = train(adapted(), rows, shuffled=True)
    model = adapted()
    prefix, calls = Prefix(model), Calls(model)
    keep(prefix, rows, 3)
    calls.new()
    same(train(model, rows, prefix, shuffled=True), expected, atol=2e-4)
    batches = (len(rows) + 1) // 2
    assert calls.new() == [batches, batches, 3 * batches, 3 * batches]


def test_an_adapter_on_the_head_alone_runs_no_layer_twice() -> None:
    rows = data()
    expected = train(adapted(target_modules=["lm_head"]), rows)
    model = adapted(target_modules=["lm_head"])
    prefix, calls = Prefix(model), Calls(model)
    keep(prefix, rows, 3)
    calls.new()
    same(train(model, rows, prefix), expected)
    assert calls.new() == [4] * LAYERS


LAST = {"target_modules": ["q_proj"], "layers_to_transform": [3]}
LOWEST: dict[str, tuple[dict[str, Any], int]] = {
    "the last layer": (LAST, 3),
    "two layers": ({**LAST, "layers_to_transform": [1, 3]}, 1),
    "all": ({"target_modules": "all-linear"}, 0),
    "the head": ({"target_modules": ["lm_head"]}, LAYERS),
    "a whole head": ({**LAST, "modules_to_save": ["lm_head"]}, 3),
    "embeddings": ({"target_modules": ["embed_tokens", "lm_head"]}, 0),
    "whole embeddings": ({**LAST, "modules_to_save": ["embed_tokens"]}, 0),
    "some tokens": ({**LAST, "trainable_token_indices": [3, 4]}, 0),
}


@pytest.mark.parametrize(("settings", "lowest"), LOWEST.values(), ids=LOWEST)
def test_autograd_begins_at_the_lowest_trained_layer(settings: dict[str, Any], lowest: int) -> None:
    model = adapted(**settings)
    assert first_trained_layer(model) == lowest
    seen: list[bool] = []
    for layer in module.decoder_layers(model):
        layer.register_forward_hook(lambda _, __, out: seen.append(out.requires_grad))
    step(model, data(), [0])
    assert seen == [n >= lowest for n in range(LAYERS)]


def test_nothing_is_frozen_below_what_is_in_no_layer() -> None:
    """A head that is also the embeddings; a norm, of which nobody knows where it stands."""
    tied = base(tie_word_embeddings=True)
    whole = {"modules_to_save": ["lm_head"], "ensure_weight_tying": True}
    for model in adapted(model=tied, **LAST, **whole), adapted(**LAST, modules_to_save=["norm"]):
        assert first_trained_layer(model) == 0
        said = keep(Prefix(model), data(), 3)
        assert said == "frozen layers: none below the trained ones"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_gradient_is_recorded_below(checkpointing: bool) -> None:
    """Checkpointing makes the embeddings' output want a gradient, which would go through all."""
    model = adapted()
    expected = step(model, data(), [0, 1]), [p.grad for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    prefix, saved, below = Prefix(model), [], [False]
    layers = module.decoder_layers(model)
    layers[0].register_forward_pre_hook(lambda *_: below.__setitem__(0, True))
    outputs = []

    def end(_: Any, __: Any, out: Any) -> None:
        below[0] = False
        outputs.append(out)

    layers[1].register_forward_hook(end)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.nbytes * below[0])
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = step(model, data(), [0, 1], prefix)
    assert outputs[0].grad_fn is None and not outputs[0].requires_grad
    assert saved and sum(saved) == 0
    found = loss, [p.grad for p in model.parameters() if p.requires_grad]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "dropout": ("llama", {"attention_dropout": 0.1}, "they use random numbers"),
    "dropout of embeddings": ("gpt2", {"embd_pdrop": 0.1}, "they use random numbers"),
    "documents of a row see each other": ("opt", {}, "depend on more than these states"),
}


@pytest.mark.parametrize(("family", "changes", "why"), REFUSED.values(), ids=REFUSED)
def test_where_states_are_not_the_rows_own_none_are_kept(
    family: str, changes: dict[str, Any], why: str, root: Path
) -> None:
    expected = train(adapted(model=base(family, **changes), **TOP[family]), data())
    model = adapted(model=base(family, **changes), **TOP[family])
    prefix, before = Prefix(model), torch.get_rng_state()
    assert why in keep(prefix, data(), 3)
    assert torch.equal(before, torch.get_rng_state()) and model.training
    assert not root.exists()
    same(train(model, data(), prefix), expected)


def test_a_layer_that_reads_what_a_frozen_one_left_is_noticed() -> None:
    model, left = adapted(), {}
    layers = module.decoder_layers(model)
    layers[0].mlp.register_forward_hook(lambda _, __, out: left.update(left=out))
    layers[3].register_forward_pre_hook(lambda _, x: (x[0] + 100 * left["left"], *x[1:]))
    assert "depend on more than these states" in keep(Prefix(model), data(), 3)


def test_evaluation_generation_and_what_is_saved_are_untouched() -> None:
    rows, other = data(), data(3, seed=5)
    expected = train(adapted(), rows)
    plain, model = adapted(), adapted()
    saved = list(get_peft_model_state_dict(model)), list(model.state_dict())
    prefix, calls = Prefix(model), Calls(model)
    keep(prefix, rows, 3)
    prompt = torch.tensor([[5, 6, 7]])
    for _ in range(2):  # while nothing is kept yet, and when all is
        for judged in plain, model:
            judged.eval()
        torch.manual_seed(0)
        with torch.no_grad():
            ids = torch.from_numpy(other[1]["input_ids"])[None]
            assert torch.equal(model(ids).logits, plain(ids).logits)
            text = [m.generate(input_ids=prompt, max_new_tokens=5) for m in (plain, model)]
        assert torch.equal(*text)
        for numbers in [0, 1], [2, 3], [4, 5], [6]:
            step(model.train(), rows, numbers, prefix)
        model.zero_grad()
    same(train(model, rows, prefix), expected)
    assert (list(get_peft_model_state_dict(model)), list(model.state_dict())) == saved
    prefix.close()
    assert not any("forward" in vars(layer) for layer in module.decoder_layers(model))
    calls.new()
    step(model, rows, [0])
    assert calls.new() == [1] * LAYERS
