"""What is pulled is what the Hub lists, safetensors alone, and below its folder; or not there."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_commands import Done, commands
from hub_writing import Trouble, WritableHub, writable

from lora_kit import load
from lora_kit.errors import UserError

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": "nano"}


def weights(header: dict[str, Any] | str | None = None) -> bytes:
    """An adapter of one module, 2 x 4 and 4 x 2; `header` instead of the right one."""
    right = {
        "base_model.model.q_proj.lora_A.weight": ("F32", [2, 4], [0, 32]),
        "base_model.model.q_proj.lora_B.weight": ("F32", [4, 2], [32, 64]),
    }
    keys = ("dtype", "shape", "data_offsets")
    values = {name: dict(zip(keys, entry, strict=True)) for name, entry in right.items()}
    text = header if isinstance(header, str) else json.dumps(header or values)
    return struct.pack("<Q", len(text)) + text.encode() + bytes(64)


def adapter(**files: Any) -> dict[str, bytes]:
    """The files of a repository; `a__b` is the file a.b."""
    plain = {"adapter_config__json": CONFIG, "adapter_model__safetensors": weights()}
    found = {name.replace("__", "."): content for name, content in {**plain, **files}.items()}
    return {n: c if isinstance(c, bytes) else json.dumps(c).encode() for n, c in found.items()}


class Canary:
    def __reduce__(self) -> Any:
        return (print, ("canary",))


TWICE = "{" + '"a":{"dtype":"F32","shape":[8],"data_offsets":[0,32]},' * 2 + '"b":0}'
OVERLAP = {"a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}}
OVERLAP |= {"b": {"dtype": "F32", "shape": [8], "data_offsets": [32, 64]}}
PICKLE = pickle.dumps(Canary())
REPOS: dict[str, dict[str, bytes]] = {
    "good": adapter(),
    "more": adapter(
        **{"training_args__bin": PICKLE, "handler__py": b"print('canary')", "run__yaml": b"a: 1"},
        **{"model__gguf": b"GGUF", "model__pkl": PICKLE, "pulled__json": b"{}", "a/b__json": b"{}"},
        **{"tokenizer__json": b"{}", "LICENSE": b"text", "NOTICE__txt": b"n", "x__pt": PICKLE},
    ),
    "pickled": {"adapter_config.json": b"{}", "adapter_model.bin": PICKLE},
    "empty": {".gitattributes": b""},
    "twice": adapter(adapter_model__safetensors=weights(TWICE)),
    "overlap": adapter(adapter_model__safetensors=weights(OVERLAP)),
    "huge": adapter(adapter_model__safetensors=struct.pack("<Q", 2**62) + bytes(64)),
    "short": adapter(adapter_model__safetensors=weights()[:-8]),
    "nan": adapter(adapter_model__safetensors=weights()[:-4] + struct.pack("<f", float("nan"))),
    "nojson": adapter(adapter_config__json=b"{"),
    "nolora": adapter(adapter_config__json={**CONFIG, "peft_type": "IA3"}),
    "code": adapter(adapter_config__json={**CONFIG, "auto_mapping": {"parent_library": "os"}}),
    "lock": adapter(run__lock__json={"adapter": {"sha256": "0" * 64}}),
    "shards": adapter(
        **{"model-1__safetensors": weights()},
        model__safetensors__index__json={"weight_map": {"a": "model-2.safetensors"}},
    ),
    "changed": adapter(),
    "changedtext": adapter(),
    "short-listed": adapter(),
    "up": adapter(),
    "absolute": adapter(),
    "backslash": adapter(),
    **{name: adapter() for name in ("oddsize", "oddpath", "nohash")},
    "down": adapter(),
    "local": adapter(adapter_config__json={**CONFIG, "base_model_name_or_path": None}),
    "hidden": adapter(),
}


def lie(path: Any, size: Any = 2, **more: Any) -> list[dict[str, Any]]:
    return [{"type": "file", "path": path, "size": size, "oid": "0" * 40, **more}]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("place")


@pytest.fixture(scope="module")
def hub(place: Path) -> Iterator[WritableHub]:
    with writable(place / "hub") as running:
        for name, files in REPOS.items():
            running.make(f"me/{name}", private=True, files=files)
        size, other = len(weights()), {"oid": "1" * 64, "size": len(weights()), "pointerSize": 1}
        config = len(REPOS["good"]["adapter_config.json"])
        running.lies = {
            "me/changed": lie("adapter_model.safetensors", size, lfs=other),
            "me/changedtext": lie("adapter_config.json", config),
            "me/short-listed": lie("adapter_config.json", config + 1),
            "me/up": lie("../../evil.json"),
            "me/absolute": lie("/tmp/evil.json"),
            "me/backslash": lie("..\\evil.json"),
            "me/oddsize": lie("adapter_config.json", size="x"),
            "me/oddpath": lie(5),
            "me/nohash": [{"type": "file", "path": "adapter_config.json", "size": 2}],
        }
        running.troubles["me/down"] = Trouble("read", 503, times=99)
        running.troubles["me/hidden"] = Trouble("read", 403, times=99)
        yield running


@pytest.fixture(scope="module")
def done(hub: WritableHub, place: Path) -> dict[str, Done]:
    first = hub.heads["me/good"]
    hub.commit("me/good", {"README.md": b"newer"})
    (place / "there").mkdir()
    names = [*REPOS, "missing"]
    return commands(
        hub,
        place / "home",
        *(f"pull me/{name} --out {place}/{name}" for name in names if name != "more"),
        f"pull me/more --out {place}/more --json",
        f"pull me/good --out {place}/older --revision {first}",
        f"pull me/good --out {place}/norevision --revision v9",
        f"pull me/good --out {place}/there",
        f"pull org/gated-no-token --out {place}/gated",
        f"pull ../me --out {place}/noname",
    )


def test_only_what_is_known_comes_down(
    done: dict[str, Done], hub: WritableHub, place: Path
) -> None:
    found = json.loads(done[f"pull me/more --out {place}/more --json"].out)
    names = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "LICENSE"}
    names.add("NOTICE.txt")
    assert set(found["files"]) == names
    assert {f.name for f in (place / "more").rglob("*")} == {*names, "pulled.json"}
    left = {"training_args.bin", "handler.py", "run.yaml", "model.gguf", "model.pkl", "x.pt"}
    assert set(found["left"]) == {*left, "pulled.json", "a/b.json"}
    assert not any(name in path for name in left for path in hub.asked if "/resolve/" in path)
    assert json.loads((place / "more/pulled.json").read_text())["repo"] == "me/more"


def test_a_revision_is_pinned(done: dict[str, Done], hub: WritableHub, place: Path) -> None:
    assert (place / "good/README.md").read_bytes() == b"newer"
    assert not (place / "older/README.md").exists()
    pinned = json.loads((place / "good/pulled.json").read_text())["revision"]
    assert pinned == hub.heads["me/good"]
    assert json.loads((place / "older/pulled.json").read_text())["revision"] != pinned


REFUSED = {
    "pickled": "no safetensors weights at its top (adapter_model.bin)",
    "empty": "no safetensors weights at its top (empty)",
    "twice": "adapter_model.safetensors: corrupt safetensors file (duplicate key 'a')",
    "overlap": "adapter_model.safetensors: corrupt safetensors file",
    "huge": "adapter_model.safetensors: corrupt safetensors file (a header of",
    "short": "adapter_model.safetensors: corrupt safetensors file",
    "nan": "q_proj.lora_B.weight is NaN or infinite",
    "nojson": "adapter_config.json: no JSON",
    "nolora": "adapter_config.json: peft_type is 'IA3'",
    "code": "adapter_config.json: `auto_mapping`",
    "lock": "adapter_model.safetensors is not the one that run.lock.json names",
    "shards": "model-2.safetensors: missing",
    "changed": "adapter_model.safetensors: not the bytes that the Hub lists",
    "changedtext": "adapter_config.json: not the bytes that the Hub lists",
    "short-listed": "adapter_config.json",
    "up": "names a file outside of its folder: '../../evil.json'",
    "absolute": "names a file outside of its folder: '/tmp/evil.json'",
    "backslash": "names a file outside of its folder",
    **dict.fromkeys(("oddsize", "oddpath", "nohash"), "list of its files is not readable"),
    "down": "responds 503: try again later",
    "hidden": "access denied (403)",
    "missing": "(404)",
    "norevision": "has no revision `v9`",
    "gated": "access denied (401): request it at",
    "noname": "not a name on the Hub: write owner/name",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_a_line_and_leaves_nothing(
    done: dict[str, Done], place: Path, name: str
) -> None:
    [pulled] = [d for line, d in done.items() if f"--out {place}/{name} " in f"{line} "]
    assert pulled.code in (1, 2) and not pulled.out
    [line] = [one for one in pulled.err.splitlines() if one.startswith("error:")]
    assert REFUSED[name] in line and "partial" not in line and len(line) < 400
    assert "Traceback" not in pulled.err and "canary" not in pulled.err
    assert not (place / name).exists() and not list(place.glob(".*partial*"))
    assert not list(place.parent.rglob("evil.json"))


def test_a_base_that_only_its_author_has_must_be_named(
    done: dict[str, Done], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pulled = done[f"pull me/local --out {place}/local"]
    assert pulled.code == 0 and "base_model_name_or_path was a folder of its author" in pulled.err
    with pytest.raises(UserError, match=r"base_model_name_or_path: no base"):
        load(place / "local")


def test_a_folder_that_exists_is_left_alone(done: dict[str, Done], place: Path) -> None:
    refused = done[f"pull me/good --out {place}/there"]
    assert refused.code == 2 and "exists: name another folder" in refused.err
    assert (place / "there").is_dir() and not list((place / "there").iterdir())


def test_every_refusal_was_tried(done: dict[str, Done]) -> None:
    assert len(REFUSED) + 5 == sum(line.startswith("pull") for line in done)
