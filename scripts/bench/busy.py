"""Training speed while other trainings run, and what each setting costs without them.

    python scripts/bench/busy.py --out busy.json               # a quiet machine, 20 minutes
    python scripts/bench/busy.py --settings ours OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1

Settings are environment variables, `A=1,B=2` for several; `ours` is what lora_kit sets by itself,
and `libgomp` how long its threads spin without a setting. Rounds go A B A B: each setting alone,
then the same beside `--others` trainings with the same setting. The shares are of the median alone;
a fair one is 1 / (others + 1).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# libgomp's own number of turns, as a setting that lora_kit leaves as it is.
NAMED = {"ours": {}, "libgomp": {"GOMP_SPINCOUNT": "300000"}}
TRAIN = "from lora_kit.cli import main; main()"
OVERRIDES = ["train.max_steps=1000000", "train.logging_steps=1", "train.save_steps=1000000"]


def environment(setting: str) -> dict[str, str]:
    """The environment of a training with a setting, without any other of OpenMP."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    if setting in NAMED:
        return inherited | NAMED[setting]
    return inherited | dict(pair.split("=", 1) for pair in setting.split(","))


def start(folder: Path, name: str, run: str, setting: str, more: list[str]) -> Any:
    """A training that never ends, in a process group of its own."""
    command = [sys.executable, "-c", TRAIN, "train", run, f"name={name}", *OVERRIDES, *more]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment(setting),
        stdout=subprocess.DEVNULL,
        stderr=(folder / f"{name}.log").open("w"),
        start_new_session=True,
    )


def counted(folder: Path, name: str) -> tuple[int, float]:
    """(tokens, seconds) that a training has logged; zeros before its first step."""
    file = folder / "runs" / name / "metrics.jsonl"
    rows = (
        file.read_text().splitlines()[:-1] if file.is_file() else []
    )  # the last may be in writing
    rows = [row for row in rows if '"tokens"' in row]
    if not rows:
        return 0, 0.0
    last = json.loads(rows[-1])
    return last["tokens"], last["seconds"]


def rates(run: str, setting: str, count: int, seconds: float, more: list[str]) -> list[float]:
    """Tokens per second of `count` trainings at once, while all of them train."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        names = [f"busy{number}" for number in range(count)]
        running = {name: start(folder, name, run, setting, more) for name in names}
        try:
            while not all(counted(folder, name)[1] > 2 for name in names):  # warm
                time.sleep(0.5)
                for name, process in running.items():
                    if process.poll() is not None:
                        raise RuntimeError((folder / f"{name}.log").read_text()[-2000:])
            before = {name: counted(folder, name) for name in names}
            time.sleep(seconds)
            after = {name: counted(folder, name) for name in names}
        finally:
            for process in running.values():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)
            for process in running.values():
                process.wait()
            shutil.rmtree(folder / "runs", ignore_errors=True)
    return [(after[n][0] - before[n][0]) / seconds for n in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", default="recipes/configs/nano-sft.yaml")
    parser.add_argument("--set", nargs="*", default=["base.dtype=float32"], help="overrides")
    parser.add_argument("--settings", nargs="+", default=["ours", "libgomp"])
    parser.add_argument("--others", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20, help="of each measurement")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    run = str(Path(asked.run).resolve())
    alone: dict[str, list[float]] = {setting: [] for setting in asked.settings}
    beside: dict[str, list[float]] = {setting: [] for setting in asked.settings}
    for number in range(asked.rounds):
        for setting in asked.settings:
            alone[setting] += rates(run, setting, 1, asked.seconds, asked.set)
            if asked.others:
                beside[setting] += rates(run, setting, asked.others + 1, asked.seconds, asked.set)
            rest = " ".join(f"{rate:,.0f}" for rate in beside[setting][-asked.others - 1 :])
            print(
                f"{number} {setting}: alone {alone[setting][-1]:,.0f}, together {rest}", flush=True
            )
    for setting in asked.settings:
        whole = statistics.median(alone[setting])
        shares = [rate / whole for rate in beside[setting]] or [0.0]
        print(
            f"{setting}: alone {whole:,.0f} tokens/s ({min(alone[setting]):,.0f} to "
            f"{max(alone[setting]):,.0f}); beside {asked.others} others {min(shares):.3f} to "
            f"{max(shares):.3f} of it, median {statistics.median(shares):.3f}"
        )
    if asked.out:
        asked.out.write_text(json.dumps({"alone": alone, "beside": beside}, indent=1) + "\n")


if __name__ == "__main__":
    main()
