"""Where a base lies and which one it is: the Hub, the cache, folders; nothing in them runs."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub import OLDER, SHA, Hub, client, serving

from lora_kit.base.load import load_base, load_tokenizer
from lora_kit.base.pin import pin
from lora_kit.errors import UserError
from lora_kit.schema import Base

# Pins every (model, revision) of PINS, or says in which line it failed.
PIN = """
import json, os
from lora_kit.base.pin import pin
from lora_kit.errors import UserError
from lora_kit.schema import Base

for model, revision in json.loads(os.environ["PINS"]):
    try:
        found = pin(Base(model=model, revision=revision))
        out = {**found.to_lock(), "folder": found.folder}
    except UserError as error:
        out = {"error": str(error)}
    print(json.dumps(out))
"""

# What decides a base's output, and is hashed.
DECIDING = (
    *("chat_template.jinja", "config.json", "model.safetensors"),
    *("tokenizer.json", "tokenizer_config.json"),
)


def pins(hub: str, home: Path, *wanted: tuple[str, str | None], **environment: str) -> list[Any]:
    return client(PIN, hub, home, PINS=json.dumps(wanted), **environment)


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def repo(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as its authors keep it: a card, a folder and a pickle that nobody needs."""
    folder = tmp_path_factory.mktemp("repo") / "model"
    shutil.copytree(base, folder)
    card = "---\nlicense: apache-2.0\ntags: [a]\n---\n# A model\nlicense: mit\n"
    (folder / "README.md").write_text(card, encoding="utf-8")
    (folder / "pytorch_model.bin").write_bytes(b"never fetched")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "config.json").write_text("{}", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def hub(repo: Path, plain_base: Path) -> Iterator[Hub]:
    bare = repo.parent / "bare"
    bare.mkdir()
    shutil.copy(repo / "config.json", bare)
    (bare / "pytorch_model.bin").write_bytes(b"never read")
    repos = {"org/model": {SHA: repo, OLDER: plain_base}, "org/pickled": {SHA: bare}}
    with serving(repos, {"main": SHA, "v1": OLDER, "branch": OLDER}) as running:
        yield running


def test_a_hub_base_is_pinned_to_its_commit_and_found_again_offline(
    hub: Hub, repo: Path, plain_base: Path, tmp_path: Path
) -> None:
    wanted = [("org/model", revision) for revision in (None, "branch", "v1", SHA, OLDER, SHA[:7])]
    newest, branch, tag, commit, older, short = pins(hub.url, tmp_path, *wanted)
    assert [p["revision"] for p in (newest, commit)] == [SHA, SHA]
    assert [p["revision"] for p in (branch, tag, older)] == [OLDER, OLDER, OLDER]
    assert newest["model"] == "org/model" and newest["licence"] == "apache-2.0"
    assert newest["hashes"] == {name: sha256(repo / name) for name in DECIDING}
    assert tag["hashes"]["config.json"] == sha256(plain_base / "config.json")
    assert tag["licence"] is None
    assert short["error"].startswith(f"base.model: org/model: has no revision `{SHA[:7]}`")
    files = {str(f.relative_to(newest["folder"])) for f in Path(newest["folder"]).rglob("*")}
    assert files == {f.name for f in repo.iterdir()} - {"pytorch_model.bin", "onnx"}

    asked = len(hub.asked)
    offline, by_sha, never = pins(
        hub.url, tmp_path, wanted[0], wanted[3], ("org/other", None), HF_HUB_OFFLINE="1"
    )
    assert len(hub.asked) == asked
    for again in (offline, by_sha):
        assert again == newest
    assert never["error"].startswith(
        "base.model: org/other: no such folder here, not completely in the Hub's"
    )
    assert "HF_HUB_OFFLINE is set" in never["error"] and "hf download" in never["error"]

    # Half a download, then the network goes: it must not pass for the model.
    (Path(newest["folder"]) / "model.safetensors").unlink()
    [half] = pins(hub.url, tmp_path, wanted[0], HF_HUB_OFFLINE="1")
    assert "not completely in the Hub's cache" in half["error"]


def test_what_the_hub_refuses_is_said_in_one_line(hub: Hub, tmp_path: Path) -> None:
    words = {
        "org/gated-no-token": ["(401)", f"request it at {hub.url}/org/gated-no-token", "login"],
        "org/gated-refused": ["(403)", f"request it at {hub.url}/org/gated-refused", "login"],
        "org/blocked": ["(403)", f"request it at {hub.url}/org/blocked"],
        "org/missing": ["no such folder here", f"on {hub.url}", "private", "login"],
        "org/private": ["no such folder here", f"on {hub.url}", "private", "login"],
        "org/down": [f"{hub.url} responds 503", "again later"],
        "org/pickled": ["no .safetensors weights"],
        "org/a--b": ["not a Hub id"],
    }
    found = pins(hub.url, tmp_path, *((model, None) for model in words))
    for (model, expected), got in zip(words.items(), found, strict=True):
        assert "\n" not in got["error"] and len(got["error"]) < 400
        assert got["error"].startswith("base.model: ")
        missing = [word for word in expected if word not in got["error"]]
        assert not missing, (model, got["error"])
        # It is not asked again and again.
        assert sum(model in path for path in hub.asked) <= 4, model


def test_an_endpoint_that_does_not_answer_is_given_up_soon(tmp_path: Path) -> None:
    [got] = pins("http://127.0.0.1:9", tmp_path, ("org/model", None))
    assert "http://127.0.0.1:9 cannot be reached" in got["error"] and "\n" not in got["error"]
    assert got["error"].endswith("download it with `hf download org/model`")


def test_a_local_folder(base: Path, work: Path) -> None:
    found = pin(Base(model=str(base)))
    assert found.folder == str(base.resolve()) and found.revision is None
    assert found.hashes == {name: sha256(base / name) for name in DECIDING}
    assert "folder" not in found.to_lock()
    # A link named like a hash is not taken at its word outside the Hub's cache.
    linked = work / "linked"
    shutil.copytree(base, linked)
    (linked / "model.safetensors").rename(work / ("0" * 64))
    (linked / "model.safetensors").symlink_to(work / ("0" * 64))
    assert pin(Base(model=str(linked))).hashes == found.hashes


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: mit\n---\n", "mit"),
        ("---\r\nlicense: mit\r\n---\r\n", "mit"),
        ("---\ntitle: a --- b\nlicense: mit\n---\n", "mit"),
        ("---\nlicense: [mit, gpl]\n---\n", "mit, gpl"),
        ("# license: mit\n", None),
        ("---\nlicense: {\n---\n", None),
        ("---\nlicense: null\n---\n", None),
        ("---\n- license\n---\n", None),
        ("", None),
    ],
)
def test_the_licence_is_the_cards(base: Path, work: Path, card: str, licence: str | None) -> None:
    folder = work / "model"
    shutil.copytree(base, folder)
    (folder / "README.md").write_bytes(card.encode())
    assert pin(Base(model=str(folder))).licence == licence


def test_folders_and_names_that_are_no_base(base: Path, work: Path) -> None:
    empty, pickled = work / "empty", work / "pickled"
    empty.mkdir()
    shutil.copytree(base, pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    for model, revision, words in (
        (str(empty), None, "no config.json: not a model folder"),
        (str(pickled), None, "no .safetensors weights"),
        (str(work / "nowhere" / "at" / "all"), None, "no such folder, and not a Hub id"),
        ("just-a-name", None, "no such folder, and not a Hub id"),
        (str(base), "main", "base.revision"),
        ("nano", "main", "base.revision"),
    ):
        with pytest.raises(UserError, match=words) as raised:
            pin(Base(model=model, revision=revision))
        assert (model in str(raised.value)) and "\n" not in str(raised.value)


class _Canary:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (Path.write_text, (self.file, "it ran"))


def test_nothing_in_the_folder_runs(
    base: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = work / "canary"
    folder = work / "model"
    shutil.copytree(base, folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Canary(canary)))
    code = f"open({str(canary)!r}, 'w').write('it ran')\n"
    for name in ("configuration_x.py", "modeling_x.py", "tokenization_x.py"):
        (folder / name).write_text(code + "class X: pass\n", encoding="utf-8")
    known = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}
    (folder / "config.json").write_text(json.dumps({**known, "auto_map": auto}))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["tokenization_x.X", "tokenization_x.X"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    # Someone who says yes to everything that is asked.
    monkeypatch.setattr("builtins.input", lambda *_: "y")

    # An architecture that transformers has: its own classes are used.
    settings = Base(model=str(folder), dtype="float32")
    load_tokenizer(pin(settings).folder)
    assert type(load_base(settings, pin(settings))).__name__ == "LlamaForCausalLM"
    assert not canary.exists()

    # One that only the folder's code has: refused, and nobody is asked.
    unknown = {**known, "auto_map": auto, "model_type": "x", "architectures": ["X"]}
    (folder / "config.json").write_text(json.dumps(unknown))
    (folder / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "tokenizer_class": "X"}))
    for load in (
        lambda: load_base(settings, pin(settings)),
        lambda: load_tokenizer(pin(settings).folder),
    ):
        with pytest.raises(UserError, match=r"model: .*code") as raised:
            load()
        assert "\n" not in str(raised.value)
        assert "trust_remote_code=True" not in str(raised.value)
    assert not canary.exists()

    # The canary does sing where pickles are read.
    pickle.loads((folder / "pytorch_model.bin").read_bytes())
    assert canary.exists()


def test_of_a_repository_the_top_folder_is_read_and_how_it_pools() -> None:
    from huggingface_hub.utils import filter_repo_objects

    from lora_kit.base.pin import _FILES, _NOT_READ, _WEIGHTS

    there = [
        *("config.json", "model.safetensors", "tokenizer.json", "vocab.txt", "README.md"),
        *("1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"),
        *("onnx/config.json", "openvino/a.txt", "1x/config.json", "1_Pooling/model.safetensors"),
        *("consolidated.safetensors", "pytorch_model.bin", "model.py"),
    ]
    chosen = filter_repo_objects(
        there, allow_patterns=[*_FILES, _WEIGHTS], ignore_patterns=_NOT_READ
    )
    assert list(chosen) == [*there[:5], "1_Pooling/config.json"]
