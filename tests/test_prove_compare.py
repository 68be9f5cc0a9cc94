"""A finished run is judged on its own held-out rows, again, and by what else is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import RunMaker, make_base, sentences
from trained import copied, edit, finish, finish_in, labelled, on_own_base

import lora_kit
from lora_kit.data.census import Census
from lora_kit.data.rows import Rows
from lora_kit.errors import CheckFailed, UserError
from lora_kit.prove.evaluate import check_prove, evaluate
from lora_kit.schema import Gate, Prove, Run
from lora_kit.tasks.answers import question
from lora_kit.tasks.batches import IGNORED
from lora_kit.tasks.causal import Conversations, Text
from lora_kit.tasks.encode import Prepared
from lora_kit.tasks.measure import generate
from lora_kit.tasks.preference import Preference

FIGURES = ("verdict", "domain", "general", "few_shot", "metrics", "samples")


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with general text; the tests leave it as they found it."""
    folder = tmp_path_factory.mktemp("compared")
    (folder / "general.jsonl").write_text(
        "\n".join(json.dumps({"text": s}) for s in sentences(30, seed=9)), encoding="utf-8"
    )
    return finish_in(folder, base, **{"data.general": "general.jsonl"})


def data_of(rows: Rows, kind: str = "text") -> Prepared:
    """Rows to train on and to evaluate on."""
    return Prepared(rows, rows, None, {"kind": kind, "joiner": ""}, Census(), {}, [], False)


def run_with(prove: Prove, recipe: str = "cpt") -> Run:
    values = {"recipe": recipe, "name": "test", "base": {"model": "nano"}}
    return Run.model_validate({**values, "data": {"train": "nano:topics"}, "prove": prove})


def test_compare_finds_what_the_report_says_twice(run: Path) -> None:
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    again = lora_kit.compare(run)
    assert {key: again[key] for key in FIGURES} == {key: report[key] for key in FIGURES}
    assert lora_kit.compare(str(run)) == again
    assert report["verdict"]["domain"] == "better"
    assert report["domain"]["documents"] == 24 and report["general"]["documents"] == 30
    assert report["general"].keys() == report["domain"].keys()
    for sample in report["samples"]:
        assert sample["base"] != sample["adapted"]
        # The expected text goes on where the prompt stopped, none of it left out.
        assert sample["prompt"] + sample["expected"] in (run / "../../text.txt").read_text()


def test_compare_can_spend_more_or_less(run: Path, tmp_path: Path, capfd: Any) -> None:
    own = copied(run, tmp_path)
    less = lora_kit.compare(own, ["prove.budget=0.001"])
    assert less["evaluated"]["domain"] == {"units": 20, "of": 24}
    assert less["evaluated"]["general"] == {"units": 20, "of": 30}
    assert less["domain"]["documents"] == less["general"]["documents"] == 20
    assert less["few_shot"]["documents"] == 20 and less["verdict"]["domain"] == "better"
    said = "20 of 24 held-out documents and 20 of 30 general ones, drawn at random"
    assert f"evaluating on {said} (prove.budget: 0.001; null: all)" in capfd.readouterr().err
    assert said in (own / "report.html").read_text(encoding="utf-8")
    more = lora_kit.compare(own, ["prove.budget=null"])
    assert more["domain"]["documents"] == 24 and more["general"]["documents"] == 30
    assert more["evaluated"]["budget"] is None and more["evaluated"]["share"] > 0
    # As after a training whose evaluation was stopped.
    (own / "report.json").unlink()
    assert lora_kit.compare(own, ["prove.budget=0.001"])["evaluated"]["domain"]["units"] == 20


@pytest.mark.parametrize("what", ["text.txt", "general.jsonl"])
def test_other_data_are_refused_and_named(run: Path, what: str) -> None:
    file = run.parent.parent / what
    before = file.read_bytes()
    file.write_bytes(before.replace(b"wizards", b"lizards"))
    try:
        with pytest.raises(UserError, match=r"changed since .* was trained") as raised:
            lora_kit.compare(run)
    finally:
        file.write_bytes(before)
    assert what in str(raised.value) and str(run) in str(raised.value)


def test_a_version_that_holds_out_other_rows_is_refused(run: Path, tmp_path: Path) -> None:
    own = copied(run, tmp_path)
    edit(own / "census.json", lambda census: census["eval"].update(rows_kept=23))
    with pytest.raises(UserError, match=r"24 rows are held out, and 23 were when it was trained"):
        lora_kit.compare(own)
    (own / "census.json").unlink()
    assert lora_kit.compare(own)["domain"]["documents"] == 24


def test_another_base_is_refused_and_named(cpt_run: Path, base: Path, tmp_path: Path) -> None:
    own, finished = tmp_path / "own", copied(cpt_run, tmp_path)
    on_own_base(finished, base, own)
    make_base(own, initializer_range=0.03)
    with pytest.raises(UserError, match=r"trained on another base than") as raised:
        lora_kit.compare(finished)
    assert str(finished) in str(raised.value) and str(own) in str(raised.value)


def test_what_is_no_finished_run_is_refused(run: Path, work: Path, base: Path) -> None:
    with pytest.raises(UserError, match=r"neither a run directory nor an adapter"):
        lora_kit.compare(work / "nowhere")
    unfinished = work / "unfinished"
    unfinished.mkdir()
    (unfinished / "run.yaml").write_bytes((run / "run.yaml").read_bytes())
    with pytest.raises(UserError, match=r"this run has no adapter: it did not finish"):
        lora_kit.compare(unfinished)


@pytest.mark.slow
def test_a_run_that_learned_nothing_is_no_different(run_file: RunMaker) -> None:
    changes = {"train.learning_rate": 0.0, "prove.metrics": ["f1"], "prove.shots": 0}
    with pytest.raises(CheckFailed, match="did not change"):
        finish(run_file, "sft", **changes)
    finished = Path("runs/test")
    report = json.loads((finished / "report.json").read_text(encoding="utf-8"))
    assert report["verdict"] == {"domain": "no different", "f1": "no different"}
    assert report["general"] is report["few_shot"] is None
    assert report["domain"]["loss"]["difference"] == 0
    assert report["domain"]["loss"]["ci95"] == [0, 0] == report["metrics"]["f1"]["ci95"]
    assert report["overfitting"]["gap"] == 0
    assert all(sample["base"] == sample["adapted"] for sample in report["samples"])
    report["overfitting"]["train_f1"] = {"base": 0.1, "adapted": 0.2}  # when another score decided
    (finished / "report.json").write_text(json.dumps(report), encoding="utf-8")
    again = lora_kit.compare(finished)
    assert again["domain"] == report["domain"]
    assert again["overfitting"].keys() == report["overfitting"].keys() - {"train_f1"}


def test_samples_are_the_first_and_the_extremes(run: Path) -> None:
    samples = lora_kit.compare(run)["samples"]
    kinds = [sample["chosen"] for sample in samples]
    assert kinds == ["first"] * 2 + ["largest gain"] * 2 + ["largest loss"] * 2
    change = [sample["loss"]["adapted"] - sample["loss"]["base"] for sample in samples]
    assert change[2] <= change[3] <= min(change[0], change[1]) and change[3] <= change[5]
    assert change[4] >= change[5] >= max(change[0], change[1])
    assert len({sample["prompt"] + sample["expected"] for sample in samples}) == 6


def test_the_base_with_examples_is_the_base_given_longer_rows(run: Path) -> None:
    """Zero examples of room, and the few-shot base is not measured; with some it is another."""
    report = lora_kit.compare(run, ["prove.shots=2"])
    assert report["few_shot"]["shots"] == 2 and report["few_shot"]["tokens"] > 10
    assert report["few_shot"]["documents"] == report["domain"]["documents"]
    assert report["few_shot"]["loss"]["base"] != report["domain"]["loss"]["base"]
    assert report["few_shot"]["loss"]["adapted"] == report["domain"]["loss"]["adapted"]
    assert report["verdict"]["few_shot"] == "better"
    model, tokenizer = lora_kit.load(run)
    rows = labelled([([0, 5, 6] * 42, [0, 5, 6] * 42)] * 20, list(range(20)), [2] * 20)
    model.config.max_position_embeddings = 127
    report = evaluate(Text(), model, data_of(rows), tokenizer, run_with(Prove()))
    assert report["few_shot"] is None


def test_only_what_is_measured_may_change(run: Path) -> None:
    with pytest.raises(UserError, match=r"train\.max_steps=3: a finished run takes other prove"):
        lora_kit.compare(run, ["train.max_steps=3", "prove.shots=1"])
    with pytest.raises(UserError, match=r"prove\.shotz: unknown key; did you mean `shots`"):
        lora_kit.compare(run, ["prove.shotz=3"])
    with pytest.raises(UserError, match=r"prove\.metrics: recipe cpt does not read it"):
        lora_kit.compare(run, ["prove.metrics=[f1]"])
    with pytest.raises(UserError, match=r"prove\.gate\.metrics: f1: .* not in prove\.metrics"):
        lora_kit.compare(run, ["prove.gate.metrics.f1=0.5"])


def test_the_report_is_written_anew_unless_something_would_be_lost(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = run / "report.json"
    before = file.read_bytes()
    again = lora_kit.compare(run, ["prove.shots=0"], gate=True)
    assert "stay as they are: they hold few_shot, which was not" in capsys.readouterr().err
    assert file.read_bytes() == before and again["few_shot"] is None
    assert "few_shot" not in again["verdict"]
    assert again["gate"]["passed"] is (again["verdict"]["general"] == "kept")
    again = lora_kit.compare(run, gate=True)
    assert again == json.loads(file.read_text(encoding="utf-8")) and again["gate"]
    assert again["training"] == json.loads(before)["training"]
    file.unlink()  # stopped before it was written: it comes from the adapter alone
    found = lora_kit.compare(run)
    assert found["domain"] == again["domain"] and found["audit"] is None and file.is_file()
    for damaged in ("", "[1]", '{"verdict": "better"}', '{"metrics": [1]}'):
        file.write_text(damaged, encoding="utf-8")
        with pytest.raises(UserError, match=r"report\.json: invalid: edited or corrupt"):
            lora_kit.compare(run)
    file.write_bytes(before)


def test_a_model_from_scratch_stands_beside_it(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run / "report.json").read_bytes()
    report = lora_kit.compare(run, scratch=True)
    assert capsys.readouterr().out == ""  # what --json prints is one object
    found = report["scratch"]
    assert found["documents"] == 24 and found["parameters"] > 50_000 and found["seconds"] > 0
    assert found["loss"]["adapted"] == report["domain"]["loss"]["adapted"]
    assert found["loss"]["base"] not in (report["domain"]["loss"]["base"], 0)
    # Eight steps from random weights, against eight of an adapter on other random weights.
    low, high = found["loss"]["ci95"]
    words = {low > 0: "worse", high < 0: "better"}
    assert report["verdict"]["scratch"] == words.get(True, "no different")
    assert found["steps"] == 8
    edit(run / "report.json", lambda r: r["training"].update(steps=3))  # it was stopped early
    assert lora_kit.compare(run, scratch=True)["scratch"]["steps"] == 3
    (run / "report.json").write_bytes(before)


def test_rows_of_one_token_are_not_judged(run: Path) -> None:
    model, tokenizer = lora_kit.load(run)
    short = labelled([([5], [5])] * 20, list(range(20)), [1] * 20)
    with pytest.raises(UserError, match=r"data\.eval: no row has two tokens"):
        check_prove(Text(), data_of(short), tokenizer, run_with(Prove()))
    mixed = labelled([([5], [5])] * 5 + [([5, 6], [5, 6])] * 20, list(range(25)), [1] * 25)
    report = evaluate(Text(), model, data_of(mixed), tokenizer, run_with(Prove()))
    assert report["domain"]["documents"] == 20 and len(report["samples"]) == 6


def test_a_gate_on_examples_that_are_not_measured_is_refused_before_training(run: Path) -> None:
    _, tokenizer = lora_kit.load(run)
    rows = data_of(labelled([([5, 6], [5, 6])] * 20, list(range(20)), [1] * 20))
    gate = {"gate": Gate(general=None, few_shot="better")}
    check_prove(Text(), rows, tokenizer, run_with(Prove(**gate)))
    words = r"prove\.gate\.few_shot: not measured with"
    with pytest.raises(UserError, match=f"{words} prove.shots: 0: leave it out"):
        check_prove(Text(), rows, tokenizer, run_with(Prove(shots=0, **gate)))
    with pytest.raises(UserError, match=f"{words} this recipe"):
        check_prove(Preference(), rows, tokenizer, run_with(Prove(**gate)))


def test_scores_come_with_the_base_and_the_base_with_examples(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is asked what: the adapter knows all answers, the base with examples every other one."""
    model, tokenizer = lora_kit.load(run)
    rows = [([n, n, n + 50], [IGNORED, IGNORED, n + 50]) for n in range(300, 340)]
    made = labelled(rows, list(range(40)), [3] * 40)

    def answers(model: Any, tokenizer: Any, prompts: Any, most: int, **_: Any) -> list[str]:
        off = any(getattr(module, "_disable_adapters", False) for module in model.modules())
        few = len(prompts[0]) > 2
        assert off or not few, "examples are for the base"
        known = [not off or (few and prompt[-1] % 2 == 0) for prompt in prompts]
        right = [tokenizer.decode([prompt[-1] + 50]) for prompt in prompts]
        return [word if knows else "" for word, knows in zip(right, known, strict=True)]

    monkeypatch.setattr("lora_kit.tasks.answers.generate", answers)
    prove = Prove(metrics=["accuracy", "f1"], answers=30, shots=2)
    sft = Conversations()
    report = evaluate(sft, model, data_of(made, "chat"), tokenizer, run_with(prove, "sft"))
    for name in prove.metrics:
        found = report["metrics"][name]
        assert found["rows"] == 30 and 0.2 < found["few_shot"] < 0.8
        assert found["base"] == 0 and found["adapted"] == found["difference"] == 1
        assert report["verdict"][name] == "better"
    assert report["few_shot"]["shots"] == 2 and report["few_shot"]["tokens"] == 6
    # The classes of all rows, not only of the 30 that were asked.
    classes = report["classes"]
    known = {tokenizer.decode([n + 50]).strip().casefold() for n in range(300, 340)}
    assert {label.casefold() for label in classes["labels"]} == known
    confusion = np.array(classes["confusion"])
    assert confusion.shape == (len(known), len(known) + 1)
    assert confusion.sum() == confusion.trace() == 30
    assert {found["f1"] for found in classes["per_class"].values()} == {0, 1}


def test_what_the_model_answers_is_scored(sft_run: Path, tmp_path: Path) -> None:
    metrics = ["exact_match", "f1", "rouge_l"]
    changes = [f"prove.metrics=[{', '.join(metrics)}]", "prove.answers=21"]
    report = lora_kit.compare(copied(sft_run, tmp_path), changes)
    assert list(report["metrics"]) == metrics
    assert metrics == [name for name in report["verdict"] if name in metrics]
    assert all(figures["rows"] == 21 for figures in report["metrics"].values())
    assert "What is" in report["samples"][0]["prompt"] and report["samples"][0]["expected"]


def test_an_answer_is_asked_for_with_the_tokens_of_training() -> None:
    rows = labelled([([1, 2, 3, 4, 5], [IGNORED, 2, IGNORED, 4, 5])], [0], [2])
    assert question(rows[0], chat=True) == ([1, 2, 3], [4, 5])
    assert question(rows[0], chat=False) == ([1, 2, 3], [4, 5])
    whole = labelled([([1, 2, 3, 4], [1, 2, 3, 4])], [0], [2])
    assert question(whole[0], chat=True) == ([1, 2], [3, 4])


@pytest.mark.slow
def test_nothing_is_asked_beyond_the_positions_of_the_base(run_file: RunMaker, work: Path) -> None:
    """Learned positions have an end: rows as long as all of them, and rows that leave little."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    base = make_base(work / "gpt2")
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 72}
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=400, eos_token_id=0, bos_token_id=0, **sizes)
    GPT2LMHeadModel(config).save_pretrained(base)
    changes = {"base.model": str(base), "train.max_length": 72, "prove.metrics": ["f1"]}
    finished = finish(run_file, "sft", **changes, **{"data.limits": {"truncated": 1.0}})
    report = json.loads((finished / "report.json").read_text(encoding="utf-8"))
    assert report["metrics"]["f1"]["rows"] == 24 and len(report["samples"]) == 6
    assert report["few_shot"] is None and "too short for examples" in report["not_measured"][0]


def test_a_bases_own_way_of_generating_is_left_aside(run: Path) -> None:
    model, tokenizer = lora_kit.load(run)
    prompts = [[0, 50 + n] for n in range(8)]
    plain = generate(model, tokenizer, prompts, 12)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.num_beams = 3
    assert generate(model, tokenizer, prompts, 12) == plain
