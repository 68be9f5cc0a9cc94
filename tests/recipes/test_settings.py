"""Every key that a recipe takes is read by it: what it changes, or where that is tested.

Keys that all recipes share are read in one place (`training_arguments`, `attach`, `prepare`) and
tested on one recipe. Here: that every recipe takes this way, and what `classify` and
`dpo` do with a key on their own.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
from classifiers import make_body, texts
from conftest import make_tokenizer, sentences
from prepared import put, put_texts
from test_train_settings import TRAIN

import lora_kit
from lora_kit.base.pin import Pinned
from lora_kit.errors import RunFileError, UserError
from lora_kit.run import run_class, schema_of
from lora_kit.tasks.causal import Conversations, Text
from lora_kit.tasks.encode import rows_of
from lora_kit.tasks.preference import Preference
from lora_kit.tasks.sequence import Classification
from lora_kit.tasks.task import Task
from lora_kit.train.arguments import training_arguments
from lora_kit.train.callbacks import read_metrics

TESTS = Path(__file__).resolve().parent.parent
TASKS: dict[str, Task] = {
    "cpt": Text(),
    "sft": Conversations(),
    "classify": Classification(),
    "dpo": Preference(),
}
# Keys that no recipe treats in a way of its own -> the test that shows what they change.
SHARED = {
    "recipe": "test_train_settings.py::test_top",
    "name": "test_train_settings.py::test_top",
    "seed": "test_train_settings.py::test_top",
    "speed": "test_train_speed.py::test_plain_takes_no_quick_path_and_auto_does",
    "ship.target": "test_ship_targets.py::test_a_target_stops_what_it_would_not_take",
    **dict.fromkeys(
        ("base.model", "base.revision", "base.dtype", "base.quantize"),
        "test_train_settings.py::test_base",
    ),
    **dict.fromkeys(
        (
            *("adapter.r", "adapter.lora_alpha", "adapter.lora_dropout", "adapter.target_modules"),
            *("adapter.exclude_modules", "adapter.layers_to_transform", "adapter.rank_pattern"),
            *("adapter.alpha_pattern", "adapter.use_rslora", "adapter.use_dora"),
        ),
        "test_train_settings.py::test_adapter_reaches_the_model",
    ),
    "adapter.start": "test_train_failures.py::test_start_begins_with_that_adapter",
    "data.ignore": "test_data_marks.py::test_a_column_that_is_refused_is_named_with_the_fix",
    "data.workers": "test_data_prepare.py::test_limits_and_workers_prepare_nothing_again",
    **{
        f"data.limits.{key}": "test_data_census.py::"
        "test_each_limit_stops_the_run_names_its_key_and_can_be_raised"
        for key in ("dropped", "truncated", "without_supervision", "exact_leaks", "near_leaks")
    },
    "train.trainable": "test_train_strategies.py::test_the_head_alone",
    "train.top_layers": "test_train_strategies.py::test_top_layers_hold_the_adapter",
    "train.save_total_limit": "test_train_resume.py::test_checkpoints_are_bounded",
    "train.early_stopping_patience": "test_train_early_stopping.py::"
    "test_stops_when_patience_runs_out",
    "train.load_best_model_at_end": "test_train_early_stopping.py::"
    "test_the_last_one_where_it_is_asked_for",
    "prove.shots": "test_prove_compare.py::"
    "test_the_base_with_examples_is_the_base_given_longer_rows",
    "prove.harness": "test_prove_harness.py::test_an_adapter_that_does_nothing_makes_no_difference",
    **{
        f"prove.gate.{key}": "test_prove_gate.py::test_bounds"
        for key in ("domain", "general", "few_shot", "loss", "metrics")
    },
    "prove.gate.scores": "test_prove_gate.py::test_no_other_score_may_be_worse",
    "prove.budget": "test_prove_deciding.py::test_the_budget_pays_for_all_contenders",
    **{f"train.{key}": "recipes/test_settings.py::test_train_reaches_the_trainer" for key in TRAIN},
}
_DATA = "test_data_prepare.py::test_each_key_of_data_changes_what_is_learned_or_judged"
_ROWS = "recipes/test_settings.py::test_a_key_changes_the_rows"
# The others, by recipe.
OWN: dict[str, dict[str, str]] = {
    "cpt": {
        **dict.fromkeys(("data.train", "data.eval", "data.general", "data.columns"), _DATA),
        **dict.fromkeys(("data.replay", "data.decontaminate", "data.group"), _DATA),
        "data.packing": "test_data_prepare.py::test_rows_are_packed_as_asked",
        "train.max_length": "test_train_settings.py::test_max_length",
    },
    "sft": {
        **dict.fromkeys(("data.train", "data.eval", "data.general", "data.columns"), _DATA),
        **dict.fromkeys(("data.replay", "data.decontaminate", "data.group"), _DATA),
        **dict.fromkeys(("data.labels", "data.chat_template", "data.supervise"), _DATA),
        "data.packing": "test_data_prepare.py::test_rows_are_packed_as_asked",
        "train.max_length": "test_data_prepare.py::"
        "test_other_settings_of_a_run_are_part_of_the_key",
        "prove.metrics": "test_prove_compare.py::test_what_the_model_answers_is_scored",
        "prove.answers": "test_prove_compare.py::test_what_the_model_answers_is_scored",
    },
    "classify": {
        **dict.fromkeys(("data.train", "data.eval", "data.columns", "data.labels"), _ROWS),
        **dict.fromkeys(("data.decontaminate", "data.group", "train.max_length"), _ROWS),
        "base.pooling": "test_base_head.py::test_poolings_by_family",
        "prove.metrics": "test_tasks_sequence.py::"
        "test_the_best_rival_is_chosen_by_the_score_that_decides",
    },
    "dpo": {
        **dict.fromkeys(("data.train", "data.eval", "data.general", "data.columns"), _ROWS),
        **dict.fromkeys(("data.decontaminate", "data.group", "data.chat_template"), _ROWS),
        "train.max_length": _ROWS,
        "train.beta": "test_tasks_preference.py::test_accuracy_and_margin_against_the_reference",
        "train.loss_type": "recipes/test_settings.py::test_the_one_loss_type_there_is",
        "prove.metrics": "test_prove_deciding.py::test_a_margin_may_decide_a_preference",
        "prove.answers": "test_tasks_preference.py::"
        "test_generations_are_measured_against_the_reference",
    },
}


def keys_of(task: Task) -> set[str]:
    """The keys of a recipe's run file, with dots, as its JSON schema has them."""
    schema = schema_of(task)
    found = set()

    def walk(node: dict[str, Any], before: str) -> None:
        for name, field in node["properties"].items():
            references = [one.get("$ref", "") for one in (field, *field.get("anyOf", ()))]
            kinds = [reference.rpartition("/")[2] for reference in references if reference]
            if kinds and "Source" not in kinds:
                walk(schema["$defs"][kinds[0]], f"{before}{name}.")
            else:
                found.add(before + name)

    walk(schema, "")
    return found


@pytest.mark.parametrize("recipe", TASKS)
def test_every_key_has_a_test_that_shows_what_it_changes(recipe: str) -> None:
    keys = keys_of(TASKS[recipe])
    assert len(keys) >= 50
    shared = {key: test for key, test in SHARED.items() if key not in TASKS[recipe].unread}
    proven = shared | OWN[recipe]
    assert keys == proven.keys()
    for test in set(proven.values()):
        file, _, name = test.partition("::")
        tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
        names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert name in names, test


# ------------------------------------------------------------------ data
def classified(folder: Path) -> dict[str, str]:
    """{name in the tables below: file}, for classify."""
    rows = [{**row, "doc": n % 9, "kind": row["label"][0]} for n, row in enumerate(texts(160))]
    return {
        "rows": put(folder / "rows.jsonl", rows),
        "more": put(folder / "more.jsonl", texts(60, seed=3)),
        "leaked": put(folder / "leaked.jsonl", [{"q": row["text"]} for row in rows[:150:3]]),
    }


def preferred(folder: Path) -> dict[str, str]:
    """The same for dpo."""

    def pairs(seed: int) -> list[dict[str, Any]]:
        words = sentences(120, seed)
        return [
            {
                "prompt": f"What comes after {a.split()[0]} at number {n}?",
                "chosen": a[: 20 + n],
                "rejected": b[:20],
                "other": a[:9],
                "doc": n % 9,
            }
            for n, (a, b) in enumerate(zip(words[:60], words[60:], strict=True))
        ]

    rows = pairs(0)
    return {
        "rows": put(folder / "rows.jsonl", rows),
        "more": put(folder / "more.jsonl", pairs(4)),
        "leaked": put(
            folder / "leaked.jsonl", [{"q": r["prompt"], "a": r["chosen"]} for r in rows]
        ),
        "general": put_texts(folder / "general.txt", sentences(40, seed=9)),
    }


FILES = {"classify": classified, "dpo": preferred}
# recipe, key, another value than the default; names of files are replaced.
CHANGES: list[tuple[str, str, Any]] = [
    ("classify", "data.train", "more"),
    ("classify", "data.eval", 0.3),
    ("classify", "data.columns", {"label": "kind"}),
    ("classify", "data.labels", ["time", "food", "animals"]),
    ("classify", "data.decontaminate", "leaked"),
    ("classify", "data.group", "doc"),
    ("classify", "train.max_length", 8),
    ("dpo", "data.train", "more"),
    ("dpo", "data.eval", 0.3),
    ("dpo", "data.general", "general"),
    ("dpo", "data.columns", {"chosen": "other"}),
    ("dpo", "data.chat_template", "alpaca"),
    ("dpo", "data.decontaminate", "leaked"),
    ("dpo", "data.group", "doc"),
    ("dpo", "train.max_length", 40),
]


@pytest.fixture(scope="module")
def pinned(tmp_path_factory: pytest.TempPathFactory) -> Pinned:
    """The folder of a tokenizer alone."""
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return Pinned("base", str(folder))


def settings(recipe: str, changes: dict[str, Any], files: dict[str, str]) -> Any:
    values: dict[str, Any] = {"recipe": recipe, "name": "test", "base": {"model": "nano"}}
    values |= {"data": {"train": files["rows"], "workers": 1}, "train": {"max_length": 128}}
    for key, value in changes.items():
        section, _, name = key.partition(".")
        values.setdefault(section, {})[name] = files.get(str(value), value)
    return run_class(TASKS[recipe]).model_validate(values)


@pytest.mark.parametrize(("recipe", "key", "value"), CHANGES)
def test_a_key_changes_the_rows(
    recipe: str, key: str, value: Any, pinned: Pinned, tmp_path: Path
) -> None:
    files = FILES[recipe](tmp_path)
    found = []
    for changes in ({}, {key: value}):
        run = settings(recipe, changes, files)
        _, data = rows_of(TASKS[recipe], run, pinned, limits=False)
        uses = [data.rows("train"), data.eval, data.general or ()]
        rows = [[str({k: v for k, v in row.items()}) for row in some] for some in uses]
        found.append((data.facts, rows, data.census.to_json()["leaks"]))
    assert found[0] != found[1]


@pytest.mark.parametrize("recipe", ["classify", "dpo"])
def test_a_limit_is_one_of_every_recipe(recipe: str, pinned: Pinned, tmp_path: Path) -> None:
    files = FILES[recipe](tmp_path)
    short = {"train.max_length": {"classify": 8, "dpo": 40}[recipe]}
    key = {"classify": "truncated", "dpo": "dropped"}[recipe]
    with pytest.raises(UserError, match=rf"data\.limits\.{key}"):
        rows_of(TASKS[recipe], settings(recipe, short, files), pinned)
    higher = {**short, "data.limits": {key: 1.0}}
    rows_of(TASKS[recipe], settings(recipe, higher, files), pinned)


# ------------------------------------------------------------------ train
@pytest.mark.parametrize("recipe", TASKS)
@pytest.mark.parametrize("key", TRAIN)
def test_train_reaches_the_trainer(recipe: str, key: str, tmp_path: Path) -> None:
    """The arguments of the task's own trainer."""
    task, files = TASKS[recipe], {"rows": "x"}
    value, expected = TRAIN[key]
    made = task.classes()[1]
    plain = training_arguments(settings(recipe, {}, files), tmp_path, arguments_class=made)
    run = settings(recipe, {f"train.{key}": value}, files)
    changed = training_arguments(run, tmp_path, arguments_class=made)
    for name, wanted in expected.items():
        assert getattr(changed, name) == wanted != getattr(plain, name)


def test_the_one_loss_type_there_is() -> None:
    """The key is there for the losses to come; any other value is refused."""
    run = settings("dpo", {"train.loss_type": "sigmoid"}, {"rows": "x"})
    assert run.train.loss_type == "sigmoid"
    with pytest.raises(ValueError, match="sigmoid"):
        settings("dpo", {"train.loss_type": "ipo"}, {"rows": "x"})


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["classify", "dpo"])
def test_a_run_evaluates_saves_and_trains_as_asked(recipe: str, work: Path) -> None:
    make_body(work / "base", "Llama", "ForCausalLM")
    FILES[recipe](work)
    train = {"max_steps": 4, "max_length": 128, "learning_rate": 1e-2, "warmup_steps": 0}
    train |= {"eval_steps": 2, "save_steps": 2, "logging_steps": 3, "top_layers": 1}
    train |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 3}
    train |= {"gradient_checkpointing": True, "load_best_model_at_end": False}
    values = {"recipe": recipe, "name": "test", "base": {"model": "base", "dtype": "float32"}}
    values |= {"adapter": {"r": 4}, "data": {"train": "rows.jsonl", "eval": 0.4}, "train": train}
    values["prove"] = {"metrics": [TASKS[recipe].scores[1]]}
    (work / "run.yaml").write_text(json.dumps(values), encoding="utf-8")
    report = lora_kit.train("run.yaml")
    rows = read_metrics(Path("runs/test/metrics.jsonl"))
    assert [row["step"] for row in rows if "loss" in row] == [3]
    assert [row["step"] for row in rows if "eval_loss" in row] == [2, 4]
    saved = sorted(folder.name for folder in Path("runs/test/checkpoints").iterdir())
    assert saved == ["checkpoint-2", "checkpoint-4"]
    assert {one["module"].split(".layers.")[1][0] for one in report["layers"]} == {"1"}
    assert report["domain"]["decided_by"] == TASKS[recipe].scores[1]
    lock = json.loads(Path("runs/test/run.lock.json").read_text(encoding="utf-8"))
    assert lock["batch"]["gradient_accumulation_steps"] == 2


# ------------------------------------------------------------------ keys that are not read
@pytest.mark.parametrize(
    ("recipe", "key", "value"),
    [
        ("cpt", "data.labels", ["a", "b"]),
        ("cpt", "data.supervise", "all"),
        ("cpt", "prove.metrics", ["f1"]),
        ("classify", "data.general", "nano:docstrings"),
        ("classify", "ship.target", "vllm"),
        ("classify", "prove.answers", 3),
        ("dpo", "data.replay", 0.1),
        ("dpo", "data.packing", "documents"),
        ("dpo", "prove.shots", 1),
    ],
)
def test_a_key_that_is_not_read_is_refused(recipe: str, key: str, value: Any, work: Path) -> None:
    put(work / "rows.jsonl", [{"text": "a"}])
    values: dict[str, Any] = {"recipe": recipe, "name": "test", "base": {"model": "nano"}}
    values["data"] = {"train": "rows.jsonl"}
    section, _, name = key.partition(".")
    values.setdefault(section, {})[name] = value
    (work / "run.yaml").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(RunFileError) as raised:
        lora_kit.train("run.yaml")
    (problem,) = raised.value.problems
    assert problem.startswith(f"{key}: recipe {recipe} does not read it: ")
    assert key not in keys_of(TASKS[recipe])
