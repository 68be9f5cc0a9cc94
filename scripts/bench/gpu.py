"""Each kind of work once on this machine's GPU, as people run it: does it, and is it right?

    python scripts/bench/gpu.py                  # two at a time; results/cuda-journeys.json
    python scripts/bench/gpu.py --at-once 4 --out FOLDER

Every run is `lora-kit train` on the embedded model, with the quick paths and with `speed: plain`;
both have the same losses to rounding (`largest_difference`, relative), since they compute the
same. After it `compare` and `merge`. Kept: the seconds of each command and the last lines of those
that failed, the losses, and the planned against the measured memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import yaml

from lora_kit import nano

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
NANO = {"model": "nano"}
SHORT = {
    "max_steps": 20,
    "max_length": 256,
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-3,
    "logging_steps": 1,
}
TEXT = {"train": "nano:topics", "eval": 0.3}
ROWS = {"train": "nano:instructions", "eval": 0.1}
RUNS: dict[str, dict[str, Any]] = {
    "cpt": {"recipe": "cpt", "base": NANO, "data": TEXT, "train": SHORT},
    "nf4": {"recipe": "cpt", "base": NANO | {"quantize": "nf4"}, "data": TEXT, "train": SHORT},
    "float32": {"recipe": "cpt", "base": NANO | {"dtype": "float32"}, "data": TEXT, "train": SHORT},
    "top": {
        "recipe": "cpt",
        "base": NANO,
        "data": TEXT,
        "adapter": {"layers_to_transform": [2, 3]},
        "train": SHORT | {"num_train_epochs": 3, "max_steps": 60},
    },
    "sft": {"recipe": "sft", "base": NANO, "data": ROWS, "train": SHORT},
    "packing": {"recipe": "sft", "base": NANO, "data": ROWS | {"packing": True}, "train": SHORT},
    "steps": {
        "recipe": "sft",
        "base": NANO,
        "data": ROWS,
        "train": SHORT | {"gradient_accumulation_steps": 4, "max_steps": 8},
    },
    "dpo": {
        "recipe": "dpo",
        "base": NANO,
        "data": {"train": "pairs.jsonl", "eval": 0.1},
        "train": SHORT | {"learning_rate": 5e-5},
    },
    "classify": {
        "recipe": "classify",
        "base": NANO,
        "data": {"train": "labels.jsonl", "eval": 0.2},
        "train": SHORT,
    },
    "head": {
        "recipe": "classify",
        "base": NANO,
        "data": {"train": "labels.jsonl", "eval": 0.2},
        "train": SHORT | {"trainable": "head"},
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--at-once", type=int, default=2, help="runs beside each other")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--only", nargs="*", choices=RUNS, default=list(RUNS))
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(asked.at_once) as pool:
        write_rows(Path(folder))
        running = {pool.submit(journey, name, Path(folder)): name for name in asked.only}
        for done in as_completed(running):
            found[running[done]] = done.result()
            print(running[done], json.dumps(done.result()), flush=True)
            (asked.out / "cuda-journeys.json").write_text(
                json.dumps(found, indent=1), encoding="utf-8"
            )


def write_rows(folder: Path) -> None:
    """Pairs, of which the chosen side goes on as the text does; and texts of two classes."""
    texts = [text for _, text in nano.topics() if len(text) > 600]
    pairs = [
        {"prompt": text[:200], "chosen": text[200:400], "rejected": text[400:600][::-1]}
        for text in texts
    ]
    labels = []
    for one in pairs:
        labels.append({"text": one["chosen"], "label": "forward"})
        labels.append({"text": one["rejected"], "label": "backward"})
    for name, rows in (("pairs", pairs), ("labels", labels)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def journey(name: str, folder: Path) -> dict[str, Any]:
    """One run with the quick paths and one without, and the verbs after it."""
    result: dict[str, Any] = {}
    losses = {}
    for speed in ("auto", "plain"):
        run = f"{name}-{speed}"
        values = {"name": run, **RUNS[name], "speed": speed}
        if values["recipe"] in ("cpt", "sft"):
            values["prove"] = {"shots": 0}
        file = folder / f"{run}.yaml"
        file.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        result[speed] = command(folder, "train", file.name)
        directory = folder / "runs" / run
        if "failed" in result[speed]:
            continue
        lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [row for row in map(json.loads, lines) if "loss" in row]
        losses[speed] = [row["loss"] for row in rows]
        report = json.loads((directory / "report.json").read_text(encoding="utf-8"))
        result[speed] |= {
            "losses": [round(losses[speed][0], 4), round(losses[speed][-1], 4)],
            "seconds_of_steps": round(rows[-1]["seconds"], 2),
            "verdict": report["verdict"],
            "memory": report.get("memory"),
        }
    if len(losses) == 2:
        both = zip(losses["auto"], losses["plain"], strict=True)
        result["largest_difference"] = max(abs(a - b) / max(abs(b), 1e-9) for a, b in both)
    if "failed" not in result["auto"]:
        run = f"runs/{name}-auto"
        result["compare"] = command(folder, "compare", run)
        result["merge"] = command(folder, "merge", run, "--out", f"merged-{name}")
    return result


def command(folder: Path, *words: str) -> dict[str, Any]:
    """Run one verb: its seconds, and its last lines if it failed."""
    started = time.perf_counter()
    done = subprocess.run(
        [Path(sys.executable).parent / "lora-kit", *words],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    result: dict[str, Any] = {"s": round(time.perf_counter() - started, 1)}
    if done.returncode:
        result |= {"failed": done.returncode, "said": (done.stdout + done.stderr)[-1500:]}
    return result


if __name__ == "__main__":
    main()
