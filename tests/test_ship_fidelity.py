"""What is lost in merging an adapter that was trained on 4 bits: the figures against the files."""

# ruff: noqa: F811 - fixtures of another file
from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_base
from safetensors.torch import load_file, save_file
from test_cli import Shell, run  # noqa: F401 - a fixture
from trained import edit, finish_in

import lora_kit
from lora_kit.adapter.files import open_adapter
from lora_kit.adapter.finished import FinishedRun
from lora_kit.base.load import load_base
from lora_kit.base.pin import pin
from lora_kit.base.tensors import stored_in
from lora_kit.errors import UserError
from lora_kit.prove.compare import prepared_again
from lora_kit.prove.into import better_base, in_words, original_weights
from lora_kit.ship import fidelity as room
from lora_kit.ship.check import check
from lora_kit.ship.export import export
from lora_kit.ship.fidelity import fidelity
from lora_kit.ship.hub import make_plan
from lora_kit.ship.merge import merge
from lora_kit.tasks.causal import Text
from lora_kit.tasks.measure import measure

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on NF4 in bfloat16, of a base whose weights are large enough to have an error."""
    folder = tmp_path_factory.mktemp("nf4")
    base = make_base(folder / "base", initializer_range=0.2)
    weights = load_file(base / "model.safetensors")  # in 16 bits, as bases come
    weights = {name: tensor.bfloat16() for name, tensor in weights.items()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    nf4 = {"base.dtype": "bfloat16", "base.quantize": "nf4", "adapter.use_rslora": True}
    return finish_in(folder, base, **nf4)


@pytest.fixture(scope="module")
def found(trained: Path) -> dict[str, Any]:
    return fidelity(FinishedRun(trained))


@pytest.fixture(scope="module")
def rows(trained: Path) -> Any:
    return prepared_again(FinishedRun(trained), Text())[1].eval


def loss(model: Any, rows: Any) -> float:
    losses = measure(model, rows, 1)
    return float(losses.nats.sum() / losses.tokens.sum())


def test_the_error_is_that_of_the_files_through_bitsandbytes(
    trained: Path, found: dict[str, Any]
) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    settings = FinishedRun(trained).base
    pinned = pin(settings)
    stored, held = stored_in(Path(pinned.folder)), load_base(settings, pinned)
    norms = {one["module"]: one["norm"] for one in open_adapter(trained).figures()}
    assert {one["module"] for one in found["modules"]} == norms.keys() and len(norms) == 14
    for one in found["modules"]:
        weight = stored[f"{one['module']}.weight"].read().to(torch.bfloat16)
        options = {"blocksize": 64, "compress_statistics": True, "quant_type": "nf4"}
        rough = dequantize_4bit(*quantize_4bit(weight, **options))
        module = held.get_submodule(one["module"]).weight
        assert torch.equal(rough, dequantize_4bit(module.data, module.quant_state))
        error = float((weight.float() - rough.float()).norm())
        assert one["error"] == pytest.approx(error, rel=1e-5) and 0 < error < one["weight"]
        assert one["update"] == norms[one["module"]] > 0
    total = np.linalg.norm([one["error"] for one in found["modules"]])
    assert found["whole"]["error"] == pytest.approx(float(total))


def test_the_losses_are_those_of_the_models_that_merge_writes(
    trained: Path, found: dict[str, Any], rows: Any, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model, tokenizer = lora_kit.load(trained)
    assert found["loss"] == pytest.approx(loss(model, rows), rel=1e-6)
    with model.disable_adapter():
        assert loss(model, rows) > found["loss"] + 0.2  # a loud one
    for into in room.INTO:
        folder = merge(FinishedRun(trained), tmp_path / into, into=into).out
        merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        assert found[into]["loss"] == pytest.approx(loss(merged, rows), rel=1e-6)
        same = room._measured(model, merged, rows, tokenizer.pad_token_id)
        assert same[3].sum() == found["tokens"]
        assert same[2].sum() / same[3].sum() == pytest.approx(found[into]["kl"], rel=1e-3)
    assert 0 <= found["dequantized"]["kl"] < 0.1 * found["base"]["kl"]


def test_the_divergence_by_hand(trained: Path, rows: Any) -> None:
    model, tokenizer = lora_kit.load(trained)
    other, _ = lora_kit.load(trained, quantize="none")
    sums = room._measured(model, other, rows, tokenizer.pad_token_id)
    apart = np.zeros(sums.shape[1])
    for n in range(len(rows)):
        ids = torch.as_tensor(rows[n]["input_ids"])[None].long()
        with torch.inference_mode():
            p, q = (m(ids).logits[0, :-1].double().log_softmax(-1) for m in (model, other))
        apart[rows.cell("unit", n)] += float((p.exp() * (p - q)).sum())
    assert np.allclose(sums[2], apart, rtol=0.05) and apart.min() > 0


def test_divergence_is_zero_of_a_model_from_itself_and_counted_by_document(
    trained: Path, rows: Any
) -> None:
    model, tokenizer = lora_kit.load(trained)
    sums = room._measured(model, model, rows, tokenizer.pad_token_id)
    losses = measure(model, rows, tokenizer.pad_token_id)
    assert np.allclose(sums[0], losses.nats, rtol=1e-5) and (sums[0] == sums[1]).all()
    assert np.array_equal(sums[3], losses.tokens) and abs(sums[2]).max() == 0


def test_the_verb_says_which_and_what_is_lost(run: Shell, trained: Path, found: Any) -> None:
    done = run("check", str(trained), "--fidelity", "--json")
    assert done.code == 0 and json.loads(done.out) == {**found, "run": str(trained)}
    both = run("check", str(trained), "--fidelity", "--target", "vllm")
    assert both.code == 2 and "--fidelity --target vllm: use only one of them" in both.err
    done = run("check", str(trained), "--fidelity")
    assert done.code == 0 and "mlp.up_proj" in done.out and "layers.1" in done.out
    assert found["why"] in done.out
    assert f"--into {found['recommended']} --out merged" in done.out


def figures_of(base: float, dequantized: float) -> dict[str, Any]:
    losses = {"base": base, "dequantized": dequantized}
    return {into: {"loss": l_, "difference": l_ - 3.0} for into, l_ in losses.items()}


@pytest.mark.parametrize(
    ("base", "dequantized", "bounds", "into", "words"),
    [
        (3.012, 3.0, (0.01, 0.02), "dequantized", "0.0120 nats per token worse"),
        (3.012, 3.0, (-0.01, 0.02), "dequantized", "no difference that these rows show"),
        (3.0004, 3.0, (0.0003, 0.0005), "dequantized", "no difference"),
        (2.95, 3.0, (-0.06, -0.04), "base", "0.0500 better"),
        (3.2, 3.1, (0.01, 0.02), "dequantized", "its loss is 0.1000 nats per token higher; into"),
    ],
)
def test_the_advice(
    base: float, dequantized: float, bounds: tuple[float, float], into: str, words: str
) -> None:
    advice = room._advice("runs/a b", figures_of(base, dequantized), *bounds)
    assert advice["recommended"] == into and words in advice["why"]
    assert advice["command"] == f"lora-kit merge 'runs/a b' --into {into} --out merged"


def test_a_run_that_was_not_quantized_has_no_choice(cpt_run: Path, run: Shell) -> None:
    with pytest.raises(UserError, match=r"base\.quantize is none: only an adapter trained on nf4"):
        fidelity(FinishedRun(cpt_run))
    done = run("check", str(cpt_run), "--fidelity")
    assert (done.code, len(done.errors)) == (2, 1)
    done = run("check", str(cpt_run / "adapter"), "--fidelity")
    assert (done.code, len(done.errors)) == (2, 1)


def test_what_is_advised_can_be_exported(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_kit.errors import CheckFailed
    from lora_kit.ship import gguf
    from lora_kit.ship.export import export

    found = export(FinishedRun(trained), "gguf", tmp_path / "gguf", "f32", into="dequantized")[
        "reloaded"
    ]
    assert found["max_difference"] <= 1e-3 < 0.1 < found["adapter_effect"]
    with pytest.raises(UserError, match="only where a merged model is written"):
        export(FinishedRun(trained), "portable", tmp_path / "no", into="dequantized")

    def into_the_other(*arguments: Any, into: str, **options: Any) -> Any:
        return merge(*arguments, **options, into="base")

    monkeypatch.setattr(gguf, "merge", into_the_other)
    with pytest.raises(CheckFailed, match="log-probabilities differ"):
        export(FinishedRun(trained), "gguf", tmp_path / "other", "f32", into="dequantized")


# --- Both bases, measured at the end of a run


def test_a_run_measures_both_bases(trained: Path, found: dict[str, Any]) -> None:
    report = json.loads((trained / "report.json").read_text())
    into = report["into"]
    assert into["dequantized"]["loss"] == report["domain"]["loss"]["adapted"]
    assert into["dequantized"]["loss"] == pytest.approx(found["loss"], abs=2e-3)
    # `fidelity` merges, which rounds.
    assert into["base"]["loss"] == pytest.approx(found["base"]["loss"], rel=2e-3)
    assert into["base"].keys() == into["dequantized"].keys() == {"loss", "bits_per_byte"}
    assert abs(into["base"]["loss"] - into["dequantized"]["loss"]) > 1e-3


def test_the_trained_layers_come_back(trained: Path) -> None:
    model, tokenizer = lora_kit.load(trained, dtype="float32")
    exact, _ = lora_kit.load(trained, dtype="float32", quantize="none")
    ids = tokenizer("the quick brown fox", return_tensors="pt").input_ids
    with torch.inference_mode():
        before = model(ids).logits
        with original_weights(model) as other:
            assert torch.allclose(other(ids).logits, exact(ids).logits, atol=1e-4)
        assert (before - exact(ids).logits).abs().max() > 0.01
        assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize(
    ("losses", "into", "chosen"),
    [
        ((2.87, 2.74), "auto", "dequantized"),
        ((2.74, 2.87), "auto", "base"),
        ((2.87, 2.74), "base", "base"),
        (None, "auto", "base"),
    ],
)
def test_auto_takes_the_better_base_and_prints_both(
    run: Shell,
    trained: Path,
    tmp_path: Path,
    losses: tuple[float, float] | None,
    into: str,
    chosen: str,
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    measured = dict(zip(("base", "dequantized"), ({"loss": n} for n in losses or ()), strict=False))
    edit(folder / "report.json", lambda report: report.update(into=measured or None))
    more = [] if into == "auto" else ["--into", into]
    done = run("merge", str(folder), "--out", str(tmp_path / "m"), *more)
    assert done.code == 0
    assert json.loads((tmp_path / "m" / "merge.json").read_text())["into"] == chosen
    wanted = "has no scores of both bases" if losses is None else "2.8700"
    assert wanted in done.err and (losses is None or "2.7400" in done.err)
    # What ships the adapter alone ships it onto the original base.
    notes = check(FinishedRun(folder), "vllm")["notes"]
    assert bool(notes) == (losses == (2.87, 2.74))
    if chosen == "dequantized":
        assert export(FinishedRun(folder), "portable", tmp_path / "p")["notes"] == notes
    card = make_plan(FinishedRun(folder), "me/x").card.text
    assert ("2\\.8700" in card or "2.8700" in card) == (losses is not None)


def test_scores_other_than_the_loss_and_what_was_not_measured(tmp_path: Path) -> None:
    into = {"base": {"accuracy": 0.7}, "dequantized": {"accuracy": 0.8}}
    assert better_base(into) == "dequantized"
    assert better_base({"base": {"loss": 2.0}, "dequantized": {"loss": 2.0}}) == "base"
    assert "accuracy 0.8000" in in_words(into)
