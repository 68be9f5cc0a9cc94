"""Intervals cover planted differences for any score, agree with scipy, and verdicts follow."""

from __future__ import annotations

import json
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import scipy.stats

from lora_kit.errors import CheckFailed
from lora_kit.tasks import bootstrap
from lora_kit.tasks.bootstrap import bca_interval, compared, interval, retention, verdict
from lora_kit.tasks.task import Score, mean_score, ratio

Pair = tuple[Score, Score]


def loss(nats: Any, tokens: Any) -> Score:
    return Score("loss", np.stack([nats, tokens], axis=1).astype(float), better="lower")


def losses(units: int, effect: float, seed: int) -> Pair:
    """Documents of mixed lengths; the adapted model is `effect` nats per token off, with noise."""
    random = np.random.default_rng(seed)
    tokens = random.integers(20, 400, units).astype(float)
    level = random.normal(3, 0.7, units)  # documents differ far more than the models do
    adapted = tokens * (level + effect + random.normal(0, 0.2, units))
    return loss(tokens * level, tokens), loss(adapted, tokens)


def macro_f1(true: np.ndarray, predicted: np.ndarray, classes: int) -> Score:
    """Mean F1 over the classes that occur; sums: hits, rows of the class, rows predicted as it."""
    one_hot = np.eye(classes)
    sums = [one_hot[true] * (true == predicted)[:, None], one_hot[true], one_hot[predicted]]

    def value(sums: np.ndarray) -> np.ndarray:
        hits, support, guessed = np.split(sums, 3, axis=-1)
        f1 = 2 * hits / np.maximum(support + guessed, 1)
        return f1.sum(-1) / np.maximum((support + guessed > 0).sum(-1), 1)

    return Score("macro_f1", np.concatenate(sums, axis=1), value)


def classified(rows: int, right: tuple[float, float], seed: int, rarity: float = 1.0) -> Pair:
    """Five classes, each `rarity` times as frequent as the one before; both models find the same
    rows difficult. The base is right on the share `right[0]`, the adapted model where a difficulty
    with some noise is below `right[1]`: 0.58 is as good as 0.6 of the base."""
    random = np.random.default_rng(seed)
    weights = rarity ** np.arange(5)
    true = random.choice(5, rows, p=weights / weights.sum())
    difficulty, guess = random.random(rows), random.integers(0, 5, rows)
    other = 0.8 * difficulty + 0.2 * random.random(rows)
    base = np.where(difficulty < right[0], true, guess)
    return macro_f1(true, base, 5), macro_f1(true, np.where(other < right[1], true, guess), 5)


def correlated(units: int, noise: tuple[float, float], seed: int) -> Pair:
    """Pearson's r of predictions with this much noise in them; sums: n, x, y, xx, yy, xy."""
    random = np.random.default_rng(seed)
    true = random.normal(0, 1, units)

    def value(sums: np.ndarray) -> np.ndarray:
        n, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
        spread = np.sqrt((n * xx - x * x) * (n * yy - y * y))
        return np.where(spread > 0, (n * xy - x * y) / np.where(spread > 0, spread, 1), 0.0)

    def score(noise: float) -> Score:
        found = true + random.normal(0, noise, units)
        parts = [np.ones(units), found, true, found * found, true * true, found * true]
        return Score("pearson", np.stack(parts, axis=1), value)

    return score(noise[0]), score(noise[1])


# --- The interval


@pytest.mark.parametrize("effect", [-0.05, 0.0])
@pytest.mark.parametrize("units", [20, 60])
def test_the_interval_of_a_loss_covers_the_true_difference(
    units: int, effect: float, monkeypatch: Any
) -> None:
    monkeypatch.setattr(bootstrap, "RESAMPLES", 1000)
    covered = narrow = 0
    for seed in range(100):
        low, high = compared(*losses(units, effect, seed), seed)["ci95"]
        covered += low <= effect <= high
        # Paired: the spread between documents, 0.7 nats, does not widen it.
        narrow += high - low < 0.4
    assert 90 <= covered <= 99 and narrow == 100


@pytest.mark.parametrize(("rows", "rarity"), [(60, 1.0), (100, 0.6)])
def test_the_interval_of_macro_f1_covers_the_true_difference(
    rows: int, rarity: float, monkeypatch: Any
) -> None:
    monkeypatch.setattr(bootstrap, "RESAMPLES", 500)
    right = (0.5, 0.6)
    whole = [score.figure for score in classified(400_000, right, 10**6, rarity)]
    true = whole[1] - whole[0]
    covered = 0
    for seed in range(100):
        low, high = compared(*classified(rows, right, seed, rarity), seed)["ci95"]
        covered += low <= true <= high
    assert true > 0.03 and 90 <= covered <= 99


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
        found = compared(loss(3 * size, size), loss(3 * size + each * size, size), seed)
        alarms += verdict(found, units) != "no different"
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


def test_the_interval_of_any_value_is_scipys_too(monkeypatch: Any) -> None:
    """The difference of two macro-F1, which is no ratio of sums."""
    base, adapted = classified(80, (0.5, 0.62), seed=1)
    columns = base.sums.shape[1]
    both = np.hstack([base.sums, adapted.sums])

    def difference(sums: np.ndarray) -> np.ndarray:
        return adapted.value(sums[..., columns:]) - base.value(sums[..., :columns])

    monkeypatch.setattr(bootstrap, "_student", lambda _: 1.959964 * (1 - 1 / 80) ** 0.5)
    low, high = bca_interval(difference, both, 80, seed=0)
    theirs = scipy.stats.bootstrap(
        (np.arange(80),),
        lambda drawn, axis=-1: difference(both[drawn].sum(-2)),
        method="BCa",
        n_resamples=10_000,
        rng=0,
    ).confidence_interval
    spread = theirs.high - theirs.low
    assert abs(low - theirs.low) < 0.03 * spread and abs(high - theirs.high) < 0.03 * spread


def of_differences(change: np.ndarray, size: np.ndarray, seed: int) -> tuple[float, float]:
    """The bootstrap as it was for ratios alone: only differences are resampled, row by row."""
    units, estimate = len(change), change.sum() / size.sum()
    random = np.random.default_rng(seed)
    drawn = []
    piece = max(1, 2**22 // units)
    for done in range(0, bootstrap.RESAMPLES, piece):
        rows = min(piece, bootstrap.RESAMPLES - done)
        draws = random.integers(0, units, (rows, units), dtype=np.int32)
        drawn.append(change[draws].sum(1) / size[draws].sum(1))
    ratios = np.concatenate(drawn)
    without = (change.sum() - change) / (size.sum() - size)
    lean = without.mean() - without
    skew = float((lean**3).sum()) / (6 * float((lean**2).sum()) ** 1.5)
    below = float((ratios < estimate).mean() + (ratios == estimate).mean() / 2)
    normal = NormalDist()
    bias = normal.inv_cdf(min(max(below, 1e-4), 1 - 1e-4))
    units = max(1.1, float(size.sum() ** 2 / (size**2).sum()))
    wide = bootstrap._student(units - 1) * (units / (units - 1)) ** 0.5
    shares = [
        normal.cdf(bias + z / (1 - skew * z)) if skew * z < 1 else float(z > 0)
        for z in (bias - wide, bias + wide)
    ]
    low, high = np.quantile(ratios, shares)
    return round(float(low), 4), round(float(high), 4)


@pytest.mark.parametrize("units", [2, 20, 137, 1500])
def test_ratios_have_the_figures_that_they_had(units: int) -> None:
    """To the printed digit, on the same draws: of losses, and of right and wrong answers, where
    many resamples equal the estimate."""
    for seed in range(1 if units > 1000 else 3):
        base, adapted = losses(units, -0.03, seed)
        found = compared(base, adapted, seed)
        change = adapted.sums[:, 0] - base.sums[:, 0]
        assert tuple(found["ci95"]) == of_differences(change, base.sums[:, 1], seed)
        random = np.random.default_rng(seed)
        before = (random.random(units) < 0.4).astype(float)
        after = np.r_[1 - before[0], np.where(random.random(units - 1) < 0.8, before[1:], 1.0)]
        found = compared(mean_score("accuracy", before), mean_score("accuracy", after), seed)
        if units > 2:
            assert tuple(found["ci95"]) == of_differences(after - before, np.ones(units), seed)
        assert found["changed"] == (before != after).sum()


@pytest.mark.parametrize("freedom", [8, 19, 49, 500])
def test_the_quantile_is_students(freedom: int) -> None:
    assert bootstrap._student(freedom) == pytest.approx(scipy.stats.t.ppf(0.975, freedom), abs=1e-3)


def test_figures_are_ratios_of_sums() -> None:
    found = compared(loss([30, 10], [10, 2]), loss([18, 10], [10, 2]), seed=0)
    assert found == {
        "base": round(40 / 12, 4),
        "adapted": round(28 / 12, 4),
        "difference": -1.0,
        "ci95": [-1.2, 0.0],  # both draws the first document, both the second
        "better": "lower",
        "changed": 1,
    }


def test_figures_repeat_under_the_seed_in_pieces_too() -> None:
    pair = losses(1500, -0.03, seed=1)  # 2**22 draws are one piece: four of them
    first = compared(*pair, seed=3)
    assert compared(*pair, seed=3) == first
    assert compared(*pair, seed=4)["ci95"] != first["ci95"]
    assert first["ci95"][1] < 0


def test_many_documents_take_little_memory(monkeypatch: Any) -> None:
    """All draws of 10,000 documents at once would be 800 MB."""
    import tracemalloc

    monkeypatch.setattr(bootstrap, "RESAMPLES", 1000)
    pair = losses(10_000, -0.03, seed=1)
    tracemalloc.start()
    compared(*pair, seed=3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 120e6


def test_a_few_large_documents_count_as_few() -> None:
    """Three documents hold nearly all tokens: the interval is that of about three units."""
    size = np.r_[np.full(3, 10_000.0), np.full(97, 10.0)]
    gain = np.random.default_rng(0).normal(-0.1, 0.05, 100)
    low, high = compared(loss(3 * size, size), loss((3 + gain) * size, size), 0)["ci95"]
    even = np.full(100, 100.0)
    narrow = compared(loss(3 * even, even), loss((3 + gain) * even, even), 0)["ci95"]
    assert high - low > 2 * (narrow[1] - narrow[0])
    assert 3 < bootstrap._effective(size) < 3.3
    assert bootstrap._effective(even) == pytest.approx(100)


@pytest.mark.parametrize("make", [losses, classified, correlated], ids=lambda make: make.__name__)
def test_a_model_equal_to_the_other_differs_by_exactly_nothing(make: Callable[..., Pair]) -> None:
    kind = {losses: (-0.1,), classified: ((0.5, 0.5),), correlated: ((0.5, 0.5),)}[make]
    for units in (1, 2, 3, 50):
        one, _ = make(units, *kind, seed=units)
        found = compared(one, Score(one.name, one.sums.copy(), one.value, one.better), seed=0)
        assert found["difference"] == 0 and found["ci95"] == [0, 0] and found["changed"] == 0
        word = "too little data" if units < 20 else "no different"
        assert verdict(found, units) == word


def test_one_unit_and_two_give_numbers() -> None:
    found = compared(loss([6], [3]), loss([3], [3]), seed=0)
    assert found["ci95"] == [-1.0, -1.0] and verdict(found, 1) == "too little data"
    assert compared(*classified(1, (0.0, 1.0), seed=0), seed=0)["ci95"][0] <= 1
    for pair in (losses(2, -0.3, 0), classified(2, (0.2, 0.9), 3), correlated(2, (1, 0.1), 0)):
        found = compared(*pair, seed=0)
        low, high = found["ci95"]
        assert low <= found["difference"] <= high and np.isfinite([low, high]).all()
        json.dumps(found, allow_nan=False)


def test_units_with_nothing_to_count_are_dropped() -> None:
    """A document without a token, in both models; not one that a single model left empty."""
    found = compared(loss([0, 6], [0, 3]), loss([0, 3], [0, 3]), seed=0)
    assert found["ci95"] == [-1, -1]
    precision = [Score("precision", np.array(rows, float)) for rows in ([[1, 2]], [[0, 0]])]
    assert bootstrap.counted(*precision).tolist() == [True]


def test_lopsided_gains_have_an_interval() -> None:
    size = np.full(30, 10.0)
    assert interval(size * -0.5, size, 0) == (-0.5, -0.5)  # all gained the same
    found = compared(loss(size * 3, size), loss(size * 2.9, size), 0)
    assert found["ci95"] == [-0.1, -0.1] == [found["difference"]] * 2
    low, high = interval(np.r_[-300.0, np.zeros(29)], size, 0)  # one gained, the others nothing
    assert low < -1 <= high <= 0


def test_a_class_that_never_occurs_changes_nothing() -> None:
    random = np.random.default_rng(2)
    true = random.integers(0, 3, 60)
    base, adapted = (np.where(random.random(60) < p, true, 2 - true) for p in (0.5, 0.8))
    three = compared(macro_f1(true, base, 3), macro_f1(true, adapted, 3), 0)
    nine = compared(macro_f1(true, base, 9), macro_f1(true, adapted, 9), 0)
    assert nine == three and three["difference"] > 0.1
    # One that occurs once is missing in a third of the resamples.
    rare = np.r_[true, 3]
    found = compared(macro_f1(rare, np.r_[base, 0], 4), macro_f1(rare, np.r_[adapted, 3], 4), 0)
    assert np.isfinite(found["ci95"]).all() and found["difference"] > 0.2


def test_resamples_without_a_value_are_dropped() -> None:
    """A value that is no number where only one unit was drawn: also of every jackknife of two."""

    def value(sums: np.ndarray) -> np.ndarray:  # variance of x; sums: n, x, xx
        n, x, xx = np.moveaxis(sums, -1, 0)
        found = xx / n - (x / n) ** 2
        return np.where(found > 1e-9, found, np.nan)

    x = np.array([1.0, 2.0])
    pair = [Score("v", np.stack([np.ones(2), s * x, s * s * x * x], 1), value) for s in (1, 2)]
    found = compared(*pair, seed=0)
    assert found["ci95"] == [0.75, 0.75] and found["difference"] == 0.75
    with pytest.raises(CheckFailed, match=r"v: nan for the base, nan for the adapted model"):
        compared(*(Score(s.name, s.sums[:1], value) for s in pair), seed=0)


# --- The words


@pytest.mark.parametrize(
    ("difference", "ci95", "documents", "word"),
    [
        (-0.5, (-0.6, -0.4), 20, "better"),
        (0.5, (0.4, 0.6), 20, "worse"),
        (-0.5, (-0.6, -0.4), 19, "too little data"),
        (-0.5, (-1.1, 0.1), 20, "no different"),
        (-0.5, (-1.1, 0.0), 20, "no different"),
        (-0.01, (-0.012, -0.008), 500, "no different"),  # certain, under half a percent of 3 nats
        (0.01, (0.008, 0.012), 500, "no different"),
        (0.0, (0.0, 0.0), 500, "no different"),
    ],
)
def test_the_words(difference: float, ci95: tuple[float, float], documents: int, word: str) -> None:
    found = {"base": 3.0, "difference": difference, "ci95": list(ci95), "better": "lower"}
    assert verdict(found, documents) == word
    kept = {"better": "kept", "no different": "kept", "worse": "forgot"}.get(word, word)
    assert retention(found, documents) == kept
    # The same change of a score of which more is better. Half a percent of 3 is the same.
    mirrored = {"better": "worse", "worse": "better"}.get(word, word)
    assert verdict(found | {"better": "higher"}, documents) == mirrored


@pytest.mark.parametrize(
    ("base", "difference", "word"), [(0.3, 0.004, "no different"), (0.3, 0.006, "better")]
)
def test_half_a_point_of_a_share_is_nothing(base: float, difference: float, word: str) -> None:
    ci95 = [difference - 0.001, difference + 0.001]
    found = {"base": base, "difference": difference, "ci95": ci95, "better": "higher"}
    assert verdict(found, 5000) == word


def test_fewer_than_six_changed_units_are_no_difference() -> None:
    before = np.zeros(100)
    for changed, word in ((5, "no different"), (6, "better")):
        after = np.r_[np.ones(changed), np.zeros(100 - changed)]
        found = compared(mean_score("accuracy", before), mean_score("accuracy", after), 0)
        assert found["changed"] == changed and found["ci95"][0] > 0
        assert verdict(found, 100) == word


@pytest.mark.parametrize(
    ("pair", "word"),
    [
        (losses(60, -0.2, 0), "better"),
        (losses(60, 0.2, 0), "worse"),
        (losses(60, 0.0, 0), "no different"),
        (classified(300, (0.5, 0.7), 0), "better"),
        (classified(300, (0.7, 0.5), 0), "worse"),
        (classified(300, (0.6, 0.58), 1), "no different"),
        (correlated(200, (1.5, 0.5), 0), "better"),
        (correlated(200, (0.5, 1.5), 0), "worse"),
        (correlated(200, (0.8, 0.8), 0), "no different"),
    ],
)
def test_planted_differences_get_their_word(pair: Pair, word: str) -> None:
    found = compared(*pair, seed=0)
    assert verdict(found, len(pair[0].sums)) == word
    low, high = found["ci95"]
    assert low <= found["difference"] <= high


def test_an_accuracy_goes_the_other_way_than_a_loss() -> None:
    random = np.random.default_rng(0)
    base = (random.random(100) < 0.3).astype(float)
    right = np.maximum(base, random.random(100) < 0.4)
    pair = mean_score("accuracy", base), mean_score("accuracy", right)
    found = compared(*pair, seed=0)
    assert found["base"] == round(base.mean(), 4) and found["adapted"] == round(right.mean(), 4)
    assert found["ci95"][0] > 0 and verdict(found, 100) == "better"
    assert verdict(compared(*reversed(pair), seed=0), 100) == "worse"
    assert verdict(found, 19) == "too little data"
    assert pair[0].value is ratio
