"""Is a difference real? Paired bootstrap intervals over units, and a word for each."""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import numpy as np

from lora_kit.data.splits import FEWEST_TO_JUDGE
from lora_kit.tasks.measure import Losses

RESAMPLES = 10_000
FEWEST_UNITS = FEWEST_TO_JUDGE
SMALLEST_SHARE = 0.005  # a difference below half a percent is called no difference
FEWEST_CHANGED = 6
_NATS_TO_BITS = 1 / np.log(2)


def statistics(base: Losses, adapted: Losses, seed: int) -> dict[str, Any]:
    """Loss and bits per byte of two models on the same units, their difference, its interval.

    Units without a label, or without text, are left out: `documents` counts those judged.

    Returns:
        {"documents": units, "loss": {"base", "adapted", "difference", "ci95"}, "bits_per_byte":
        the same four}: nats per token and bits per byte; a difference is adapted minus base.
    """
    judged = (base.tokens > 0) & (base.bytes > 0)
    change, before = (adapted.nats - base.nats)[judged], base.nats[judged].sum()
    bits_before, bits = before * _NATS_TO_BITS, change * _NATS_TO_BITS
    return {
        "documents": int(judged.sum()),
        "loss": _figures(before, change, base.tokens[judged], seed),
        "bits_per_byte": _figures(bits_before, bits, base.bytes[judged], seed),
    }


def scores(base: np.ndarray, adapted: np.ndarray, seed: int) -> dict[str, Any]:
    """Mean scores of two models on the same rows, float64 (rows,), their difference, its interval:
    {"base", "adapted", "difference", "ci95", "changed": rows with another score}. Where few rows
    changed the interval is too narrow: a bootstrap does not know what it did not draw."""
    figures = _figures(base.sum(), adapted - base, np.ones(len(base)), seed)
    return {**figures, "changed": int((adapted != base).sum())}


def verdict(
    measured: dict[str, Any],
    lower: str = "better",
    higher: str = "worse",
    same: str = "no different",
) -> str:
    """A word for a comparison of losses: the interval must exclude 0, over enough documents."""
    if measured["documents"] < FEWEST_UNITS:
        return "too little data"
    loss = measured["loss"]
    return _word(loss, SMALLEST_SHARE * abs(loss["base"]), lower, higher, same)


def verdict_of_scores(measured: dict[str, Any], rows: int) -> str:
    """A word for a comparison of scores, where more is better. Half a point of 1 is nothing, nor
    are fewer than six rows: the sign test would not reach 5%."""
    if rows < FEWEST_UNITS:
        return "too little data"
    if measured.get("changed", FEWEST_CHANGED) < FEWEST_CHANGED:
        return "no different"
    smallest = SMALLEST_SHARE * max(1.0, abs(measured.get("base", 1.0)))
    return _word(measured, smallest, "worse", "better", "no different")


def interval(change: np.ndarray, size: np.ndarray, seed: int) -> tuple[float, float]:
    """95% interval of sum(change) / sum(size): the BCa bootstrap over units.

    Both models are judged on the same resample, so only the differences matter (paired). Bias and
    skewness are corrected (BCa; Efron 1987), the jackknife in closed form. The normal quantile is
    widened to that of Student's t, without which intervals of 20 units are too narrow ("expanded
    percentiles"; Hesterberg 2015, arXiv:1411.5279), for the units that count: where one document
    is as large as ten, there are fewer of them than documents (Kish's effective sample size).

    Args:
        change, size: float64 (units,): what was gained in each unit, and what it is divided by.
    """
    units = len(change)
    estimate = change.sum() / size.sum()
    if units < 2:
        return estimate, estimate
    drawn = _resampled(change, size, seed)
    without = (change.sum() - change) / np.maximum(size.sum() - size, np.finfo(float).tiny)
    lean = without.mean() - without
    spread = float((lean**2).sum())
    # Every unit gained the same, or one is all there is.
    if spread == 0 or drawn.min() == drawn.max():
        return estimate, estimate
    skew = float((lean**3).sum()) / (6 * spread**1.5)
    normal = NormalDist()
    # Resamples equal to the estimate count half; none at all below it would be an infinite bias.
    below = float((drawn < estimate).mean() + (drawn == estimate).mean() / 2)
    bias = normal.inv_cdf(min(max(below, 1 / RESAMPLES), 1 - 1 / RESAMPLES))
    effective = max(1.1, float(size.sum() ** 2 / (size**2).sum()))
    wide = _student(effective - 1) * (effective / (effective - 1)) ** 0.5
    shares = []
    for z in (bias - wide, bias + wide):
        # Beyond this the correction turns around: the outermost resample is meant.
        shares.append(normal.cdf(bias + z / (1 - skew * z)) if skew * z < 1 else float(z > 0))
    low, high = np.quantile(drawn, shares)
    return float(low), float(high)


def _resampled(change: np.ndarray, size: np.ndarray, seed: int) -> np.ndarray:
    """The ratio in each resample of the units, float64 (resamples,), the same for a seed."""
    units = len(change)
    random = np.random.default_rng(seed)
    ratios = []
    # In pieces: all draws of 10,000 documents at once would take 800 MB.
    piece = max(1, 2**22 // units)
    for done in range(0, RESAMPLES, piece):
        draws = random.integers(0, units, (min(piece, RESAMPLES - done), units), dtype=np.int32)
        sizes = size[draws].sum(1)
        ratios.append(change[draws].sum(1)[sizes > 0] / sizes[sizes > 0])
    return np.concatenate(ratios)


def _student(freedom: float) -> float:
    """The 97.5% quantile of Student's t, by Cornish and Fisher's expansion (Abramowitz and Stegun
    26.7.5): within 0.001 from 8 degrees of freedom on, and far too large below 2."""
    z = NormalDist().inv_cdf(0.975)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def _figures(before: float, change: np.ndarray, size: np.ndarray, seed: int) -> dict[str, Any]:
    low, high = interval(change, size, seed)
    total = size.sum()
    base, difference = before / total, change.sum() / total
    return {
        "base": round(float(base), 4),
        "adapted": round(float(base + difference), 4),
        "difference": round(float(difference), 4),
        "ci95": [round(float(low), 4), round(float(high), 4)],
    }


def _word(figures: dict[str, Any], smallest: float, lower: str, higher: str, same: str) -> str:
    low, high = figures["ci95"]
    if abs(figures["difference"]) < smallest or low <= 0 <= high:
        return same
    return lower if figures["difference"] < 0 else higher
