"""Runs that are killed, stopped, or resumed twice at once: each must end with the same adapter.

    python scripts/drills/interrupted.py                     # all; half an hour on two cores
    python scripts/drills/interrupted.py --only resumes --times 5

kills: SIGKILL at a random moment, to all processes of `lora-kit train` or to one of them; then
`--resume`, or the same command where nothing had been saved. signals: the same with SIGINT, SIGTERM
and SIGHUP in turn, which must save, leave no process, and exit with 130, 143 or 129. resumes: two
`--resume` of one run at once; one must finish it, the other be refused with exit code 2.
The moments depend on --seed and on the time that the first run takes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))

from processes import LORA_KIT, as_in_a_terminal

from lora_kit.adapter.files import WEIGHTS
from lora_kit.hashes import file_hash
from lora_kit.run import read_lock

RUN = Path("runs/drill")
SETTINGS = {
    "recipe": "cpt",
    "name": "drill",
    "base": {"model": "nano", "dtype": "float32"},
    "adapter": {"r": 8},
    "data": {"train": "rows.jsonl", "eval": 0.2},
    "train": {
        "learning_rate": 1e-3,
        "max_steps": 120,
        "max_length": 64,
        "save_steps": 7,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
    },
    "prove": {"shots": 0},
}
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


@dataclass
class Drill:
    """What each trial is compared with.

    Attributes:
        folder: of the trials. seconds: of an uninterrupted run. adapter: its hash.
        stopped: a folder with a run that was stopped half-way.
    """

    folder: Path
    seconds: float
    adapter: str
    stopped: Path


def prepared(folder: Path) -> Path:
    """A folder with the run file and its data."""
    folder.mkdir(parents=True)
    (folder / "run.yaml").write_text(json.dumps(SETTINGS), encoding="utf-8")  # JSON is YAML
    rows = ({"text": f"The square of {n} is {n * n}, and its cube {n**3}."} for n in range(300))
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    """`lora-kit train`, which receives signals that this process may ignore."""
    return subprocess.Popen(
        [*LORA_KIT, "train", "run.yaml", *options],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=as_in_a_terminal,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Its exit code and its last line."""
    _, said = process.communicate()
    return process.returncode, (said.strip().splitlines() or [""])[-1]


def family(pid: int) -> list[psutil.Process]:
    """A process and all that it started."""
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def left_of(processes: Sequence[psutil.Process]) -> list[int]:
    """The process ids of those that still run."""
    return [one.pid for one in processes if one.is_running() and one.status() != "zombie"]


def wrong_end(drill: Drill, folder: Path) -> str:
    """Continue to the end; what is wrong with the result, or ""."""
    begun = any((folder / RUN / "checkpoints").glob("*/seal.json"))
    if not begun:  # as `--resume` asks for
        shutil.rmtree(folder / RUN, ignore_errors=True)
    code, last = 0, ""
    if not read_lock(folder / RUN).get("finished"):
        code, last = finish(start(folder, *(["--resume"] if begun else [])))
    if code:
        return f"continued: exit {code}: {last}"
    if file_hash(folder / RUN / "adapter" / WEIGHTS) != drill.adapter:
        return "another adapter"
    shutil.rmtree(folder)
    return ""


def kills(drill: Drill, number: int, chance: random.Random) -> str:
    folder = prepared(drill.folder / f"kills-{number}")
    process = start(folder)
    time.sleep(chance.uniform(0.3, 1) * drill.seconds)
    found = family(process.pid)
    for one in found if number % 2 else chance.sample(found, min(1, len(found))):
        one.kill()
    finish(process)
    psutil.wait_procs(found, timeout=60)
    left = left_of(found)
    return f"left: {left}" if left else wrong_end(drill, folder)


def signals(drill: Drill, number: int, chance: random.Random) -> str:
    folder = prepared(drill.folder / f"signals-{number}")
    sent, expected = list(SIGNALS.items())[number % len(SIGNALS)]
    process = start(folder)
    time.sleep(chance.uniform(0.3, 1) * drill.seconds)
    found = family(process.pid)
    process.send_signal(sent)
    code, last = finish(process)
    left = left_of(found)
    if left or code not in (0, expected) or last.startswith("Traceback"):
        return f"{sent.name}: exit {code}: {last}; left: {left}"
    return wrong_end(drill, folder)


def resumes(drill: Drill, number: int, chance: random.Random) -> str:
    folder = drill.folder / f"resumes-{number}"
    shutil.copytree(drill.stopped, folder)
    first = start(folder, "--resume")
    time.sleep(chance.choice((0.0, chance.uniform(0, 1))) * drill.seconds)
    ends = [finish(one) for one in (start(folder, "--resume"), first)]
    if sorted(code for code, _ in ends) != [0, 2]:
        return f"{ends}"
    (refused,) = (last for code, last in ends if code)
    if "in use by process" not in refused and "already finished" not in refused:
        return refused
    return wrong_end(drill, folder)


KINDS = {"kills": (kills, 30), "signals": (signals, 30), "resumes": (resumes, 20)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=KINDS, nargs="+", default=list(KINDS))
    parser.add_argument("--times", type=int, help="trials of each kind, instead of 30, 30 and 20")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="trials at once")
    given = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        os.environ["LORA_KIT_CACHE"] = str(place / "cache")
        whole, stopped = prepared(place / "whole"), prepared(place / "stopped")
        began = time.monotonic()
        code, last = finish(start(whole))
        seconds = time.monotonic() - began
        if code:
            raise SystemExit(last)
        adapter = file_hash(whole / RUN / "adapter" / WEIGHTS)
        half = start(stopped)
        while not any((stopped / RUN / "checkpoints").glob("*")):
            time.sleep(0.05)
        half.send_signal(signal.SIGTERM)
        finish(half)
        drill = Drill(place, seconds, adapter, stopped)
        print(f"uninterrupted: {seconds:.1f} s, adapter {adapter[:12]}", flush=True)
        for kind in given.only:
            trial, times = KINDS[kind]
            numbers = range(given.times or times)
            chances = [random.Random(f"{given.seed} {kind} {number}") for number in numbers]
            with ThreadPoolExecutor(given.jobs) as pool:
                found = list(pool.map(trial, [drill] * len(numbers), numbers, chances))
            for number, wrong in enumerate(found):
                if wrong:
                    print(f"{kind} {number}: {wrong}", flush=True)
            failed += sum(map(bool, found))
            print(f"{kind}: {found.count('')} of {len(found)}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
