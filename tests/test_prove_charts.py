"""Where the marks of the charts stand."""

from __future__ import annotations

import math

from reports import classifier, layers, metrics

from lora_kit.prove.charts import Scale, confused, curves, forest, heat


def test_a_scale_has_round_ticks_inside() -> None:
    assert Scale(0, 10).at(2.5) == 25
    assert Scale(0, 10).ticks() == [
        (0, "0"),
        (20, "2"),
        (40, "4"),
        (60, "6"),
        (80, "8"),
        (100, "10"),
    ]
    assert [label for _, label in Scale(2.61, 3.52).ticks()] == ["2.8", "3.0", "3.2", "3.4"]
    assert [label for _, label in Scale(0, 30000).ticks()][1] == "10,000"
    for low, high in ((0.001, 0.0011), (-7, 1e6), (3, 3.5), (1e-9, 2e-9)):
        ticks = Scale(low, high).ticks()
        assert 2 <= len(ticks) <= 6 and all(0 <= place <= 100 for place, _ in ticks)
        assert len({label for _, label in ticks}) == len(ticks)
    assert Scale.of([3.0]).at(3.0) == 50 and Scale.of([0.0]).at(0.0) == 50


def test_a_forest_shows_zero_and_both_sides() -> None:
    plot = forest([(14.0, 12.0, 16.0), (-4.0, -5.0, 3.0)])
    assert 0 < plot["zero"] < 100
    for (at, low, high), better in zip(plot["rows"], ((14, 12, 16), (-4, -5, 3)), strict=True):
        assert 0 < low < at < high < 100
        assert [place > plot["zero"] for place in (at, low, high)] == [v > 0 for v in better]
    assert (plot["zero"], "0") in plot["ticks"]
    assert not [label for _, label in plot["ticks"] if "-" in label]
    assert forest([(5.0, 5.0, 5.0)])["zero"] > 10  # the side that nothing is on has room too


def test_curves_stay_in_their_box() -> None:
    rows = metrics()
    found = curves(rows, best_step=200)
    assert found is not None
    for name in ("loss", "eval_line", "rate"):
        places = [tuple(map(float, pair.split(","))) for pair in found[name].split()]
        assert len(places) == (6 if name == "eval_line" else 60)
        assert all(0 <= value <= 100 for pair in places for value in pair)
    assert found["best"] == found["eval"][3][0] and found["eval"][3][2] == 200
    losses = [row["loss"] for row in rows if "loss" in row]
    assert (found["first"], found["last"]) == ((5, losses[0]), (300, losses[-1]))
    few = curves(rows[:6])
    assert few and few["best"] is None
    flat = curves([{"step": n, "loss": 2.0} for n in range(3)])
    assert flat and flat["loss"] == "0.0,50.0 50.0,50.0 100.0,50.0" and flat["rate"] == ""
    broken = [{"step": 9, "loss": math.nan}, {"step": 9, "eval_loss": None}, *rows]
    assert curves(broken, 200) == found
    assert curves([]) is curves(rows[:1]) is curves([{"step": 1, "eval_loss": 2.0}] * 2) is None


def test_modules_are_laid_out_by_layer_and_kind() -> None:
    found = heat(layers(80))
    assert found["layers"] == 80 and len(found["rows"]) == 7 and not found["others"]
    assert [len(row["cells"]) for row in found["rows"]] == [80] * 7
    assert found["rows"][0]["kind"] == "self_attn.q_proj"
    module = {"r": 8, "norm": 1.0, "effective_rank": 2.0}
    experts = [
        {"module": f"model.layers.3.mlp.experts.{n}.up_proj", **module, "norm": float(n)}
        for n in range(3)
    ]
    found = heat([*experts, {"module": "lm_head", **module}])
    assert found["layers"] == 4 and found["others"] == [{"module": "lm_head", **module}]
    assert found["rows"] == [
        {
            "kind": "mlp.experts.*.up_proj",
            "cells": [{"layer": 3, "norm": 1.0, "effective_rank": 2.0, "r": 8.0}],
        }
    ]
    assert heat([])["rows"] == []


def test_mistakes_are_counted_from_the_confusion_matrix() -> None:
    figures = {"precision": 0.0, "recall": 0.0, "support": 0}
    made = {
        "labels": ["a", "b", "c", "d"],
        "confusion": [[5, 3, 0, 0], [1, 4, 0, 0], [0, 2, 0, 0], [0, 0, 0, 0]],
        "per_class": {name: {**figures, "f1": n / 10} for n, name in enumerate("abcd")},
    }
    found = confused(made)
    assert found.pairs == [("a", "b", 3, 8), ("c", "b", 2, 2)]
    assert found.mistakes == 6
    assert found.matrix[0] == ("a", [(5, 0.625), (3, 0.375), (0, 0), (0, 0)])
    assert [cell for _, cell in found.matrix[3][1]] == [0, 0, 0, 0]
    # `d` is no class of the held-out rows: neither true nor predicted.
    assert [label for label, _ in found.lowest] == ["a", "b", "c"]
    assert [label for label, _ in found.every] == list("abcd")
    many = confused(classifier(77)["classes"])
    assert many.matrix is None and len(many.every) == 77
    assert many.pairs[0][2:] == (7, 10)
