"""lm-evaluation-harness on tiny tasks: its figures, reckoned by hand, of base and adapted."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import sentences

from lora_kit.errors import UserError
from lora_kit.prove import harness
from lora_kit.prove.harness import check_tasks, compared_results, run_harness
from lora_kit.schema import Run

ROWS = [
    {
        "question": f"the {one}",
        "choices": [" fox", " dog", " queen of all"],
        "label": n % 3,
    }
    for n, one in enumerate(sentences(24, seed=5))
]


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes a task with rows of its own; returns the path of its .yaml."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")

    def write(name: str, output_type: str, **more: Any) -> str:
        values = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(rows)}},
            "test_split": "test",
            "output_type": output_type,
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{label}}",
        }
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(values | more), encoding="utf-8")
        return str(file)

    return write


@pytest.fixture
def choosing(task: Any) -> str:
    return task("choosing", "multiple_choice", doc_to_choice="{{choices}}", target_delimiter="")


@pytest.fixture
def tokenizer(base: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base)


@pytest.fixture
def model(base: Path) -> Any:
    """With an adapter that does nothing yet (B is zero)."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    return get_peft_model(plain, LoraConfig(target_modules="all-linear"))


def loud(model: Any) -> Any:
    """The adapter changes what the model says."""
    import torch

    torch.manual_seed(1)
    for name, values in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(values, std=0.5)
    return model


def chosen(model: Any, tokenizer: Any) -> np.ndarray:
    """Whether the right choice is the likeliest, row by row, without the harness."""
    import torch

    right = []
    for row in ROWS:
        question = tokenizer(row["question"]).input_ids
        likelihoods = []
        for choice in row["choices"]:
            whole = tokenizer(row["question"] + choice).input_ids
            assert whole[: len(question)] == question
            with torch.no_grad():
                logs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            answer = range(len(question), len(whole))
            likelihoods.append(sum(float(logs[n - 1, whole[n]]) for n in answer))
        right.append(int(np.argmax(likelihoods)) == row["label"])
    return np.array(right, dtype=float)


@pytest.mark.parametrize("training", [True, False])
def test_an_error_leaves_the_model_in_the_mode_that_it_had(
    model: Any, tokenizer: Any, choosing: str, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval

    def broken(*_: Any, **__: Any) -> Any:
        raise ValueError("no such column")

    monkeypatch.setattr(lm_eval, "evaluate", broken)
    with pytest.raises(UserError, match="no such column"):
        run_harness(model.train(training), tokenizer, [choosing], seed=0)
    assert model.training is training


def test_the_seed_is_that_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_kit.prove import evaluate

    values = {"recipe": "sft", "name": "test", "base": {"model": "nano"}, "seed": 7}
    run = Run.model_validate(
        {**values, "data": {"train": "nano:topics"}, "prove": {"harness": ["arc_easy"]}}
    )
    monkeypatch.setattr(evaluate, "run_harness", lambda *given: {"given": given[2:]})
    report: dict[str, Any] = {}
    evaluate.add_harness(report, None, None, run)
    assert report["harness"]["given"] == (["arc_easy"], 7)


def test_accuracy_is_that_reckoned_by_hand(model: Any, tokenizer: Any, choosing: str) -> None:
    model = loud(model).train()
    adapted = chosen(model.eval(), tokenizer)
    with model.disable_adapter():
        base = chosen(model, tokenizer)
    assert (base != adapted).any()
    found = run_harness(model.train(), tokenizer, [choosing], seed=0, at_once=5)
    figures = found["choosing/acc"]
    assert figures["rows"] == 24 and figures["higher_is_better"]
    assert figures["base"] == pytest.approx(base.mean(), abs=1e-4)
    assert figures["adapted"] == pytest.approx(adapted.mean(), abs=1e-4)
    low, high = figures["ci95"]
    assert low < figures["difference"] < high
    assert (
        model.training
        and not model.base_model.model.model.layers[0].self_attn.q_proj.disable_adapters
    )


def test_an_adapter_that_does_nothing_makes_no_difference(
    model: Any, tokenizer: Any, choosing: str, task: Any
) -> None:
    saying = task(
        "saying",
        "generate_until",
        doc_to_target=" fox",
        generation_kwargs={
            "until": ["\n"],
            "max_gen_toks": 4,
            "do_sample": True,
            "temperature": 1.0,
        },
    )
    reading = task(
        "reading",
        "loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{question}}",
        metric_list=[{"metric": "bits_per_byte"}],
    )
    found = run_harness(model, tokenizer, [choosing, saying, reading], seed=3, at_once=4)
    assert {"choosing/acc", "saying/exact_match", "reading/bits_per_byte"} <= found.keys()
    assert all(figures["difference"] == 0 for figures in found.values())
    assert found["choosing/acc"]["ci95"] == [0, 0]
    # Bits of all rows by bytes of all rows: no mean of rows.
    assert found["reading/bits_per_byte"]["ci95"] is None
    assert not found["reading/bits_per_byte"]["higher_is_better"]
    again = run_harness(model, tokenizer, [choosing, saying, reading], seed=3, at_once=4)
    assert again == found


def results(first: list[float], second: list[float]) -> dict[str, Any]:
    """What lm_eval.evaluate returns of a group of two tasks, as far as it is read."""
    tasks = {"one": first, "two": second}
    means = {name: {"acc,none": float(np.mean(values))} for name, values in tasks.items()}
    return {
        "results": {
            **means,
            "both": {
                "alias": "both",
                "acc,none": float(np.mean(first + second)),
                "acc_stderr,none": "N/A",
            },
        },
        "groups": {"both": {}},
        "group_subtasks": {"both": ["one", "two"]},
        "higher_is_better": {"both": {"acc": True}},
        "samples": {
            name: [{"filter": "none", "acc": value} for value in values]
            for name, values in tasks.items()
        },
    }


def test_a_group_with_a_figure_stands_for_its_tasks() -> None:
    found = compared_results(results([0, 1], [0, 0, 0]), results([1, 1], [0, 1, 0]), seed=0)
    assert found.keys() == {"both/acc"}
    figures = found["both/acc"]
    assert (figures["rows"], figures["base"], figures["adapted"]) == (5, 0.2, 0.6)
    assert figures["ci95"][0] <= 0.4 <= figures["ci95"][1]


def test_what_is_wrong_with_the_tasks_is_said_at_once(
    choosing: str, task: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.tasks import TaskManager

    broken = task(
        "broken", "multiple_choice", dataset_kwargs={"data_files": {"test": "none.jsonl"}}
    )
    unsafe = task("unsafe", "multiple_choice", unsafe_code=True, doc_to_choice="{{choices}}")
    # The names it ships take seconds to read: one stands for all of them.
    task("hellaswag", "multiple_choice")
    shipped = TaskManager(include_defaults=False, include_path=str(Path(choosing).parent))
    monkeypatch.setattr(harness, "_manager", lambda _: shipped)
    check_tasks([choosing])
    with pytest.raises(UserError) as caught:
        check_tasks([choosing, "hella_swag", "none.yaml", broken, unsafe, choosing])
    lines = str(caught.value).splitlines()
    assert len(lines) == 5 and all(line.startswith("prove.harness: ") for line in lines)
    assert lines[0].endswith("choosing.yaml: named 2 times")
    assert lines[1].endswith("did you mean `hellaswag`?")
    assert "none.yaml: no task of the harness, and no .yaml file" in lines[2]
    assert "broken.yaml: cannot be loaded: FileNotFoundError" in lines[3]
    assert "unsafe.yaml: runs code that the model wrote" in lines[4]


def test_without_the_harness_the_way_to_install_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'lora-kit\[harness\]'"):
        check_tasks(["hellaswag"])
