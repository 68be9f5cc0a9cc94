"""A gate holds only where every bound was measured and reached."""

from __future__ import annotations

from typing import Any

import pytest

from lora_kit.prove.gate import held
from lora_kit.schema import Gate

SCORE = {"base": 0.2, "adapted": 0.5}


def report(**verdicts: str) -> dict[str, Any]:
    return {
        "verdict": {"domain": "better", "general": "kept", **verdicts},
        "domain": {"loss": {"adapted": 2.5}},
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
        ({"few_shot": "better"}, {}, ["few_shot: not known: prove.shots"]),
        ({"loss": 2.5, "metrics": {"f1": 0.5}}, {}, []),
        ({"loss": 2.4}, {}, ["loss: 2.5 nats per token (asked for: 2.4 at most)"]),
        ({"metrics": {"f1": 0.6}}, {}, ["f1: 0.5 (asked for: 0.6 at least)"]),
        ({"metrics": {"bleu": 0.6}}, {}, ["bleu: not measured (asked for: 0.6 at least)"]),
        ({}, {"domain": "worse", "general": "forgot"}, ["domain: worse", "general: forgot"]),
    ],
)
def test_bounds(gate: dict[str, Any], verdicts: dict[str, str], failed: list[str]) -> None:
    found = held(report(**verdicts), Gate(**gate))
    assert found["passed"] is (not failed) and len(found["failed"]) == len(failed)
    assert all(line.startswith(start) for line, start in zip(found["failed"], failed, strict=True))


def test_what_was_not_measured_does_not_hold() -> None:
    unknown = report()
    del unknown["verdict"]["general"]
    unknown["metrics"] = None
    assert held(unknown, Gate())["failed"] == [
        "general: not known: name data.general (asked for: kept)"
    ]
    assert not held(unknown, Gate(general=None, metrics={"f1": 0.1}))["passed"]
