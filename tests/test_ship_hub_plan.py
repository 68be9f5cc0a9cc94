"""What a push would upload: what is needed to use it, without this machine in it."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
from markupsafe import escape
from reports import full
from test_ship_hub_pull import CONFIG, weights
from trained import edit, relock
from typer.testing import CliRunner

from lora_kit.adapter.finished import FinishedRun
from lora_kit.cli import app
from lora_kit.errors import CheckFailed, UserError
from lora_kit.hashes import file_hash
from lora_kit.nano import MODEL
from lora_kit.run import HUB_ID
from lora_kit.ship.card import LOCAL
from lora_kit.ship.hub import UploadPlan, make_plan

SHA = "5" * 40
HOME = "{}home/me/secret-project".format("/")


def put(folder: Path, **files: Any) -> None:
    """`a__b` is the file a.b: bytes, text, or what JSON says."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        text = content if isinstance(content, str | bytes) else json.dumps(content)
        data = text if isinstance(text, bytes) else text.encode()
        (folder / name.replace("__", ".")).write_bytes(data)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run on a local base, whose files name this machine wherever they can."""
    folder = tmp_path / "runs" / "test"
    adapter = folder / "adapter"
    put(adapter, adapter_model__safetensors=weights(), tokenizer__json={}, notes__txt="mine")
    put(adapter, adapter_config__json={**CONFIG, "base_model_name_or_path": f"{HOME}/base"})
    put(adapter, chat_template__jinja="{{ messages }}", training_args__bin=b"pickle")
    lock = {
        "base": {"model": f"{HOME}/base", "revision": None, "licence": "mit", "hashes": {"a": "b"}},
        "kind": "chat",
        "data": {f"{HOME}/a.jsonl": "d1", "b.jsonl": "d2", "org/set[train]": "d3", "nano:x": "d4"},
        "commits": {"org/set[train]": "c3"},
        "adapter": {"sha256": file_hash(adapter / "adapter_model.safetensors")},
    }
    report = full() | {"not_measured": [f"ask one, with lora-kit compare {HOME}/runs/test"]}
    page = f"<p>{HOME}/base</p><p>data: {HOME}/a.jsonl</p><a href='https://x.org/a/b'>x</a>"
    values = f"base:\n  model: {HOME}/base\ndata:\n  train:\n  - source: {HOME}/a.jsonl\n"
    put(folder, run__lock__json=lock, report__json=report, report__html=page, run__yaml=values)
    return folder


def texts(plan: UploadPlan) -> dict[str, str]:
    """Of what is no tensor."""
    read = {n: c if isinstance(c, bytes) else c.read_bytes() for n, c in plan.files.items()}
    return {name: c.decode() for name, c in read.items() if not name.endswith(".safetensors")}


def test_a_local_base_and_local_data_are_hashes_alone(run: Path) -> None:
    plan = make_plan(FinishedRun(run), "me/test")
    found = texts(plan)
    assert set(found) == {
        *("README.md", "adapter_config.json", "chat_template.jinja", "report.json"),
        *("run.lock.json", "tokenizer.json"),
    }
    assert set(plan.files) - set(found) == {"adapter_model.safetensors"}
    for name, text in found.items():
        assert "secret-project" not in text and ".jsonl" not in text, name
    lock = json.loads(found["run.lock.json"])
    assert lock["base"]["model"] == LOCAL and not HUB_ID.fullmatch(LOCAL)
    assert lock["base"]["hashes"] == {"a": "b"}
    data = {"local data 1": "d1", "local data 2": "d2", "org/set[train]": "d3", "nano:x": "d4"}
    assert lock["data"] == data
    config = json.loads(found["adapter_config.json"])
    assert config["base_model_name_or_path"] is None and config["r"] == 2
    assert "the base was a local folder" in str(plan) and not plan.public
    edit(run / "run.lock.json", lambda v: v["base"].update(model="nano"))
    edit(
        run / "adapter/adapter_config.json", lambda v: v.update(base_model_name_or_path=str(MODEL))
    )
    config = json.loads(texts(make_plan(FinishedRun(run), "me/test"))["adapter_config.json"])
    assert config["base_model_name_or_path"] == "nano"


def test_rows_of_the_data_leave_only_when_asked(run: Path) -> None:
    [sample, *_] = full()["samples"]
    without = texts(make_plan(FinishedRun(run), "me/test"))
    report = json.loads(without["report.json"])
    assert "samples" not in report and report["domain"] == full()["domain"]
    assert sample["expected"] not in "".join(without.values())
    found = texts(make_plan(FinishedRun(run), "me/test", with_samples=True))
    assert json.loads(found["report.json"])["samples"][0]["expected"] == sample["expected"]
    page = "<p>base</p><p>data: a.jsonl</p><a href='https://x.org/a/b'>x</a>"
    assert found["report.html"] == page


def test_a_merged_model_goes_up_instead(run: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    put(merged, model__safetensors=weights(), config__json={"_name_or_path": HOME, "n": 1})
    put(merged, generation_config__json={}, tokenizer__json={}, pytorch_model__bin=b"pickle")
    # Any other model, such as the base itself, has none of this run's figures.
    for record in (None, {}, {"adapter": {"sha256": "0" * 64}}):
        if record is not None:
            put(merged, merge__json=record)
        with pytest.raises(UserError, match=r"merged: not what `lora-kit merge` made of .*test"):
            make_plan(FinishedRun(run), "me/test", merged=merged)
    saved = {"sha256": file_hash(run / "adapter/adapter_model.safetensors")}
    put(merged, merge__json={"adapter": saved, "base": {"model": "secret-project"}})
    put(merged, NOTICE=b"of the base", LICENCE__txt=b"a", **{"COPYING": b"b"})
    plan = make_plan(FinishedRun(run), "me/test", merged=merged)
    found = texts(plan)
    assert set(plan.files) == {*found, "model.safetensors"}
    assert json.loads(found["merge.json"]) == {"adapter": saved, "base": {"model": LOCAL}}
    assert set(found) == {
        *("README.md", "config.json", "generation_config.json", "report.json", "run.lock.json"),
        *("tokenizer.json", "merge.json", "NOTICE", "LICENCE.txt", "COPYING"),
    }
    assert json.loads(found["config.json"]) == {"n": 1}
    assert "base_model_relation: merge" in found["README.md"]
    (merged / "tokenizer_config.json").symlink_to("{}etc/passwd".format("/"))
    with pytest.raises(UserError, match="holds a link to somewhere else"):
        make_plan(FinishedRun(run), "me/test", merged=merged)
    with pytest.raises(UserError, match=r"model\.safetensors: missing"):
        make_plan(FinishedRun(run), "me/test", merged=tmp_path / "nowhere")


def test_a_base_whose_terms_ask_for_it_gets_a_notice(run: Path) -> None:
    edit(run / "run.lock.json", lambda v: v["base"].update(licence="llama3.2", revision=SHA))
    named = {"base_model_name_or_path": "meta-llama/Llama-3.2-1B", "revision": SHA}
    edit(run / "adapter/adapter_config.json", lambda v: v.update(named))
    plan = make_plan(FinishedRun(run), "me/test")
    assert texts(plan)["NOTICE"].startswith("Llama 3.2 is licensed under the Llama 3.2 Community")
    assert "warning: Llama 3.2's terms ask for a name that begins with Llama" in str(plan)
    (run / "adapter/LICENSE").write_text("LLAMA 3.2 COMMUNITY ... LlamaUseReport@meta.com")
    plan = make_plan(FinishedRun(run), "me/Llama-test")
    # What the base came with goes along; ours stands below it, once.
    ours = texts(plan)["NOTICE"]
    (run / "adapter/NOTICE").write_text("Copyright Some Lab\n")
    plan = make_plan(FinishedRun(run), "me/Llama-test")
    assert texts(plan)["NOTICE"] == f"Copyright Some Lab\n\n{ours}"
    (run / "adapter/NOTICE").write_text(texts(plan)["NOTICE"])
    assert texts(make_plan(FinishedRun(run), "me/Llama-test"))["NOTICE"] == texts(plan)["NOTICE"]
    assert "LICENSE" in plan.files and "terms ask" not in str(plan)


@pytest.mark.parametrize("home", ["{}home/jane doe/my runs", "{}data/jane's/it", '{}srv/a "b"/c'])
def test_paths_with_spaces_and_quotes_do_not_leave(run: Path, home: str) -> None:
    home = home.format("/")
    named = {"base_model_name_or_path": f"{home}/base"}
    edit(run / "adapter/adapter_config.json", lambda v: v.update(named))
    data = {f"{home}/my rows.jsonl": "d1"}
    lock = {"data": data, "commits": {}, "from": f"{home}/last one"}
    edit(run / "run.lock.json", lambda v: v.update(lock, base={"model": f"{home}/base"}))
    said = [f"with compare {home}/runs/test", "see https://x.org/a/b, 3 / 4"]
    edit(run / "report.json", lambda v: v.update(not_measured=said))
    put(run, report__html=f"<p>{escape(home)}/my rows.jsonl</p><p>{escape(home)}/base</p>")
    found = texts(make_plan(FinishedRun(run), "me/test", with_samples=True))
    for name, text in found.items():
        assert not re.search("jane|my runs|srv", text), name
    assert found["report.html"] == "<p>my rows.jsonl</p><p>base</p>"
    assert json.loads(found["run.lock.json"])["from"] == "last one"
    assert json.loads(found["report.json"])["not_measured"] == ["with compare test", said[1]]


def test_rows_are_not_rewritten(run: Path) -> None:
    def put_rows(text: str) -> None:
        edit(run / "report.json", lambda v: v["samples"][0].update(expected=text))
        (run / "report.html").write_text(f"<p>{text}</p>")

    put_rows("#!/usr/bin/python -m a")
    found = texts(make_plan(FinishedRun(run), "me/test", with_samples=True))
    assert found["report.html"] == "<p>#!/usr/bin/python -m a</p>"
    assert "#!/usr/bin/python -m a" in found["report.json"]
    put_rows(f"{HOME}/x")
    with pytest.raises(UserError, match=r"report\.json:\d+: a home folder"):
        make_plan(FinishedRun(run), "me/test", with_samples=True)


def test_an_adapter_that_is_not_finite_stays(run: Path) -> None:
    file = run / "adapter/adapter_model.safetensors"
    file.write_bytes(weights()[:-4] + struct.pack("<f", float("inf")))
    edit(run / "run.lock.json", lambda v: v["adapter"].update(sha256=file_hash(file)))
    with pytest.raises(CheckFailed, match=r"q_proj\.lora_B\.weight is NaN or infinite"):
        make_plan(FinishedRun(run), "me/test")


def test_a_secret_stops_it_before_anything_is_shown(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_API_KEY", "a-canary-of-the-environment")
    (run / "adapter/chat_template.jinja").write_text("x\n{# a-canary-of-the-environment #}")
    relock(run)
    for more in ([], ["--dry-run"], ["--dry-run", "--json"]):
        done = CliRunner().invoke(app, ["push", str(run), "me/test", *more])
        assert isinstance(done.exception, UserError) and not done.output
        assert "chat_template.jinja:2: the value of MY_API_KEY" in str(done.exception)
        assert "canary" not in str(done.exception)


def test_a_run_that_is_damaged_or_not_finished_is_refused(run: Path, tmp_path: Path) -> None:
    (run / "adapter/adapter_model.safetensors").write_bytes(weights()[:-1] + b"\1")
    with pytest.raises(UserError, match="was changed since the run saved it"):
        make_plan(FinishedRun(run), "me/test")
    (run / "adapter/adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="missing"):
        make_plan(FinishedRun(run), "me/test")
    with pytest.raises(UserError, match="neither a run directory nor an adapter"):
        make_plan(FinishedRun(tmp_path / "nothing"), "me/test")
    for repo in ("test", "me/te st", "../test", "me/a/b", "me/{{x}}"):
        with pytest.raises(UserError, match="not a name on the Hub"):
            make_plan(FinishedRun(run), repo)
