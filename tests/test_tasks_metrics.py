"""Scores of answers: against plain reckonings of the same, in every script, and borrowed ones."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lora_kit.errors import UserError
from lora_kit.tasks import metrics
from lora_kit.tasks.metrics import check_classes, check_names, classes, confusion, score

ENGLISH = st.lists(
    st.sampled_from(
        ["the", "a", "An", "fox", "Dog.", "dog", "it's", "well-known", "?", "7", "1,000"]
    ),
    max_size=8,
).map(" ".join)
WORDS = st.lists(st.sampled_from("abcde"), max_size=12)


@pytest.fixture(scope="module", autouse=True)
def _copies_of_scripts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """evaluate copies a script into a cache, and imports it from there."""
    import evaluate

    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("modules")
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", str(folder))
        yield


def one(name: str, prediction: str, expected: str) -> float:
    return float(score(name, [prediction], [expected])[0])


def squad(text: str) -> str:
    """The normalisation of Rajpurkar et al. 2016, step by step."""
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


@given(ENGLISH, ENGLISH)
def test_english_is_scored_as_squad_scores_it(prediction: str, expected: str) -> None:
    found, wanted = squad(prediction).split(), squad(expected).split()
    assume(found and wanted)  # what is left out there altogether is told apart here
    common = sum(min(Counter(found)[word], Counter(wanted)[word]) for word in set(found))
    precision, recall = common / len(found), common / len(wanted)
    expected_f1 = 2 * precision * recall / (precision + recall) if common else 0.0
    assert one("exact_match", prediction, expected) == (found == wanted)
    assert one("f1", prediction, expected) == pytest.approx(expected_f1)


@given(WORDS, WORDS)
def test_rouge_l_is_that_of_the_plain_table(found: list[str], wanted: list[str]) -> None:
    table = np.zeros((len(found) + 1, len(wanted) + 1), int)
    for i, first in enumerate(found):
        for j, second in enumerate(wanted):
            longer = max(table[i, j + 1], table[i + 1, j])
            table[i + 1, j + 1] = table[i, j] + 1 if first == second else longer
    expected = 2 * table[-1, -1] / (len(found) + len(wanted)) if found or wanted else 1.0
    assert one("rouge_l", " ".join(found), " ".join(wanted)) == pytest.approx(expected)


@given(st.sampled_from(list(metrics.OWN)), st.text(max_size=40), st.text(max_size=40))
def test_own_scores_lie_between_0_and_1_both_ways_round(name: str, first: str, second: str) -> None:
    assert one(name, first, first) == 1.0
    assert 0.0 <= one(name, first, second) <= 1.0
    assert one(name, first, second) == one(name, second, first)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Straße", "STRASSE"),
        ("cafe\u0301", "CAFÉ"),
        ("Привет, мир!", "привет мир"),
        ("東京 2020", "東京2020。"),
        ("«مرحبا»", "مرحبا"),
        ("(B)", "b."),
        ("A.", "a"),
        ("$1,000", "1000"),
    ],
)
def test_the_same_answer_written_otherwise(first: str, second: str) -> None:
    assert one("exact_match", first, second) == one("f1", first, second) == 1.0


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("日本", "中国"),
        ("हिन्दी", "हिन्द"),
        ("привет", "мир"),
        ("A", "the"),
        ("A", "B"),
        ("-5", "5"),
        ("1.5", "15"),
        ("+", "-"),
        ("", "x"),
    ],
)
def test_different_answers_are_told_apart(first: str, second: str) -> None:
    assert [one(name, first, second) for name in metrics.OWN] == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("prediction", "expected", "f1"),
    [
        ("東京大学", "京都大学", 0.75),  # 京, 大 and 学 of four
        ("ภาษาไทย", "ภาษาลาว", 4 / 7),
        ("서울 대학교", "서울 고등학교", 0.5),  # Korean has spaces: words
    ],
)
def test_scripts_without_spaces_are_compared_by_character(
    prediction: str, expected: str, f1: float
) -> None:
    assert one("f1", prediction, expected) == pytest.approx(f1)


def test_a_class_is_named_exactly_but_for_case_and_space_around() -> None:
    found = score("accuracy", [" Card_Arrival\n", "card arrival", ""], ["card_arrival"] * 3)
    assert found.dtype == np.float64 and found.tolist() == [1, 0, 0]


def fits(held_out: list[str], trained: list[str]) -> None:
    check_classes(Counter(held_out), Counter(trained))


def test_accuracy_wants_classes() -> None:
    """However many there are: what the rows repeat is a class, also where each held-out row has
    another one."""
    fits([f"class {n % 77}" for n in range(200)], [])
    fits([f"class {n}" for n in range(200)], [f" Class {n} " for n in range(5000)])
    fits([f"answer {n}" for n in range(20)], [])
    fits([f"answer {n % 300}" for n in range(600)], [f"text {n}" for n in range(600)])
    with pytest.raises(UserError, match=r"accuracy: 29 of 40 held-out answers occur in .* f1"):
        fits([f"answer {min(n, 29)}" for n in range(40)], [f"text {n}" for n in range(900)])


def test_classes_are_those_of_the_data() -> None:
    """Also those that no row of the sample has, however they are written; a completion that is no
    class is counted apart."""
    known = ["spam", "Ham", "eggs", "ham ", "SPAM"]
    labels, counts = confusion(
        known, ["HAM", "spam", "a spam", "ham"], ["Ham", "spam", "spam", "spam"]
    )
    assert labels == ["eggs", "Ham", "spam"]
    assert counts.tolist() == [[0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 1]]
    found = classes(labels, counts)
    assert found["per_class"] == {
        "eggs": {"precision": 0, "recall": 0, "f1": 0, "support": 0},
        "Ham": {"precision": 0.5, "recall": 1, "f1": 0.6667, "support": 1},
        "spam": {"precision": 1, "recall": 0.3333, "f1": 0.5, "support": 3},
    }


def test_a_report_lists_no_more_classes_than_can_be_stored() -> None:
    known = [f"class {n}" for n in range(5000)]
    labels, counts = confusion(known, ["class 7", "else"], ["class 9", "class 4999"])
    assert labels == ["class 4999", "class 7", "class 9"]
    assert counts.tolist() == [[0, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]]


def test_all_that_is_wrong_with_the_names_is_said_at_once() -> None:
    with pytest.raises(UserError) as caught:
        check_names(["f1", "exact_macth", "./none.py", "f1"], True)
    lines = str(caught.value).splitlines()
    assert lines[0] == "prove.metrics: f1: named 2 times"
    assert lines[1].endswith("did you mean `exact_match`?") and "--trust-remote-code" in lines[1]
    assert lines[2].startswith("prove.metrics: ./none.py: no such script")
    assert len(lines) == 3
    check_names(list(metrics.OWN), True)
    check_names([], False)
    with pytest.raises(UserError, match="text has none"):
        check_names(["f1"], False)


SCRIPT = """
import datasets
import evaluate


class Made(evaluate.Metric):
    def _info(self):
        text = datasets.Value("{kind}")
        features = datasets.Features({{"predictions": text, "references": text}})
        return evaluate.MetricInfo(
            description="", citation="", inputs_description="", features=features
        )

    def _compute(self, predictions, references):
        same = sum(len(p) == len(r) for p, r in zip(predictions, references))
        return {result}
"""


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., str]:
    """Writes a metric of the evaluate library; returns its folder."""

    def write(name: str, result: str, kind: str = "string") -> str:
        (tmp_path / name).mkdir()
        text = SCRIPT.format(kind=kind, result=result)
        (tmp_path / name / f"{name}.py").write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


@pytest.mark.parametrize("result", ['{"lengths": same, "n": 3, "each": [same]}', '{"x": same / 1}'])
def test_a_metric_of_the_evaluate_library_is_taken_row_by_row(
    script: Callable[..., str], result: str
) -> None:
    path = script("lengths", result)
    check_names([path, f"{path}/lengths.py"], True)
    assert score(path, ["ab", "a", "东京"], ["cd", "cd", "ab"]).tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("name", "result", "kind", "said"),
    [
        ("numeric", '{"numeric": 1.0}', "int32", "numeric: does not accept text: "),
        ("many", '{"first": 1.0, "second": 2.0}', "string", "many: returns no single number"),
        ("none", '{"none": float("nan")}', "string", "none: returns no single number"),
        ("fails", "1 / 0", "string", "fails: does not accept text: ZeroDivisionError"),
        ("wer", '{"wer": 0.1}', "string", "wer: lower is better"),
    ],
)
def test_a_metric_that_does_not_fit_is_one_line(
    script: Callable[..., str], name: str, result: str, kind: str, said: str
) -> None:
    with pytest.raises(UserError, match=said) as caught:
        check_names([script(name, result, kind)], True)
    assert len(str(caught.value).splitlines()) == 1
