"""A half-finished run is continued where it was moved to, and becomes what it would have been."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import CHATML, make_base
from processes import adapter_hash
from test_train_resume import Crash
from trained import edit, folder_maker

import lora_kit
from lora_kit.errors import UserError
from lora_kit.train import trainer as module

pytestmark = pytest.mark.slow

HALF = Path("runs/half")


@pytest.fixture(scope="module")
def made(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with its base, that was moved away: runs/straight is finished, runs/half broke off
    in its seventh step of 8. The best evaluation is one of those before that."""
    project = tmp_path_factory.mktemp("moved") / "made"
    project.mkdir()
    shutil.copytree(base, project / "base")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        changes: dict[str, Any] = {
            "base.model": "base",
            "prove.shots": 0,
            "train.max_steps": 8,
            "train.save_steps": 2,
            "train.eval_steps": 2,
        }
        file = folder_maker(project, base)("cpt", **changes)
        lora_kit.train(file, "name=straight")
        patch.setattr(module, "Progress", Crash)
        with pytest.raises(ZeroDivisionError):
            lora_kit.train(file, "name=half")
    return project.rename(project.with_name("kept"))


@pytest.fixture
def project(made: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy in another place, entered."""
    shutil.copytree(made, work / "project")
    monkeypatch.chdir(work / "project")
    return work / "project"


def as_an_older_version(project: Path) -> None:
    """Let runs/half hold absolute paths of the place where it was begun, as commit 278a73b wrote
    them."""
    begun = str(project.parent / "begun")
    for file in (HALF / "run.yaml", HALF / "run.lock.json"):
        file.write_text(file.read_text(encoding="utf-8").replace("../..", begun), encoding="utf-8")
    assert begun in (HALF / "run.yaml").read_text(encoding="utf-8")
    edit(HALF / "run.lock.json", lambda c: [c.pop(key) for key in ("recipe", "auto", "facts")])


def resumed(*overrides: str, file: str | Path = HALF / "run.yaml") -> None:
    """Continue runs/half: the adapter must be that of the run that was never interrupted."""
    report = lora_kit.train(file, *overrides, resume=True)
    assert report["training"]["steps"] == 8
    assert adapter_hash(str(HALF)) == adapter_hash("runs/straight")


def test_from_its_own_run_file_in_the_run_directory(project: Path) -> None:
    resumed()


def test_from_the_users_run_file(project: Path) -> None:
    resumed("name=half", file="run.yaml")


def test_with_new_places_named(project: Path) -> None:
    (project / "base").rename(project.parent / "weights")
    (project / "text.txt").rename(project.parent / "other.txt")
    data, base = project.parent / "other.txt", project.parent / "weights"
    resumed(f"data.train={data}", f"base.model={base}")
    # They were written absolute on the command line.
    values = yaml.safe_load((HALF / "run.yaml").read_text(encoding="utf-8"))
    assert (values["data"]["train"], values["base"]["model"]) == (str(data), str(base))
    lock = json.loads((HALF / "run.lock.json").read_text(encoding="utf-8"))
    assert list(lock["data"]) == [str(data)] and lock["base"]["model"] == str(base)


def test_one_that_holds_absolute_paths_of_another_machine(project: Path) -> None:
    as_an_older_version(project)
    with pytest.raises(UserError, match=r"data\.train: .*begun/text\.txt.*: no such file"):
        resumed()
    resumed("data.train=../../text.txt", "base.model=../../base")
    values = yaml.safe_load((HALF / "run.yaml").read_text(encoding="utf-8"))
    assert (values["data"]["train"], values["base"]["model"]) == ("../../text.txt", "../../base")


@pytest.mark.parametrize("older", [False, True])
def test_other_content_is_not_taken_for_moved(project: Path, older: bool) -> None:
    if older:
        as_an_older_version(project)
    places = ["data.train=../../text.txt", "base.model=../../base"]
    text = (project / "text.txt").read_text(encoding="utf-8")
    (project / "text.txt").write_text(text.replace("queen", "king"), encoding="utf-8")
    with pytest.raises(UserError, match=r"text\.txt was changed") as caught:
        resumed(*places)
    assert str(caught.value).count("is now") == older
    (project / "text.txt").write_text(text, encoding="utf-8")
    shutil.rmtree(project / "base")
    make_base(project / "base", CHATML, initializer_range=0.03)
    with pytest.raises(UserError, match=r"the files of the base .*base were changed") as caught:
        resumed(*places)
    assert "is now" not in str(caught.value)
