"""An evaluation changes neither what a 4-bit base computes nor the gradients through it."""

from __future__ import annotations

from pathlib import Path

import torch

from lora_kit.adapter.attach import attach
from lora_kit.base.load import load_base
from lora_kit.base.pin import pin
from lora_kit.schema import Adapter, Base
from tests.conftest import make_base


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The gradient of every adapter weight for one fixed batch."""
    ids = torch.arange(4, 36).view(2, 16)
    model.train()
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_evaluation_leaves_gradients_as_they_were(base: Path) -> None:
    run_base = Base(model=str(base), dtype="bfloat16", quantize="nf4")
    model = attach(load_base(run_base, pin(run_base)), Adapter(r=4), fresh=(), seed=0)
    before = gradients(model)
    assert sum(float(g.abs().sum()) > 0 for n, g in before.items() if "lora_B" in n) == 14
    model.eval()
    with torch.inference_mode():
        model(input_ids=torch.arange(4, 36).view(2, 16))
    after = gradients(model)
    assert before.keys() == after.keys()
    for name, gradient in before.items():
        assert torch.equal(gradient, after[name]), name


def test_rows_that_do_not_divide_by_32(tmp_path: Path) -> None:
    run_base = Base(
        model=str(make_base(tmp_path / "odd", intermediate_size=172)),
        dtype="float32",
        quantize="nf4",
    )
    model = load_base(run_base, pin(run_base))
    with torch.inference_mode():
        logits = model(input_ids=torch.arange(4, 20).view(1, 16)).logits
    assert bool(torch.isfinite(logits).all())
