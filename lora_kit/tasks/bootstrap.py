"""Paired bootstrap confidence intervals over units, and the verdict from each.

One bootstrap for every score: units are resampled with replacement, and `Score.value` is computed
from the sums of each resample, for mean losses, macro-F1 and correlations alike.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist

import numpy as np

from lora_kit.data.splits import FEWEST_TO_EVALUATE
from lora_kit.errors import CheckFailed
from lora_kit.schema import Json
from lora_kit.tasks.task import Score, ratio

RESAMPLES = 10_000
SMALLEST_SHARE = 0.005  # smaller relative differences count as no difference
FEWEST_CHANGED = 6  # with five changed units the sign test cannot reach 5%
_DRAWS_AT_ONCE = 2**22
_ROUNDING = 1e-12  # relative rounding error of sums


def compared(base: Score, adapted: Score, seed: int) -> Json:
    """Compare a score of two models on the same units: values, difference and its interval.

    Units with nothing to count in either model (no label to predict) are dropped.

    Args:
        base, adapted: the same score; row n of their `sums` is the same unit. `base` is the score
            of the model that the adapted one is compared with.

    Returns:
        {"base", "adapted", "difference", "ci95": [low, high], "better": "lower" or "higher",
        "changed"}: the difference is adapted minus base; `changed` counts the units whose sums
        differ. Rounded to 4 digits.

    Raises:
        CheckFailed: one of the values is not finite.
    """
    kept = counted(base, adapted)
    before, after = base.sums[kept], adapted.sums[kept]
    columns = before.shape[1]

    def difference(sums: np.ndarray) -> np.ndarray:  # (..., 2 * columns) -> (...)
        return adapted.value(sums[..., columns:]) - base.value(sums[..., :columns])

    values = float(base.value(before.sum(0))), float(adapted.value(after.sum(0)))
    if not np.isfinite(values).all():
        raise CheckFailed(
            f"{base.name}: {values[0]} for the base, {values[1]} for the adapted model: not "
            "finite, so it cannot be compared"
        )
    effective = float(len(before))
    if base.value is ratio and adapted.value is ratio:
        effective = _effective(before[:, 1] + after[:, 1])
    low, high = bca_interval(difference, np.hstack([before, after]), effective, seed)
    return {
        "base": round(values[0], 4),
        "adapted": round(values[1], 4),
        "difference": round(values[1] - values[0], 4),
        "ci95": [round(low, 4), round(high, 4)],
        "better": adapted.better,
        "changed": int((before != after).any(1).sum()),
    }


def counted(base: Score, adapted: Score) -> np.ndarray:
    """bool (units,): units with something to count in at least one of the two models."""
    if base.value is ratio and adapted.value is ratio:
        return (base.sums[:, 1] > 0) | (adapted.sums[:, 1] > 0)
    return np.any(base.sums, axis=1) | np.any(adapted.sums, axis=1)


def verdict(found: Json, units: int) -> str:
    """`better`, `worse`, `no different` or `too little data`, from the result of `compared`.

    Different means: the interval excludes 0, at least six units changed, and the difference is at
    least 0.5% of the base's value; for scores where higher is better, also at least 0.005.

    Args:
        found: `base`, `difference`, `ci95`, `better`, and `changed` if known.
        units: number of compared units; fewer than 20 are too little data.
    """
    if units < FEWEST_TO_EVALUATE:
        return "too little data"
    low, high = found["ci95"]
    lower = found["better"] == "lower"
    scale = abs(found["base"]) if lower else max(1.0, abs(found["base"]))
    few = found.get("changed", FEWEST_CHANGED) < FEWEST_CHANGED
    if few or abs(found["difference"]) < SMALLEST_SHARE * scale or low <= 0 <= high:
        return "no different"
    return "better" if (found["difference"] < 0) == lower else "worse"


def retention(found: Json, units: int) -> str:
    """The verdict on general text, which need not improve: `kept`, `forgot` or `too little
    data`."""
    word = verdict(found, units)
    return {"better": "kept", "no different": "kept", "worse": "forgot"}.get(word, word)


def interval(change: np.ndarray, size: np.ndarray, seed: int) -> tuple[float, float]:
    """95% interval of sum(change) / sum(size), where `change` is already paired.

    Args:
        change, size: float64 (units,): numerator and denominator of each unit.
    """
    return bca_interval(ratio, np.stack([change, size], axis=1), _effective(size), seed)


def bca_interval(
    value: Callable[[np.ndarray], np.ndarray], sums: np.ndarray, effective: float, seed: int
) -> tuple[float, float]:
    """95% confidence interval of a value of sums over units, by the BCa bootstrap.

    Corrected for bias and skewness (BCa; Efron 1987), the latter by the jackknife. The normal
    quantile is replaced by that of Student's t, since intervals of 20 units would be too narrow
    ("expanded percentiles"; Hesterberg 2015, arXiv:1411.5279).

    Args:
        value: (..., k) -> (...). Resamples for which it is not finite are dropped.
        sums: float64 (units, k).
        effective: effective sample size: the number of units of equal size with the same variance;
            less than the number of units if their sizes differ.
    """
    total = sums.sum(0)
    estimate = float(value(total))
    if len(sums) < 2:
        return estimate, estimate
    with np.errstate(all="ignore"):
        drawn = _resampled(value, sums, seed)
        # The jackknife: the value without each unit. In pieces, as in `_resampled`.
        parts = np.array_split(sums, 1 + sums.size // _DRAWS_AT_ONCE)
        without = np.concatenate([value(total - part) for part in parts])
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn):
        return estimate, estimate
    rounding = _ROUNDING * float(np.abs(drawn).max())
    if np.ptp(drawn) <= rounding:  # every unit changed by the same amount
        return estimate, estimate
    influence = np.nan_to_num(without.mean() - without)
    spread = float((influence**2).sum())
    acceleration = float((influence**3).sum()) / (6 * spread**1.5) if spread else 0.0
    normal = NormalDist()
    # Resamples equal to the estimate count half. The share is clamped: 0 or 1 is infinite bias.
    equal = np.abs(drawn - estimate) <= rounding
    below = float(((drawn < estimate) & ~equal).mean() + equal.mean() / 2)
    bias = normal.inv_cdf(min(max(below, 1 / RESAMPLES), 1 - 1 / RESAMPLES))
    effective = max(1.1, effective)
    quantile = _student(effective - 1) * (effective / (effective - 1)) ** 0.5
    shares = []
    for z in (bias - quantile, bias + quantile):
        corrected = 1 - acceleration * z
        # Not positive: the correction reverses; use the outermost resample.
        shares.append(normal.cdf(bias + z / corrected) if corrected > 0 else float(z > 0))
    low, high = np.quantile(drawn, shares)
    return float(low), float(high)


def _resampled(
    value: Callable[[np.ndarray], np.ndarray], sums: np.ndarray, seed: int
) -> np.ndarray:
    """The value of each resample, float64 (resamples,); deterministic for a seed."""
    units = len(sums)
    random = np.random.default_rng(seed)
    values = []
    # In pieces: all resamples of 10,000 units at once would take 800 MB.
    piece = max(1, _DRAWS_AT_ONCE // units)
    for done in range(0, RESAMPLES, piece):
        rows = min(piece, RESAMPLES - done)
        draws = random.integers(0, units, (rows, units), dtype=np.int32)
        times = np.empty((rows, units))  # how often each unit was drawn
        for row in range(rows):
            times[row] = np.bincount(draws[row], minlength=units)
        values.append(value(times @ sums))
    return np.concatenate(values)


def _effective(size: np.ndarray) -> float:
    """Kish's effective sample size of units of these sizes."""
    return float(size.sum() ** 2 / (size**2).sum())


def _student(freedom: float) -> float:
    """The 97.5% quantile of Student's t, by Cornish and Fisher's expansion (Abramowitz and Stegun
    26.7.5): within 0.001 from 8 degrees of freedom on, and far too large below 2."""
    z = NormalDist().inv_cdf(0.975)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3
