"""The quick paths in whole models: the same numbers, or none of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lora_kit.speed import attention, fast, linear, patch
from lora_kit.speed.fast import documents_loss, label_nats, make_fast, make_plain
from lora_kit.tasks.batches import collator, in_one_row

SHAPE = {
    **{"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
    **{"eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 0},
}
# family: (settings of its own, parts that stay plain)
FAMILIES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "llama": ({}, set()),
    "qwen2": ({"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, set()),
    "qwen3": ({"head_dim": 16}, set()),
    "mistral": ({"sliding_window": 4, "head_dim": 16}, set()),
    "gemma": ({"head_dim": 16}, set()),
    "gemma3_text": ({"head_dim": 16, "sliding_window": 4}, set()),
    "gpt2": ({"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}, set()),
    "mixtral": ({"num_local_experts": 4}, set()),
    # Limits on scores and logits, biases of the head, scales of the logits, positions as a bias.
    "gemma2": ({"head_dim": 16, "sliding_window": 4}, {"attention", "loss"}),
    "phi": ({}, {"loss"}),
    "granite": ({"logits_scaling": 3.0}, {"loss"}),
    "bloom": ({"n_layer": 2, "n_head": 4}, {"attention"}),
    "falcon": ({}, {"linear", "attention"}),
    # Windows and chunks that only transformers' mask knows of.
    "phimoe": ({"sliding_window": 12, "num_local_experts": 4}, {"attention"}),
    "llama4_text": (
        {"attention_chunk_size": 12, "head_dim": 16, "num_local_experts": 2},
        {"attention", "loss"},
    ),
    "doge": ({"keep_window_size": 12}, {"attention"}),
    # Convolutions that look across the beginning of a document.
    "lfm2": ({"layer_types": ["conv", "full_attention"], "block_ff_dim": 96}, {"attention"}),
    # It takes attention's output for contiguous.
    "jetmoe": ({"num_local_experts": 2, "kv_channels": 16}, set()),
}


def model_of(family: str, dtype: torch.dtype = torch.float32, **adapter: Any) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    settings = {**SHAPE, **FAMILIES[family][0]}
    if family == "gpt2":  # dropout would be in the way of comparing
        settings |= {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)).to(dtype)
    base.requires_grad_(False)
    fields = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **adapter}
    if family in ("phimoe", "llama4_text"):  # PEFT cannot adapt their routers
        fields["target_modules"] = ["q_proj", "k_proj"]
    model = get_peft_model(base, LoraConfig(**fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    return model


def fast_paths(model: Any) -> dict[str, str]:
    return make_fast(model, documents_loss(model, collator(0), in_one_row))


def some_rows() -> list[dict[str, Any]]:
    noise = torch.Generator().manual_seed(3)
    ids = [torch.randint(1, 128, (n,), generator=noise).numpy() for n in (9, 20, 3)]
    rows = [{"input_ids": row, "labels": row.copy()} for row in ids]
    rows[1]["labels"][:12] = -100
    return rows


def result(model: Any, batch: dict[str, Any]) -> tuple[float, torch.Tensor]:
    model.train()
    model.zero_grad()
    loss = model(**batch, num_items_in_batch=29).loss
    loss.backward()
    grads = [p.grad.reshape(-1) for p in model.parameters() if p.grad is not None]
    return float(loss.detach()), torch.cat(grads)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_plain_path(family: str) -> None:
    model = model_of(family)
    loss, gradient = result(model, collator(0)(some_rows()))
    plain = fast_paths(model)
    assert plain.keys() == FAMILIES[family][1], plain
    flat = "attention" not in plain
    found, other = result(model, (in_one_row if flat else collator(0))(some_rows()))
    assert found == pytest.approx(loss, rel=1e-5)
    assert float((other - gradient).norm() / gradient.norm()) < 1e-4


def weighted(model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of each label, and all gradients where labels have different weights."""
    model.zero_grad()
    nats = label_nats(model, batch)
    (nats * torch.linspace(-1, 2, len(nats))).sum().backward()
    grads = [p.grad.reshape(-1) for p in model.parameters() if p.grad is not None]
    return nats.detach(), torch.cat(grads)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "phi"])
def test_the_loss_of_each_label_is_that_of_the_standard_path(family: str) -> None:
    """With the quick paths and without; gemma2 keeps the standard attention and loss."""
    model = model_of(family).eval()
    batch = collator(0)(some_rows())
    nats, gradient = weighted(model, batch)
    labels = batch["labels"][:, 1:]
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1]
    each = torch.nn.functional.cross_entropy(logits.mT, labels, reduction="none")
    assert torch.allclose(nats, each[labels != -100], atol=1e-5)
    plain = fast_paths(model)
    for flat in {False, "attention" not in plain}:
        found, other = weighted(model, (in_one_row if flat else collator(0))(some_rows()))
        assert torch.allclose(found, nats, atol=1e-5)
        assert float((other - gradient).norm() / gradient.norm()) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_of_each_label_is_the_same_without_gradients(dtype: torch.dtype) -> None:
    """To the last bit: the reference of a preference is computed as the training computes."""
    model = model_of("llama", dtype)
    assert fast_paths(model) == {}
    batch = in_one_row(some_rows())
    recorded = label_nats(model, batch)
    assert recorded.requires_grad
    with torch.no_grad():
        assert torch.equal(label_nats(model, batch), recorded)
        standard = model(**batch, reduction="none").loss
        assert not torch.equal(standard, recorded)  # evaluation stays on the standard path
    with torch.inference_mode():
        assert torch.equal(label_nats(model, batch), recorded)


def test_a_wrapped_model_is_called_through_its_wrapper() -> None:
    class Wrapper(torch.nn.parallel.DistributedDataParallel):
        def __init__(self, module: Any) -> None:
            torch.nn.Module.__init__(self)
            self.module, self.calls = module, 0

        def forward(self, **inputs: Any) -> Any:
            self.calls += 1
            return self.module(**inputs)

    model = model_of("llama")
    assert fast_paths(model) == {}
    wrapped, batch = Wrapper(model), in_one_row(some_rows())
    assert torch.equal(label_nats(wrapped, batch), label_nats(model, batch))
    assert wrapped.calls == 1


def test_an_encoder_with_a_head_takes_the_quick_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = BertConfig(vocab_size=99, num_attention_heads=2, num_labels=3, **sizes)
    fields = {"r": 4, "target_modules": "all-linear", "modules_to_save": ["classifier"]}
    model = get_peft_model(
        BertForSequenceClassification(config), LoraConfig(task_type="SEQ_CLS", **fields)
    )
    ids = torch.randint(1, 99, (2, 9), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "labels": torch.tensor([0, 2])}

    def probe(flat: bool) -> torch.Tensor:
        assert not flat
        return model(**batch).loss

    assert make_fast(model, probe, ("linear", "norm")) == {}
    assert patch.part_of(model.base_model.model.bert.encoder.layer[0].attention.self.query)
    make_plain(model)
    wrong_gradient(monkeypatch)
    assert make_fast(model, probe, ("linear", "norm")).keys() == {"linear"}


def test_a_model_that_looks_across_documents_is_found_out() -> None:
    """Also where that changes the gradients by less than rounding in 16 bits may."""
    for family, apart in (("lfm2", False), ("llama", True), ("jetmoe", True)):
        model = model_of(family)
        for install in fast.PARTS.values():
            install(model)
        assert fast._keeps_apart(model.eval()) is apart


def test_every_quick_path_is_really_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: dict[str, int] = {}

    def counting(owner: Any) -> None:
        plain = owner.forward

        def forward(*args: Any) -> Any:
            counted[owner.__name__] = counted.get(owner.__name__, 0) + 1
            return plain(*args)

        monkeypatch.setattr(owner, "forward", staticmethod(forward))

    from lora_kit.speed.loss import FrozenHeadLoss
    from lora_kit.speed.norm import FrozenRMSNorm

    model = model_of("llama")
    assert fast_paths(model) == {}
    for owner in (linear.LoraLinear, attention.DocumentAttention, FrozenHeadLoss, FrozenRMSNorm):
        counting(owner)
    result(model, in_one_row(some_rows()))
    # Two layers: seven linear ones, three documents at once in each attention, two norms and one.
    assert counted == {
        "LoraLinear": 14,
        "DocumentAttention": 2,
        "FrozenHeadLoss": 1,
        "FrozenRMSNorm": 5,
    }


def test_trying_changes_nothing_and_all_can_be_taken_out() -> None:
    model = model_of("llama", lora_dropout=0.1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    ids = torch.arange(1, 21)[None]
    with torch.no_grad():
        model.eval()
        expected = model(input_ids=ids).logits
        model.train()
    random = torch.get_rng_state()
    assert fast_paths(model) == {}
    assert torch.equal(torch.get_rng_state(), random) and model.training
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=ids).logits, expected)
    make_plain(model)
    assert not [m for m in model.modules() if "forward" in vars(m)]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, expected)


def test_generating_is_as_before() -> None:
    model = model_of("llama").eval()
    ids = torch.tensor([[0, 0, 5, 6], [9, 8, 7, 6]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": mask}
    expected = model.generate(input_ids=ids, **options)
    fast_paths(model)
    assert torch.equal(model.generate(input_ids=ids, **options), expected)


def wrong_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = linear.LoraLinear.forward
    monkeypatch.setattr(
        linear.LoraLinear,
        "forward",
        staticmethod(lambda ctx, *args: plain(ctx, *args[:-1], args[-1] * 1.5)),
    )


def wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = linear.LoraLinear.backward

    def backward(ctx: Any, *grads: Any) -> Any:
        found = list(plain(ctx, *grads))
        found[5] = found[5] * 1.2  # of B
        return tuple(found)

    monkeypatch.setattr(linear.LoraLinear, "backward", staticmethod(backward))


def documents_that_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = attention._blocks
    monkeypatch.setattr(
        attention, "_blocks", lambda documents, *others: plain([sum(documents)], *others)
    )


def norm_with_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_kit.speed.norm import FrozenRMSNorm

    plain = FrozenRMSNorm.backward
    monkeypatch.setattr(
        FrozenRMSNorm,
        "backward",
        staticmethod(lambda ctx, *grads: (plain(ctx, *grads)[0] * 2, None, None)),
    )


def unshifted_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = fast.causal_loss
    monkeypatch.setattr(
        fast, "causal_loss", lambda h, w, labels, *rest: plain(h, w, labels.roll(-1, 1), *rest[:1])
    )


@pytest.mark.parametrize(
    ("break_it", "part"),
    [
        (wrong_scale, "linear"),
        (wrong_gradient, "linear"),
        (norm_with_a_wrong_gradient, "norm"),
        (documents_that_mix, "attention"),
        (unshifted_labels, "loss"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_path_that_is_wrong_is_taken_out(
    break_it: Any, part: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check that keeps a future version of a library from training something else."""
    model = model_of("llama", dtype)
    expected = result(model, collator(0)(some_rows()))
    break_it(monkeypatch)
    plain = fast_paths(model)
    assert plain.keys() == {part}
    # What was right stays in.
    kept = {patch.part_of(module) for module in model.modules()} - {None}
    assert kept == {"linear", "norm", "loss" if part != "loss" else "attention"} - {part}
    flat = part != "attention"
    found = result(model, (in_one_row if flat else collator(0))(some_rows()))
    assert found[0] == pytest.approx(expected[0], rel=1e-2)


def test_settings_of_lora_that_are_computed_apart_stay_plain() -> None:
    assert "linear" in fast_paths(model_of("llama", use_dora=True))
    assert fast_paths(model_of("llama", use_rslora=True, alpha_pattern={"q_proj": 3})) == {}


def test_an_adapted_head_keeps_the_plain_loss() -> None:
    model = model_of("llama", target_modules=["q_proj", "lm_head"])
    assert fast_paths(model).keys() == {"loss"}
