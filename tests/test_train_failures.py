"""What stops a training, what it says, and what it leaves behind."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_base, make_tokenizer
from processes import adapter_hash
from safetensors.torch import load_file, save_file
from trained import finish_in

import lora_kit as package
from lora_kit.errors import CheckFailed, Interrupted, UserError
from lora_kit.train.callbacks import read_metrics

LINEAR = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
RUN = Path("runs/test")


def finite(weights: Path) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in load_file(weights).values())


def test_nan_in_the_base_stops_at_the_first_step(run_file: Any, base: Path, work: Path) -> None:
    broken = shutil.copytree(base, work / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckFailed, match="step 1: the loss or its gradient is not finite") as stop:
        package.train(run_file("cpt", **{"base.model": str(broken)}))
    assert stop.value.exit_code == 1
    assert not (RUN / "adapter").exists()
    assert read_metrics(RUN / "metrics.jsonl") == []


@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_diverging_keeps_the_last_good_checkpoint(run_file: Any, clip: float) -> None:
    """The first step throws the weights to 1e30; the second one's gradient is not finite."""
    changes = {"learning_rate": 1e30, "save_steps": 1, "warmup_steps": 0, "max_grad_norm": clip}
    with pytest.raises(CheckFailed, match="step 2: the loss or its gradient is not finite"):
        package.train(run_file("cpt", **{f"train.{key}": value for key, value in changes.items()}))
    (checkpoint,) = (RUN / "checkpoints").iterdir()
    assert checkpoint.name == "checkpoint-1"
    assert (checkpoint / "seal.json").is_file()
    assert finite(checkpoint / "adapter_model.safetensors")
    assert [row["step"] for row in read_metrics(RUN / "metrics.jsonl")] == [1]
    assert not (RUN / "adapter").exists()
    assert not json.loads((RUN / "run.lock.json").read_text())["finished"]


@pytest.mark.slow
def test_a_rate_that_is_too_large_is_explained(
    run_file: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether or not the weights overflow in the steps that it has."""
    usual = r"lower train\.learning_rate \(10000; usual with LoRA: 1e-5 to 1e-3\)"
    with contextlib.suppress(CheckFailed):
        package.train(run_file("cpt", **{"train.learning_rate": 1e4, "train.eval_steps": 1}))
    assert re.search(f"warning: training will diverge: {usual}", capsys.readouterr().err)
    with pytest.raises(CheckFailed, match=f"is not finite .*{usual.replace('10000', '1e.30')}"):
        package.train(run_file("cpt", **{"train.learning_rate": 1e30, "name": "more"}))


MISMATCHES = {
    "nothing": ({"target_modules": ["query"]}, "`query` matches no module|'query'] matches no"),
    "one of two": ({"target_modules": ["q_proj", "v_prj"]}, "`v_prj` matches no module"),
    "expression": ({"target_modules": "h\\.[0-9]+"}, "matches no module"),
    "rank": ({"rank_pattern": {"w_proj": 4}}, "rank_pattern: `w_proj` matches no adapted module"),
    "alpha": ({"alpha_pattern": {"w_proj": 4}}, "alpha_pattern: `w_proj` matches no adapted"),
    "layers": (
        {"layers_to_transform": [1, 2], "target_modules": ["q_proj"]},
        r"layers_to_transform: \[2\]: the base has layers 0 to 1",
    ),
}


@pytest.mark.parametrize("what", MISMATCHES)
def test_patterns_that_match_nothing(run_file: Any, what: str) -> None:
    settings, words = MISMATCHES[what]
    changes = {f"adapter.{key}": value for key, value in settings.items()}
    with pytest.raises(UserError, match=words) as caught:
        package.train(run_file("cpt", **changes))
    if "matches no module" in words:
        assert f"linear modules: {LINEAR}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not Path("runs").exists()


def test_existing_run_directory_is_not_touched(run_file: Any) -> None:
    RUN.mkdir(parents=True)
    (RUN / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="runs/test exists: choose another with name=NAME"):
        package.train(run_file())
    assert [file.name for file in RUN.iterdir()] == ["thesis.txt"]
    assert (RUN / "thesis.txt").read_text() == "years of work"


def test_tokenizer_larger_than_the_embeddings(run_file: Any, work: Path) -> None:
    small = make_base(work / "small", vocab_size=300)
    make_tokenizer(small)
    with pytest.raises(UserError, match="has 400 tokens, the base 300 embeddings"):
        package.train(run_file("cpt", **{"base.model": str(small)}))
    assert not Path("runs").exists()


def test_no_rows_left(run_file: Any, work: Path) -> None:
    with pytest.raises(UserError, match=r"no rows left; .*longer than train\.max_length \(8 tok"):
        package.train(run_file("sft", **{"train.max_length": 8}))
    rows = [{"prompt": f"question {n}", "completion": "  "} for n in range(30)]
    (work / "empty.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match="30 with an empty completion") as caught:
        package.train(run_file("sft", **{"data.train": "empty.jsonl"}))
    assert "empty.jsonl" in str(caught.value)
    assert not Path("runs").exists()


@pytest.mark.slow
def test_checkpointing_changes_no_number(run_file: Any) -> None:
    file = run_file()
    package.train(file, "name=with", "train.gradient_checkpointing=true")
    package.train(file, "name=without")
    assert adapter_hash("runs/with") == adapter_hash("runs/without")


@pytest.fixture(scope="module")
def first(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose adapter is another than that of the run file."""
    changes = {"adapter.target_modules": ["q_proj"], "train.learning_rate": 1e-2}
    return finish_in(tmp_path_factory.mktemp("first"), base, **changes)


@pytest.mark.slow
def test_start_begins_with_that_adapter(run_file: Any, work: Path, first: Path) -> None:
    """Continued pre-training, then fine-tuning on top; at a learning rate of 0 nothing moves."""
    shutil.copytree(first, work / "runs" / "first")
    file = run_file("sft", **{"adapter": {"start": "runs/first"}, "train.weight_decay": 0.0})
    with pytest.raises(CheckFailed, match="the adapter did not change"):
        package.train(file, "name=still", "train.learning_rate=0")
    assert adapter_hash("runs/still") == adapter_hash("runs/first")
    report = package.train(file, "name=moved", "adapter.start=runs/first/adapter")
    assert adapter_hash("runs/moved") != adapter_hash("runs/first")
    first = json.loads(Path("runs/first/report.json").read_text())
    count = first["training"]["trainable_parameters"]
    assert report["training"]["trainable_parameters"] == count


@pytest.mark.slow
def test_start_refuses_the_adapter_of_another_base(run_file: Any, work: Path, first: Path) -> None:
    shutil.copytree(first, work / "runs" / "first")
    twin = make_base(work / "twin", initializer_range=0.03)  # the same shapes
    deeper = make_base(work / "deeper", num_hidden_layers=3)
    wider = make_base(work / "wider", hidden_size=128)
    start = {"adapter": {"start": "runs/first"}}
    with pytest.raises(UserError, match="runs/first: trained on another base"):
        package.train(run_file("cpt", **start, **{"base.model": str(twin)}))
    # An adapter alone does not say which base it is from: its tensors must at least fit.
    shutil.copytree("runs/first/adapter", "alone")
    start = {"adapter": {"start": "alone"}}
    for other, words in ((deeper, "missing tensor .*layers.2"), (wider, "does not fit the base")):
        with pytest.raises(UserError, match=words):
            package.train(run_file("cpt", **start, **{"base.model": str(other)}))
    with pytest.raises(UserError, match="neither a run directory nor an adapter folder"):
        package.train(run_file("cpt", **{"adapter": {"start": str(twin)}}))
    assert [folder.name for folder in Path("runs").iterdir()] == ["first"]


def test_a_dropout_beside_start_is_refused(run_file: Any) -> None:
    with pytest.raises(UserError, match=r"adapter\.lora_dropout: taken over from adapter\.start"):
        package.train(run_file("cpt", **{"adapter": {"start": "x", "lora_dropout": 0.3}}))


@pytest.mark.parametrize(
    ("adapter", "says"),
    [
        ({"exclude_modules": ["zzz"]}, r"exclude_modules: `zzz` matches no module"),
        ({"exclude_modules": "zzz"}, r"exclude_modules: `zzz` matches no module's full name"),
        ({"target_modules": "q_proj"}, r"write \[q_proj\]"),
    ],
)
def test_module_names_that_stand_for_nothing(
    run_file: Any, adapter: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        package.train(run_file("cpt", adapter=adapter))


def test_excluded_modules_and_layers_go_together(run_file: Any) -> None:
    adapter = {"exclude_modules": ["k_proj"], "layers_to_transform": [0], "r": 4}
    report = package.train(run_file("cpt", adapter=adapter))
    # q 64+64, v and o 64+32 and 64+64, gate and up 64+128 each, down 128+64, of rank 4
    assert report["training"]["trainable_parameters"] == 4 * (128 + 96 + 128 + 3 * 192)


@pytest.mark.slow
def test_an_interrupted_evaluation_keeps_the_adapter(
    run_file: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = run_file()
    with monkeypatch.context() as patch:
        interrupted = "lora_kit.prove.evaluate.evaluate"
        patch.setattr(interrupted, lambda *_, **__: signal.raise_signal(signal.SIGINT))
        with pytest.raises(Interrupted) as stopped:
            package.train(file)
    assert stopped.value.exit_code == 130
    assert str(stopped.value) == (
        "stopped during the evaluation; the adapter is saved in runs/test/adapter: "
        "evaluate it with lora-kit compare runs/test"
    )
    adapter = adapter_hash(RUN)
    compared = package.compare(RUN)  # the advice works
    assert (RUN / "report.json").is_file()
    report = package.train(file, resume=True)
    assert adapter_hash(RUN) == adapter
    assert report["domain"] == compared["domain"]
    with pytest.raises(UserError, match="already finished"):
        package.train(file, resume=True)


@pytest.mark.slow
def test_memory_that_runs_out_while_evaluating_keeps_the_adapter(
    run_file: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a run that had no checkpoint leaves no directory in the way of the next try."""

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("could not create a primitive")

    file = run_file()
    with monkeypatch.context() as patch:
        patch.setattr("lora_kit.prove.evaluate.evaluate", fail)
        with pytest.raises(RuntimeError):
            package.train(file)
    assert (RUN / "adapter").is_dir()
    again = package.compare(RUN, ["train.per_device_eval_batch_size=1"])
    assert again["domain"]["documents"] > 0
    with monkeypatch.context() as patch:
        patch.setattr("lora_kit.base.load.freeze", fail)
        with pytest.raises(RuntimeError):
            package.train(file, "name=other")
    assert not Path("runs/other").exists()
