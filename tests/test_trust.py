"""The one choke point: what may run code that is not ours, and that nothing goes around it."""

# ruff: noqa: F811 - fixtures of another file
from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import processes
import pytest
import yaml
from conftest import RunMaker
from test_cli import Shell, run  # noqa: F401 - a fixture
from test_tasks_metrics import SCRIPT

import lora_kit
from lora_kit import trust
from lora_kit.errors import UserError
from lora_kit.launch import load_recipe
from lora_kit.prove import harness
from lora_kit.run import load_run
from lora_kit.start import start
from lora_kit.tasks import metrics

ROOT = Path(lora_kit.__file__).parent
FILES = [*ROOT.rglob("*.py"), *(ROOT.parent / "recipes").glob("*.py")]
# Who may call what runs code, or reads a pickle.
ALLOWED = {
    ("exec_module", "recipe.py"),  # a recipe
    ("evaluate.load", "metrics.py"),
    ("PeftModel.from_pretrained", "reload.py"),  # an export of ours, by the program that serves it
    ("import_module", "text.py"),  # libraries by names that stand there
    ("pickle.loads", "workers.py"),  # what this process wrote for its own workers
    ("torch.load", "guards.py"),  # tensors of a checkpoint of ours
}


def calls(source: str) -> Iterator[str]:
    """What of this can run code that came with a file: `name of the call`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            yield from ["trust_remote_code"] * (ast.unparse(node.value) != "False")
        if isinstance(node, ast.Dict):  # options for a call
            for key, value in zip(node.keys, node.values, strict=True):
                if key is not None and ast.unparse(key) == "'trust_remote_code'":
                    yield from ["trust_remote_code"] * (ast.unparse(value) != "False")
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        last = name.rpartition(".")[2]
        named = {word.arg for word in node.keywords}
        if name.startswith(("Auto", "transformers.Auto")) and last == "from_pretrained":
            if (
                not {"trust_remote_code", None} & named
            ):  # left out, transformers asks at the terminal
                yield "from_pretrained"
        elif last == "from_pretrained" and "Peft" in name:
            yield "PeftModel.from_pretrained"
        elif name in ("evaluate.load", "torch.load", "eval", "exec", "__import__"):
            yield name
        elif last in ("exec_module", "import_module", "run_path", "load_dataset"):
            yield last
        elif name.endswith(".load_adapter"):
            yield "load_adapter"
        elif name.startswith(("pickle.", "joblib.", "dill.")) and last in ("load", "loads"):
            yield name


def test_nothing_goes_around_it() -> None:
    assert len(FILES) >= 70
    found = {(call, file.name) for file in FILES for call in calls(file.read_text("utf-8"))}
    assert found == ALLOWED


@pytest.mark.parametrize(
    "source",
    [
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "AutoModel.from_pretrained(x)",
        "f(trust_remote_code=run.train.x)",
        "f(**{'trust_remote_code': True})",
        "PeftModel.from_pretrained(model, folder)",
        "import torch\ntorch.load(file, weights_only=True)",
        "pickle.load(file)",
        "evaluate.load(name)",
        "importlib.import_module(name)",
    ],
)
def test_a_way_around_is_seen(source: str) -> None:
    assert list(calls(source))
    assert not list(calls("AutoModel.from_pretrained(x, trust_remote_code=False)\njson.load(f)"))


# --- The command line says it, nothing else


@pytest.fixture(autouse=True)
def _unsaid(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import evaluate

    monkeypatch.setenv(trust.VARIABLE, "0")
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.mark.parametrize("section", ["base", "train", "prove", "data", "adapter"])
def test_no_key_can_say_it(run_file: RunMaker, section: str) -> None:
    with pytest.raises(UserError, match=rf"{section}\.trust_remote_code: ") as raised:
        load_run(run_file(**{f"{section}.trust_remote_code": True}))
    assert section in ("base", "adapter") or "--trust-remote-code" in str(raised.value)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Whose scripts evaluate would fetch, or take from its cache of fetched ones."""
    from evaluate import loading

    asked: list[str] = []

    def fetch(path: str, *_: Any, **__: Any) -> Any:
        asked.append(path)
        raise FileNotFoundError(path)

    monkeypatch.setattr(loading, "HubEvaluationModuleFactory", fetch)
    monkeypatch.setattr(loading, "CachedEvaluationModuleFactory", fetch)
    return asked


@pytest.mark.parametrize("name", ["bleu", "someone/metric"])
def test_a_metric_of_the_hub_waits_for_the_word(hub: list[str], name: str) -> None:
    with pytest.raises(UserError, match="add --trust-remote-code"):
        metrics.check_names([name], True)
    assert not hub
    trust.allow_remote_code(True)
    with pytest.raises(UserError, match="no metric of this name on the Hub"):
        metrics.check_names([name], True)
    assert hub
    # What is said counts for one command.
    trust.allow_remote_code(False)
    with pytest.raises(UserError, match="add --trust-remote-code"):
        metrics.check_names([name], True)


def test_the_flag_says_it_and_an_inherited_yes_does_not(
    run: Shell, run_file: RunMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr("lora_kit.start.start", lambda *_: seen.append(os.environ[trust.VARIABLE]))
    monkeypatch.setenv(trust.VARIABLE, "1")
    file = str(run_file())
    run("train", file)
    run("train", file, "--trust-remote-code")
    assert seen == ["0", "1"]
    assert run("compare", "nowhere", "--trust-remote-code").code == 2
    assert os.environ[trust.VARIABLE] == "1"


TASK = {
    **{"task": "own", "dataset_path": "json", "test_split": "test", "doc_to_target": "a"},
    **{"output_type": "generate_until", "doc_to_text": "a"},
}


def task(folder: Path, **more: Any) -> str:
    (folder / "rows.jsonl").write_text('{"a": "b"}\n')
    data = {"dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}}
    (folder / "own.yaml").write_text(yaml.safe_dump({**TASK, **data, **more}))
    return str(folder / "own.yaml")


def test_a_task_of_the_harness_cannot_ask_the_hub_for_a_metric(
    hub: list[str], work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", work / "cache")
    for metric in ({"metric": "bleurt"}, {"metric": "exact_match", "hf_evaluate": True}):
        with pytest.raises(UserError, match=r"own\.yaml.*add --trust-remote-code"):
            harness.check_tasks([task(work, metric_list=[metric])])
    assert not hub


@pytest.mark.slow
def test_a_library_does_not_fetch_compiled_code(work: Path) -> None:
    """bitsandbytes takes the package `kernels`, where it is, when it is imported."""
    (work / "kernels.py").write_text("def get_kernel(*a, **k):\n    open('canary', 'w').close()\n")
    told = "from lora_kit.launch import prepare_process; prepare_process()\n"
    asked = "import bitsandbytes.backends.cpu.ops\nimport kernels"
    command = [sys.executable, "-c", told + asked]
    found = processes.run(command)
    assert "import of kernels halted" in found.stderr and not (work / "canary").exists()


# --- What was pulled is not run


@pytest.fixture
def pulled(work: Path) -> Path:
    """A folder that `pull` brought, the working folder of nobody."""
    (work / "pulled" / "deep").mkdir(parents=True)
    (work / "pulled" / trust.PULLED).write_text("{}")
    return work / "pulled"


def code(canary: Path) -> str:
    return f"import pathlib\npathlib.Path({str(canary)!r}).touch()\ndef main(run, resume): pass\n"


def test_no_program_of_it_runs_also_through_a_link(pulled: Path, work: Path) -> None:
    canary = work / "canary"
    inside, outside = pulled / "deep" / "own.py", work / "own.py"
    inside.write_text(code(canary))
    outside.write_text(code(canary))
    (work / "link.py").symlink_to(inside)
    (pulled / "link.py").symlink_to(outside)
    for file in (inside, work / "link.py", pulled / "link.py", work / "pulled/deep/../link.py"):
        with pytest.raises(UserError, match="pulled programs are not run"):
            load_recipe(file)
        assert not canary.exists()
    with pytest.raises(UserError, match="defines no TASK"):
        load_recipe(outside)
    assert canary.exists()


def test_no_recipe_metric_or_task_of_it_runs(
    pulled: Path, run_file: RunMaker, hub: list[str], work: Path
) -> None:
    canary = work / "canary"
    (pulled / "made").mkdir()
    script = SCRIPT.format(kind="string", result="1.0") + code(canary)
    (pulled / "made" / "made.py").write_text(script)
    (pulled / "functions.py").write_text(code(canary))
    named = task(pulled, doc_to_text="a")
    with open(named, "a") as opened:
        opened.write("\nprocess_docs: !function functions.main\n")
    recipe = pulled / "cpt.py"
    recipe.write_text(code(canary))
    with pytest.raises(UserError, match="pulled programs are not run"):
        start(_with(run_file(), recipe=str(recipe)))
    for metric in (pulled / "made", pulled / "made" / "made.py"):
        with pytest.raises(UserError, match="pulled programs are not run"):
            metrics.check_names([str(metric)], True)
    with pytest.raises(UserError, match="pulled programs are not run"):
        harness.check_tasks([named])
    assert not canary.exists() and not hub


def _with(file: Path, **changes: Any) -> Path:
    values = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump(values | changes))
    return file


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"recipe": "{}/mine.py"}, "recipe"),
        ({"recipe": "../mine.py"}, "recipe"),
        ({"prove": {"metrics": ["../made"]}}, "prove.metrics"),
        ({"prove": {"metrics": ["f1", "owner/metric"]}}, "prove.metrics"),
        ({"prove": {"harness": ["{}/own.yaml"]}}, "prove.harness"),
    ],
)
def test_a_run_file_of_it_names_no_program_of_ours(
    pulled: Path, run_file: RunMaker, work: Path, changes: Any, key: str
) -> None:
    (work / "mine.py").write_text(code(work / "canary"))
    own = _with(run_file(), **yaml.safe_load(yaml.safe_dump(changes).replace("{}", str(work))))
    text = own.read_text()
    (pulled / "run.yaml").write_text(text)
    (pulled / "text.txt").write_text("text")
    with pytest.raises(UserError, match=rf"{key}: .*a pulled run file must not name programs"):
        load_run(pulled / "run.yaml")
    (pulled / "run.yaml").write_text(_with(own, recipe="cpt", prove={"metrics": []}).read_text())
    load_run(pulled / "run.yaml")


def test_a_child_imports_nothing_from_the_working_folder(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('the folder of a stranger ran')")
    command = trust.run_module("json.tool")
    done = processes.run(command, cwd=tmp_path, input="[]")
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
