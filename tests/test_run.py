"""The run file: what is taken, written and described."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import processes
import pytest
import yaml
from pydantic import ValidationError

from lora_kit.errors import RunFileError, UserError
from lora_kit.run import (
    check_free,
    load_run,
    read_lock,
    recipe_file,
    shipped,
    write_run,
)
from lora_kit.schema import Adapter, Base, Data, Prove, Run, Ship, Train
from lora_kit.tasks.recipe import load_recipe

SECTIONS = {
    **{"base": Base, "adapter": Adapter, "data": Data, "train": Train},
    **{"prove": Prove, "ship": Ship},
}
GOOD = """
recipe: cpt
name: test
base: {model: some/model}
data: {train: text.txt}
"""


@pytest.fixture
def folder(work: Path) -> Path:
    (work / "text.txt").write_text("Some text.", encoding="utf-8")
    return work


def write(folder: Path, text: str) -> Path:
    file = folder / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_a_short_run_file_gets_the_defaults_of_lora(folder: Path) -> None:
    run = load_run(write(folder, GOOD))
    assert run.data.train == str(folder / "text.txt")
    assert run.base.model == "some/model"  # no such folder: a Hub id
    assert (run.adapter.r, run.adapter.target_modules) == (16, "all-linear")
    assert (run.train.learning_rate, run.data.eval, run.seed) == (2e-4, 0.1, 0)
    assert run.directory == Path("runs/test")
    assert recipe_file(run.recipe) == shipped("recipes") / "cpt.py"


@pytest.mark.parametrize("text", ["2e-4", "2E-4", "2.0e-4", "0.0002", "+2e-4"])
def test_a_number_may_be_written_with_an_exponent(folder: Path, text: str) -> None:
    run = load_run(write(folder, f"{GOOD}train: {{learning_rate: {text}}}"))
    assert run.train.learning_rate == 2e-4


def test_relative_paths_are_taken_from_the_run_file_not_from_the_working_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = folder / "inner"
    (inner / "base").mkdir(parents=True)
    (inner / "more.md").write_text("More.", encoding="utf-8")
    (inner / "mine.py").write_text("def main(run, resume): ...", encoding="utf-8")
    text = (
        "recipe: mine.py\nname: a/b\nbase: {model: base}\n"
        "data: {train: [../text.txt, nano:topics], eval: more.md}\nadapter: {start: ../inner}"
    )
    file = write(inner, text)
    monkeypatch.chdir(folder)
    run = load_run(Path("inner/run.yaml"))
    assert Path(run.data.train[0]).samefile(folder / "text.txt")
    assert run.data.train[1] == "nano:topics"
    assert (run.data.eval, run.base.model) == (str(inner / "more.md"), str(inner / "base"))
    assert recipe_file(run.recipe) == inner / "mine.py"
    assert Path(run.adapter.start or "").samefile(inner)
    assert load_run(file) == run


def test_a_written_run_reads_back_equal_and_can_be_changed(folder: Path) -> None:
    text = (
        GOOD.replace("name: test", "name: '1e4'")
        + "adapter: {target_modules: [q_proj, '2e3'], rank_pattern: {a.b: 2}}\n"
        + "train: {learning_rate: 3e-5, adam_epsilon: 1e-10, eval_steps: 5}"
    )
    run = load_run(write(folder, text))
    (folder / "elsewhere").mkdir()
    resolved = folder / "elsewhere" / "run.yaml"
    write_run(run, resolved)
    assert load_run(resolved) == run
    again = load_run(resolved, ["name=other", "train.eval_steps=null"])
    assert (again.name, again.train.eval_steps) == ("other", None)
    written = yaml.safe_load(resolved.read_text(encoding="utf-8"))
    for section, model in SECTIONS.items():
        assert written[section].keys() == model.model_fields.keys()


def test_a_written_run_has_absolute_paths_only_where_the_user_wrote_them(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = work / "project"
    for folder in ("base", "metric", "runs/start", "far/deep"):
        (project / folder).mkdir(parents=True)
    for file in ("a.txt", "b.txt", "names.txt", "own.py", "far/c.txt"):
        (project / file).write_text("x", encoding="utf-8")
    (project / "link").symlink_to(project / "far" / "deep")
    text = (
        "recipe: own.py\nname: some/test\nbase: {model: base}\nadapter: {start: runs/start}\n"
        f"data: {{train: [a.txt, '*.txt', {{source: {project}/b.txt}}, link/../c.txt], "
        "eval: nano:topics, general: owner/set, labels: names.txt}\n"
        "prove: {metrics: [f1, ./metric]}"
    )
    file = write(project, text)
    monkeypatch.chdir(project)
    run = load_run(file)
    made = run.directory / "run.yaml"
    made.parent.mkdir(parents=True)
    write_run(run, made)
    values = yaml.safe_load(made.read_text(encoding="utf-8"))
    up = "../../.."
    assert (values["recipe"], values["base"]["model"]) == (f"{up}/own.py", f"{up}/base")
    assert values["adapter"]["start"] == "../../start"
    sources = [one if isinstance(one, str) else one["source"] for one in values["data"]["train"]]
    # Of a path that goes up from what a link leads to, only the absolute form is certain.
    up_a_link = f"{project}/link/../c.txt"
    assert sources == [f"{up}/a.txt", f"{up}/*.txt", f"{project}/b.txt", up_a_link]
    assert values["data"]["eval"] == "nano:topics" and values["data"]["general"] == "owner/set"
    assert values["data"]["labels"] == f"{up}/names.txt"
    assert values["prove"]["metrics"] == ["f1", f"{up}/metric"]
    assert load_run(made) == run

    project.rename(work / "moved")
    monkeypatch.chdir(work)
    moved = load_run("moved/runs/some/test/run.yaml", needs_sources=False)
    assert (moved.recipe, moved.base.model) == (f"{work}/moved/own.py", f"{work}/moved/base")
    assert moved.adapter.start == f"{work}/moved/runs/start"
    assert moved.data.labels == f"{work}/moved/names.txt"


def test_a_relative_base_that_is_gone_is_named_by_its_whole_path(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the run.yaml of a run has it; `some/model` would be an id on the Hub."""
    (work / "runs" / "test").mkdir(parents=True)
    file = write(work / "runs" / "test", GOOD.replace("some/model", "../../base"))
    (work / "elsewhere").mkdir()
    monkeypatch.chdir(work / "elsewhere")
    assert load_run(file, needs_sources=False).base.model == str(work / "base")


def test_a_section_without_keys_takes_its_defaults(folder: Path) -> None:
    assert load_run(write(folder, GOOD + "train:\nadapter:\n")).train == Train()


def test_byte_order_mark_and_crlf_are_read(folder: Path) -> None:
    file = folder / "run.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + GOOD.strip().replace("\n", "\r\n").encode())
    assert load_run(file).name == "test"


def test_a_date_is_a_name(folder: Path) -> None:
    assert load_run(write(folder, GOOD), ["name=2026-11-21"]).name == "2026-11-21"


def test_overrides_replace_and_add(folder: Path) -> None:
    overrides = ["train.max_steps=7", "adapter.rank_pattern.q_proj=4", "base.model=a/b=c"]
    overrides += ["adapter.target_modules=[q_proj, v_proj]", "train.learning_rate=1e-3"]
    run = load_run(write(folder, GOOD), overrides)
    assert (run.train.max_steps, run.train.learning_rate) == (7, 1e-3)
    assert run.adapter.rank_pattern == {"q_proj": 4}
    assert run.adapter.target_modules == ["q_proj", "v_proj"]
    assert run.base.model == "a/b=c"


def test_a_run_is_frozen(folder: Path) -> None:
    run = load_run(write(folder, GOOD))
    with pytest.raises(ValidationError):
        run.seed = 1  # type: ignore[misc]
    with pytest.raises(ValidationError):
        run.train.max_steps = 1  # type: ignore[misc]


def test_a_finished_run_is_read_without_its_data(folder: Path) -> None:
    file = write(folder, GOOD)
    (folder / "text.txt").unlink()
    with pytest.raises(RunFileError, match="no such file"):
        load_run(file)
    assert load_run(file, needs_sources=False).name == "test"


def test_an_existing_run_directory_is_not_taken(folder: Path) -> None:
    run = load_run(write(folder, GOOD))
    check_free(run)
    run.directory.mkdir(parents=True)
    with pytest.raises(UserError, match="exists: choose another"):
        check_free(run)
    write_run(run, run.directory / "run.yaml")
    with pytest.raises(UserError, match="exists: choose another"):  # nothing to continue from
        check_free(run)
    (run.directory / "checkpoints" / "checkpoint-1").mkdir(parents=True)
    (run.directory / "checkpoints" / "checkpoint-1" / "seal.json").touch()
    with pytest.raises(UserError, match="--resume"):
        check_free(run)
    (run.directory / "run.lock.json").write_text('{"finished": true}', encoding="utf-8")
    with pytest.raises(UserError, match="exists: choose another"):
        check_free(run)
    (run.directory / "run.lock.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="edited or corrupt"):
        read_lock(run.directory)


def test_every_key_has_a_description_and_stands_in_the_schema() -> None:
    schema = json.loads(json.dumps(Run.model_json_schema()))
    counted = 0
    for name, model in (*SECTIONS.items(), ("", Run)):
        node: dict[str, Any] = schema["$defs"][model.__name__] if name else schema
        assert node["additionalProperties"] is False
        assert node["properties"].keys() == model.model_fields.keys()
        for key, field in model.model_fields.items():
            counted += 1
            if (name or key not in SECTIONS) and (name, key) != ("data", "limits"):
                assert len(field.description or "") > 10, f"{name}.{key}"
                assert node["properties"][key]["description"] == field.description
    assert counted >= 48


def test_the_shipped_configs_use_keys_of_the_schema() -> None:
    files = sorted((shipped("recipes") / "configs").glob("*.yaml"))
    assert len(files) >= 2
    for file in files:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
        sections = {**SECTIONS, **load_recipe(recipe_file(values["recipe"])).task.settings}
        for key, value in values.items():
            assert key in Run.model_fields, file.name
            if key in SECTIONS:
                assert value.keys() <= sections[key].model_fields.keys(), file.name


def test_reading_a_good_file_imports_no_training_library(folder: Path) -> None:
    write(folder, GOOD)
    code = (
        "import sys; from lora_kit.run import load_run; load_run('run.yaml');"
        "print([m for m in ('torch','transformers','peft','datasets','numpy') if m in sys.modules])"
    )
    done = processes.run([sys.executable, "-c", code])
    assert done.stdout.strip() == "[]", done.stderr
