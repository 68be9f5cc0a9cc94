"""The command people type: its help, its mistakes in one line, its exit codes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import processes
import pytest

from lora_kit import __version__, cli
from lora_kit.launch import read_run
from lora_kit.run import recipe_file, shipped, shipped_recipes
from lora_kit.schema import Run

VERBS = {command.callback.__name__ for command in cli.app.registered_commands if command.callback}
HEAVY = ("torch", "transformers", "peft", "datasets", "accelerate", "numpy", "huggingface_hub")


class Done:
    """What one command came to."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


Shell = Callable[..., Done]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    """`lora-kit ARGUMENTS`, in this process."""

    def call(*arguments: str) -> Done:
        # Set, so that monkeypatch takes away what --debug puts there.
        monkeypatch.setenv("LORA_KIT_DEBUG", "")
        monkeypatch.setattr(sys, "argv", ["lora-kit", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Done(ended.value.code, captured.out, captured.err)

    return call


def in_a_process(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return processes.run(command)


# --- Help


def test_help_lists_every_verb_and_imports_no_training_library() -> None:
    code = f"""
import sys
from lora_kit import cli
try:
    cli.main()
except SystemExit as ended:
    print("LOADED", [m for m in {HEAVY} if m in sys.modules], ended.code)
"""
    done = in_a_process(code, "--help")
    assert done.stdout.splitlines()[-1] == "LOADED [] 0", done.stderr
    assert len(VERBS) >= 8
    listed = done.stdout.split("Commands:")[1]
    assert all(f"\n  {verb} " in listed for verb in VERBS)
    assert "lora-kit demo" in done.stdout


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_has_a_help_with_an_example(run: Shell, verb: str) -> None:
    done = run(verb, "--help")
    assert done.code == 0
    assert f"Example: lora-kit {verb}" in " ".join(done.out.split())


def test_the_version_is_that_of_the_package(run: Shell) -> None:
    done = run("--version")
    assert (done.code, done.out, done.err) == (0, f"{__version__}\n", "")


def test_without_a_verb_comes_the_help(run: Shell) -> None:
    done = run()
    assert done.code == 0 and "Commands:" in done.out


# --- Mistakes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("trian run.yaml", "No such command 'trian'. Did you mean 'train'? (see lora-kit --help)"),
        ("train", "Missing argument 'RUN.yaml'. (see lora-kit train --help)"),
        ("train run.yaml --fast", "No such option: --fast"),
        ("train run.yaml --processes 0", "'--processes'"),
        ("train gone.yaml", "gone.yaml: cannot be read (No such file or directory)"),
        ("preview", "Missing argument 'RUN.yaml'. (see lora-kit preview --help)"),
        ("preview gone.yaml --json", "gone.yaml: cannot be read (No such file or directory)"),
        ("preview gone.yaml --samples -1", "'--samples'"),
        ("preview gone.yaml --split test", "'--split'"),
        ("compare gone", "gone: neither a run directory nor an adapter folder"),
        ("compare gone --json", "gone: neither a run directory nor an adapter folder"),
        ("generate gone hello", "gone: neither a run directory nor an adapter folder"),
        ("generate gone", "Missing argument 'prompt'."),
        ("merge gone --out merged", "gone: neither a run directory nor an adapter folder"),
        ("merge gone", "Missing option '--out'."),
        ("merge gone --out merged --dtype float8", "'float8' is not one of "),
        ("copy spt folder", "unknown name `spt`; did you mean `sft`?"),
        ("copy sft file.txt", "file.txt: cannot be written (File exists)"),
        ("schema more", 'unknown recipe "more"'),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_2(
    run: Shell, work: Path, arguments: str, words: str
) -> None:
    (work / "there").mkdir()
    (work / "file.txt").write_text("mine", encoding="utf-8")
    done = run(*arguments.split())
    assert (done.code, done.out) == (2, "")
    assert done.err.splitlines() == done.errors
    assert len(done.errors) == 1 and words in done.errors[0]
    assert sorted(p.name for p in work.iterdir()) == ["file.txt", "there"]
    assert (work / "file.txt").read_text(encoding="utf-8") == "mine"


def test_every_mistake_of_a_run_file_has_its_line(
    run: Shell, run_file: Callable[..., Path]
) -> None:
    file = run_file("cpt", **{"data.eval": 2.0, "base.dtype": "float16"})
    done = run("train", str(file), "seed=x")
    assert done.code == 2 and len(done.errors) == 3
    assert all(line.startswith(f"error: {file}: ") for line in done.errors)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "arguments", [["--debug", "compare", "gone"], ["compare", "gone", "--debug"]]
)
def test_a_traceback_comes_only_with_debug(run: Shell, work: Path, arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.code == 2 and len(done.errors) == 1
    assert "Traceback" in done.err and "UserError" in done.err
    assert "Traceback" not in run("compare", "gone").err


def test_the_installed_command_ends_with_the_same_code(work: Path) -> None:
    done = in_a_process("from lora_kit.cli import main; main()", "train", "gone.yaml")
    assert done.returncode == 2
    assert done.stderr.startswith("error: gone.yaml: ") and done.stderr.count("\n") == 1


# --- Verbs that train nothing


def test_preview_reports_what_train_would_refuse(
    run: Shell, run_file: Callable[..., Path], work: Path
) -> None:
    file = run_file("sft")
    with (work / "rows.jsonl").open("a", encoding="utf-8") as opened:
        opened.write('\n{"prompt": null, "completion": "x"}' * 10)
    before = sorted(work.iterdir())
    done = run("preview", str(file), "--json")
    found = json.loads(done.out)
    assert done.code == 0 and done.out.count("\n") == 1
    assert (found["recipe"], found["kind"]) == ("sft", "chat")
    assert (found["rows_read"], found["rows_kept"]) == (70, 60)
    assert found["dropped"] == {"with a null `prompt`": 10}
    assert found["truncated"] == {} and found["samples_without_supervision"] == 0
    assert found["duplicates"].keys() == found["leaks"].keys() == {"exact", "near"}
    assert found["tokens"] > found["supervised_tokens"] > found["end_markers_supervised"] == 60
    assert len(found["problems"]) == 1 and "data.limits.dropped" in found["problems"][0]
    assert done.err == f"training would stop: {found['problems'][0]}\n"

    people = run("preview", str(file), "data.limits.dropped=0.2", "--samples", "2")
    assert (people.code, people.err) == (0, "")
    assert people.out.startswith("train: ") and people.out.count("⟦It is ") == 2
    judged = run("preview", str(file), "--split", "eval", "--samples", "1")
    assert "⟦evaluated on⟧" in judged.out and judged.out.count("⟦It is ") == 1
    assert sorted(work.iterdir()) == before


def test_preview_writes_a_page_and_never_over_something_else(
    run: Shell, run_file: Callable[..., Path], work: Path
) -> None:
    file = run_file("cpt")
    for _ in range(2):  # the second replaces the first
        done = run("preview", str(file), "--html", "page.html", "--json")
        assert done.code == 0 and json.loads(done.out)["kind"] == "text"
        assert done.err == "page.html: written; open it in a browser\n"
    assert "It is not there" not in (work / "page.html").read_text(encoding="utf-8")
    done = run("preview", str(file), "--html", "text.txt")
    assert (done.code, done.out) == (2, "") and len(done.errors) == 1
    assert "--html text.txt: exists and is not a preview page" in done.errors[0]
    done = run("preview", str(file), "--split", "general")
    assert (done.code, done.out) == (2, "") and "data.general is not set" in done.errors[0]


def test_preview_of_a_recipe_of_ones_own_takes_what_is_there(
    run: Shell, run_file: Callable[..., Path], work: Path
) -> None:
    for recipe, kind in (("cpt", "text"), ("sft", "chat")):
        own = (shipped("recipes") / f"{recipe}.py").read_text(encoding="utf-8")
        (work / "own.py").write_text(own, encoding="utf-8")
        done = run("preview", str(run_file(recipe)), "recipe=own.py", "--json")
        assert json.loads(done.out)["kind"] == kind


def test_schema_prints_the_json_schema(run: Shell) -> None:
    done = run("schema")
    assert done.code == 0
    assert json.loads(done.out) == Run.model_json_schema()


def test_doctor_tells_versions_devices_and_memory(
    run: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_kit import doctor

    found = json.loads(run("doctor", "--json").out)
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert all(found["versions"][name] for name in doctor.NEEDED)
    assert found["devices"] and found["cores"] >= 1
    assert found["memory_mib"] >= found["memory_free_mib"] > 0 and found["disk_free_mib"] >= 0
    assert found["cache"]["folder"] == os.environ["LORA_KIT_CACHE"] and found["cache"]["mib"] >= 0
    people = run("doctor")
    monkeypatch.setenv("LORA_KIT_CACHE_GB", "20")
    assert "at most 20 GB" in run("doctor").out and found["cache"]["folder"] in people.out
    assert f"torch {found['versions']['torch']}" in people.out
    assert people.code == (1 if found["problems"] else 0)

    monkeypatch.setattr(doctor, "NEEDED", (*doctor.NEEDED, "no-such-package"))
    monkeypatch.setattr(doctor, "OPTIONAL", {"no-such-tool": ("its use", "its install")})
    done = run("doctor")
    assert done.code == 1
    assert "PROBLEM: no-such-package is not installed: pip install" in done.out
    assert "not installed: no-such-tool, for its use: its install" in done.out


@pytest.mark.parametrize("recipe", shipped_recipes())
def test_copy_gives_a_recipe_and_a_run_file_that_work_and_overwrites_neither(
    run: Shell, work: Path, recipe: str
) -> None:
    done = run("copy", recipe, "a/mine")
    assert done.code == 0 and "lora-kit train a/mine/run.yaml" in done.out
    folder = work / "a" / "mine"
    assert sorted(p.name for p in folder.iterdir()) == sorted(["run.yaml", f"{recipe}.py"])
    put_data(folder)
    copied, _ = read_run(folder / "run.yaml", [])
    assert recipe_file(copied.recipe) == folder / f"{recipe}.py"
    assert copied.name == f"my-{recipe}"
    text = (folder / "run.yaml").read_text(encoding="utf-8")
    assert "recipes/configs" not in text and "lora-kit train run.yaml" in text

    shutil.rmtree(folder)
    folder.mkdir()
    for kept in (f"{recipe}.py", "run.yaml"):
        for file in folder.iterdir():
            file.unlink()
        (folder / kept).write_text("mine", encoding="utf-8")
        again = run("copy", recipe, "a/mine")
        assert again.code == 2 and f"{kept} exists" in again.errors[0]
        assert [(p.name, p.read_text(encoding="utf-8")) for p in folder.iterdir()] == [
            (kept, "mine")
        ]


def put_data(folder: Path) -> None:
    """What run files of one's own data name."""
    for name in ("data.jsonl", "pairs.jsonl", "rows.csv"):
        (folder / name).touch()
    (folder / "texts").mkdir()


CONFIGS = sorted(file.stem for file in (shipped("recipes") / "configs").glob("*.yaml"))


@pytest.mark.parametrize("name", CONFIGS)
def test_copy_gives_any_shipped_run_file(run: Shell, work: Path, name: str) -> None:
    assert run("copy", name, "mine").code == 0
    put_data(work / "mine")
    copied, _ = read_run(work / "mine" / "run.yaml", [])
    assert copied.name == f"my-{name}"
    assert recipe_file(copied.recipe).parent == work / "mine"
    header = (work / "mine" / "run.yaml").read_text(encoding="utf-8").split("recipe:")[0]
    assert "#   lora-kit train run.yaml" in header
    assert "copy" not in header and "my-field" not in header and "recipes/configs" not in header


def test_a_copied_recipe_runs_as_the_shipped_one(run: Shell, work: Path) -> None:
    run("copy", "cpt", ".")
    copied, recipe = read_run(work / "run.yaml", [])
    config = shipped("recipes") / "configs" / "nano-cpt.yaml"
    same = {"name": "my-cpt", "recipe": str(work / "cpt.py")}
    shipped_one, _ = read_run(config, [])
    assert copied.model_dump() == {**shipped_one.model_dump(), **same}
    assert callable(recipe.main)
