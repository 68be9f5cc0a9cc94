"""Trainings that bought nothing, or cost something, on a model that knows something: nano.

The other planted cases stand beside what catches them: a learning rate of zero, an adapter on one
layer by a typo, frozen and all-zero tensors (audit), scaled losses and contaminated packing
(self_test).
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from conftest import RunMaker, sentences
from prepared import put, put_texts, texts

import lora_kit
from lora_kit import nano
from lora_kit.errors import CheckFailed
from lora_kit.tasks.pairing import pairs

pytestmark = pytest.mark.slow

NANO = {
    "base": {"model": "nano", "dtype": "float32"},  # bfloat16 is ten times slower on many CPUs
    "adapter": {"r": 8, "lora_alpha": 16},
    "train.learning_rate": 4e-3,
    "train.max_steps": 40,
    "train.per_device_train_batch_size": 16,
    "data.limits": {"near_leaks": 1.0, "exact_leaks": 10_000},
    "prove.shots": 0,
}
FILES = {"data.train": "train.jsonl", "data.eval": "eval.jsonl"}


def report_of(run_file: RunMaker, recipe: str, **changes: Any) -> dict[str, Any]:
    lora_kit.train(run_file(recipe, **{**NANO, **changes}))
    found: dict[str, Any] = json.loads(Path("runs/test/report.json").read_text(encoding="utf-8"))
    return found


def questions() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Rows to learn from, and 60 held out."""
    rows = nano.instructions()
    random.Random(0).shuffle(rows)
    return rows[60:700], rows[:60]


@pytest.mark.parametrize("form", ["", "Here is what the manual has to say about your question: "])
def test_real_labels_are_learned(run_file: RunMaker, work: Path, form: str) -> None:
    for name, rows in zip(("train", "eval"), questions(), strict=True):
        put(
            work / f"{name}.jsonl", [row | {"completion": form + row["completion"]} for row in rows]
        )
    found = report_of(run_file, "sft", **FILES, **{"train.max_steps": 20})
    assert found["verdict"]["domain"] == "better" and not found["prompt_use"]["blind"]
    assert found["prompt_use"]["adapted"] > found["prompt_use"]["base"]


@pytest.mark.parametrize("form", ["", "Here is what the manual has to say about your question: "])
def test_shuffled_labels_are_never_better(run_file: RunMaker, work: Path, form: str) -> None:
    """Also where every answer begins with a sentence that is learned at once."""
    train, held_out = questions()
    answers = [row["completion"] for row in train]
    random.Random(1).shuffle(answers)
    shuffled = zip(train, answers, strict=True)
    put(work / "train.jsonl", [row | {"completion": form + a} for row, a in shuffled])
    put(work / "eval.jsonl", [row | {"completion": form + row["completion"]} for row in held_out])
    found = report_of(run_file, "sft", **FILES)
    assert found["verdict"]["domain"] in ("no different", "worse"), found["prompt_use"]


def test_a_form_that_is_new_hides_no_shuffled_labels(run_file: RunMaker, work: Path) -> None:
    """The loss falls by a lot, because the base did not know the names of the classes; which of
    them belongs to a row was not to be learned."""
    chooser = random.Random(0)
    names = ["zibadu_koro", "mefi_talu", "gono_vesi", "radu_pimo"]
    rows = [{"prompt": s, "completion": chooser.choice(names)} for s in sentences(460)]
    put(work / "train.jsonl", rows[60:])
    put(work / "eval.jsonl", rows[:60])
    found = report_of(run_file, "sft", **FILES)
    assert found["domain"]["loss"]["ci95"][1] < -0.5
    assert found["verdict"]["domain"] == "no different"
    assert found["prompt_use"]["blind"]
    assert "hardly depend on their prompts" in Path("runs/test/report.html").read_text("utf-8")


def test_another_language_is_forgetting(run_file: RunMaker, work: Path) -> None:
    put_texts(work / "invented.txt", texts(300, words=40))
    put_texts(work / "general.txt", [text for _, text in nano.docstrings()[:40]])
    changes = {"data.train": "invented.txt", "data.general": "general.txt", "data.eval": 0.1}
    gate: dict[str, Any] = {"prove.gate": {"domain": None}, "train.max_steps": 15}
    with pytest.raises(CheckFailed, match=r"gate: general: forgot \(asked for: kept\)"):
        report_of(run_file, "cpt", **changes, **gate)
    found = json.loads(Path("runs/test/report.json").read_text(encoding="utf-8"))
    assert found["verdict"] == {"domain": "better", "general": "forgot"}
    assert found["gate"]["passed"] is False and Path("runs/test/report.html").is_file()


def test_pairs_keep_the_answers_and_change_the_prompts() -> None:
    asked = [([1, n], [50 + n % 3, 9]) for n in range(30)]
    own, other = pairs(asked)
    assert len(own) == len(other) == 30
    for n, (prompt, answer) in enumerate(asked):
        assert own[n]["input_ids"].tolist() == prompt + answer
        mixed = other[n]["input_ids"].tolist()
        assert mixed[2:] == answer and 50 + mixed[1] % 3 != answer[0]
        assert own[n]["labels"].tolist() == [-100, -100, *answer] == other[n]["labels"].tolist()
    # Where all answers are the same, no other prompt is a wrong one.
    assert len(pairs([([n], [7]) for n in range(30)])[0]) == 0
