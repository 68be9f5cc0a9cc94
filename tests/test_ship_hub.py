"""To the Hub and back, with the real client: one commit, private, nothing that should stay."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub import SHA
from hub_commands import Done, commands
from hub_writing import TOKEN, Trouble, WritableHub, writable
from trained import edit, finish, folder_maker

from lora_kit.adapter.finished import FinishedRun
from lora_kit.ship.hub import make_plan

pytestmark = pytest.mark.slow

# In the data: one with the shape of a token, one without.
IN_DATA = ("hf_" + "DataCanary0" * 3, "zebracanary")
IN_NOTES = "notescanary-77"
IN_ENVIRONMENT = "environmentcanary-5521"
PUSHED = (
    *("README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"),
    *("report.json", "run.lock.json", "tokenizer.json", "tokenizer_config.json"),
)


STALE = ("config.json", "merge.json", "model.safetensors", "report.html")


def write_rows(file: Path) -> None:
    rows = [
        {"prompt": f"What is {n} {IN_DATA[1]}?", "completion": f"It is {n} {IN_DATA[0]}"}
        for n in range(60)
    ]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("place")


@pytest.fixture(scope="module")
def run(place: Path, base: Path) -> Iterator[Path]:
    """A run on a base of the loopback Hub, with canaries in its data and among its files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        make = folder_maker(place, base)

        def with_canaries(*arguments: Any, **changes: Any) -> Path:
            file = make(*arguments, **changes)
            write_rows(place / "rows.jsonl")
            return file

        with (place / "log").open("w") as log, contextlib.redirect_stderr(log):
            found = finish(with_canaries, "sft")
    yaml = (found / "run.yaml").read_text(encoding="utf-8").replace(str(base), "org/tiny")
    (found / "run.yaml").write_text(f"# {IN_NOTES}\n{yaml}", encoding="utf-8")
    edit(found / "run.lock.json", lambda v: v["base"].update(model="org/tiny", revision=SHA))
    config = {"base_model_name_or_path": "org/tiny", "revision": SHA}
    edit(found / "adapter" / "adapter_config.json", lambda v: v.update(config))
    for name in ("README.md", "notes.txt", "adapter/README.md", "adapter/notes.json"):
        (found / name).write_text(IN_NOTES, encoding="utf-8")
    (found / "adapter" / "optimizer.bin").write_bytes(IN_NOTES.encode())
    yield found


@pytest.fixture(scope="module")
def hub(place: Path, base: Path) -> Iterator[WritableHub]:
    with writable(place / "hub") as running:
        running.repos["org/tiny"] = {SHA: base}
        running.heads["org/tiny"] = SHA
        yield running


@pytest.fixture(scope="module")
def done(hub: WritableHub, run: Path, place: Path) -> dict[str, Done]:
    """Everything that is typed in this module, in its order."""
    hub.make("me/public", private=False)
    hub.make("me/private", private=True)
    hub.troubles |= {
        "me/taken": Trouble("commit", 503, after=True),
        "me/cut": Trouble("commit", 0, after=True),
        "me/busy": Trouble("commit", 503, times=2),
        "me/limited": Trouble("commit", 429, headers={"Retry-After": "1"}),
        "me/flood": Trouble("commit", 429, headers={"Retry-After": "4000"}),
        "me/denied": Trouble("commit", 403),
        "me/gone": Trouble("commit", 404),
        "me/locked": Trouble("commit", 409),
        "me/moved": Trouble("commit", 412),
        "me/down": Trouble("read", 503, times=99),
        "me/out": Trouble("read", 401, times=99),
        "me/wrong": Trouble("create", 401),
    }
    hub.make("me/out", private=True)
    # What an earlier push left, with --with-samples and --merged, beside what is somebody's own.
    old = {name: b"{}" for name in (*STALE, "theirs.txt", "a/config.json")}
    hub.make("me/stale", private=True, files=old)
    content = make_plan(FinishedRun(run), "me/rows").files
    held = {n: c.read_bytes() if isinstance(c, Path) else c for n, c in content.items()}
    hub.make("me/rows", private=True, files={**held, "report.html": b"rows of the data"})
    again = [f"push {run} {name}" for name in hub.troubles]
    return commands(
        hub,
        place / "home",
        f"push {run} me/dry --dry-run",
        f"push {run} me/dry --dry-run --json",
        f"push {run} me/first --json",
        f"push {run} me/first",
        f"pull me/first --out {place}/back",
        f"load {run} {place}/back",
        f"inspect {place}/back",
        f"push {place}/back me/second",
        f"push {run} me/open --public",
        f"push {run} me/public",
        f"push {run} me/private --public",
        f"push {run} no-owner",
        f"push {run} me/stale --json",
        f"push {run} me/stale",
        f"push {run} me/rows",
        f"train {place}/run.yaml base.dtype={IN_DATA[0]}",
        *again,
        "cut",
        f"push {run} me/away",
        f"pull me/first --out {place}/away",
        SOME_API_KEY=IN_ENVIRONMENT,
    )


def test_the_plan_is_shown_and_a_dry_run_touches_no_network(
    done: dict[str, Done], hub: WritableHub, run: Path
) -> None:
    shown = done[f"push {run} me/dry --dry-run"]
    assert shown.code == 0 and "dry run, nothing was uploaded" in shown.out
    assert "to me/dry, private; base org/tiny, unknown:" in shown.err
    assert all(name in shown.err for name in PUSHED)
    assert "warning: the licence of the base is not known" in shown.err
    plan = json.loads(done[f"push {run} me/dry --dry-run --json"].out)
    assert sorted(plan["files"]) == sorted(PUSHED) and plan["visibility"] == "private"
    assert plan["files"]["tokenizer.json"] == (run / "adapter/tokenizer.json").stat().st_size
    assert not any("me/dry" in path for path in hub.asked) and "me/dry" not in hub.repos


def test_a_push_is_one_private_commit_of_what_is_needed(
    done: dict[str, Done], hub: WritableHub, run: Path
) -> None:
    first = json.loads(done[f"push {run} me/first --json"].out)
    assert first["committed"] and first["commit"] == hub.heads["me/first"]
    assert "me/first" in hub.private
    # The one that the Hub makes, and ours; the second push found nothing to do.
    assert hub.commits.count("me/first") == 2
    assert "already up to date" in done[f"push {run} me/first"].out
    folder = hub.folder("me/first")
    assert {f.name for f in folder.iterdir()} == {*PUSHED, ".gitattributes"}
    weights = (run / "adapter/adapter_model.safetensors").read_bytes()
    assert (folder / "adapter_model.safetensors").read_bytes() == weights
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/tiny", SHA)
    assert "me/open" not in hub.private and "public" in done[f"push {run} me/open --public"].out


def test_what_was_pushed_comes_back_and_says_the_same(
    done: dict[str, Done], hub: WritableHub, run: Path, place: Path
) -> None:
    pulled = done[f"pull me/first --out {place}/back"]
    assert pulled.code == 0 and hub.heads["me/first"] in pulled.out
    back = place / "back"
    assert {f.name for f in back.iterdir()} == {*PUSHED, "pulled.json"}
    marker = json.loads((back / "pulled.json").read_text())
    assert (marker["repo"], marker["revision"]) == ("me/first", hub.heads["me/first"])
    for name, digest in marker["files"].items():
        assert hashlib.sha256((back / name).read_bytes()).hexdigest() == digest
    difference, effect = json.loads(done[f"load {run} {place}/back"].out)
    assert difference == 0.0 and effect > 0.1
    assert "org/tiny" in done[f"inspect {place}/back"].out
    # Pushed on: the same weights, under another name.
    assert done[f"push {place}/back me/second"].code == 0
    names = {f.name for f in hub.folder("me/second").iterdir()}
    assert names == {*PUSHED, ".gitattributes"}


def test_no_canary_leaves_this_machine_and_none_is_printed(
    done: dict[str, Done], hub: WritableHub, run: Path, place: Path
) -> None:
    report = (run / "report.json").read_text()
    assert IN_DATA[1] in report and IN_NOTES in (run / "run.yaml").read_text()
    sent = b"\n".join(hub.received)
    assert (run / "adapter/adapter_model.safetensors").read_bytes() in sent
    printed = "\n".join(one.out + one.err for one in done.values())
    assert "base.dtype" in printed and '"***" is invalid' in printed
    canaries = [*IN_DATA, IN_NOTES, IN_ENVIRONMENT, TOKEN]
    for canary in [*canaries, str(place), "rows.jsonl"]:
        assert canary.encode() not in sent, canary
    log = (place / "log").read_text()
    assert IN_DATA[1] in log
    for canary in canaries:
        assert canary not in printed, canary
        assert canary not in log or canary == IN_DATA[1]  # a sample is shown, less its tokens
    # The token went to the Hub, and not to the other host that large files are fetched from.
    hosts = {host.partition(":")[0] for host, token in hub.tokens if TOKEN in token}
    assert hosts == {"127.0.0.1"}
    assert any(host.startswith("localhost") for host, _ in hub.tokens)


def test_a_commit_that_was_taken_is_not_made_again(
    done: dict[str, Done], hub: WritableHub, run: Path
) -> None:
    for repo in ("me/taken", "me/cut", "me/busy", "me/limited"):
        pushed = done[f"push {run} {repo}"]
        assert pushed.code == 0 and "retrying in" in pushed.err, (repo, pushed)
        assert hub.commits.count(repo) == 2, repo
        assert hub.heads[repo] in pushed.out
        assert {f.name for f in hub.folder(repo).iterdir()} == {*PUSHED, ".gitattributes"}
    assert "answers 429: retrying in 1 s" in done[f"push {run} me/limited"].err


def test_what_a_push_no_longer_means_is_taken_away(
    done: dict[str, Done], hub: WritableHub, run: Path
) -> None:
    first = done[f"push {run} me/stale --json"]
    assert json.loads(first.out)["removed"] == list(STALE)
    assert f"me/stale: removed: {', '.join(STALE)}" in first.err
    there = {str(f.relative_to(hub.folder("me/stale"))) for f in hub.folder("me/stale").rglob("*")}
    assert there == {*PUSHED, "theirs.txt", "a", "a/config.json"}
    assert "already up to date" in done[f"push {run} me/stale"].out
    assert hub.commits.count("me/stale") == 2
    # Nothing else was new.
    assert "uploaded" in done[f"push {run} me/rows"].out
    assert {f.name for f in hub.folder("me/rows").iterdir()} == set(PUSHED)


@pytest.mark.parametrize(
    ("repo", "words"),
    [
        ("me/flood", "too many requests (429): try again in 4000 seconds"),
        ("me/denied", "access denied (403): request it at http"),
        ("me/gone", "(404)"),
        ("me/locked", "another commit is in progress (409)"),
        ("me/moved", "changed by someone else in the meantime"),
        ("me/down", "responds 503: try again later"),
        ("me/out", "(401), or it is private: run `hf auth login`, or set HF_TOKEN"),
        ("me/wrong", "(401), or it is private: run `hf auth login`, or set HF_TOKEN"),
        ("me/public", "already public, which a push does not change: add --public"),
        ("me/private --public", "already private, which a push does not change: remove --public"),
        ("no-owner", "not a name on the Hub: write owner/name"),
        ("me/away", "http://127.0.0.1:9 cannot be reached"),
    ],
)
def test_what_the_hub_refuses_is_a_line(
    done: dict[str, Done], hub: WritableHub, run: Path, repo: str, words: str
) -> None:
    pushed = done[f"push {run} {repo}"]
    [line] = [line for line in pushed.err.splitlines() if line.startswith("error:")]
    assert words in line and pushed.code == 2 and len(line) < 300 and not pushed.out
    assert "Traceback" not in pushed.err and (run / "adapter/adapter_model.safetensors").is_file()
    folder = hub.repos.get(repo.split()[0])
    assert not folder or not (hub.folder(repo.split()[0]) / "README.md").exists()


def test_somebody_elses_commit_is_kept(done: dict[str, Done], hub: WritableHub) -> None:
    assert {f.name for f in hub.folder("me/moved").iterdir()} == {".gitattributes", "theirs.txt"}


def test_without_a_network_nothing_is_left(done: dict[str, Done], place: Path) -> None:
    away = done[f"pull me/first --out {place}/away"]
    assert away.code == 2 and "cannot be reached" in away.err
    assert not (place / "away").exists() and not list(place.glob(".away*"))
    shutil.rmtree(place / "hub")
