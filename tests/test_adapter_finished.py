"""A finished run is the same run wherever it is, and says which base it needs and does not find."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import make_base
from trained import edit, finish_in, relock
from typer.testing import CliRunner, Result

import lora_kit
from lora_kit.adapter.finished import FinishedRun
from lora_kit.cli import app
from lora_kit.errors import UserError
from lora_kit.ship.card import LOCAL
from lora_kit.ship.hub import make_plan

IDS = torch.arange(4, 60)[None]


def said(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def refusal(*words: str | Path) -> str:
    """What a verb ends with: one line of the user's mistake."""
    done = said(*words)
    assert isinstance(done.exception, UserError), done.output
    assert "\n" not in str(done.exception) and done.exception.exit_code == 2
    return str(done.exception)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits.float()


@pytest.fixture(scope="module")
def project(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project that was moved as a whole after its training: base, rows, run file, runs/test."""
    made = tmp_path_factory.mktemp("project") / "made"
    made.mkdir()
    shutil.copytree(base, made / "base")
    finish_in(made, base, "sft", **{"base.model": "base", "prove.shots": 0})
    return made.rename(made.with_name("moved"))


@pytest.fixture
def run(project: Path, work: Path) -> Path:
    """A copy of its run directory in another copy of it, seen from a third place."""
    shutil.copytree(project, work / "copy")
    return work / "copy" / "runs" / "test"


def test_the_files_of_a_run_name_no_place(project: Path) -> None:
    run = project / "runs" / "test"
    values = yaml.safe_load((run / "run.yaml").read_text(encoding="utf-8"))
    assert (values["base"]["model"], values["data"]["train"]) == ("../../base", "../../rows.jsonl")
    lock = json.loads((run / "run.lock.json").read_text(encoding="utf-8"))
    assert lock["base"]["model"] == "../../base" and list(lock["data"]) == ["../../rows.jsonl"]
    opened = FinishedRun(run)
    assert opened.run is not None and opened.run.data.train == str(project / "rows.jsonl")
    assert opened.base.model == str(project / "base")


def test_one_object_opens_a_run_its_adapter_and_an_adapter_alone(run: Path, work: Path) -> None:
    whole, inside = FinishedRun(run), FinishedRun(run / "adapter")
    shutil.copytree(run / "adapter", work / "sent")
    alone = FinishedRun(work / "sent", base=str(run.parents[1] / "base"))
    for opened in (whole, inside):
        assert opened.home.samefile(run) and opened.run is not None and opened.name == "test"
        assert opened.lock["seed"] == 0 and "model.safetensors" in opened.hashes
    assert alone.run is None and alone.lock == {} and alone.hashes == {} and alone.name == "sent"
    with pytest.raises(UserError, match=r"sent: no run directory \(run\.yaml\)"):
        alone.require_run()
    for opened in (whole, inside, alone):
        assert opened.folder.name in ("adapter", "sent") and len(opened.adapter.factors) == 14
        assert opened.base.model == str(run.parents[1] / "base")
        assert opened.processor.chat_template and opened.pinned.hashes["config.json"]
    # What the files of an older causal run do not say.
    for key in ("auto", "facts"):
        edit(run / "run.lock.json", lambda c, key=key: c.pop(key))
    older = FinishedRun(run)
    assert older.auto == "AutoModelForCausalLM" and older.facts == {}
    assert older.fresh == () and older.pooling is None and older.head.labels == ()
    older.require_language_model("serve")
    for key, value in {"auto": "os.system", "facts": [], "fresh": "x", "pooling": 1}.items():
        edit(run / "run.lock.json", lambda c, key=key, value=value: c.update({key: value}))
        with pytest.raises(UserError, match=rf"run\.lock\.json: {key}: "):
            getattr(FinishedRun(run), key)
        edit(run / "run.lock.json", lambda c, key=key: c.pop(key))


VERBS = {
    "merge": ["merge", "RUN", "--out", "out", "--verify", "logits"],
    "merge --dtype": ["merge", "RUN", "--out", "out", "--dtype", "float32"],
    "generate": ["generate", "RUN", "What is 3?", "--max-new-tokens", "4"],
    "generate --no-adapter": ["generate", "RUN", "What is 3?", "--no-adapter"],
    "inspect": ["inspect", "RUN"],
    "inspect two": ["inspect", "RUN", "RUN"],
    "check": ["check", "RUN", "--target", "transformers"],
    "push": ["push", "RUN", "me/test", "--dry-run"],
    "combine": ["combine", "RUN", "RUN", "--out", "out"],
    "export": ["export", "RUN", "--to", "portable", "--out", "out"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run", "adapter"])
@pytest.mark.parametrize("verb", VERBS)
def test_a_moved_run_works_with_every_verb(verb: str, name: str, run: Path) -> None:
    named = {"run": run, "adapter": run / "adapter"}[name]
    done = said(*[named if word == "RUN" else word for word in VERBS[verb]])
    assert done.exit_code == 0, done.output


@pytest.mark.slow
def test_a_moved_run_is_compared_with_its_moved_data(run: Path) -> None:
    before = json.loads((run / "report.json").read_text(encoding="utf-8"))
    done = said("compare", run, "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    for part in ("base", "adapted"):
        assert report["domain"]["loss"][part] == pytest.approx(before["domain"]["loss"][part])
    text = (run.parents[1] / "rows.jsonl").read_text(encoding="utf-8")
    (run.parents[1] / "rows.jsonl").write_text(text.replace("What is 1?", "What was 1?"))
    assert "rows.jsonl changed since" in refusal("compare", run)


@pytest.mark.slow
def test_a_base_in_another_place_is_named_with_base(run: Path, work: Path) -> None:
    wanted = logits(lora_kit.load(run)[0])
    elsewhere = (run.parents[1] / "base").rename(work / "elsewhere")
    for verb in (
        ["merge", run, "--out", "out"],
        ["generate", run, "Hello"],
        ["compare", run],
        ["export", run, "--to", "merged", "--out", "out"],
    ):
        words = refusal(*verb)
        assert words.startswith(
            f"{run}/run.yaml: base.model: {run.parents[1]}/base: no such folder"
        )
        assert words.endswith("if it is elsewhere, name it with --base FOLDER_OR_ID")
    assert torch.equal(logits(lora_kit.load(run, base="elsewhere")[0]), wanted)
    assert torch.equal(logits(lora_kit.load(run / "adapter", base=str(elsewhere))[0]), wanted)
    assert lora_kit.compare(run, base=str(elsewhere))["domain"]["documents"] == 24
    for verb in (
        ["merge", run, "--out", "merged", "--base", "elsewhere"],
        ["generate", run, "Hello", "--base", "elsewhere", "--max-new-tokens", "2"],
    ):
        done = said(*verb)
        assert done.exit_code == 0, done.output
    assert "--base: nowhere: no such folder" in refusal(
        "merge", run, "--out", "o", "--base", "nowhere"
    )


@pytest.mark.slow
def test_another_base_is_refused_by_its_files(run: Path, work: Path) -> None:
    other = make_base(work / "other", initializer_range=0.03)
    for verb in (["merge", run, "--out", "out"], ["generate", run, "Hello"], ["compare", run]):
        words = refusal(*verb, "--base", other)
        assert words.startswith(f"{run}: trained on another base than {other}: ")
        assert "config.json, model.safetensors differ; an adapter only works on its own" in words
    with pytest.raises(UserError, match=r"another base .*: config\.json, model\.safetensors diff"):
        lora_kit.load(run, base=str(other))
    # Weights alone, which a merge compares while it reads them.
    shutil.copy(run.parents[1] / "base" / "config.json", other / "config.json")
    assert "model.safetensors differs" in refusal("merge", run, "--out", "out", "--base", other)
    assert not (work / "out").exists()


def test_an_adapter_whose_base_is_elsewhere_says_how_to_name_it(run: Path, work: Path) -> None:
    """As PEFT saves one, on another machine: no lock file, an absolute path."""
    sent = work / "sent"
    shutil.copytree(run / "adapter", sent)
    config = sent / "adapter_config.json"
    wanted = logits(lora_kit.load(run)[0])

    edit(config, lambda c: c.update(base_model_name_or_path="/elsewhere/models/tiny"))
    words = refusal("merge", sent, "--out", "out")
    assert words.startswith(f"{config}: base_model_name_or_path: /elsewhere/models/tiny: no such")
    assert "--base FOLDER_OR_ID" in words

    edit(config, lambda c: c.update(base_model_name_or_path=None))
    assert "base_model_name_or_path: no base: name it with --base" in refusal(
        "merge", sent, "--out", "out"
    )

    # Its weights are quantized: there is nothing to fetch that could be used.
    edit(config, lambda c: c.update(base_model_name_or_path="someone/tiny-bnb-4bit"))
    words = refusal("merge", sent, "--out", "out")
    assert "hf download" not in words and "already quantized: name the original model" in words
    quantized = work / "base-4bit"
    shutil.copytree(run.parents[1] / "base", quantized)
    method = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    edit(quantized / "config.json", lambda c: c.update(quantization_config=method))
    edit(config, lambda c: c.update(base_model_name_or_path=str(quantized)))
    words = refusal("merge", sent, "--out", "out")
    assert f"{quantized}: its weights are already quantized: name the original model" in words
    assert not (work / "out").exists()

    model, _ = lora_kit.load(sent, base=str(run.parents[1] / "base"), dtype="float32")
    assert torch.equal(logits(model), wanted)
    done = said("merge", sent, "--out", "out", "--base", run.parents[1] / "base")
    assert done.exit_code == 0, done.output


def test_what_is_made_of_a_moved_run_names_its_base_where_it_is(run: Path, work: Path) -> None:
    done = said("combine", run, run, "--out", "both")
    assert done.exit_code == 0, done.output
    base = str(run.parents[1] / "base")
    config = json.loads((work / "both" / "adapter_config.json").read_text(encoding="utf-8"))
    lock = json.loads((work / "both" / "run.lock.json").read_text(encoding="utf-8"))
    assert (config["base_model_name_or_path"], lock["base"]["model"]) == (base, base)
    lora_kit.load(work / "both")


def test_inspect_names_the_base_where_it_is(run: Path) -> None:
    base = str(run.parents[1] / "base")
    for named in (run, run / "adapter"):
        found = json.loads(said("inspect", named, "--json").stdout)
        assert (found["base"]["model"], found["base"]["revision"]) == (base, None)
    found = json.loads(said("inspect", run, run, "--json").stdout)
    assert found["same_base"] and [one["model"] for one in found["bases"]] == [base, base]
    # A base of the Hub is named by its commit, which only the adapter and the lock file hold.
    edit(run / "run.lock.json", lambda c: c["base"].update(model="org/base", revision="a" * 40))
    named = {"base_model_name_or_path": "org/base", "revision": "a" * 40}
    edit(run / "adapter" / "adapter_config.json", lambda c: c.update(named))
    assert FinishedRun(run).peft_base == ("org/base", "a" * 40)


@pytest.mark.slow
def test_a_push_names_the_base_that_base_names(
    run: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained on a folder, which others know as a model of the Hub."""
    sha = "5" * 40
    snapshot = (run.parents[1] / "base").rename(work / sha)
    monkeypatch.setattr("lora_kit.base.pin._from_hub", lambda *_: snapshot)
    assert make_plan(FinishedRun(run), "me/test").base == LOCAL
    plan = make_plan(FinishedRun(run, "org/base"), "me/test")
    config, lock = (json.loads(plan.files[f"{n}.json"]) for n in ("adapter_config", "run.lock"))
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", sha)
    assert (lock["base"]["model"], lock["base"]["revision"]) == ("org/base", sha)
    assert "base_model: org/base\n" in plan.card.text and sha in plan.card.text
    done = said("push", run, "me/test", "--dry-run", "--base", "org/base", "--json")
    assert json.loads(done.stdout)["base"] == "org/base"
    elsewhere = make_plan(FinishedRun(run, str(snapshot)), "me/test")
    assert elsewhere.base == LOCAL and str(work) not in str(elsewhere.files["adapter_config.json"])
    make_base(work / "other", initializer_range=0.03)
    words = refusal("push", run, "me/test", "--dry-run", "--base", work / "other")
    assert words.startswith(f"{run}: trained on another base than {work / 'other'}: ")


def test_a_pushed_run_tells_no_path_of_this_machine(run: Path) -> None:
    template = run / "adapter" / "chat_template.jinja"
    template.write_text(template.read_text() + f"{{# {run.parents[1]}/rows.jsonl #}}")
    relock(run)
    words = refusal("push", run, "me/test", "--dry-run")
    assert "chat_template.jinja" in words and "a path of this machine" in words
