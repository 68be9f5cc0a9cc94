"""Positions of the marks in the report's charts: numbers in, places and labels out.

Places are in percent of the box that is drawn in, from its upper left corner, so that one drawing
fits a telephone and a sheet of paper. The template draws.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

from lora_kit.schema import Json

_LAYER = re.compile(r"\.(\d+)\.")
NO_CLASS = "other"  # a generated completion that is no class
MOST_CLASSES = 12  # of a confusion matrix that can be read
MOST_PAIRS = 15


@dataclass(frozen=True)
class Scale:
    """The numbers from `low` to `high` on 0 to 100 percent."""

    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float], margin: float = 0.0) -> Scale:
        """Around the values, with a share of their spread left free at both ends."""
        values = list(values)
        low, high = min(values), max(values)
        spread = high - low or abs(high) or 1.0
        margin = margin if high > low else 0.5
        return cls(low - margin * spread, high + margin * spread)

    def at(self, value: float) -> float:
        return round(100 * (value - self.low) / (self.high - self.low), 2)

    def ticks(self, most: int = 5) -> list[tuple[float, str]]:
        """(place, label) of the round numbers in between: 1, 2 or 5 times a power of ten apart."""
        # 1e-9: a round number must not be missed because of floating-point rounding.
        rough = (self.high - self.low) / most
        power = 10.0 ** math.floor(math.log10(rough))
        step = power * next(n for n in (1, 2, 5, 10) if n * power >= rough * (1 - 1e-9))
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [(self.at(n * step), f"{n * step:,.{digits}f}") for n in range(first, last + 1)]


def forest(rows: Sequence[tuple[float, float, float]]) -> dict[str, object]:
    """A forest plot of improvements, each (value, low, high) of its interval; more is better.

    Returns:
        `zero`, the place of no change; `ticks`, labelled without a sign, because the page names
        both sides of `zero`; and `rows`, the three places of each improvement.
    """
    scale = Scale.of([0.0, *(value for row in rows for value in row)], margin=0.2)
    return {
        "zero": scale.at(0),
        "ticks": [(place, label.lstrip("-")) for place, label in scale.ticks()],
        "rows": [tuple(map(scale.at, row)) for row in rows],
    }


def curves(rows: Sequence[Json], best_step: int | None = None) -> dict[str, object] | None:
    """Losses and learning rate over the steps of metrics.jsonl, the rate on a scale of its own from
    0; None with fewer than two steps."""

    def points(name: str) -> list[tuple[int, float]]:
        found = [(row["step"], row.get(name)) for row in rows]
        return [(s, v) for s, v in found if v is not None and math.isfinite(v)]

    loss, held_out, rate = points("loss"), points("eval_loss"), points("learning_rate")
    if len({step for step, _ in loss}) < 2:
        return None
    x = Scale.of(step for step, _ in loss + held_out)
    y = Scale.of((value for _, value in loss + held_out), margin=0.05)
    top = Scale(0.0, max((value for _, value in rate), default=0.0) or 1.0)

    def place(step: int, value: float, scale: Scale) -> tuple[float, float]:
        return x.at(step), round(100 - scale.at(value), 2)

    def line(points: list[tuple[int, float]], scale: Scale) -> str:
        places = [place(step, value, scale) for step, value in points]
        return " ".join(f"{across},{down}" for across, down in places)

    return {
        "x_ticks": x.ticks(),
        "y_ticks": [(round(100 - at, 2), label) for at, label in y.ticks()],
        "loss": line(loss, y),
        "eval": [(*place(step, value, y), step, value) for step, value in held_out],
        "eval_line": line(held_out, y),
        "rate": line(rate, top) if rate else "",
        "highest_rate": top.high,
        "best": None if best_step is None else x.at(best_step),
        "first": loss[0],
        "last": loss[-1],
    }


def heat(modules: Sequence[Json]) -> dict[str, object]:
    """Norm and effective rank of the adapter, kind of module × number of the layer.

    `model.layers.3.mlp.experts.7.up_proj` is of layer 3 and of the kind `mlp.experts.*.up_proj`;
    modules that share both are averaged. A module outside of the layers is in `others`.

    Returns:
        `layers`, how many columns there are, a gap where a layer has no adapter; and `rows`, each
        a `kind` with its cells.
    """
    found: dict[str, dict[int, list[Json]]] = {}
    others = []
    for module in modules:
        if number := _LAYER.search(module["module"]):
            kind = re.sub(r"\b\d+\b", "*", module["module"][number.end() :])
            found.setdefault(kind, {}).setdefault(int(number[1]), []).append(module)
        else:
            others.append(module)
    rows = [
        {"kind": kind, "cells": [{"layer": n, **_means(at[n])} for n in sorted(at)]}
        for kind, at in found.items()
    ]
    layers = 1 + max((max(at) for at in found.values()), default=-1)
    return {"layers": layers, "rows": rows, "others": others}


def _means(modules: list[Json]) -> dict[str, float]:
    return {name: fmean(m[name] for m in modules) for name in ("norm", "effective_rank", "r")}


class Mistakes(NamedTuple):
    """What a classifier mistakes for what.

    Attributes:
        matrix: of up to MOST_CLASSES classes, a row for each true class: (label, cells), a cell
            (rows, share of the true class); else None.
        pairs: the mistakes that happened more than once (true, predicted, rows, rows of the true
            class), most frequent first, up to MOST_PAIRS.
        mistakes: how many rows in all, of how many `rows`.
        lowest: the classes (label, figures) by F1, lowest first, without those that never occur,
            neither true nor predicted.
        every: all classes in their order.
    """

    matrix: list[tuple[str, list[tuple[int, float]]]] | None
    pairs: list[tuple[str, str, int, int]]
    mistakes: int
    rows: int
    lowest: list[tuple[str, Json]]
    every: list[tuple[str, Json]]


def confused(classes: Json) -> Mistakes:
    """The mistakes in `classes` of report.json."""
    confusion = classes["confusion"]
    labels = [*classes["labels"], NO_CLASS]  # generated completions have a column for it
    support = [sum(row) for row in confusion]
    predicted = [sum(column) for column in zip(*confusion, strict=True)]
    pairs, mistakes = [], 0
    for true, row in enumerate(confusion):
        for other, count in enumerate(row):
            if other == true:
                continue
            mistakes += count
            if count > 1:
                pairs.append((labels[true], labels[other], count, support[true]))
    pairs.sort(key=lambda pair: -pair[2])
    every = list(classes["per_class"].items())
    occurring = [one for n, one in enumerate(every) if support[n] or predicted[n]]
    matrix = None
    if len(confusion) <= MOST_CLASSES:
        matrix = [
            (labels[n], [(count, count / max(1, support[n])) for count in row])
            for n, row in enumerate(confusion)
        ]
    lowest = sorted(occurring, key=lambda one: one[1]["f1"])
    return Mistakes(matrix, pairs[:MOST_PAIRS], mistakes, sum(support), lowest, every)
