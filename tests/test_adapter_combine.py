"""Adapters combined without a model are what PEFT makes of them with one; and what they are worth
is measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_base
from safetensors.torch import load_file
from trained import edit, finish, folder_maker
from typer.testing import CliRunner

import lora_kit
from lora_kit.adapter import extract
from lora_kit.adapter.combine import METHODS, combine
from lora_kit.adapter.files import open_adapter
from lora_kit.adapter.finished import FinishedRun
from lora_kit.cli import app
from lora_kit.errors import UserError
from lora_kit.ship.combined import combine_and_measure

WEIGHTS = [0.7, -0.4]
PEFTS = {"linear": "cat", "svd": "svd", "ties": "ties_svd", "dare": "dare_linear_svd"}


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def make(base: Path, out: Path, seed: int, **settings: Any) -> Path:
    """An adapter of random numbers."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    settings = {"init_lora_weights": False, "task_type": "CAUSAL_LM", **settings}
    get_peft_model(load(base), LoraConfig(**settings)).save_pretrained(str(out))
    return out


@pytest.fixture(scope="module")
def pair(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Of different ranks, scales and modules; PEFT visits these in our order, which `dare` needs
    to draw the same."""
    folder = tmp_path_factory.mktemp("pair")
    # PEFT 0.21 gives the result the first one's rsLoRA, and so a scale of sqrt(r).
    one = {"r": 8, "lora_alpha": 4, "rank_pattern": {"layers.1.mlp.up_proj": 3}}
    two = {"r": 5, "lora_alpha": 9, "use_rslora": True}
    two["alpha_pattern"] = {"layers.0.mlp.up_proj": 20}
    return [
        make(base, folder / "a", 1, target_modules=["gate_proj", "up_proj"], **one),
        make(base, folder / "b", 2, target_modules=["up_proj"], **two),
    ]


def of_peft(
    base: Path, pair: list[Path], kind: str, patch: pytest.MonkeyPatch
) -> tuple[Any, dict[str, Any]]:
    """The model with PEFT's own combination, and its dW by module."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(load(base), str(pair[0]), adapter_name="a")
    model.load_adapter(str(pair[1]), adapter_name="b")
    # Called between the random start of the new adapter and its combination.
    patch.setattr("peft.tuners.lora.model._freeze_adapter", lambda *_: torch.manual_seed(3))
    model.add_weighted_adapter(["a", "b"], WEIGHTS, "all", combination_type=kind, density=0.3)
    model.set_adapter("all")
    return model, {
        name.removeprefix("base_model.model."): module.get_delta_weight("all")
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


@pytest.mark.parametrize("method", PEFTS)
def test_each_method_is_pefts(
    method: str, base: Path, pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import PeftModel

    made = combine(
        [*map(FinishedRun, pair)], tmp_path / "out", method, WEIGHTS, density=0.3, seed=3
    )
    model, wanted = of_peft(base, pair, PEFTS[method], monkeypatch)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(wanted) == 4 and len(tensors) == 8
    for module, update in wanted.items():
        a, b = (tensors[f"base_model.model.{module}.lora_{half}.weight"] for half in "AB")
        assert len(a) == b.shape[1] == made["rank"] == {"linear": 13}.get(method, 8)
        assert update.norm() > 0.5
        assert (b @ a - update).abs().max() <= 2e-5 * update.abs().max()
    got = PeftModel.from_pretrained(load(base), str(tmp_path / "out"))
    ids = torch.arange(3, 67)[None]
    with torch.inference_mode():
        ours, theirs, plain = (m(input_ids=ids).logits for m in (got, model, load(base)))
    assert (ours - theirs).abs().max() <= 1e-4 < 0.1 < (ours - plain).abs().max()


def test_another_rank_blocks_and_embeddings_change_nothing_else(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All methods on all kinds of module; `ties` and `linear` cut to a rank as `svd` is."""
    targets = ["embed_tokens", "q_proj", "down_proj"]
    pair = [make(base, tmp_path / str(n), n, r=4, target_modules=targets) for n in (1, 2)]

    def updates(out: Path) -> dict[str, Any]:
        tensors = load_file(out / "adapter_model.safetensors")
        halves = sorted(tensors)
        return {a: tensors[b] @ tensors[a] for a, b in zip(halves[::2], halves[1::2], strict=True)}

    for kind in ("linear", "ties"):
        combine([*map(FinishedRun, pair)], tmp_path / f"{kind}-whole", kind, WEIGHTS, rank=4)
    combine([*map(FinishedRun, pair)], tmp_path / "svd", "svd", WEIGHTS)
    monkeypatch.setattr(extract, "_BLOCK", 1000)
    combine([*map(FinishedRun, pair)], tmp_path / "ties-blocks", "ties", WEIGHTS)
    for one, other in (("linear-whole", "svd"), ("ties-whole", "ties-blocks")):
        first, second = updates(tmp_path / one), updates(tmp_path / other)
        assert first.keys() == second.keys() and len(first) == 5
        for module, update in first.items():
            assert (update - second[module]).abs().max() <= 1e-4 * update.abs().max()
    made = combine([*map(FinishedRun, pair)], tmp_path / "sum")
    assert made["rank"] == 8 and made["weights"] == [0.5, 0.5]
    parts = [open_adapter(folder) for folder in pair]
    whole = open_adapter(tmp_path / "sum")
    assert "model.embed_tokens" in whole.factors
    for module in whole.factors:
        one, other, both = (adapter.update(module) for adapter in (*parts, whole))
        wanted = (one.scale * one.b @ one.a + other.scale * other.b @ other.a) / 2
        assert torch.allclose(both.b @ both.a, wanted, atol=1e-5) and both.scale == 1


def test_mistakes_are_named_and_leave_nothing(base: Path, pair: list[Path], tmp_path: Path) -> None:
    wide = make_base(tmp_path / "wide", intermediate_size=96)
    other = make(wide, tmp_path / "other", 1, target_modules=["up_proj"])
    same_name = make(wide, tmp_path / "same", 1, target_modules=["up_proj"])
    edit(
        same_name / "adapter_config.json",
        lambda c: c.update(base_model_name_or_path=str(base)),
    )
    dora = make(base, tmp_path / "dora", 1, target_modules=["up_proj"], use_dora=True)
    saved = make(base, tmp_path / "saved", 1, target_modules=["q_proj"], modules_to_save=["norm"])
    cases: list[tuple[list[Path], dict[str, Any], str]] = [
        ([pair[0], other], {}, "different bases or revisions"),
        ([pair[0], same_name], {}, "up_proj is"),
        ([pair[0], dora], {}, "use_dora"),
        ([pair[0], saved], {}, "modules_to_save"),
        (pair[:1], {}, "name two or more"),
        (pair, {"weights": [1.0]}, "1 for 2 adapters"),
        (pair, {"weights": [1.0, float("nan")], "density": 0.0}, "below a million\n--density"),
        (pair, {"rank": 0}, "--rank 0"),
        ([*pair, tmp_path / "nowhere"], {}, "nowhere"),
    ]
    for paths, settings, words in cases:
        with pytest.raises(UserError, match="(?s)" + words):
            combine([*map(FinishedRun, paths)], tmp_path / "out", **settings)
    assert not list(tmp_path.glob("*out*"))
    done = CliRunner().invoke(app, ["combine", *map(str, pair), "--out", "x", "--weights", "1;2"])
    assert isinstance(done.exception, UserError)


@pytest.fixture(scope="module")
def runs(
    base: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch_module: pytest.MonkeyPatch
) -> list[Path]:
    """Two, trained for real on the same text, split by two seeds."""
    folder = tmp_path_factory.mktemp("runs")
    monkeypatch_module.chdir(folder)
    maker = folder_maker(folder, base)
    changes = {"base.dtype": "float32", "prove.shots": 0}
    return [finish(maker, **changes, name=name, seed=seed) for name, seed in (("a", 0), ("b", 1))]


@pytest.fixture(scope="module")
def monkeypatch_module() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.mark.slow
def test_all_methods_are_measured_and_the_best_is_written(runs: list[Path], tmp_path: Path) -> None:
    names, out = [str(run) for run in runs], tmp_path / "out"
    on = ["--on", names[0], "--on", names[1]]
    done = CliRunner().invoke(app, ["combine", *names, "--out", str(out), *on, "--json"])
    assert done.exit_code == 0, done.output
    assert "split by another seed" in done.stderr
    found = json.loads(done.stdout)
    losses = {name: loss["mean"] for name, loss in found["losses"].items()}
    assert list(losses) == ["base", *names, *PEFTS]
    assert losses[names[0]] < losses["base"] - 0.1
    assert found["method"] == min(PEFTS, key=losses.__getitem__)
    assert found["best_single"] == min(names, key=losses.__getitem__)
    gain = losses[found["method"]] - losses[found["best_single"]]
    assert found["difference"] == pytest.approx(gain, abs=1e-3)
    # What a run's own report says of its rows is what is measured here.
    own = json.loads((runs[0] / "report.json").read_text())["domain"]["loss"]
    for who, key in (("base", "base"), (names[0], "adapted")):
        assert found["losses"][who][names[0]] == pytest.approx(own[key], abs=2e-4)
    # What was written is what was measured, with its tokenizer and where it comes from.
    lock = json.loads((out / "run.lock.json").read_text())
    assert [one["adapter"] for one in lock["combined"]["of"]] == ["a", "b"]
    assert str(runs[0].parent) not in (out / "run.lock.json").read_text()
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == []
    model, tokenizer = lora_kit.load(out)
    assert tokenizer.chat_template and model.peft_config["default"].r == found["rank"]


def test_a_combination_that_is_no_better_is_called_so(runs: list[Path], tmp_path: Path) -> None:
    names = [str(run) for run in runs]
    options = ["--method", "linear", "--weights", "0.01,0.01", "--on", names[0]]
    done = CliRunner().invoke(app, ["combine", *names, "--out", str(tmp_path / "out"), *options])
    assert done.exit_code == 0, done.output
    assert "the combination is worse: the best adapter alone" in done.output
    assert "svd" not in done.output and (tmp_path / "out" / "adapter_config.json").is_file()


def test_weights_that_changed_since_training_are_refused(runs: list[Path], tmp_path: Path) -> None:
    lock = runs[1] / "run.lock.json"
    before = lock.read_text()
    cases = {
        "different bases or revisions": {"base": {"hashes": {"config.json": "0"}}},
        "was changed since the run saved it": {"adapter": {"sha256": "0"}},
    }
    for words, changes in cases.items():
        lock.write_text(json.dumps({**json.loads(before), **changes}))
        with pytest.raises(UserError, match=words):
            combine([*map(FinishedRun, runs)], tmp_path / "out")
        lock.write_text(before)


def test_adapters_may_be_called_as_methods_and_the_base_are(runs: list[Path]) -> None:
    import shutil

    for source, name in zip(runs, ("svd", "base"), strict=True):
        shutil.copytree(source / "adapter", name)
    adapters = [FinishedRun("svd"), FinishedRun("base")]
    found = combine_and_measure(adapters, Path("named"), [FinishedRun(runs[0])], None)
    assert found["losses"].keys() == {"base", "./svd", "./base", *METHODS}
    assert found["best_single"] in ("./svd", "./base")
    assert found["losses"]["base"]["mean"] != found["losses"]["./base"]["mean"]
    assert found["losses"]["svd"]["mean"] != found["losses"]["./svd"]["mean"]
