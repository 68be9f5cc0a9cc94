"""A run whose files are damaged, one at a time: each verb refuses it in one line, or does the same.

    python scripts/drills/damaged.py                  # ten minutes on two cores
    python scripts/drills/damaged.py --only optimizer run.yaml

Every file of a finished run is cut, emptied, removed, exchanged for that of another run, or has one
bit changed; then `load`, `merge` and `compare` are tried on it. So is every file of a stopped run,
on `--resume`. Silent: a verb ends well, with another result than on the undamaged run.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

import torch
from interrupted import RUN, finish, prepared, start

import lora_kit
from lora_kit.adapter.files import WEIGHTS
from lora_kit.adapter.finished import FinishedRun
from lora_kit.errors import LoraKitError
from lora_kit.hashes import file_hash
from lora_kit.launch import train
from lora_kit.ship.merge import merge as merged

Damage = Callable[[Path, Path], None]  # of a file; the same file of another run
# Files that say how a run went and decide nothing about its model.
RECORDS = {"metrics.jsonl", "report.html", "census.json", ".writer", "error.log"}


def cut(file: Path, other: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def emptied(file: Path, other: Path) -> None:
    os.truncate(file, 0)


def removed(file: Path, other: Path) -> None:
    file.unlink()


def exchanged(file: Path, other: Path) -> None:
    shutil.copyfile(other, file)


def flipped(file: Path, other: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) * 2 // 3] ^= 1
    file.write_bytes(content)


DAMAGES = (cut, emptied, removed, exchanged, flipped)


def load(run: Path) -> str:
    """The hash of the logits of a text."""
    model, tokenizer = lora_kit.load(run)
    with torch.no_grad():
        logits = model(**tokenizer("The square of 12 is", return_tensors="pt")).logits
    return hashlib.sha256(logits.float().numpy().tobytes()).hexdigest()


def merge(run: Path) -> str:
    """The hash of the merged weights."""
    out = run.with_name("merged")
    shutil.rmtree(out, ignore_errors=True)
    merged(FinishedRun(run), out)
    return file_hash(out / "model.safetensors")


def compare(run: Path) -> str:
    """What is measured."""
    return json.dumps(lora_kit.compare(run)["domain"], sort_keys=True)


def resume(run: Path) -> str:
    """The hash of the finished adapter."""
    train(run / "run.yaml", resume=True)
    return file_hash(run / "adapter" / WEIGHTS)


def outcome(verb: Callable[[Path], str], run: Path) -> tuple[str, str]:
    """("done", result), ("refused", message) or ("unforeseen", error)."""
    try:
        with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            return "done", verb(run)
    except LoraKitError as error:
        kind = "unforeseen" if error.exit_code == 3 or "\n" in str(error) else "refused"
        return kind, str(error)
    except Exception as error:
        return "unforeseen", repr(error)


def made(place: Path) -> dict[str, Path]:
    """Two finished runs of different seeds, and both stopped half-way."""
    found = {}
    for seed in ("0", "1"):
        stopped, whole = prepared(place / f"stopped-{seed}"), prepared(place / f"whole-{seed}")
        settings = (f"seed={seed}", "train.max_steps=21", "train.save_total_limit=1")
        process = start(stopped, *settings)
        while not (stopped / RUN / "checkpoints" / "checkpoint-7" / "seal.json").exists():
            if process.poll() is not None:
                raise SystemExit("it ended before it was stopped")
        process.terminate()
        finish(process)
        with chdir(whole):
            train("run.yaml", *settings)
        found[f"stopped-{seed}"], found[f"whole-{seed}"] = stopped, whole
    return found


def tried(
    verb: Callable[[Path], str], run: Path, other: Path, damage: Damage | None, name: Path
) -> tuple[str, str]:
    """The outcome of a verb on a copy of a run, its file `name` damaged."""
    copy = Path(shutil.copytree(run, run.with_name("copy")))
    if damage:
        damage(copy / name, other / name)
    with chdir(copy):
        found = outcome(verb, RUN)
    shutil.rmtree(copy)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", default=[""], help="parts of file names")
    given = parser.parse_args()
    counts: Counter[str] = Counter()
    variants = 0
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        os.environ["LORA_KIT_CACHE"] = str(place / "cache")
        with redirect_stderr(io.StringIO()):
            runs = made(place)
        for state, verbs in (("whole", (load, merge, compare)), ("stopped", (resume,))):
            good, other = runs[f"{state}-0"], runs[f"{state}-1"]
            whole = {verb: tried(verb, good, other, None, RUN) for verb in verbs}
            assert all(kind == "done" for kind, _ in whole.values()), whole
            names = [file.relative_to(good) for file in sorted((good / RUN).rglob("*"))]
            names = [name for name in names if (good / name).is_file()]
            names = [name for name in names if name.name not in RECORDS]
            for name in names:
                if not any(part in str(name) for part in given.only):
                    continue
                for damage in DAMAGES:
                    variants += 1
                    for verb in verbs:
                        kind, said = tried(verb, good, other, damage, name)
                        if kind == "done":
                            kind = "the same" if (kind, said) == whole[verb] else "silent"
                        counts[kind] += 1
                        if kind in ("silent", "unforeseen"):
                            print(f"{verb.__name__}, {name} {damage.__name__}: {kind}: {said}")
    print(f"{variants} damaged variants: " + ", ".join(f"{n} {kind}" for kind, n in counts.items()))
    return 1 if counts["silent"] + counts["unforeseen"] else 0


if __name__ == "__main__":
    sys.exit(main())
