"""The interval covers what was planted, the words follow from it, a run is judged on its own."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import RunMaker, make_base, sentences
from trained import finish, folder_maker, labelled

import lora_kit
from lora_kit.data.formats import Example
from lora_kit.data.labelled import IGNORED
from lora_kit.errors import UserError
from lora_kit.prove.compare import HeldOut, _cut, compare_model, statistics, verdict
from lora_kit.prove.measure import Losses


def losses(units: int, effect: float, seed: int) -> tuple[Losses, Losses]:
    """Documents of mixed lengths; the adapted model is `effect` nats per token off, with noise."""
    random = np.random.default_rng(seed)
    tokens = random.integers(20, 400, units).astype(float)
    level = random.normal(3, 0.7, units)  # documents differ far more than the models do
    base = tokens * level
    adapted = tokens * (level + effect + random.normal(0, 0.2, units))
    return Losses(base, tokens, 4 * tokens), Losses(adapted, tokens, 4 * tokens)


@pytest.mark.parametrize("effect", [-0.05, 0.0])
def test_the_interval_covers_the_true_difference(effect: float, monkeypatch: Any) -> None:
    monkeypatch.setattr("lora_kit.prove.compare.RESAMPLES", 1000)
    covered = narrow = 0
    for seed in range(100):
        found = statistics(*losses(60, effect, seed), seed=seed)["loss"]
        low, high = found["ci95"]
        covered += low <= effect <= high
        # Paired: the spread between documents, 0.7 nats, has gone from it.
        narrow += high - low < 0.2
    assert 90 <= covered <= 99 and narrow == 100


def test_statistics_are_ratios_of_sums() -> None:
    base = Losses(np.array([30.0, 10.0]), np.array([10.0, 2.0]), np.array([40.0, 10.0]))
    adapted = Losses(np.array([18.0, 10.0]), base.tokens, base.bytes)
    found = statistics(base, adapted, seed=0)
    assert found["documents"] == 2
    assert found["loss"] == {
        "base": round(40 / 12, 4),
        "adapted": round(28 / 12, 4),
        "difference": -1.0,
        "ci95": [-1.2, 0.0],  # both draws the first document, both the second
    }
    bits = found["bits_per_byte"]
    assert bits["base"] == round(40 / np.log(2) / 50, 4)
    assert bits["difference"] == round(-12 / np.log(2) / 50, 4)


def test_statistics_repeat_under_the_seed_in_pieces_too(monkeypatch: Any) -> None:
    pair = losses(1500, -0.03, seed=1)  # 2**22 draws are one piece: four of them
    first = statistics(*pair, seed=3)
    assert statistics(*pair, seed=3) == first
    assert statistics(*pair, seed=4)["loss"]["ci95"] != first["loss"]["ci95"]
    assert first["loss"]["ci95"][1] < 0


def test_odd_units_give_numbers() -> None:
    one = Losses(np.array([6.0]), np.array([3.0]), np.array([9.0]))
    found = statistics(one, Losses(np.array([3.0]), one.tokens, one.bytes), seed=0)
    assert found["loss"]["ci95"] == [-1.0, -1.0] and found["documents"] == 1
    assert verdict(found, "better", "worse", "same") == "too little data"
    # A document without a token, and some without a byte.
    empty = Losses(np.array([0.0, 6.0]), np.array([0.0, 3.0]), np.array([0.0, 9.0]))
    found = statistics(empty, Losses(np.array([0.0, 3.0]), empty.tokens, empty.bytes), seed=0)
    assert found["loss"]["difference"] == -1 and found["loss"]["ci95"] == [-1, -1]
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("difference", "interval", "documents", "word"),
    [
        (-0.5, (-0.6, -0.4), 20, "lower"),
        (0.5, (0.4, 0.6), 20, "higher"),
        (-0.5, (-0.6, -0.4), 19, "too little data"),
        (-0.5, (-1.1, 0.1), 20, "same"),
        (-0.5, (-1.1, 0.0), 20, "same"),
        (-0.01, (-0.012, -0.008), 500, "same"),  # certain, and under half a percent of 3 nats
        (0.01, (0.008, 0.012), 500, "same"),
        (0.0, (0.0, 0.0), 500, "same"),
    ],
)
def test_the_words(
    difference: float, interval: tuple[float, float], documents: int, word: str
) -> None:
    loss = {"base": 3.0, "difference": difference, "ci95": list(interval)}
    assert verdict({"documents": documents, "loss": loss}, "lower", "higher", "same") == word


FIGURES = ("verdict", "domain", "general", "samples")


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished run with general text; the tests leave it as they found it."""
    folder, before = tmp_path_factory.mktemp("compared"), Path.cwd()
    (folder / "general.jsonl").write_text(
        "\n".join(json.dumps({"text": s}) for s in sentences(30, seed=9)), encoding="utf-8"
    )
    yield finish(folder_maker(folder, base), **{"data.general": "general.jsonl"})
    os.chdir(before)


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


def test_another_base_is_refused_and_named(run_file: RunMaker, tmp_path: Path) -> None:
    own = make_base(tmp_path / "own")
    finished = finish(run_file, **{"base.model": str(own), "train.max_steps": 1})
    make_base(own, initializer_range=0.03)
    with pytest.raises(UserError, match=r"model\.safetensors.* changed since") as raised:
        lora_kit.compare(finished)
    assert str(finished) in str(raised.value) and str(own) in str(raised.value)


def test_what_is_no_finished_run_is_refused(run: Path, work: Path, base: Path) -> None:
    with pytest.raises(UserError, match=r"run\.yaml is missing"):
        lora_kit.compare(work / "nowhere")
    unfinished = work / "unfinished"
    unfinished.mkdir()
    (unfinished / "run.yaml").write_bytes((run / "run.yaml").read_bytes())
    with pytest.raises(UserError, match=r"without an adapter: it did not finish"):
        lora_kit.compare(unfinished)


def test_a_run_that_learned_nothing_is_no_different(run_file: RunMaker) -> None:
    finished = finish(run_file, "sft", **{"train.learning_rate": 0.0, "train.max_steps": 1})
    report = json.loads((finished / "report.json").read_text(encoding="utf-8"))
    assert report["verdict"] == {"domain": "no different"} and report["general"] is None
    assert report["domain"]["loss"]["difference"] == 0
    assert report["domain"]["loss"]["ci95"] == [0, 0]
    assert all(sample["base"] == sample["adapted"] for sample in report["samples"])
    assert lora_kit.compare(finished)["domain"] == report["domain"]


def test_texts_are_cut_between_characters(run: Path) -> None:
    _, tokenizer = lora_kit.load(run)
    text = "föx 🦊 " * 40
    start, rest = _cut(tokenizer, text, 48)
    assert text.startswith(start + rest) and "\ufffd" not in start + rest and len(start) > 5
    assert _cut(tokenizer, "a", 48) == ("a", "")
    half, other = _cut(tokenizer, "the quick brown fox", 48)
    assert half + other == "the quick brown fox" and other


def test_a_text_is_not_prompted_as_an_answer(run: Path, monkeypatch: Any) -> None:
    """Text begins as in training even where the base has a chat template."""
    model, tokenizer = lora_kit.load(run)
    seen: list[list[int]] = []
    plain = type(model).generate

    def spy(self: Any, **options: Any) -> Any:
        seen.extend(options["input_ids"].tolist())
        return plain(self, **options)

    monkeypatch.setattr(type(model), "generate", spy)
    rows = labelled([([0, 5, 6], [IGNORED, 5, 6])], [0], [2])
    shown = [Example("x", text="the quick brown fox")]
    compare_model(model, tokenizer, HeldOut(rows, None, shown))
    assert tokenizer.chat_template and [row[0] for row in seen] == [tokenizer.eos_token_id] * 2
