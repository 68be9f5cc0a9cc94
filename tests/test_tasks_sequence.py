"""Sequence classification: rows, loss, scores, and what an adapter is compared with."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from classifiers import classify_file, make_body, texts, write_rows
from conftest import make_tokenizer

from lora_kit.adapter.attach import attach
from lora_kit.base.load import LARGEST_COUNTS
from lora_kit.base.pin import pin
from lora_kit.data.rows import Rows
from lora_kit.errors import RunFileError, UserError
from lora_kit.run import load_run
from lora_kit.schema import Run
from lora_kit.tasks import probe
from lora_kit.tasks.encode import rows_of
from lora_kit.tasks.probe import Probe, draw, fit
from lora_kit.tasks.sequence import Classification, Rule, macro_f1

TASK = Classification()
LABELS = ["animals", "food", "time"]


def opened(file: Path) -> Run:
    return load_run(file, task_of=lambda _: TASK)


def made(folder: Path, family: str = "Bert", **changes: Any) -> tuple[Any, ...]:
    """A model with its adapter, processor, rows and run, on a base without dropout."""
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    base = make_body(folder / "base", family, **(off if family == "Bert" else {}))
    run = opened(classify_file(folder, base, **changes))
    pinned = pin(run.base)
    processor, data = rows_of(TASK, run, pinned)
    model, fresh = TASK.model(pinned, data.facts, run)
    return attach(model, run.adapter, fresh, run.seed), processor, data, run


# ------------------------------------------------------------------ labels
def facts(labels: dict[str, int], names: Any = None, dropped: str = "") -> dict[str, Any]:
    data: Any = SimpleNamespace(labels=names)
    train: Any = SimpleNamespace(labels=labels, dropped=dropped)
    return TASK.facts(train, data)


def test_labels_are_in_alphabetical_order_or_in_that_of_the_run_file() -> None:
    assert facts({"a": 1, "b": 2})["labels"] == ["a", "b"]
    assert facts({"a": 1, "b": 2}, ["b", "c", "a"]) == {
        "labels": ["b", "c", "a"],
        "rows": [2, 0, 1],
    }


def test_one_class_is_refused_and_few_rows_are_reported() -> None:
    one = "1 class in the rows, 'a': a classifier needs at least two"
    with pytest.raises(UserError, match=f"{one}$"):
        facts({"a": 9})
    with pytest.raises(UserError, match=f"{one}; dropped: 7 with a null `label`"):
        facts({"a": 9}, dropped="7 with a null `label`")
    found = facts(dict.fromkeys("abcde", 1) | {"f": 2}, list("abcdefg"))
    assert TASK.notes(set(), found) == [
        "1 class has no training row: g",
        "5 classes have one training row: a, b, c and 2 more",
    ]


def test_more_classes_than_an_adapter_can_name() -> None:
    """`Head.read` and a base's config have the same limit."""
    most = LARGEST_COUNTS["labels"]
    names = [str(number) for number in range(most + 1)]
    assert len(facts(dict.fromkeys(names[:-1], 1))["labels"]) == most
    with pytest.raises(UserError, match=r"data\.train: 131,073 classes: at most 131,072 are"):
        facts(dict.fromkeys(names, 1))


def test_names_of_labels_are_not_empty_and_differ_by_more_than_white_space() -> None:
    twice = "the label 'a' is empty or duplicate"
    for names in (["a", "b", "a"], ["a", "b", "a "]):
        with pytest.raises(UserError, match=rf"data\.labels: {twice}"):
            facts({"a": 1, "b": 2}, names)
    with pytest.raises(UserError, match=rf"data\.train: {twice}"):
        facts({" a": 1, "a": 2})
    with pytest.raises(UserError, match=r"data\.labels: the label '' is empty"):
        facts({"a": 1, "b": 2}, ["a", "b", " "])


def test_a_held_out_label_that_no_training_row_has_is_counted(tmp_path: Path) -> None:
    """As where each class has one row, or all rows of one are near each other."""
    run = opened(classify_file(tmp_path, make_body(tmp_path / "base")))
    rows = [row | {"label": f"class {number}"} for number, row in enumerate(texts(60))]
    write_rows(tmp_path / "rows.jsonl", rows)
    words = r"data\.eval: no rows left; dropped: 24 whose label is in no training row \(first: "
    with pytest.raises(UserError, match=words):
        rows_of(TASK, run, pin(run.base))
    write_rows(tmp_path / "rows.jsonl", rows[:50] + texts(60)[50:])
    with pytest.raises(UserError, match=r"\d of 60 rows .* whose label is in no training row"):
        rows_of(TASK, run, pin(run.base))


def test_a_class_with_one_row_is_trained_on(tmp_path: Path) -> None:
    base = make_body(tmp_path / "base")
    file = classify_file(tmp_path, base)
    write_rows(tmp_path / "rows.jsonl", [*texts(60), {"text": "a stone", "label": "rare"}])
    run = opened(file)
    _, data = rows_of(TASK, run, pin(run.base))
    assert data.facts == {"labels": ["animals", "food", "rare", "time"], "rows": [12, 12, 1, 12]}
    assert "1 class has one training row: rare" in data.census.notes
    assert data.facts["labels"].index("rare") in data.rows("train").column("labels")


# ------------------------------------------------------------------ rows
def test_texts_are_encoded_with_special_tokens_and_truncated(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path, bos=True)
    run: Any = SimpleNamespace(train=SimpleNamespace(max_length=8))
    examples: Any = [
        SimpleNamespace(text="the fox", label="b"),
        SimpleNamespace(text="the quick brown fox jumps over the lazy dog", label="a"),
    ]
    short, long = TASK.encode(examples, tokenizer, {"labels": ["a", "b"]}, run)
    assert short[0]["input_ids"].tolist() == tokenizer("the fox")["input_ids"]  # type: ignore[index]
    assert short[0]["labels"] == 1 and short[0]["truncated"] == ""  # type: ignore[index]
    assert long[0]["input_ids"].tolist() == tokenizer(examples[1].text)["input_ids"][:8]  # type: ignore[index]
    assert long[0]["truncated"] == "cut to train.max_length (8 tokens)"  # type: ignore[index]


def test_batches_are_padded_and_halved_by_length() -> None:
    collate = TASK.collate(SimpleNamespace(pad_token_id=1))
    sizes = (3, 5, 2, 4, 5)
    batch = collate([{"input_ids": np.arange(n) + 10, "labels": n, "unit": 0} for n in sizes])
    assert batch["input_ids"].shape == (5, 5) and batch["attention_mask"].sum(1).tolist() == [
        *sizes
    ]
    assert batch["input_ids"][2].tolist() == [10, 11, 1, 1, 1] and TASK.items(batch) == 5
    (first, factor), (second, _) = TASK.halve(batch)
    assert (
        factor == 1
        and first["labels"].tolist() == [5, 5]
        and second["labels"].tolist() == [4, 3, 2]
    )
    assert second["input_ids"].shape == (3, 4)
    assert TASK.halve({name: values[:1] for name, values in batch.items()}) == []


# ------------------------------------------------------------------ loss
@pytest.mark.parametrize("family", ["Bert", "Llama"])
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_the_loss_does_not_depend_on_how_a_step_is_cut(
    family: str, quantize: str, tmp_path: Path
) -> None:
    model, processor, data, run = made(tmp_path, family, **{"base.quantize": quantize})
    collate = TASK.collate(processor)
    rows = [data.rows("train")[n] for n in range(8)]
    model.train()

    def gradients(batches: list[Any]) -> tuple[float, list[torch.Tensor]]:
        model.zero_grad()
        losses = [TASK.loss(model, batch, 8, run.train) for batch in batches]
        sum(losses).backward()  # type: ignore[union-attr]
        found = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        return sum(loss.item() for loss in losses), found

    whole, expected = gradients([collate(rows)])
    assert whole == pytest.approx(np.log(3), abs=1)
    each, found = gradients([collate([row]) for row in rows])
    halved, by_halves = gradients([part for part, _ in TASK.halve(collate(rows))])
    assert each == pytest.approx(whole, rel=1e-5) and halved == pytest.approx(whole, rel=1e-5)
    size = torch.sqrt(sum(g.square().sum() for g in expected))
    for some in (found, by_halves):
        off = torch.sqrt(sum((a - b).square().sum() for a, b in zip(some, expected, strict=True)))
        assert off / size < 1e-5


# ------------------------------------------------------------------ scores
def held_out(labels: list[int]) -> Any:
    from lora_kit.data.rows import Rows

    return Rows.of(
        {"input_ids": [5, 6], "labels": label, "unit": unit} for unit, label in enumerate(labels)
    )


def test_scores_are_those_of_the_definition() -> None:
    true, predicted = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 1]
    rule = Rule(lambda rows: np.array(predicted))
    run: Any = None
    accuracy, f1 = TASK.score(rule, held_out(true), None, {"labels": [*"abcd"]}, run)
    assert (accuracy.name, f1.name) == ("accuracy", "macro_f1")
    assert accuracy.figure == pytest.approx(3 / 6)
    # a: P 1, R 2/3; b: P 1/3, R 1/2; c: nothing right. d does not occur.
    assert f1.figure == pytest.approx((0.8 + 0.4 + 0.0) / 3)
    assert accuracy.about["confusion"] == [[2, 1, 0, 0], [0, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    # A resample is a sum over some units: here the first four.
    assert macro_f1(f1.sums[:4].sum(0)) == pytest.approx((0.8 + 2 / 3) / 2)
    assert macro_f1(np.stack([f1.sums.sum(0)] * 2)).shape == (2,)


def test_the_model_decides_by_its_largest_logit_whatever_the_padding(tmp_path: Path) -> None:
    model, processor, data, run = made(tmp_path)
    scores = TASK.score(model, data.eval, processor, data.facts, run)
    collate, right = TASK.collate(processor), 0
    model.eval()
    for row in data.eval:
        batch = collate([row])
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"]).logits
        right += int(logits.argmax()) == row["labels"]
    assert scores[0].sums.sum(0).tolist() == [right, len(data.eval)]


# ------------------------------------------------------------------ rivals
def test_the_linear_probe_is_of_the_frozen_base_and_the_best_rival(tmp_path: Path) -> None:
    model, processor, data, run = made(tmp_path)
    given = (data, processor, data.facts, run)

    def accuracies() -> dict[str, float]:
        found = {}
        for contender in TASK.rivals(model, *given):
            with contender.enter() as rival:
                scores = TASK.score(rival, data.eval, processor, data.facts, run)
            found[contender.name] = scores[0].figure
        return found

    before = accuracies()
    assert list(before) == ["linear_probe", "majority"]
    assert before["majority"] == pytest.approx(1 / 3, abs=0.02)
    assert before["linear_probe"] > 0.5
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.normal_(parameter)  # an adapter that changes everything
    assert accuracies() == before


def test_the_majority_is_the_best_rival_where_features_tell_nothing(tmp_path: Path) -> None:
    base = make_body(tmp_path / "base")
    file = classify_file(tmp_path, base)
    rows = [{"text": row["text"], "label": "often"} for row in texts(60)]
    for row in rows[::4]:
        row["label"] = "seldom"
    write_rows(tmp_path / "rows.jsonl", rows)
    run = opened(file)
    pinned = pin(run.base)
    processor, data = rows_of(TASK, run, pinned)
    model, fresh = TASK.model(pinned, data.facts, run)
    model = attach(model, run.adapter, fresh, 0)
    rivals = TASK.rivals(model, data, processor, data.facts, run)
    assert rivals[0].name == "majority"


@pytest.mark.parametrize(
    ("metrics", "best"),
    [([], "majority"), (["macro_f1"], "linear_probe"), (["accuracy", "macro_f1"], "majority")],
)
def test_the_best_rival_is_chosen_by_the_score_that_decides(
    metrics: list[str], best: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where features tell a little, always predicting the most frequent class may have the higher
    accuracy, and never has the higher macro-F1."""
    classes = np.where(np.arange(120) % 10 < 7, 0, 1 + np.arange(120) % 2)
    features = np.random.default_rng(0).normal(size=(120, 30)).astype(np.float32)
    features[np.arange(120), classes] += 1
    monkeypatch.setattr(probe, "_STRENGTHS", (0.001,))
    monkeypatch.setattr(TASK, "_each", lambda model, of, rows, _: features[rows.column("unit")])
    rows = Rows.of({"labels": label, "unit": unit} for unit, label in enumerate(classes.tolist()))
    data: Any = SimpleNamespace(rows=lambda use: rows)
    model = SimpleNamespace(disable_adapter=contextlib.nullcontext)
    run: Any = SimpleNamespace(seed=0, prove=SimpleNamespace(metrics=metrics))
    rivals = TASK.rivals(model, data, None, {"labels": LABELS}, run)
    assert rivals[0].name == best


def accuracy(fitted: Probe, classes: np.ndarray) -> float:
    """In cross-validation."""
    assert sorted(fitted.compared) == list(range(len(classes)))
    return float((fitted.predicted == classes[fitted.compared]).mean())


def test_a_probe_separates_what_can_be_separated_and_comes_again() -> None:
    generator = np.random.default_rng(0)
    classes = np.arange(120) % 4
    features = generator.normal(size=(120, 16)).astype(np.float32) * 5 + 100
    features[np.arange(120), classes] += 40
    found, again = (fit(features, classes, 5, seed=1) for _ in range(2))  # one class has no row
    assert accuracy(found, classes) > 0.99 and (found.classes(features) == classes).mean() > 0.99
    assert np.array_equal(found.weight, again.weight)
    noise = fit(generator.normal(size=(120, 16)).astype(np.float32), classes, 4, seed=1)
    assert accuracy(noise, classes) < 0.45 and noise.strength == 0.3
    single = fit(features[:3], np.array([0, 1, 2]), 3, seed=0)  # a row a class
    assert np.isfinite(single.weight).all()
    assert len(draw(20_000, 0)) == 10_000 and len(draw(7, 0)) == 7


# ------------------------------------------------------------------ the run file
def test_keys_of_the_task(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    run = opened(classify_file(tmp_path, base, **{"base.pooling": "mean"}))
    assert run.base.model_dump()["pooling"] == "mean"
    file = classify_file(
        tmp_path, base, **{"base.pooling": "max", "data.packing": "running", "prove.shots": 2}
    )
    with pytest.raises(RunFileError) as raised:
        opened(file)
    message = str(raised.value)
    assert "data.packing: recipe classify does not read it" in message
    assert "prove.shots: recipe classify does not read it" in message
    assert 'base.pooling: "max" is invalid: one of mean, cls, last or null' in message
    values = json.loads(classify_file(tmp_path, base, **{"base.pooling": "mean"}).read_text())
    file.write_text(json.dumps(values | {"recipe": "sft"}))
    with pytest.raises(RunFileError, match=r"base\.pooling"):
        load_run(file)


def test_only_its_own_scores_can_decide(tmp_path: Path) -> None:
    run: Any = SimpleNamespace(prove=SimpleNamespace(metrics=["macro_f1", "rouge_l"]))
    data: Any = None
    assert TASK.check(data, None, {}, run) == [
        "prove.metrics: rouge_l: unknown; this recipe's scores: accuracy, macro_f1"
    ]
