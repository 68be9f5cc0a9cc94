"""A gate holds only where every bound was measured and reached."""

from __future__ import annotations

from typing import Any

import pytest
from reports import classifier, preferences, scored

from lora_kit.prove.scores import check_gate
from lora_kit.schema import Gate

SCORE = {**scored(0.2, 0.5, 0.2, 0.4), "rows": 90}


def report(**verdicts: str) -> dict[str, Any]:
    return {
        "verdict": {"domain": "better", "general": "kept", **verdicts},
        "domain": {"documents": 90, "loss": {"adapted": 2.5, "ci95": [-1, -0.5]}},
        "metrics": {"f1": SCORE},
    }


@pytest.mark.parametrize(
    ("gate", "verdicts", "failed"),
    [
        ({}, {}, []),
        ({}, {"domain": "no different"}, ["domain: no different (asked for: better)"]),
        ({}, {"domain": "too little data"}, ["domain: too little data (asked for: better)"]),
        ({"domain": "no different"}, {"domain": "no different"}, []),
        ({"domain": "no different"}, {"domain": "worse"}, ["domain: worse (asked for: no d"]),
        ({"domain": None}, {"domain": "worse"}, []),
        ({}, {"general": "forgot"}, ["general: forgot (asked for: kept)"]),
        ({"general": None}, {"general": "forgot"}, []),
        ({"few_shot": "better"}, {"few_shot": "worse"}, ["few_shot: worse (asked for: better)"]),
        ({"few_shot": "better"}, {}, ["few_shot: not measured: prove.shots"]),
        ({"loss": 2.5, "metrics": {"f1": 0.5}}, {}, []),
        ({"loss": 2.4}, {}, ["loss: 2.5 nats per token (asked for: 2.4 at most)"]),
        ({"metrics": {"f1": 0.6}}, {}, ["f1: 0.5 (asked for: 0.6 at least)"]),
        ({"metrics": {"bleu": 0.6}}, {}, ["bleu: not measured (asked for: 0.6 at least)"]),
        ({}, {"domain": "worse", "general": "forgot"}, ["domain: worse", "general: forgot"]),
    ],
)
def test_bounds(gate: dict[str, Any], verdicts: dict[str, str], failed: list[str]) -> None:
    found = check_gate(report(**verdicts), Gate(**gate))
    assert found["passed"] is (not failed) and len(found["failed"]) == len(failed)
    assert all(line.startswith(start) for line, start in zip(found["failed"], failed, strict=True))


def test_what_was_not_measured_does_not_hold() -> None:
    unknown = report()
    del unknown["verdict"]["general"]
    unknown["metrics"] = None
    assert check_gate(unknown, Gate())["failed"] == [
        "general: not measured: set data.general to text that must not be forgotten "
        "(asked for: kept)"
    ]
    assert not check_gate(unknown, Gate(general=None, metrics={"f1": 0.1}))["passed"]


def test_no_other_score_may_be_worse() -> None:
    """Of the domain, of `metrics` and of the harness; the deciding one has its own bound."""
    worse = scored(0.5, 0.4, -0.15, -0.05)
    found = report() | {"verdict": {"domain": "better", "general": "kept"}}
    found["domain"] = {"documents": 90, "decided_by": "f1", "loss": scored(2, 3, 0.5, 1.5, "lower")}
    found["metrics"] = {
        "f1": {**scored(0.2, 0.5, 0.2, 0.4), "rows": 90},
        "rouge_l": {**worse, "rows": 90},
        "few": {**worse, "rows": 19},
    }
    found["harness"] = {
        "hellaswag/acc": {**worse, "rows": 400},
        "wikitext/word_perplexity": {**worse, "ci95": None, "rows": 62},
    }
    asked = "worse (asked for: not worse)"
    lines = [f"{name}: {asked}" for name in ("loss", "rouge_l", "hellaswag/acc")]
    assert check_gate(found, Gate())["failed"] == lines
    assert check_gate(found, Gate(scores=None))["passed"]
    # The loss in another unit is no score of its own.
    found = report()
    found["domain"] |= {"documents": 90, "bits_per_byte": scored(1, 2, 0.5, 1.5, "lower")}
    found["metrics"] = None
    assert check_gate(found, Gate())["passed"]


def test_any_score_of_the_domain_can_be_asked_for() -> None:
    found = classifier()
    held_to = {"accuracy": 0.8, "macro_f1": 0.81}
    gate = Gate(domain="no different", metrics=held_to)
    assert check_gate(found, gate)["failed"] == ["macro_f1: 0.799 (asked for: 0.81 at least)"]
    found["domain"]["wer"] = scored(0.4, 0.3, -0.15, -0.05, "lower")
    assert check_gate(found, Gate(domain=None, metrics={"wer": 0.3}))["passed"]
    failed = check_gate(found, Gate(domain=None, metrics={"wer": 0.2}))["failed"]
    assert failed == ["wer: 0.3 (asked for: 0.2 at most)"]
    # A loss in nats per token is for language models.
    failed = check_gate(found, Gate(domain=None, loss=2.0))["failed"]
    assert failed == ["loss: not measured (asked for: 2 at most)"]
    assert check_gate(preferences(), Gate(domain=None, general=None, metrics={"margin": 1}))[
        "passed"
    ]


def test_general_text_is_not_asked_of_a_model_without_a_language_model_head() -> None:
    assert check_gate(classifier(), Gate(domain="no different"))["passed"]
    assert check_gate(classifier(), Gate())["failed"] == [
        "domain: no different (asked for: better)"
    ]
    unknown = classifier() | {"not_measured": []}
    assert not check_gate(unknown, Gate(domain=None))["passed"]
