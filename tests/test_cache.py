"""Prepared once: by one process, whole or not at all, and again where it is damaged."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import CHATML, make_tokenizer
from processes import LIMIT_S, run, until

from lora_kit import cache
from lora_kit.errors import UserError
from lora_kit.tasks.encode import identity

KEY = "0123abc"


@pytest.fixture(autouse=True)
def root(own_cache: Path) -> Path:
    """The folder of the cache; it is not there yet."""
    return own_cache


class Build:
    """Writes two files, and counts how often."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, folder: Path) -> None:
        self.times += 1
        (folder / "rows.bin").write_bytes(bytes(range(200)))
        (folder / "meta.json").write_text('{"rows": 3}', encoding="utf-8")


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_what_was_prepared_is_kept(root: Path) -> None:
    build = Build()
    folder = cache.prepared(KEY, build)
    assert folder == root / KEY == cache.prepared(KEY, build) and build.times == 1
    assert names(folder) == ["meta.json", "rows.bin", "seal.json"]
    assert names(root) == [KEY, f"{KEY}.lock"]
    cache.prepared("another", build)
    assert build.times == 2


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "a byte flipped": lambda f: (f / "rows.bin").write_bytes(bytes([1, *range(1, 200)])),
    "cut short": lambda f: os.truncate(f / "rows.bin", 150),
    "a file gone": lambda f: (f / "meta.json").unlink(),
    "a folder in place of a file": lambda f: (
        (f / "meta.json").unlink(),
        (f / "meta.json").mkdir(),
    ),
    "no seal": lambda f: (f / "seal.json").unlink(),
    "an empty seal": lambda f: (f / "seal.json").write_text("{}"),
    "a seal cut short": lambda f: os.truncate(f / "seal.json", 9),
    "a seal of something else": lambda f: (f / "seal.json").write_text("3"),
    "a seal that is no text": lambda f: (f / "seal.json").write_bytes(b"\xff\xfe"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_what_is_damaged_is_prepared_again(
    damage: Callable[[Path], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    build = Build()
    folder = cache.prepared(KEY, build)
    damage(folder)
    assert cache.prepared(KEY, build) == folder and build.times == 2
    assert f"{folder}: corrupt: preparing it again" in capsys.readouterr().err
    assert (folder / "rows.bin").read_bytes() == bytes(range(200))
    assert cache.prepared(KEY, build) == folder and build.times == 2


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_preparation_that_fails_leaves_nothing_behind(
    root: Path, error: type[BaseException]
) -> None:
    def build(folder: Path) -> None:
        (folder / "half").write_bytes(b"half")
        raise error

    with pytest.raises(error):
        cache.prepared(KEY, build)
    assert names(root) == [f"{KEY}.lock"]
    good = Build()
    assert names(cache.prepared(KEY, good)) == ["meta.json", "rows.bin", "seal.json"]


def test_a_full_disk_is_the_users_to_mend(root: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "rows.bin").write_bytes(b"some")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UserError, match=r"No space left on device.*LORA_KIT_CACHE"):
        cache.prepared(KEY, build)
    assert names(root) == [f"{KEY}.lock"]


def test_what_a_killed_process_left_is_not_used(root: Path) -> None:
    left = root / f".{KEY}.lora-kit-partial" / "content"
    left.mkdir(parents=True)
    (left / "rubbish").write_bytes(b"half")
    folder = cache.prepared(KEY, Build())
    assert names(folder) == ["meta.json", "rows.bin", "seal.json"]
    assert names(root) == [KEY, f"{KEY}.lock"]


def test_without_a_place_to_keep_it_a_temporary_folder_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a file"
    file.write_text("in the way")
    build = Build()
    for place in (file, file / "below"):
        monkeypatch.setenv("LORA_KIT_CACHE", str(place))
        folder = cache.prepared(KEY, build)
        assert (folder / "rows.bin").read_bytes() == bytes(range(200))
        assert tmp_path not in folder.parents
        assert f"data: {place}: not writable" in capsys.readouterr().err
    assert build.times == 2 and file.read_text() == "in the way"


def test_a_temporary_folder_goes_with_its_process(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    found = run_script(
        "print(cache.prepared('key', lambda f: (f / 'a').write_text('a')))", tmp_path / "file"
    )
    (folder,) = found.stdout.split()
    assert Path(folder).name.startswith("lora_kit-") and not Path(folder).exists()


def test_what_no_run_has_used_for_a_month_is_forgotten(root: Path) -> None:
    build = Build()
    for key in ("old", "used", "new"):
        cache.prepared(key, build)
    (root / ".killed.lora-kit-partial").mkdir()
    for name in ("killed", "killed.lora-kit-partial"):
        (root / f"{name}.lock").touch()
    unused()
    month_ago = time.time() - (cache.DAYS_KEPT + 1) * 86400
    for name in ("old", "used", ".killed.lora-kit-partial"):
        os.utime(root / name, (month_ago, month_ago))
    cache.prepared("used", build)  # it counts when it was used, not when it was made
    cache.prepared("next", build)
    assert names(root) == [
        "killed.lora-kit-partial.lock",
        "new",
        "new.lock",
        "next",
        "next.lock",
        "used",
        "used.lock",
    ]
    assert build.times == 4


def unused() -> None:
    """As after the end of the process that used the entries."""
    for held in cache._in_use.values():
        os.close(held)
    cache._in_use.clear()


def big(folder: Path) -> None:
    (folder / "rows.bin").write_bytes(os.urandom(1_000_000))


def entries(root: Path) -> list[str]:
    return [name for name in names(root) if (root / name).is_dir()]


def test_a_bound_removes_the_oldest(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for age, key in enumerate(("d", "c", "b", "a")):
        cache.prepared(key, big)
        os.utime(root / key, (time.time() - age, time.time() - age))
    unused()
    monkeypatch.setenv("LORA_KIT_CACHE_GB", "0.0035")
    cache.prepared("d", big)  # used again, nothing is built
    assert entries(root) == ["a", "b", "c", "d"]
    cache.prepared("e", big)
    assert entries(root) == ["c", "d", "e"]
    assert names(root) == ["c", "c.lock", "d", "d.lock", "e", "e.lock"]
    monkeypatch.setenv("LORA_KIT_CACHE_GB", "0")
    unused()
    cache.prepared("f", big)
    assert entries(root) == ["f"]  # in use by this process
    monkeypatch.setenv("LORA_KIT_CACHE_GB", "much")
    with pytest.raises(UserError, match="LORA_KIT_CACHE_GB=much: not a number of gigabytes"):
        cache.prepared("g", big)


def test_what_another_process_uses_or_prepares_is_not_removed(work: Path) -> None:
    root = work / "cache"
    code = "cache.prepared('used', lambda f: (f / 'a').write_text('a')); print(1, flush=True)"
    with subprocess.Popen(
        script(f"{code}\ninput()"), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as user:
        assert user.stdout and user.stdout.readline() == b"1\n"
        first = start("first")
        assert until(lambda: len(log()) == 1)
        for name in ("used", ".key.lora-kit-partial"):
            os.utime(root / name, (0, 0))
        cache.prepared("new", Build())
        assert entries(root) == [".key.lora-kit-partial", "new", "used"]
        Path("go").touch()
        assert first.wait(LIMIT_S) == 0
        user.communicate(b"\n", timeout=LIMIT_S)
    os.utime(root / "used", (0, 0))
    cache.prepared("newer", Build())
    assert entries(root) == ["key", "new", "newer"]


def test_another_folder_in_the_cache_is_left_alone(root: Path) -> None:
    (root / "mine").mkdir(parents=True)
    (root / "mine" / "thesis.txt").write_text("years of work")
    os.utime(root / "mine", (0, 0))
    cache.prepared(KEY, Build())
    assert (root / "mine" / "thesis.txt").read_text() == "years of work"


def script(code: str) -> list[str]:
    start = "import os, sys, time\nfrom pathlib import Path\nfrom lora_kit import cache\n"
    return [sys.executable, "-c", start + code]


def run_script(code: str, root: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LORA_KIT_CACHE": str(root)}
    return run(script(code), check=True, env=environment)


WAITING = """
def build(folder):
    with open("log", "a") as log:
        print("built by", os.getpid(), file=log, flush=True)
    while not os.path.exists("go"):
        time.sleep(0.01)
    (folder / "rows").write_text("rows")
print((cache.prepared("key", build) / "rows").read_text())
"""


def start(name: str) -> subprocess.Popen[bytes]:
    with open(f"{name}.out", "wb") as out, open(f"{name}.err", "wb") as err:
        return subprocess.Popen(script(WAITING), stdout=out, stderr=err)


def log() -> list[str]:
    return Path("log").read_text().splitlines() if Path("log").exists() else []


def test_two_processes_prepare_once(work: Path) -> None:
    first = start("first")
    assert until(lambda: len(log()) == 1)
    second = start("second")
    said = "waiting for another process that prepares the same data"
    assert until(lambda: said in Path("second.err").read_text())
    Path("go").touch()
    assert first.wait(LIMIT_S) == second.wait(LIMIT_S) == 0
    assert log() == [f"built by {first.pid}"]
    assert Path("first.out").read_text() == Path("second.out").read_text() == "rows\n"


def test_where_one_process_is_killed_the_other_prepares(work: Path) -> None:
    first = start("first")
    assert until(lambda: len(log()) == 1)
    second = start("second")
    assert until(lambda: "waiting" in Path("second.err").read_text())
    first.kill()
    first.wait(LIMIT_S)
    assert until(lambda: len(log()) == 2)
    Path("go").touch()
    assert second.wait(LIMIT_S) == 0 and Path("second.out").read_text() == "rows\n"
    assert names(work / "cache") == ["key", "key.lock"]


def test_a_key_is_of_all_that_decides_and_of_nothing_else(tmp_path: Path) -> None:
    def tokenizer(name: str, **settings: Any) -> Any:
        return make_tokenizer(tmp_path / name, **settings)

    first = tokenizer("a")
    key = cache.key_of({"seed": 0}, "chat", identity(first))
    assert key == cache.key_of({"seed": 0}, "chat", identity(tokenizer("b")))
    first(["long enough", "x"], padding=True, truncation=True, max_length=4)
    assert key == cache.key_of({"seed": 0}, "chat", identity(first))  # it was used, and is the same
    others = [
        cache.key_of({"seed": 1}, "chat", identity(first)),
        cache.key_of({"seed": 0}, "text", identity(first)),
        cache.key_of({"seed": 0}, "chat", identity(tokenizer("c", chat_template=CHATML))),
        cache.key_of({"seed": 0}, "chat", identity(tokenizer("d", bos=True))),
    ]
    first.eos_token = "<|im_end|>"
    others.append(cache.key_of({"seed": 0}, "chat", identity(first)))
    first.eos_token = "<eos>"
    first.add_tokens(["more"])
    others.append(cache.key_of({"seed": 0}, "chat", identity(first)))
    assert len({key, *others}) == 7
    assert json.dumps(key).strip('"').isalnum() and len(key) == 32
