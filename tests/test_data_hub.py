"""Data sets of the Hub: the files of a split, pinned to a commit, read like local ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import make_tokenizer
from hub import OLDER, SHA, Hub, client, serving
from hub_sets import Repos, make_sets, put
from prepared import prepared

from lora_kit.data import hub as data_hub
from lora_kit.data.sources import open_sources
from lora_kit.errors import UserError
from lora_kit.schema import Source

# Opens every list of sources in WANTED, or says why not; with rows and their places.
OPEN = """
import json, os
from pathlib import Path
from lora_kit.data.sources import open_sources
from lora_kit.errors import UserError
from lora_kit.schema import Source

for wanted, commits in json.loads(os.environ["WANTED"]):
    try:
        for s in open_sources([Source(**w) for w in wanted], commits):
            rows = [row for batch in s.batches() for row in batch.parsed()]
            print(json.dumps({
                "name": s.name, "digest": s.digest, "commit": s.commit,
                "files": [str(f) for f in s.files],
                "rows": [row.columns for row in rows],
                "places": [Path(row.place).name for row in rows],
            }))
    except UserError as error:
        print(json.dumps({"error": str(error)}))
"""


def opened(
    hub: Hub | str, home: Path, *wanted: Any, commits: Any = None, **environment: str
) -> list[Any]:
    """What OPEN prints for each source, alone in a list."""
    url = hub if isinstance(hub, str) else hub.url
    alone = [[s if isinstance(s, list) else [s], commits] for s in wanted]
    return client(OPEN, url, home, WANTED=json.dumps(alone), **environment)


GOOD: list[dict[str, Any]] = [
    {"source": "org/set"},
    {"source": "org/set", "config": "short", "split": "test"},
    {"source": "org/set", "config": "long"},
    {"source": "org/set", "revision": OLDER},
    {"source": "org/set", "config": "long", "revision": "v1"},
    {"source": "org/renamed", "config": "long"},
    {"source": "org/plain"},
    {"source": "org/plain", "split": "validation"},
    {"source": "org/lines"},
]
REFUSED = [
    ({"source": "org/missing"}, ["no such file or folder here", "data set on {url}"]),
    ({"source": "org/never"}, ["no such file or folder here"]),
    ({"source": "org/private"}, ["private", "`hf auth login`"]),
    ({"source": "org/gated-no-token"}, ["{url}/datasets/org/gated-no-token", "(401)"]),
    ({"source": "org/gated-refused"}, ["access denied (403)", "`hf auth login`"]),
    ({"source": "org/down"}, ["responds 503", "again later"]),
    ({"source": "org/a--b"}, ["org/a--b"]),
    ({"source": "org/set", "revision": "v2"}, ["has no revision `v2`"]),
    (
        {"source": "org/set", "split": "trian"},
        ["has no split `trian`; it has: train, test; did you mean `train`?"],
    ),
    ({"source": "org/set", "split": "train[:10%]"}, ["has no split `train[:10%]`; it has: tr"]),
    (
        {"source": "org/set", "config": "shrt"},
        ["has no config `shrt`; it has: short, long; did you mean `short`?"],
    ),
    ({"source": "org/plain", "config": "en"}, ["has no config `en`; it has: default"]),
    ({"source": "org/choice"}, ["name one of its configs as `config:`: en, de"]),
    ({"source": "org/script"}, ["needs a loading script, which is not supported"]),
    ({"source": "org/separator"}, ["`sep: ';'`", "save its rows as jsonl"]),
    ({"source": "org/outside"}, ["its card lists files outside of the data set"]),
    ({"source": "org/card"}, ["no data files found"]),
    ({"source": "org/yaml"}, ["no data files found"]),
    ({"source": "org/zipped"}, ["a.jsonl.zst: unsupported file type"]),
    ({"source": "org/nothing"}, ["no data files found"]),
    ({"source": "org/empty"}, ["org/empty[train]: empty: there is nothing to train on"]),
    ([{"source": "org/set"}] * 2, ["org/set[train]: named twice: remove one of the two"]),
]


@pytest.fixture(scope="module")
def repos(tmp_path_factory: pytest.TempPathFactory) -> Repos:
    return make_sets(tmp_path_factory.mktemp("repos"))


@pytest.fixture(scope="module")
def hub(repos: Repos) -> Iterator[Hub]:
    with serving(repos, {"main": SHA, "v1": OLDER}) as running:
        yield running


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def found(hub: Hub, home: Path) -> list[Any]:
    """What becomes of GOOD and REFUSED, in one process on an empty cache."""
    return opened(hub, home, *GOOD, *(source for source, _ in REFUSED))


@pytest.fixture
def offline(found: list[Any], home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process has no network, and the cache that `found` left."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "hub"))


def test_a_split_is_the_files_that_the_card_names(hub: Hub, found: list[Any], home: Path) -> None:
    short, test, _, _, long = found[:5]
    assert short["name"] == "org/set[train]" and short["commit"] == SHA
    # Nothing is coerced, and no column is added.
    assert short["rows"] == [{"text": "a", "n": 1}, {"text": "b", "n": "two"}]
    assert short["places"] == ["train.jsonl:2", "train.jsonl:3"]
    assert test["name"] == "org/set/short[test]" and test["places"] == ["test [1].jsonl:1"]
    assert long["name"] == "org/set/long[train]" and long["commit"] == OLDER
    assert long["rows"] == [
        {"text": "x", "label": "spam"},
        {"text": "y", "label": "ham"},
        {"text": "z", "label": None},
    ]
    assert long["places"] == ["a.csv:2", "a.csv:3", "b.csv:2"]
    assert not any("other.jsonl" in path for path in hub.asked)
    assert not list(home.rglob("*.arrow"))


def test_parquet_and_json_without_a_card(found: list[Any]) -> None:
    train, validation, as_lines = found[6 : len(GOOD)]
    row = {"tokens": ["a", "b"], "tags": ["O", "B-X"], "meta": {"id": 7}}
    assert train["rows"] == validation["rows"] == [row]
    assert train["places"] == ["train-00000-of-00001.parquet[0]"]
    assert [train["name"], validation["name"]] == ["org/plain[train]", "org/plain[validation]"]
    assert as_lines["rows"] == [{"text": "a"}, {"text": "b"}]
    assert as_lines["places"] == ["train.json:1", "train.json:2"]


def test_the_hash_is_that_of_the_rows(found: list[Any]) -> None:
    short, test, long, older_short, older_long, renamed = (f["digest"] for f in found[:6])
    assert len({short, test, long}) == 3 and all(len(digest) == 64 for digest in (short, test))
    # Another commit: another card, the same short rows, other long ones.
    assert found[0]["commit"] != found[3]["commit"]
    assert older_short == short and older_long != long
    assert [found[3]["name"], found[4]["name"]] == [found[0]["name"], found[2]["name"]]
    # The same files, whose classes have another name.
    assert [row["label"] for row in found[5]["rows"]] == ["junk", "ham", "ham"]
    assert renamed != long


def test_without_a_network_the_cache_is_enough(found: list[Any], offline: None, home: Path) -> None:
    for wanted, before in zip(GOOD, found, strict=False):
        [again] = open_sources(Source(**wanted))
        assert (again.name, again.digest, again.commit) == tuple(
            before[key] for key in ("name", "digest", "commit")
        )
        assert [str(file) for file in again.files] == before["files"]
    with pytest.raises(UserError, match=r"org/o: .*HF_HUB_OFFLINE is set") as raised:
        open_sources("org/o")
    assert str(raised.value).endswith("download it with `hf download --repo-type dataset org/o`")
    # A file that was never fetched, or is not there any more.
    [file] = open_sources("org/lines")[0].files
    kept = file.readlink()
    file.unlink()
    with pytest.raises(UserError, match=r"org/lines: .*not completely in the Hub's cache"):
        open_sources("org/lines")
    file.symlink_to(kept)
    # No switch, but nobody answers.
    good, away = opened("http://127.0.0.1:9", home, GOOD[0], {"source": "org/o"})
    assert good == found[0] and "http://127.0.0.1:9 cannot be reached" in away["error"]


def test_what_is_wrong_is_said_in_one_line(hub: Hub, found: list[Any]) -> None:
    for (source, expected), got in zip(REFUSED, found[len(GOOD) :], strict=True):
        name = source[0]["source"] if isinstance(source, list) else source["source"]
        line = got.get("error", "")
        assert line.startswith(name), got
        assert "\n" not in line and len(line) < 400 and "tmp" not in line
        missing = [word for word in expected if word.format(url=hub.url) not in line]
        assert not missing, line


def test_two_splits_to_learn_from_and_to_judge_by(
    offline: None, found: list[Any], tmp_path: Path
) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    held_out = Source(source="org/set", split="test")
    train = Source(source="org/set")
    made = prepared(tokenizer, "text", train=train, eval=held_out, max_length=64)
    names = ["org/set[train]", "org/set[test]"]
    assert list(made.hashes) == names
    assert list(made.hashes.values()) == [f["digest"] for f in found[:2]]
    assert (made.census.train.rows_kept, made.census.eval.rows_kept) == (2, 1)
    assert made.place(made.eval, 0).endswith("test [1].jsonl:1")


def test_a_branch_that_moved_and_a_commit_that_is_kept(tmp_path: Path, repos: Repos) -> None:
    wanted = {"source": "org/set", "config": "long"}
    with serving(repos, {"main": OLDER}) as hub:
        [before] = opened(hub, tmp_path, wanted)
        hub.refs["main"] = SHA
        [after] = opened(hub, tmp_path, wanted)
        commits = {before["name"]: before["commit"]}
        kept, told = opened(hub, tmp_path, wanted, {**wanted, "revision": SHA}, commits=commits)
    assert (before["commit"], after["commit"]) == (OLDER, SHA)
    assert before["digest"] != after["digest"] and before["name"] == after["name"]
    assert kept == before and told["digest"] == after["digest"]


def test_local_files_need_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_hub, "fetch", None)
    put(tmp_path, "owner/name/a.txt", "text")
    monkeypatch.chdir(tmp_path)
    [found] = open_sources(Source(source="owner/name"))
    digest = hashlib.sha256(b"text").digest()
    assert found.digest == hashlib.sha256(digest).hexdigest() and found.commit is None
    with pytest.raises(UserError, match="no such file or folder"):
        open_sources("owner/name/b.txt")
