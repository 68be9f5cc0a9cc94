"""What is counted on the meta device is what a pass takes; what is chosen from it fits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_kit.adapter.attach import attach
from lora_kit.schema import Adapter
from lora_kit.speed import fast, memory
from lora_kit.speed.memory import Choice, Machine, PassCost, choose_batch, on_meta, recompute
from lora_kit.tasks.batches import collator, in_one_row


def llama(device: str, **adapter: Any) -> Any:
    """Three layers in float32 with an adapter; as it is in training."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.requires_grad_(False)
    model.config.use_cache = False
    return attach(model, Adapter(r=4, **adapter), (), 0).train()


def rows_on_meta(rows: list[list[int]], flat: bool) -> dict[str, Any]:
    """A micro-batch without content: the lengths of the documents in each row."""
    made = []
    for documents in rows:
        ids = np.arange(sum(documents)) % 96
        positions = np.concatenate([np.arange(length) for length in documents])
        row = {"input_ids": ids, "labels": ids.copy()}
        made.append(row if len(documents) == 1 else {**row, "position_ids": positions})
    return on_meta((in_one_row if flat else collator(0))(made))


def count(model: Any, batch: dict[str, Any]) -> PassCost:
    return memory.count(model, batch, lambda model, batch: model(**batch).loss)


def on_cpu(batch: dict[str, Any]) -> dict[str, Any]:
    """The same batch with content."""
    return {
        name: torch.ones_like(value, device="cpu") if torch.is_tensor(value) else value
        for name, value in batch.items()
    }


@pytest.mark.parametrize("again", [0, 2, 3])
@pytest.mark.parametrize("rows", [[[16], [16]], [[16], [9]]], ids=["equal", "padded"])
def test_a_pass_that_is_counted_is_the_one_that_runs(rows: list[list[int]], again: int) -> None:
    counted = []
    for device in ("meta", "cpu"):
        model = llama(device)
        batch = rows_on_meta(rows, flat=False)
        if device == "meta":
            memory.count_attention(model.get_base_model())
        else:
            batch = on_cpu(batch)
        assert recompute(model, again) == 3
        counted.append(count(model, batch))
    assert counted[0].peak == pytest.approx(counted[1].peak, rel=0.02)
    assert counted[0].flops == counted[1].flops > 0
    assert counted[0].tokens == counted[1].tokens == 32


def test_of_the_quick_paths_too() -> None:
    counted = []
    for device in ("meta", "cpu"):
        model = llama(device)
        batch = rows_on_meta([[16], [7, 9]], flat=True)
        if device == "cpu":
            assert fast.make_fast(model, fast.documents_loss(model, collator(0), in_one_row)) == {}
            places = torch.arange(batch["places"].numel())
            batch = {**on_cpu(batch), "places": places}
        else:
            assert memory.assume_fast(model)
        counted.append(count(model, batch))
    assert counted[0].flops == counted[1].flops
    assert counted[0].peak == pytest.approx(counted[1].peak, rel=0.02)


def test_no_product_goes_uncounted() -> None:
    """The quick paths multiply in place, and what they do is 4 FLOP a weight and token at least."""
    model = llama("meta")
    weights = sum(m.weight.numel() for m in model.modules() if type(m) is torch.nn.Linear)
    assert memory.assume_fast(model)
    work = count(model, rows_on_meta([[32]], flat=True))
    assert 4 * weights * 32 < work.flops < 8 * weights * 32


def test_a_plan_for_a_gpu_counts_the_attention_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's variable-length attention: no blocks, no kept probabilities, no padding."""

    def counted(gpu: bool, use_cpu: str = "false") -> PassCost:
        monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
        monkeypatch.setenv("ACCELERATE_USE_CPU", use_cpu)
        model = llama("meta")
        assert memory.assume_fast(model)
        return count(model, rows_on_meta([[41, 17, 3]], flat=True))

    cpu, gpu = counted(False), counted(True)
    assert counted(True, "true") == cpu
    operations = [sum(work.done.values()) for work in (cpu, gpu)]
    # In each of the three layers: three documents in blocks, forward and backward.
    assert operations[1] < operations[0] - 3 * 3 * 10
    assert gpu.peak < cpu.peak
    weights = sum(m.weight.numel() for m in llama("meta").modules() if type(m) is torch.nn.Linear)
    assert 4 * weights * 61 < gpu.flops < 8 * weights * 61


def test_what_is_kept_for_the_backward_pass_is_what_autograd_keeps() -> None:
    model = llama("cpu")
    batch = on_cpu(rows_on_meta([[16], [16]], flat=False))
    known = [*model.parameters(), *model.buffers(), *filter(torch.is_tensor, batch.values())]
    own = {x.untyped_storage().data_ptr() for x in known}
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    counter = memory._CostCounter(known, 96)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), counter:
        out = model(**batch)
    for x in (out.loss, out.logits):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    # Of the rest autograd keeps no tensor but a number or a mask.
    assert counter.alive == pytest.approx(sum(kept.values()), rel=0.02)


def test_logits_are_told_from_activations() -> None:
    model = llama("meta")
    memory.count_attention(model.get_base_model())
    work = count(model, rows_on_meta([[16]], flat=False))
    assert work.logits % (96 * 4) == 0
    assert 2 * 16 * 96 * 4 <= work.logits < work.peak


@pytest.mark.parametrize("flat", [False, True], ids=["plain", "quick"])
def test_computing_again_changes_memory_and_time_and_no_gradient(flat: bool) -> None:
    def gradients(again: int) -> tuple[PassCost, torch.Tensor]:
        model = llama("cpu")
        batch = on_cpu(rows_on_meta([[60]] * 4, flat))
        if flat:
            assert fast.make_fast(model, fast.documents_loss(model, collator(0), in_one_row)) == {}
            batch["places"] = torch.arange(batch["places"].numel())
        recompute(model, again)
        work = count(model, dict(batch))
        model(**batch).loss.backward()
        grads = [p.grad.reshape(-1) for p in model.parameters() if p.grad is not None]
        return work, torch.cat(grads)

    none, expected = gradients(0)
    some, found = gradients(2)
    every, also = gradients(3)
    assert none.peak > some.peak > every.peak
    assert none.flops < some.flops < every.flops
    assert torch.equal(found, expected) and torch.equal(also, expected)


def test_layers_below_the_adapter_keep_nothing_and_are_not_computed_again() -> None:
    high, whole = llama("meta", layers_to_transform=[2]), llama("meta")
    assert recompute(high, 0) == 1 and recompute(whole, 0) == 3
    works = []
    for model in (high, whole):
        memory.count_attention(model.get_base_model())
        works.append(count(model, rows_on_meta([[16]], flat=False)))
    assert works[0].peak < works[1].peak and works[0].flops < works[1].flops


# --- The choice, on numbers


@given(
    rows=st.integers(1, 48),
    layers=st.integers(0, 20),
    row=st.integers(1, 1000),
    saved=st.integers(0, 100),  # bytes of a row, by computing a layer again
    start=st.floats(0.1, 10),  # seconds of a pass besides its rows
    limit=st.integers(0, 60_000),
    data=st.data(),
)
@settings(max_examples=300, deadline=None)
def test_what_is_chosen_fits_is_the_same_step_and_the_quickest(
    rows: int, layers: int, row: int, saved: int, start: float, limit: int, data: st.DataObject
) -> None:
    own = data.draw(st.sampled_from([n for n in range(1, rows + 1) if rows % n == 0]))
    least = data.draw(st.integers(0, layers))

    def fits(micro: int, again: int) -> bool:
        return micro * (row + saved * (layers - again)) <= limit

    def seconds(micro: int, again: int) -> float:
        return start + micro * (1 + 0.3 * again)

    found = choose_batch(rows, own, range(least, layers + 1), fits, seconds)
    every = [
        rows // n * seconds(n, k)
        for n in range(1, own + 1)
        for k in range(least, layers + 1)
        if rows % n == 0 and fits(n, k)
    ]
    if found is None:
        assert not every
        return
    assert found.micro_batch * found.accumulation == rows and found.micro_batch <= own
    assert least <= found.recomputed and fits(found.micro_batch, found.recomputed)
    if fits(own, least):
        assert found == Choice(own, rows // own, least)
    # Only every eighth of the layers is tried.
    spare = 0.3 * math.ceil((layers - least) / 8) * rows
    taken = found.accumulation * seconds(found.micro_batch, found.recomputed)
    assert taken <= min(every) + (spare if layers - least > 8 else 0) + 1e-9


def test_an_operation_takes_its_arithmetic_or_its_memory_and_its_start() -> None:
    machine = Machine("cpu", 100, 0, {"float32": 1e3, "bfloat16": 2e3}, 1e2)
    done = {(4000, 100, "float32"): 1, (4000, 100, "bfloat16"): 2, (0, 500, "int64"): 3}
    work = PassCost(tokens=1, peak=0, logits=0, done=done)
    alone = (4 + 2 * 2 + 3 * 5) / memory._RATE_REACHED
    assert machine.seconds(work) == pytest.approx(alone + (1 + 2 + 3) * memory.CALL_S, rel=1e-9)
    assert work.flops == 12000
    assert machine.limit < machine.room


def test_nothing_of_a_pass_is_left_behind() -> None:
    model = llama("cpu")
    batch = on_cpu(rows_on_meta([[8]], flat=False))
    first, second = count(model, dict(batch)), count(model, dict(batch))
    assert first == second
    assert all(p.grad is None for p in model.parameters())
