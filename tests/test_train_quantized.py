"""QLoRA on 4 and 8 bits: it trains, leaves the base alone, and fits the base in full precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import sentences
from prepared import put_texts, texts

import lora_kit as package
from lora_kit.tasks import measure as measuring
from lora_kit.train.callbacks import read_metrics
from lora_kit.train.guards import Guards

pytestmark = pytest.mark.slow


def packed(model: Any) -> dict[str, torch.Tensor]:
    """The base's tensors as they are stored, and the scales that unpack 4 bits."""
    found = {}
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            found[name] = parameter.detach().clone()
            state = getattr(parameter, "quant_state", None)
            if state is not None:
                found[f"{name}.absmax"] = state.absmax.clone()
    return found


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_trains_and_fits_the_plain_base(
    run_file: Any, base: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    seen: list[dict[str, torch.Tensor]] = []
    real = Guards.train

    def train(self: Any, *args: Any, **options: Any) -> Any:
        seen.append(packed(self.model))
        result = real(self, *args, **options)
        seen.append(packed(self.model))
        return result

    monkeypatch.setattr(Guards, "train", train)
    file = run_file("cpt", **{"base.quantize": kind, "train.max_steps": 12, "adapter.r": 8})
    report = package.train(file)

    stored = {"nf4": torch.uint8, "int8": torch.int8}[kind]
    before, after = seen
    assert before.keys() == after.keys()
    assert sum(tensor.dtype == stored for tensor in before.values()) >= 14
    assert sum(name.endswith("absmax") for name in before) == (14 if kind == "nf4" else 0)
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name

    losses = [row["loss"] for row in read_metrics(Path("runs/test/metrics.jsonl"))]
    assert losses[-1] < losses[0] - 0.05
    assert report["domain"]["loss"]["adapted"] < report["domain"]["loss"]["base"] - 0.05

    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapter = "runs/test/adapter"
    theirs = PeftModel.from_pretrained(plain, adapter).eval()
    ours, tokenizer = package.load("runs/test", quantize="none")
    assert AutoTokenizer.from_pretrained(adapter).get_vocab() == tokenizer.get_vocab()
    ids = tokenizer(sentences(3)[0], return_tensors="pt").input_ids
    with torch.inference_mode():
        one, two = theirs(ids).logits, ours(ids).logits
        with ours.disable_adapter():
            without = ours(ids).logits
        quantized = package.load("runs/test")[0](ids).logits
    assert torch.equal(one, two)
    effect = float((one - without).abs().max())
    assert effect > 0.05
    # Trained on the rounded base, it says nearly the same on the exact one.
    assert float((one - quantized).abs().max()) < effect / 2


@pytest.mark.parametrize("kind", ["none", "nf4"])
def test_all_tokens_that_are_scored_are_counted(
    run_file: Any, work: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those of training rows, examples in the prompt, and a quantized base's own weights."""
    scored: list[int] = []
    real = measuring.measure

    def measure(model: Any, rows: Any, *given: Any) -> Any:
        scored.append(int(rows.sizes("input_ids").sum()))
        return real(model, rows, *given)

    monkeypatch.setattr(measuring, "measure", measure)
    put_texts(work / "general.txt", texts(40))
    changes = {"base.quantize": kind, "prove.budget": 0.25, "data.general": "general.txt"}
    found = package.train(run_file("cpt", **changes))["evaluated"]
    assert found["domain"]["units"] < found["domain"]["of"]
    assert len(scored) == (7 if kind == "none" else 8)
    assert sum(scored) == found["tokens"]
