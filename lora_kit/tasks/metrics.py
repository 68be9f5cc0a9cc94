"""Metrics that compare generated completions with reference completions."""

from __future__ import annotations

import math
import os
import re
import string
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from pathlib import Path

import numpy as np

from lora_kit.errors import UserError, in_a_line, problems_of
from lora_kit.run import nearest
from lora_kit.schema import Json
from lora_kit.trust import metrics_checked

# With more classes than this, most of them seen once, `accuracy` makes no sense.
MOST_CLASSES = 20
_MOST_LISTED = 1000  # with more, only the classes of the evaluated rows and completions are listed
_ARTICLES = {"a", "an", "the"}
# Scripts without spaces between words: Thai, Lao, Tibetan, Burmese, Khmer, kana, Han.
_UNSPACED = re.compile(
    "([\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\U00020000-\U0003ffff])"
)
# The minus of a negative number and the decimal point: kept when punctuation is removed.
_SIGN = re.compile(r"(?<!\w)-(?=\d)|(?<=\d)\.(?=\d)")
_LESS_IS_BETTER = {"cer", "charcut", "character", "mae", "mape", "mse", "perplexity", "ter", "wer"}
_PROBE = "the answer to this question is forty-two"  # a metric is tried on before training

VERDICTS = {"domain", "general", "few_shot", "scratch"}  # names in `verdict` of report.json
Metric = Callable[[str, str], float]


def score(name: str, predictions: list[str], references: list[str]) -> np.ndarray:
    """The score of every completion against its reference; higher is better.

    `exact_match`, `f1`, `accuracy` and `rouge_l` are between 0 and 1. Any other name is a metric of
    the `evaluate` library: the path of its script or folder, or its name on the Hub. Its script is
    Python that runs here with your rights, if `lora_kit.trust` allows it. It is computed per row,
    so that its mean has a confidence interval; corpus-level metrics (BLEU) therefore differ from
    their usual value.

    Returns:
        float64 (rows,).

    Raises:
        UserError: the metric cannot be loaded, or does not accept text.
    """
    metric = OWN.get(name) or _from_evaluate(name)
    pairs = zip(predictions, references, strict=True)
    return np.array([metric(prediction, expected) for prediction, expected in pairs], np.float64)


def check_names(names: list[str], chat: bool) -> None:
    """Raises UserError, a line per metric that cannot be computed. chat: rows have completions."""
    if names and not chat:
        why = "metrics score completions, and text has none: remove them, or use recipe: sft"
        raise UserError(f"prove.metrics: {why}")

    def check(name: str) -> None:
        if name in VERDICTS:
            raise UserError(f"{name}: this name is reserved for a verdict: rename the metric")
        score(name, [_PROBE, ""], [_PROBE, _PROBE])

    check_each("prove.metrics", names, check)


def check_each(key: str, names: list[str], check: Callable[[str], None]) -> None:
    """Raises UserError, one line per name that is repeated or rejected by `check`."""
    counts = Counter(names)
    problems = [f"{name}: named {counts[name]} times" for name in counts if counts[name] > 1]
    for name in counts:
        problems += problems_of(check, name)
    if problems:
        raise UserError("\n".join(f"{key}: {problem}" for problem in problems))


def check_classes(held_out: Counter[str], trained: Counter[str]) -> None:
    """Raises UserError if the answers, {answer: rows}, are not classes, as `accuracy` needs: most
    held-out ones occur in no other row."""
    rows, found = Counter[str](), Counter[str]()
    for answer, times in held_out.items():
        found[_folded(answer)] += times
    for answer, times in (*held_out.items(), *trained.items()):
        rows[_folded(answer)] += times
    alone = sum(rows[answer] == 1 for answer in found)
    if len(found) > MOST_CLASSES and alone > found.total() / 2:
        raise UserError(
            f"prove.metrics: accuracy: {alone} of {found.total()} held-out answers occur in no "
            "other row, so they are not classes: use exact_match, f1 or rouge_l"
        )


def confusion(
    known: Iterable[str], generated: Sequence[str], expected: Sequence[str]
) -> tuple[list[str], np.ndarray]:
    """The classes among the known answers, sorted, and how many rows of each class (first axis)
    were given which one: int64 (classes, classes + 1); last those whose completion is no class.

    >>> labels, counts = confusion(["no", "yes"], ["Yes", "no", "maybe"], ["yes", "yes", "no"])
    >>> labels, counts.tolist()
    (['no', 'yes'], [[0, 0, 1], [1, 1, 0]])
    """
    names: dict[str, str] = {}  # {as compared: as written}
    for answer in (*known, *expected):
        names.setdefault(_folded(answer), answer.strip())
    if len(names) > _MOST_LISTED:
        seen = {_folded(answer) for answer in (*generated, *expected)}
        names = {folded: answer for folded, answer in names.items() if folded in seen}
    folded = sorted(names)
    place = {answer: number for number, answer in enumerate(folded)}
    counts = np.zeros((len(folded), len(folded) + 1), dtype=np.int64)
    for found, true in zip(generated, expected, strict=True):
        counts[place[_folded(true)], place.get(_folded(found), len(folded))] += 1
    return [names[answer] for answer in folded], counts


def classes(labels: Sequence[str], confusion: np.ndarray) -> Json:
    """`classes` of report.json.

    Args:
        confusion: int64 (classes, classes) or (classes, classes + 1): rows of each true class by
            predicted class; the last column counts predictions that are none of the classes.

    Returns:
        {"labels", "confusion", "per_class": {label: {"precision", "recall", "f1", "support"}}}, as
        scikit-learn's `classification_report` defines them; 0 where nothing was predicted, or
        nothing is of the class.
    """
    hits, support, predicted = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    per_class = {}
    for n, label in enumerate(labels):
        precision = hits[n] / max(predicted[n], 1)
        recall = hits[n] / max(support[n], 1)
        f1 = 2 * hits[n] / max(predicted[n] + support[n], 1)
        per_class[label] = {
            "precision": round(float(precision), 4),
            "recall": round(float(recall), 4),
            "f1": round(float(f1), 4),
            "support": int(support[n]),
        }
    return {"labels": list(labels), "confusion": confusion.tolist(), "per_class": per_class}


def exact_match(prediction: str, expected: str) -> float:
    """1 if both have the same words after normalisation, else 0 (Rajpurkar et al. 2016).

    >>> exact_match("The Eiffel Tower.", "eiffel tower")
    1.0
    """
    return float(_answer(prediction) == _answer(expected))


def f1(prediction: str, expected: str) -> float:
    """Harmonic mean of precision and recall of the words, in any order (Rajpurkar et al. 2016).

    >>> f1("the red fox", "red dog")
    0.5
    """
    found, wanted = _answer(prediction), _answer(expected)
    return _harmonic((Counter(found) & Counter(wanted)).total(), found, wanted)


def accuracy(prediction: str, expected: str) -> float:
    """1 if the completion is the class name, ignoring case and surrounding white space, else 0."""
    return float(_folded(prediction) == _folded(expected))


def rouge_l(prediction: str, expected: str) -> float:
    """ROUGE-L: F1 of the longest common subsequence of words (Lin 2004), words not stemmed.

    >>> rouge_l("police kill the gunman", "police killed the gunman")
    0.75
    """
    found, wanted = _words(prediction), _words(expected)
    return _harmonic(_longest_common(found, wanted), found, wanted)


OWN: dict[str, Metric] = {m.__name__: m for m in (exact_match, f1, accuracy, rouge_l)}


def _folded(text: str) -> str:
    """Case-folded, NFC-normalised and stripped."""
    return unicodedata.normalize("NFC", text.casefold()).strip()


def _words(text: str) -> list[str]:
    """Words without case and punctuation.

    In scripts without spaces each character is a word: `東京2020` is 東, 京, 2020. Unlike SQuAD's
    script, `-5` is not 5, `1.5` is not 15, and `+` and `-` are different.
    """
    folded = _folded(text)
    spared = {sign.start() for sign in _SIGN.finditer(folded)}
    kept = "".join(c for n, c in enumerate(folded) if n in spared or not _is_punctuation(c))
    return _UNSPACED.sub(r" \1 ", kept if kept.strip() else folded).split()


def _is_punctuation(character: str) -> bool:
    """Includes ASCII symbols, as in SQuAD's script."""
    return character in string.punctuation or unicodedata.category(character).startswith("P")


def _answer(text: str) -> list[str]:
    """`_words` without English articles, unless there is nothing else: `A` of A, B, C, D."""
    words = _words(text)
    return [word for word in words if word not in _ARTICLES] or words


def _harmonic(common: int, found: list[str], wanted: list[str]) -> float:
    """2·P·R / (P + R) for P = common / found and R = common / wanted; 1 for two empty texts."""
    return 2 * common / (len(found) + len(wanted)) if found or wanted else 1.0


def _longest_common(first: list[str], second: list[str]) -> int:
    """Length of the longest common subsequence, with a row of the table as the bits of one integer
    (Hyyrö 2004)."""
    places: dict[str, int] = defaultdict(int)
    for n, word in enumerate(first):
        places[word] |= 1 << n
    every = (1 << len(first)) - 1
    row = every  # bit n is 0 where the length grows at word n of `first`
    for word in second:
        here = row & places[word]
        row = ((row + here) | (row - here)) & every
    return len(first) - row.bit_count()


def _from_evaluate(name: str) -> Metric:
    """A metric of the evaluate library, for one row."""
    hint = nearest(name, list(OWN))
    # evaluate has its own offline switch.
    os.environ.setdefault("HF_EVALUATE_OFFLINE", os.environ.get("HF_HUB_OFFLINE", "0"))
    import evaluate

    try:
        with metrics_checked():
            loaded = evaluate.load(name, module_type="metric", keep_in_memory=True)
    except UserError as error:
        raise UserError(f"{error}{hint}") from None
    except FileNotFoundError:
        why = "no such script, and no metric of this name on the Hub (not checked offline)"
        raise UserError(f"{name}: {why}{hint}") from None
    except (Exception, SystemExit) as error:  # third-party code
        raise UserError(f"{name}: cannot be loaded: {in_a_line(error)}") from None
    own = Path(name).stem
    if own in _LESS_IS_BETTER:
        raise UserError(f"{name}: lower is better: use a script that returns 1 - {name}")

    def metric(prediction: str, expected: str) -> float:
        try:
            result = dict(loaded.compute(predictions=[prediction], references=[expected]))
        except (Exception, SystemExit) as error:
            raise UserError(f"{name}: does not accept text: {in_a_line(error)}") from None
        numbers = {key: value for key, value in result.items() if isinstance(value, Real)}
        only = next(iter(numbers.values())) if len(numbers) == 1 else math.nan
        value = float(numbers.get(own, only))
        if not math.isfinite(value):
            raise UserError(f"{name}: returns no single number: {result}"[:200])
        return value

    return metric
