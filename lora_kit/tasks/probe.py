"""The linear probe: logistic regression on frozen features, a baseline without an adapter.

With five rows per class, a probe on mean-pooled features of a sentence encoder is as good as LoRA
(banking77, MiniLM: 0.801 and 0.804), so adapters are compared with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

# Strengths of the L2 penalty, for features with mean square 1; strongest first.
_STRENGTHS = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
_FOLDS = 5
_MOST_COMPARED = 1_000  # rows for cross-validation
_MOST_FITTED = 10_000
_ITERATIONS = 100


@dataclass(frozen=True)
class Probe:
    """A fitted logistic regression.

    Attributes:
        weight: float32 (classes, width + 1), the bias last; for (features - center) / scale.
        strength: of the penalty, chosen by cross-validation.
        compared: int64 (some,): indices of the rows used in cross-validation.
        predicted: int64 (some,): their classes, predicted by a probe not fitted to them.
    """

    weight: np.ndarray
    center: np.ndarray
    scale: float
    strength: float
    compared: np.ndarray
    predicted: np.ndarray

    def classes(self, features: np.ndarray) -> np.ndarray:
        """(rows, width) -> int64 (rows,): the most probable classes."""
        shifted = (features - self.center) / self.scale
        found: np.ndarray = (shifted @ self.weight[:, :-1].T + self.weight[:, -1]).argmax(1)
        return found


def draw(rows: int, seed: int) -> np.ndarray:
    """Indices of the rows that a probe is fitted to: all, or 10,000 of them."""
    order = np.random.default_rng(seed).permutation(rows)
    return np.sort(order[:_MOST_FITTED])


def fit(features: np.ndarray, classes: np.ndarray, count: int, seed: int) -> Probe:
    """Fit by L-BFGS: minimise the mean cross entropy + strength / 2 · ||W||², W without the bias.

    The strength is chosen by the one-standard-error rule of cross-validation (Hastie, Tibshirani
    and Friedman 2009, section 7.10).

    Args:
        features: (rows, width). classes: int64 (rows,), each below `count`.
        seed: of the sample of rows for cross-validation, at most 1,000.
    """
    import torch

    center = features.mean(0)
    scale = float(np.sqrt(np.square(features - center).mean())) or 1.0
    x = torch.from_numpy((features - center) / scale).float()
    y = torch.from_numpy(classes)
    some = np.random.default_rng(seed).permutation(len(classes))[:_MOST_COMPARED]
    predicted = np.zeros((len(_STRENGTHS), len(some)), dtype=np.int64)
    for held_out in _folds(classes[some]):
        rest, held = some[~held_out], some[held_out]
        for number, weight in enumerate(_path(x[rest], y[rest], count, _STRENGTHS)):
            predicted[number, held_out] = _logits(x[held], weight).argmax(1).numpy()
    shares = (predicted == classes[some]).mean(1)
    best = shares.max()
    enough = best - np.sqrt(best * (1 - best) / len(some))  # one standard error below
    chosen = int(np.argmax(shares >= enough))  # the strongest penalty that is good enough
    *_, weight = _path(x, y, count, _STRENGTHS[: chosen + 1])  # warm starts, then the chosen one
    strength = float(_STRENGTHS[chosen])
    return Probe(weight.numpy(), center, scale, strength, some, predicted[chosen])


def _folds(classes: np.ndarray) -> Iterator[np.ndarray]:
    """bool (rows,), the held-out part of each stratified fold."""
    order = np.argsort(classes, kind="stable")
    fold = np.empty(len(classes), dtype=np.int64)
    fold[order] = np.arange(len(classes)) % _FOLDS
    for number in range(min(_FOLDS, len(classes))):
        yield fold == number


def _path(
    x: torch.Tensor, y: torch.Tensor, count: int, strengths: Sequence[float]
) -> Iterator[torch.Tensor]:
    """The weights that minimise the loss for each strength, (count, width + 1), with warm
    starts."""
    import torch

    weight = torch.zeros(count, x.shape[1] + 1)
    for strength in strengths:
        weight = _minimised(x, y, weight, strength)
        yield weight


def _minimised(
    x: torch.Tensor, y: torch.Tensor, start: torch.Tensor, strength: float
) -> torch.Tensor:
    import torch

    weight = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight], max_iter=_ITERATIONS, tolerance_grad=1e-4, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        found = torch.nn.functional.cross_entropy(_logits(x, weight), y)
        found = found + strength / 2 * weight[:, :-1].square().sum()
        found.backward()
        return found

    with torch.enable_grad():
        optimizer.step(loss)
    return weight.detach()


def _logits(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(rows, width) -> (rows, classes)"""
    return x @ weight[:, :-1].T + weight[:, -1]
