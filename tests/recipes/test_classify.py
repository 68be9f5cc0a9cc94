"""The classify recipe on tiny bases: its files, its report, and the way of a run through the
verbs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from classifiers import classify_file, make_body, texts, write_rows
from safetensors.torch import load_file
from typer.testing import CliRunner

import lora_kit
from lora_kit.adapter.finished import FinishedRun
from lora_kit.cli import app
from lora_kit.errors import UserError
from lora_kit.ship.merge import merge

LABELS = ["animals", "food", "time"]
PLAIN = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
HARD = {"train.max_steps": 30}


def report_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "report.json").read_text())
    return found


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_body(tmp_path_factory.mktemp("bert") / "base", **PLAIN)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    return folder


@pytest.fixture(scope="module")
def finished(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose base is a sentence-transformers folder with mean pooling."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        lora_kit.train(classify_file(folder, bert, **HARD))
    return folder / "runs" / "test"


def test_the_report_compares_it_with_the_best_rival(finished: Path) -> None:
    report = report_of(finished)
    domain, contenders = report["domain"], report["contenders"]
    assert domain["documents"] == 64 and domain["rival"] == "linear_probe"
    assert contenders.keys() == {"adapted", "linear_probe", "majority"}
    assert all(found.keys() == {"accuracy", "macro_f1"} for found in contenders.values())
    assert domain["accuracy"]["adapted"] == contenders["adapted"]["accuracy"] > 0.6
    assert domain["accuracy"]["base"] == contenders["linear_probe"]["accuracy"]
    assert contenders["majority"]["accuracy"] == pytest.approx(1 / 3, abs=0.02)
    for score in ("accuracy", "macro_f1"):
        low, high = domain[score]["ci95"]
        assert low <= domain[score]["difference"] <= high
    low, high = domain["accuracy"]["ci95"]
    expected = "better" if low > 0 else "worse" if high < 0 else "no different"
    assert report["verdict"] == {"domain": expected}
    assert report["general"] is None and report["audit"]["problems"] == []
    classes = report["classes"]
    assert classes["labels"] == LABELS and classes["per_class"].keys() == set(LABELS)
    right = np.trace(classes["confusion"]) / np.sum(classes["confusion"])
    assert round(right, 4) == domain["accuracy"]["adapted"]
    assert "confusion" in (finished / "report.html").read_text(encoding="utf-8").lower()


def test_the_lock_and_the_adapter_name_head_and_labels(finished: Path) -> None:
    lock = json.loads((finished / "run.lock.json").read_text())
    assert lock["recipe"]["name"] == "classify"
    assert lock["auto"] == "AutoModelForSequenceClassification"
    assert lock["facts"]["labels"] == LABELS and sum(lock["facts"]["rows"]) == 96
    assert lock["fresh"] == ["score"] and lock["pooling"] == "mean"
    head = json.loads((finished / "adapter" / "head.json").read_text())
    assert head["id2label"] == dict(zip("012", LABELS, strict=True)) and head["pooling"] == "mean"
    config = json.loads((finished / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] is None and config["auto_mapping"] is None
    tensors = load_file(finished / "adapter" / "adapter_model.safetensors")
    assert tensors["base_model.model.score.weight"].shape == (3, 64)
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1].keys() >= {"step", "loss", "tokens", "seconds"} and rows[-1]["step"] == 30


@pytest.mark.parametrize("alone", [False, True])
def test_it_is_loaded_again_from_the_run_or_its_adapter_alone(
    finished: Path, alone: bool, tmp_path: Path
) -> None:
    source = finished
    if alone:  # as it is found elsewhere, without the run
        source = Path(shutil.copytree(finished / "adapter", tmp_path / "alone"))
    model, tokenizer = lora_kit.load(source, dtype="float32")
    rows = [
        json.loads(line) for line in (finished.parents[1] / "rows.jsonl").read_text().splitlines()
    ]
    batch = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    names = [model.config.id2label[int(number)] for number in logits.argmax(1)]
    right = np.mean([name == row["label"] for name, row in zip(names, rows, strict=True)])
    assert right > 0.7


def test_comparing_again_gives_the_same_figures(finished: Path) -> None:
    before = report_of(finished)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(finished.parents[1])
        again = lora_kit.compare(finished)
    for part in ("domain", "contenders", "classes", "verdict"):
        assert again[part] == before[part]


def test_verbs_that_do_not_apply_say_so_in_one_line(finished: Path) -> None:
    for verb in (["generate", str(finished), "a fox"], ["export", str(finished), "--out", "x"]):
        result = CliRunner().invoke(app, verb)
        assert result.exit_code != 0
        assert isinstance(result.exception, UserError) or result.exit_code == 2
    result = CliRunner().invoke(app, ["inspect", str(finished)])
    assert result.exit_code == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Bert", {}),
        ("Llama", {"base.quantize": "nf4"}),
        ("ModernBert", {"base.pooling": "mean", "base.dtype": "bfloat16"}),
    ],
)
def test_encoders_and_decoders_end_as_models_that_transformers_loads(
    family: str, changes: dict[str, Any], work: Path
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    base = make_body(work / "base", family)
    lora_kit.train(classify_file(work, base, **changes))
    run = FinishedRun(work / "runs" / "test")
    merged = merge(run, work / "merged", dtype="float32")
    model = AutoModelForSequenceClassification.from_pretrained(merged.out).eval()
    tokenizer = AutoTokenizer.from_pretrained(merged.out)
    assert list(model.config.id2label.values()) == LABELS
    ours, _ = lora_kit.load(run.path, dtype="float32", quantize="none")
    batch = tokenizer([row["text"] for row in texts(9)], padding=True, return_tensors="pt")
    batch.pop("token_type_ids", None)
    with torch.no_grad():
        assert (model(**batch).logits - ours(**batch).logits).abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_accumulation_changes_nothing(quantize: str, bert: Path, work: Path) -> None:
    found = []
    for name, rows, passes in (("whole", 8, 1), ("cut", 1, 8)):
        changes = {
            "name": name,
            "base.quantize": quantize,
            "speed": "plain",
            "train.per_device_train_batch_size": rows,
            "train.gradient_accumulation_steps": passes,
            "train.optim": "adamw_torch",
            "train.adam_epsilon": 1e-3,  # else a gradient of 1e-9 moves a weight as one of 1 does
        }
        lora_kit.train(classify_file(work, bert, **changes))
        run = work / "runs" / name
        lines = (run / "metrics.jsonl").read_text().splitlines()
        losses = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
        found.append((losses, load_file(run / "adapter" / "adapter_model.safetensors")))
    (losses, whole), (again, cut) = found
    assert len(losses) == 4 and again == pytest.approx(losses, rel=1e-5)
    for name, tensor in whole.items():
        assert torch.allclose(tensor, cut[name], rtol=1e-4, atol=1e-5), name


def test_a_head_alone_is_trained_and_loaded(bert: Path, work: Path) -> None:
    lora_kit.train(classify_file(work, bert, **HARD, **{"train.trainable": "head", "adapter": {}}))
    tensors = load_file("runs/test/adapter/adapter_model.safetensors")
    assert sorted(tensors) == ["base_model.model.score.bias", "base_model.model.score.weight"]
    model, _ = lora_kit.load("runs/test")
    assert torch.equal(model.score.weight, tensors["base_model.model.score.weight"])


@pytest.mark.slow
def test_a_run_starts_from_a_classifier_of_the_same_classes(
    finished: Path, bert: Path, work: Path, tmp_path: Path
) -> None:
    """The rows of a head have no names: in another order they would stand for other classes."""
    start = {"adapter": {"start": str(finished)}, "train.max_steps": 1}
    before = report_of(finished)["contenders"]["adapted"]["accuracy"]
    lora_kit.train(classify_file(work, bert, **start, **{"train.learning_rate": 1e-6}))
    report = report_of(work / "runs" / "test")
    assert report["contenders"]["adapted"]["accuracy"] == pytest.approx(before, abs=0.05)
    for changes, words in (
        ({"data.labels": LABELS[::-1]}, "its classes are animals, food, time, here they are time,"),
        (
            {"data.labels": [*LABELS, "more"]},
            r"its classes are .* time, more: name them .* data\.labels",
        ),
    ):
        with pytest.raises(UserError, match=rf"adapter\.start: {finished}: {words}") as raised:
            lora_kit.train(classify_file(work, bert, name="other", **start, **changes))
        assert "\n" not in str(raised.value)
    assert [folder.name for folder in (work / "runs").iterdir()] == ["test"]


def test_a_classifier_does_not_start_from_a_language_model(
    cpt_run: Path, base: Path, work: Path
) -> None:
    file = classify_file(work, base, **{"adapter": {"start": str(cpt_run)}})
    words = "an adapter for AutoModelForCausalLM, and this recipe trains AutoModelForSequenceClass"
    with pytest.raises(UserError, match=words):
        lora_kit.train(file)
    assert not any((work / "runs").glob("*"))


def _one_class(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        row["label"] = "food"


def _numbers(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        row["label"] = len(row["label"])


def _no_label(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        del row["label"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_one_class, r"1 class in the rows, 'food': a classifier needs at least two"),
        (_numbers, r"a number without a name|data\.labels"),
        (_no_label, r"label"),
    ],
)
def test_rows_that_cannot_be_classified(damage: Any, words: str, bert: Path, work: Path) -> None:
    file = classify_file(work, bert)
    rows: list[dict[str, Any]] = texts(60)
    damage(rows)
    write_rows(work / "rows.jsonl", rows)
    with pytest.raises(UserError, match=words):
        lora_kit.train(file)
    assert not (work / "runs").exists() or not any((work / "runs").iterdir())


def test_labels_of_held_out_rows_must_be_those_of_training_rows(bert: Path, work: Path) -> None:
    file = classify_file(work, bert, **{"data.eval": "eval.jsonl"})
    write_rows(work / "eval.jsonl", [{"text": "a stone", "label": "Food"}, *texts(30, seed=5)])
    with pytest.raises(UserError, match=r"the label .Food. is in no row of data\.train") as raised:
        lora_kit.train(file)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("recipe", ["sft", "cpt"])
def test_an_encoder_is_not_taken_for_a_language_model(
    recipe: str, run_file: Any, work: Path
) -> None:
    base = make_body(work / "base", "Roberta", "ForCausalLM")
    file = run_file(recipe, **{"base.model": str(base)})
    with pytest.raises(UserError, match=r"RobertaForCausalLM is not causal") as raised:
        lora_kit.train(file)
    assert "\n" not in str(raised.value)
    assert not (work / "runs" / "test").exists()
