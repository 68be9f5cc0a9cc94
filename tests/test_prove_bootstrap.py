"""The interval covers what was planted, equals scipy's, and the words follow from it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import scipy.stats

from lora_kit.prove import bootstrap
from lora_kit.prove.bootstrap import interval, scores, statistics, verdict, verdict_of_scores
from lora_kit.tasks.measure import Losses


def losses(units: int, effect: float, seed: int) -> tuple[Losses, Losses]:
    """Documents of mixed lengths; the adapted model is `effect` nats per token off, with noise."""
    random = np.random.default_rng(seed)
    tokens = random.integers(20, 400, units).astype(float)
    level = random.normal(3, 0.7, units)  # documents differ far more than the models do
    base = tokens * level
    adapted = tokens * (level + effect + random.normal(0, 0.2, units))
    return Losses(base, tokens, 4 * tokens), Losses(adapted, tokens, 4 * tokens)


@pytest.mark.parametrize("effect", [-0.05, 0.0])
@pytest.mark.parametrize("units", [20, 60])
def test_the_interval_covers_the_true_difference(
    units: int, effect: float, monkeypatch: Any
) -> None:
    monkeypatch.setattr(bootstrap, "RESAMPLES", 1000)
    covered = narrow = 0
    for seed in range(100):
        found = statistics(*losses(units, effect, seed), seed=seed)["loss"]
        low, high = found["ci95"]
        covered += low <= effect <= high
        # Paired: the spread between documents, 0.7 nats, has gone from it.
        narrow += high - low < 0.4
    assert 90 <= covered <= 99 and narrow == 100


@pytest.mark.parametrize("units", [20, 50, 200])
def test_false_alarms_are_rare(units: int, monkeypatch: Any) -> None:
    """Skewed differences with heavy tails whose true mean is zero, two hundred times: one in eight
    is the most that is let pass, one in twenty what is stated."""
    monkeypatch.setattr(bootstrap, "RESAMPLES", 500)
    alarms = 0
    for seed in range(200):
        random = np.random.default_rng(seed)
        size = random.integers(20, 400, units).astype(float)
        each = random.standard_t(4, units) / 4 + (random.exponential(1, units) - 1) / 4
        found = statistics(
            Losses(3 * size, size, size), Losses(3 * size + each * size, size, size), seed
        )
        alarms += verdict(found, "better", "worse", "no different") != "no different"
    assert alarms <= 25


def test_the_interval_is_scipys_but_for_the_widening(monkeypatch: Any) -> None:
    """BCa of a ratio of sums; the small-sample factor is taken out for the comparison."""
    random = np.random.default_rng(5)
    size = random.integers(20, 400, 40).astype(float)
    change = size * (random.exponential(1, 40) - 0.7)

    def ratio(change: Any, size: Any, axis: int = -1) -> Any:
        return change.sum(axis=axis) / size.sum(axis=axis)

    wide = interval(change, size, 0)
    units = size.sum() ** 2 / (size**2).sum()
    monkeypatch.setattr(bootstrap, "_student", lambda _: 1.959964 * (1 - 1 / units) ** 0.5)
    ours = interval(change, size, 0)
    theirs = scipy.stats.bootstrap(
        (change, size), ratio, paired=True, method="BCa", n_resamples=10_000, rng=0
    ).confidence_interval
    spread = theirs.high - theirs.low
    assert abs(ours[0] - theirs.low) < 0.03 * spread and abs(ours[1] - theirs.high) < 0.03 * spread
    assert wide[0] < ours[0] and ours[1] < wide[1]
    # The skewness shows: the symmetric percentile interval lies elsewhere.
    plain = scipy.stats.bootstrap(
        (change, size), ratio, paired=True, method="percentile", n_resamples=10_000, rng=0
    ).confidence_interval
    assert abs(plain.high - theirs.high) > 0.05 * spread


@pytest.mark.parametrize("freedom", [8, 19, 49, 500])
def test_the_quantile_is_students(freedom: int) -> None:
    assert bootstrap._student(freedom) == pytest.approx(scipy.stats.t.ppf(0.975, freedom), abs=1e-3)


def test_statistics_are_ratios_of_sums() -> None:
    base = Losses(np.array([30.0, 10.0]), np.array([10.0, 2.0]), np.array([40.0, 10.0]))
    adapted = Losses(np.array([18.0, 10.0]), base.tokens, base.bytes)
    found = statistics(base, adapted, seed=0)
    assert found["documents"] == 2
    loss, bits = found["loss"], found["bits_per_byte"]
    assert loss["base"] == round(40 / 12, 4) and loss["adapted"] == round(28 / 12, 4)
    assert loss["difference"] == -1.0
    assert loss["ci95"] == [-1.2, 0.0]  # both draws the first document, both the second
    assert bits["base"] == round(40 / np.log(2) / 50, 4)
    assert bits["difference"] == round(-12 / np.log(2) / 50, 4)


def test_statistics_repeat_under_the_seed_in_pieces_too() -> None:
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
    # A document without a token: it is not judged.
    empty = Losses(np.array([0.0, 6.0]), np.array([0.0, 3.0]), np.array([0.0, 9.0]))
    found = statistics(empty, Losses(np.array([0.0, 3.0]), empty.tokens, empty.bytes), seed=0)
    assert found["documents"] == 1 and found["loss"]["ci95"] == [-1, -1]
    # All gained the same; one gained and the others nothing.
    size = np.full(30, 10.0)
    assert interval(size * -0.5, size, 0) == (-0.5, -0.5)
    low, high = interval(np.r_[-300.0, np.zeros(29)], size, 0)
    assert low < -1 <= high <= 0
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("difference", "ci95", "documents", "word"),
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
def test_the_words(difference: float, ci95: tuple[float, float], documents: int, word: str) -> None:
    loss = {"base": 3.0, "difference": difference, "ci95": list(ci95)}
    assert verdict({"documents": documents, "loss": loss}, "lower", "higher", "same") == word


def test_the_words_of_scores_go_the_other_way() -> None:
    random = np.random.default_rng(0)
    base = (random.random(100) < 0.3).astype(float)
    right = np.maximum(base, random.random(100) < 0.4)
    found = scores(base, right, seed=0)
    assert found["base"] == round(base.mean(), 4) and found["adapted"] == round(right.mean(), 4)
    assert found["ci95"][0] > 0 and verdict_of_scores(found, 100) == "better"
    assert verdict_of_scores(scores(right, base, seed=0), 100) == "worse"
    assert verdict_of_scores(scores(base, base, seed=0), 100) == "no different"
    assert verdict_of_scores(found, 19) == "too little data"
