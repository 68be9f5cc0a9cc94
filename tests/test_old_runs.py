"""Run directories that commit 278a73b wrote open with every verb.

`old_run/` was made by that commit from its run.yaml and rows.jsonl, which were in /tmp/old_run, on
the embedded base: `done` is finished; `half` is the same run, broken off in its fifth step of six.
Left out of them are a finished run's checkpoints and report.html, and the tokenizer.json of nano.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

import lora_kit
from lora_kit import nano
from lora_kit.adapter.finished import FinishedRun
from lora_kit.cli import app
from lora_kit.errors import UserError
from lora_kit.hashes import file_hash
from lora_kit.ship.serve import adapters_by_name

HERE = Path(__file__).with_name("old_run")
MADE_IN = "/tmp/old_run"


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the runs were made in, entered: what names it names this one."""
    shutil.copytree(HERE, tmp_path / "old")
    work = tmp_path / "old"
    for name in ("done", "half"):
        run = work / "runs" / name
        run.parent.mkdir(exist_ok=True)
        (work / name).rename(run)
        for file in (run / "run.yaml", run / "run.lock.json"):
            text = file.read_text(encoding="utf-8")
            assert MADE_IN in text
            file.write_text(text.replace(MADE_IN, str(work)), encoding="utf-8")
    adapter = work / "runs" / "done" / "adapter"
    shutil.copy(nano.MODEL / "tokenizer.json", adapter)
    lock = json.loads((work / "runs/done/run.lock.json").read_text(encoding="utf-8"))
    assert file_hash(adapter / "tokenizer.json") == lock["tokenizer"]["sha256"]
    monkeypatch.chdir(work)
    return work


def test_it_is_of_an_older_layout(work: Path) -> None:
    values = yaml.safe_load((work / "runs/done/run.yaml").read_text(encoding="utf-8"))
    assert values["data"]["train"] == str(work / "rows.jsonl") and "against" in values["data"]
    opened = FinishedRun("runs/done")
    assert not {"recipe", "auto", "facts", "fresh"} & opened.lock.keys()
    assert opened.auto == "AutoModelForCausalLM" and opened.fresh == () and opened.facts == {}
    assert opened.run is not None and opened.run.data.decontaminate is None


VERBS = {
    "merge": ["merge", "runs/done", "--out", "out", "--verify", "logits"],
    "generate": ["generate", "runs/done", "Where is the kite?", "--max-new-tokens", "4"],
    "generate --no-adapter": ["generate", "runs/done", "Where?", "--no-adapter"],
    "inspect": ["inspect", "runs/done"],
    "inspect two": ["inspect", "runs/done", "runs/done/adapter"],
    "check": ["check", "runs/done", "--target", "transformers"],
    "push": ["push", "runs/done", "me/test", "--dry-run"],
    "combine": ["combine", "runs/done", "runs/done", "--out", "out"],
    "export": ["export", "runs/done", "--to", "portable", "--out", "out"],
    "preview": ["preview", "runs/done/run.yaml", "--samples", "1"],
    "plan": ["plan", "runs/done/run.yaml"],
}
SLOW = {
    "combine --on": ["combine", "runs/done", "runs/done", "--out", "out", "--on", "runs/done"],
    "export --to merged": ["export", "runs/done", "--to", "merged", "--out", "out"],
    "export --to gguf": ["export", "runs/done", "--to", "gguf", "--out", "out"],
    "compare": ["compare", "runs/done", "prove.metrics=[exact_match]"],
}


@pytest.mark.slow
@pytest.mark.parametrize("verb", {**VERBS, **SLOW})
def test_it_opens_with_every_verb(verb: str, work: Path) -> None:
    done = CliRunner().invoke(app, {**VERBS, **SLOW}[verb])
    assert done.exit_code == 0, done.output


def test_it_loads_and_is_served(work: Path) -> None:
    model, tokenizer = lora_kit.load("runs/done")
    ids = torch.tensor([tokenizer("Where is the kite number 7?").input_ids])
    with torch.inference_mode():
        adapted = model(ids).logits
        with model.disable_adapter():
            assert (model(ids).logits - adapted).abs().max() > 0.1
    assert adapters_by_name([FinishedRun("runs/done")]).keys() == {"base", "nano", "done"}
    with pytest.raises(UserError, match="only an adapter trained on nf4"):
        from lora_kit.ship.fidelity import fidelity

        fidelity(FinishedRun("runs/done"))


@pytest.mark.slow
def test_it_is_compared_again_with_the_figures_that_it_had(work: Path) -> None:
    before = json.loads((work / "runs/done/report.json").read_text(encoding="utf-8"))
    after = lora_kit.compare("runs/done")
    for part in ("base", "adapted"):
        wanted = before["domain"]["loss"][part]
        assert after["domain"]["loss"][part] == pytest.approx(wanted, abs=2e-3)
    assert after["verdict"]["domain"] == before["verdict"]["domain"] == "better"
    assert after["training"]["steps"] == before["training"]["steps"] == 6


@pytest.mark.slow
def test_half_a_run_is_continued(work: Path) -> None:
    report = lora_kit.train("runs/half/run.yaml", resume=True)
    assert report["training"]["steps"] == 6
    # Of another processor's kernels the last digits are others.
    wanted, got = (
        load_file(work / "runs" / name / "adapter" / "adapter_model.safetensors")
        for name in ("done", "half")
    )
    assert wanted.keys() == got.keys()
    for name, tensor in wanted.items():
        assert torch.allclose(got[name], tensor, rtol=1e-3, atol=1e-4), name


@pytest.mark.slow
def test_a_run_starts_from_its_adapter(work: Path) -> None:
    more = ["name=more", "adapter.start=runs/done", "train.max_steps=1"]
    settings = ["adapter.r=16", "adapter.lora_alpha=32", "adapter.target_modules=all-linear"]
    lora_kit.train("run.yaml", *more, *settings, "adapter.layers_to_transform=null")
    values = yaml.safe_load((work / "runs/more/run.yaml").read_text(encoding="utf-8"))
    assert values["adapter"]["start"] == "../done"
