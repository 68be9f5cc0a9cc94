"""Which score decides, which ones a gate may hold, and that a score of the task stays its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lora_kit.data.census import Census
from lora_kit.data.rows import Rows
from lora_kit.errors import UserError
from lora_kit.prove.evaluate import check_prove, evaluate
from lora_kit.prove.report import in_lines
from lora_kit.prove.scores import check_gate
from lora_kit.schema import Gate, Run
from lora_kit.tasks.causal import Conversations, Text
from lora_kit.tasks.encode import Prepared
from lora_kit.tasks.preference import Preference
from lora_kit.tasks.sequence import Classification
from lora_kit.tasks.task import Contender, Score, Task, mean_score

ROWS = Rows.of({"input_ids": [5, 6], "unit": unit} for unit in range(40))


def run_with(recipe: str = "classify", **prove: Any) -> Run:
    values = {"recipe": recipe, "name": "test", "base": {"model": "nano"}}
    return Run.model_validate({**values, "data": {"train": "nano:topics"}, "prove": prove})


class Model(torch.nn.Linear):
    def disable_adapter(self) -> contextlib.nullcontext[None]:
        return contextlib.nullcontext()


class Two(Task):
    """Scores two ways: the adapted model is better in the first alone. Any other metric that is
    named is generated for, and is 1 for the adapted model."""

    scores = ("accuracy", "macro_f1")

    def score(self, model: Any, rows: Rows, processor: Any, facts: Any, run: Run) -> list[Score]:
        adapted = isinstance(model, torch.nn.Module)
        every = np.arange(len(rows))
        values = {"accuracy": every % 10 < (9 if adapted else 2), "macro_f1": every % 2 == 0}
        for name in run.prove.metrics:
            values.setdefault(name, np.full(len(rows), adapted))
        return [
            Score(name, np.stack([hits, np.ones(len(rows))], axis=1).astype(float))
            for name, hits in values.items()
        ]

    def rivals(self, *_: Any) -> list[Contender]:
        return [Contender("majority", lambda: contextlib.nullcontext("majority"))]


def evaluated(generates: bool = True, **prove: Any) -> dict[str, Any]:
    data = Prepared(ROWS, ROWS, None, {}, Census(), {}, [], False)
    return evaluate(Two(), Model(1, 1), data, None, run_with(**prove), ("score",), generates)


@pytest.mark.parametrize(
    ("metrics", "word"),
    [
        (["accuracy", "macro_f1"], "better"),
        (["macro_f1", "accuracy"], "no different"),
        (["macro_f1"], "no different"),
        (["accuracy"], "better"),
    ],
)
def test_naming_a_score_of_the_task_only_chooses_what_decides(
    metrics: list[str], word: str
) -> None:
    plain, report = evaluated(), evaluated(metrics=metrics)
    assert "decided_by" not in plain["domain"] and plain["metrics"] is None
    assert report["domain"].pop("decided_by") == metrics[0]
    assert report["verdict"].pop("domain") == word
    assert plain["verdict"].pop("domain") == "better"
    assert report.pop("overfitting").keys() == {f"train_{metrics[0]}", "gap"}
    assert plain.pop("overfitting").keys() == {"train_accuracy", "gap"}
    assert report == plain


def test_other_metrics_are_reported_apart() -> None:
    report = evaluated(metrics=["macro_f1", "f1"])
    assert list(report["metrics"]) == ["f1"] and report["metrics"]["f1"]["adapted"] == 1
    assert {"accuracy", "macro_f1"} <= report["domain"].keys() and "f1" not in report["domain"]
    assert report["verdict"]["domain"] == "no different" and report["verdict"]["f1"] == "better"
    gate = Gate(domain=None, general=None, metrics={"macro_f1": 0.6, "f1": 0.9})
    assert check_gate(report, gate)["failed"] == ["macro_f1: 0.5 (asked for: 0.6 at least)"]


def test_what_a_sharded_model_cannot_generate_for_does_not_decide() -> None:
    report = evaluated(generates=False, metrics=["f1", "macro_f1"])
    assert report["metrics"] is None and report["domain"]["decided_by"] == "macro_f1"
    # Accuracy is better, but it was not asked to decide.
    report = evaluated(generates=False, metrics=["f1"])
    assert report["domain"]["accuracy"]["ci95"][0] > 0
    assert report["verdict"]["domain"] == "no different"
    assert report["domain"]["objection"] == "f1, which decides, was not measured"


class Generating(Task):
    """A language model whose loss falls, while none of its completions becomes right; those of the
    base with examples in its prompt are, half of them."""

    scores = ("loss",)
    general = None

    def score(self, model: Any, rows: Rows, processor: Any, facts: Any, run: Run) -> list[Score]:
        adapted = isinstance(model, torch.nn.Module)
        shown = "examples" in rows.columns
        loss = np.full(len(rows), 2.0 if adapted else 2.5 if shown else 3.0)
        right = np.arange(len(rows)) % 2 * float(shown)
        found = [mean_score("loss", loss, better="lower")]
        return [*found, *(mean_score(name, right) for name in run.prove.metrics)]

    def check(self, *_: Any) -> list[str]:
        return []

    def rivals(self, model: Any, *_: Any) -> list[Contender]:
        base = Contender("base", lambda: contextlib.nullcontext("base"))
        examples = Contender(
            "few_shot",
            lambda: contextlib.nullcontext("base"),
            lambda rows: rows.with_column("examples", [1] * len(rows)),
            {"shots": 3, "tokens": 9},
        )
        return [base, examples]


def test_a_loss_that_falls_does_not_make_completions_right() -> None:
    report = verdict_of(Generating(), (), metrics=["accuracy"])
    assert report["domain"]["loss"]["ci95"][1] < 0
    assert (
        report["metrics"]["accuracy"] | {"base": 0, "adapted": 0} == report["metrics"]["accuracy"]
    )
    assert report["verdict"]["domain"] == "no different"
    # Nor is it better than examples in the prompt, by the same metric.
    assert report["verdict"]["few_shot"] == "worse"
    assert report["few_shot"]["loss"]["ci95"][1] < 0
    assert report["few_shot"]["accuracy"]["base"] == 0.5
    domain, loss, few_shot = in_lines(report)[:3]
    assert domain.startswith("domain: accuracy 0.000 -> 0.000") and "no different" in domain
    assert loss.startswith("loss: 3.000 -> 2.000") and "better" in loss
    assert few_shot.startswith("few_shot: accuracy 0.500 -> 0.000") and "worse" in few_shot
    assert not check_gate(report, Gate(general=None))["passed"]
    plain = verdict_of(Generating(), ())
    assert plain["verdict"] == {"domain": "better", "few_shot": "better"}


# ------------------------------------------------------------------ a task that breaks the contract
def test_scores_of_other_names_are_refused() -> None:
    data = Prepared(ROWS, ROWS, None, {}, Census(), {}, [], False)
    given = (Model(1, 1), data, None, run_with(), ("score",))
    task = Two()
    for names in (("macro_f1", "accuracy"), ("accuracy", "f1"), ("accuracy", "macro_f1", "f1")):
        task.scores = names  # type: ignore[assignment]
        words = rf"TASK\.score: gives accuracy, macro_f1; TASK\.scores: {', '.join(names)}"
        with pytest.raises(UserError, match=words):
            evaluate(task, *given)


def test_what_is_no_list_of_scores_is_refused() -> None:
    data = Prepared(ROWS, ROWS, None, {}, Census(), {}, [], False)
    task = Two()
    task.score = lambda *_: None  # type: ignore[assignment, method-assign, return-value]
    with pytest.raises(UserError, match=r"TASK\.score: gives none; TASK\.scores: accuracy"):
        evaluate(task, Model(1, 1), data, None, run_with(), ("score",))


@pytest.mark.parametrize("wrong", [{"better": "less"}, {"sums": np.ones(3)}])
def test_a_score_that_would_be_misread_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"TASK\.score: loss: expected sums of shape \(units, k\)"):
        Score("loss", **{"sums": np.ones((3, 2)), **wrong})


# ------------------------------------------------------------------ what is compared with
class Several(Task):
    """Each contender, and the adapted model, has its own shares of right rows."""

    scores = ("accuracy", "macro_f1")

    def __init__(self, **shares: tuple[float, float]) -> None:
        self.shares = shares

    def score(self, model: Any, rows: Rows, processor: Any, facts: Any, run: Run) -> list[Score]:
        shares = self.shares[model if isinstance(model, str) else "adapted"]
        every = np.arange(len(rows)) / len(rows)
        return [
            Score(name, np.stack([every < share, np.ones(len(rows))], axis=1).astype(float))
            for name, share in zip(self.scores, shares, strict=True)
        ]

    def rivals(self, *_: Any) -> list[Contender]:
        names = [name for name in self.shares if name != "adapted"]
        return [Contender(name, partial(contextlib.nullcontext, name)) for name in names]


def verdict_of(task: Task, fresh: tuple[str, ...], **prove: Any) -> dict[str, Any]:
    data = Prepared(ROWS, ROWS, None, {}, Census(), {}, [], False)
    return evaluate(task, Model(1, 1), data, None, run_with(**prove), fresh)


@pytest.mark.parametrize("fresh", [(), ("score",)])
def test_nothing_is_better_while_a_contender_without_an_adapter_is_above(
    fresh: tuple[str, ...],
) -> None:
    """The rival is chosen on training rows; on held-out ones another contender may be the best."""
    shares = {"adapted": (0.9, 0.5), "majority": (0.2, 0.1), "linear_probe": (0.6, 0.8)}
    if not fresh:
        shares = {"base": (0.2, 0.1), **shares}
    by_accuracy = verdict_of(Several(**shares), fresh)
    assert by_accuracy["verdict"]["domain"] == "better"
    assert "objection" not in by_accuracy["domain"]
    by_f1 = verdict_of(Several(**shares), fresh, metrics=["macro_f1"])
    assert by_f1["domain"]["macro_f1"]["ci95"][0] > 0  # than the rival
    assert by_f1["verdict"]["domain"] == "no different"
    assert by_f1["domain"]["objection"] == "a linear probe on frozen features reached 0.800"
    (line, *_) = in_lines(by_f1)
    assert line.endswith("scored better, but a linear probe on frozen features reached 0.800")
    assert not check_gate(by_f1, Gate(general=None))["passed"]


class Alone(Two):
    """Names no rival, or the base itself."""

    def __init__(self, names_base: bool) -> None:
        self.names_base = names_base

    def score(self, model: Any, *given: Any) -> list[Score]:
        return super().score("base" if model.off else model, *given)

    def rivals(self, model: Any, *_: Any) -> list[Contender]:
        return [Contender("base", model.disable_adapter)] if self.names_base else []


class Switched(Model):
    off = False

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:  # type: ignore[override]
        self.off = True
        yield
        self.off = False


def test_a_random_head_that_is_not_beaten_is_no_objection() -> None:
    class Worse(Alone):
        def score(self, model: Any, *given: Any) -> list[Score]:
            return Two.score(self, "base" if not model.off else model, *given)

    data = Prepared(ROWS, ROWS, None, {}, Census(), {}, [], False)
    report = evaluate(Worse(True), Switched(1, 1), data, None, run_with(), ("score",))
    assert report["verdict"]["domain"] == "worse" and "objection" not in report["domain"]


@pytest.mark.parametrize("names_base", [False, True])
def test_beating_a_random_head_is_never_better(names_base: bool) -> None:
    data = Prepared(ROWS, ROWS, None, {}, Census(), {}, [], False)
    for fresh, word in ((("score",), "no different"), ((), "better")):
        task = Alone(names_base)
        report = evaluate(task, Switched(1, 1), data, None, run_with(), fresh)
        assert report["verdict"]["domain"] == word
        assert report["domain"]["accuracy"]["ci95"][0] > 0
        assert ("untrained head" in report["domain"].get("objection", "")) == bool(fresh)


# ------------------------------------------------------------------ how much is evaluated
class Counting(Two):
    """Counts the rows that each scoring sees."""

    def __init__(self) -> None:
        self.general: Any = None
        self.seen: list[set[int]] = []

    def score(self, model: Any, rows: Rows, *given: Any) -> list[Score]:
        self.seen.append(set(rows.column("unit").tolist()))
        return super().score(model, rows, *given)


def rows_of(units: int, each: int = 1) -> Rows:
    return Rows.of(
        {"input_ids": list(range(10)), "unit": unit} for unit in range(units) for _ in range(each)
    )


def budgeted(
    held_out: Rows, trained: int | None, general: Rows | None = None, **prove: Any
) -> tuple[dict[str, Any], list[set[int]]]:
    """Trained on so many tokens; the report, and the units that the domain's scorings saw."""
    task = Counting()
    task.general = Counting() if general else None
    train = rows_of(30)
    data = Prepared(train, held_out, general, {}, Census(), {}, [], False)
    run = run_with(**prove)
    report = evaluate(task, Model(1, 1), data, None, run, ("score",), trained=trained)
    return report, task.seen[:2]


def test_the_budget_pays_for_all_contenders() -> None:
    """Two contenders, ten tokens a unit, each counted a half: 70 of 1,000 units, and the 30
    training rows that both are scored on as well, take 1,000 of the 4,000 tokens of the training.
    """
    report, seen = budgeted(rows_of(1000), 4000)
    assert report["evaluated"] == {
        "budget": 0.25,
        "tokens": 2000,
        "share": 0.25,
        "domain": {"units": 70, "of": 1000},
        "general": None,
    }
    assert len(seen[0]) == 70 and seen[0] == seen[1] and max(seen[0]) > 500
    assert report["domain"]["documents"] == 70
    assert budgeted(rows_of(1000), 4000)[1] == seen
    assert budgeted(rows_of(1000), 4000, budget=0.5)[0]["evaluated"]["share"] == 0.5
    (line,) = [line for line in in_lines(report) if line.startswith("evaluated: ")]
    assert "70 of 1,000 held-out rows, drawn at random (prove.budget: 0.25; null: all)" in line


@pytest.mark.parametrize(
    ("trained", "prove", "units"),
    [(10**6, {}, 1000), (4000, {"budget": None}, 1000), (None, {}, 1000), (1, {}, 20)],
)
def test_all_rows_or_at_least_twenty_units(
    trained: int | None, prove: dict[str, Any], units: int
) -> None:
    report, seen = budgeted(rows_of(1000), trained, **prove)
    assert report["evaluated"]["domain"] == {"units": units, "of": 1000}
    assert len(seen[0]) == units
    drawn = [line for line in in_lines(report) if line.startswith("evaluated: ")]
    assert bool(drawn) == (units < 1000)


def test_a_unit_is_drawn_as_a_whole() -> None:
    held_out = rows_of(300, each=4)
    report, seen = budgeted(held_out, 9200)
    assert report["evaluated"]["domain"] == {"units": 50, "of": 300}
    assert len(seen[0]) == 50
    assert report["domain"]["documents"] == 200  # this task scores rows


def test_general_text_has_its_share_of_the_budget() -> None:
    """Half of it each; what one does not need is the other's."""
    both, _ = budgeted(rows_of(1000), 9200, rows_of(1000))
    assert both["evaluated"]["domain"]["units"] == both["evaluated"]["general"]["units"] == 100
    assert both["general"]["documents"] == 100 and both["evaluated"]["share"] == 0.25
    little, _ = budgeted(rows_of(1000), 9200, rows_of(40))
    assert little["evaluated"]["general"] == {"units": 40, "of": 40}
    assert little["evaluated"]["domain"]["units"] == 160
    # Twenty units of the domain take more than half: general text has the rest, and also twenty.
    for trained, units in ((4000, 30), (2800, 20)):
        found, _ = budgeted(rows_of(1000, each=2), trained, rows_of(1000))
        assert found["evaluated"]["domain"]["units"] == 20
        assert found["evaluated"]["general"]["units"] == units


# ------------------------------------------------------------------ of a task that is there
@pytest.mark.parametrize("task", [Classification(), Preference()])
def test_any_score_of_a_task_may_decide_and_no_other(task: Task) -> None:
    """`prove.metrics` is read by every task that has more than one score."""
    assert "prove.metrics" not in task.unread
    data: Any = None
    for name in task.scores:
        run = run_with(metrics=[name])
        assert task.check(data, None, {}, run) == [] and task.deciding(run.prove) == name
    (problem,) = task.check(data, None, {}, run_with(metrics=[task.scores[1], "rouge_l"]))
    assert problem.startswith("prove.metrics: rouge_l: ") and ", ".join(task.scores) in problem


@pytest.mark.parametrize(("metrics", "word"), [([], "no different"), (["margin"], "better")])
def test_a_margin_may_decide_a_preference(metrics: list[str], word: str) -> None:
    """All pairs are of the same side as before, each further from the other; what speaks against a
    perfect accuracy speaks against a margin as well."""

    class Pairs(Preference):
        general = None
        forgot = False

        def score(self, model: Any, rows: Rows, *_: Any) -> list[Score]:
            adapted = isinstance(model, torch.nn.Module)
            every = np.arange(len(rows))
            right, margins = every % 2 == 0, adapted * (1 + every % 3)
            return [mean_score("accuracy", right), mean_score("margin", margins)]

        def examine(self, *_: Any) -> dict[str, Any]:
            return {"generation": {"prompts": 4}} if self.forgot else {}

        def objection(self, report: dict[str, Any]) -> str | None:
            return "general text was forgotten" if report.get("generation") else None

    task = Pairs()
    report = verdict_of(task, (), metrics=metrics)
    assert report["verdict"]["domain"] == word
    assert report["overfitting"].keys() == {f"train_{[*metrics, 'accuracy'][0]}", "gap"}
    first = "margin 0.000 -> 1.975" if metrics else "accuracy 0.500 -> 0.500"
    assert in_lines(report)[0].startswith(f"domain: {first}")
    task.forgot = True
    assert verdict_of(task, (), metrics=metrics)["verdict"]["domain"] == "no different"


# ------------------------------------------------------------------ what a gate may hold
def checked(task: Task, general: bool = True, **prove: Any) -> None:
    labels = [-100, 6]
    rows = Rows.of(
        {"input_ids": [5, 6], "labels": labels, "unit": unit, "bytes": 1} for unit in range(3)
    )
    data: Any = SimpleNamespace(eval=rows, general=rows if general else None, facts={})
    processor: Any = SimpleNamespace(decode=lambda ids, **_: "word")
    check_prove(task, data, processor, run_with("sft", **prove))


@pytest.mark.parametrize(
    ("task", "known"),
    [
        (Classification(), "accuracy, macro_f1"),
        (Preference(), "accuracy, margin"),
        (Text(), "loss, bits_per_byte"),
        (Conversations(), "loss, bits_per_byte"),
    ],
)
def test_a_gate_holds_scores_of_the_task_and_no_others(task: Task, known: str) -> None:
    checked(task, gate={"metrics": dict.fromkeys(known.split(", "), 0.5)})
    with pytest.raises(UserError) as raised:
        checked(task, gate={"metrics": {known.split(", ")[0]: 0.5, "bleu": 0.5, "wer": 1}})
    assert str(raised.value) == (
        "prove.gate.metrics: bleu, wer: no score of this task, and not in prove.metrics "
        f"(known: {known})"
    )


def test_a_gate_holds_metrics_that_are_named() -> None:
    checked(Conversations(), metrics=["f1"], gate={"metrics": {"f1": 0.5, "loss": 2}})
    with pytest.raises(UserError, match=r"rouge_l: .* \(known: loss, bits_per_byte, f1\)$"):
        checked(Conversations(), metrics=["f1"], gate={"metrics": {"rouge_l": 0.5}})


def test_a_bound_of_a_loss_is_for_tasks_that_have_one() -> None:
    checked(Text(), gate={"loss": 2.0})
    with pytest.raises(UserError, match=r"^prove\.gate\.loss: .* \(known: accuracy, macro_f1\)$"):
        checked(Classification(), gate={"loss": 2.0})


@pytest.mark.parametrize("task", [Text(), Conversations(), Preference()])
def test_general_text_that_is_not_there_is_not_asked_for(task: Task) -> None:
    words = r"^prove\.gate\.general: kept: not measured without data\.general: .* null$"
    for gate in ({}, {"general": "kept"}):
        checked(task, gate=gate)
        with pytest.raises(UserError, match=words):
            checked(task, general=False, gate=gate)
    checked(task, general=False, gate={"general": None})
    checked(Classification(), general=False, gate={})  # forgetting is not measured for it
