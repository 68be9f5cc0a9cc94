"""What report.json holds of scores: two models against each other, each contender, each class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lora_kit.tasks.bootstrap import compared, counted
from lora_kit.tasks.task import Score

# For `not_measured`: a model without a language-model head has no general text to forget.
NO_LANGUAGE_MODEL = "general: this model has no language-model head"


def against(
    rival: str, base: Sequence[Score], adapted: Sequence[Score], seed: int
) -> dict[str, Any]:
    """The scores of a rival and of the adapted model on the same units: `domain` of report.json,
    and `general`, `few_shot`, `scratch` and `generation`, which have the same form.

    Args:
        rival: the contender whose scores `base` are.
        base, adapted: the same scores in the same order, the deciding one first.

    Returns:
        {"documents": units that the first score counts, "rival", each score's name: what
        `bootstrap.compared` returns}.

    Raises:
        CheckFailed: a score is not finite.
    """
    found: dict[str, Any] = {"documents": int(counted(base[0], adapted[0]).sum()), "rival": rival}
    for before, after in zip(base, adapted, strict=True):
        if before.name != after.name:
            raise ValueError(f"{before.name} is compared with {after.name}")
        found[after.name] = compared(before, after, seed)
    return found


def values(scores: Sequence[Score]) -> dict[str, float]:
    """Plain numbers, as in `contenders.NAME` of report.json.

    >>> values([Score("accuracy", np.array([[1.0, 1.0], [0.0, 1.0], [1.0, 1.0]]))])
    {'accuracy': 0.6667}
    """
    return {score.name: round(score.figure, 4) for score in scores}


def compared_scores(part: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The scores in what `against` returned, without the plain values between them."""
    return {name: found for name, found in part.items() if isinstance(found, dict)}


def decided_by(report: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The score that decides `verdict.domain`, and its figures: the one that `domain.decided_by`
    names, a score of the domain or one of `metrics`; else the first of the domain."""
    scores = compared_scores(report["domain"])
    name = report["domain"].get("decided_by") or next(iter(scores), "loss")
    return name, {**(report.get("metrics") or {}), **scores}[name]


def better(name: str, score: Mapping[str, Any]) -> str:
    """`lower` or `higher`, whichever is better for a score; reports of older versions tell it by
    its name, the harness by `higher_is_better`."""
    if score.get("higher_is_better") is False or name in ("loss", "bits_per_byte"):
        return "lower"
    return str(score.get("better", "higher"))


def not_measured(report: Mapping[str, Any], part: str) -> str:
    """Why a part of the report is null."""
    lines = (line.partition(": ") for line in report.get("not_measured") or [])
    given = {name: why for name, _, why in lines}
    default = "set data.general to text that must not be forgotten"
    if part == "few_shot":
        default = "prove.shots: 0, or no room for examples in the base's context"
    return given.get(part, default)


def classes(scores: Sequence[Score]) -> dict[str, Any] | None:
    """What a classifier got right and wrong: `classes` of report.json; None without classes.

    Args:
        scores: of the adapted model; `about` of one of them holds `labels` and `confusion`: how
            many rows of a true class (first axis) were given a predicted one (second axis).

    Returns:
        {"labels", "confusion", "per_class": {label: {"precision", "recall", "f1", "support"}}}, as
        scikit-learn's `classification_report` defines them; 0 where nothing was predicted, or
        nothing is of the class.
    """
    about = next((score.about for score in scores if "confusion" in score.about), None)
    if about is None:
        return None
    confusion = np.asarray(about["confusion"], dtype=np.int64)  # (classes, classes)
    labels = [str(label) for label in about["labels"]]
    hits, support, predicted = np.diag(confusion), confusion.sum(1), confusion.sum(0)

    def share(count: np.ndarray, of: np.ndarray) -> list[float]:
        return (count / np.maximum(of, 1)).round(4).tolist()

    precision, recall = share(hits, predicted), share(hits, support)
    f1 = share(2 * hits, predicted + support)
    per_class = {
        label: {
            "precision": precision[n],
            "recall": recall[n],
            "f1": f1[n],
            "support": int(support[n]),
        }
        for n, label in enumerate(labels)
    }
    return {"labels": labels, "confusion": confusion.tolist(), "per_class": per_class}
