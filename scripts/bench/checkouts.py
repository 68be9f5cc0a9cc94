"""Is one checkout faster than another? The works of speed.py, trained by both in turn, A B A B.

    python scripts/bench/checkouts.py OLD NEW
    python scripts/bench/checkouts.py OLD NEW --works lora nf4 --rounds 5 --dtype float32
    python scripts/bench/checkouts.py OLD NEW --works chat --data conversations.json

OLD and NEW are folders of checkouts; both are run by this interpreter, as `lora-kit train`, each in
an empty working folder with an empty cache. For each work the table has the medians over rounds of:
seconds per step (the median of a run without its first three steps), peak memory of the process,
seconds from the start of the command to the end of the first step, and seconds of the command.
`--dtype float32` is for CPUs without bf16 instructions. JSON of every run goes to stdout.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from speed import COMMON, WORKS, nested, write_texts

HERE = Path(__file__).resolve().parent
WARM_UP = 3  # steps
FIGURES = ("step_s", "rss_mib", "first_step_s", "wall_s")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--works", nargs="+", default=["lora", "top", "nf4"], choices=list(WORKS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--data", type=Path, help="of the work `chat`")
    asked = parser.parse_args()
    sides = {"OLD": asked.old.resolve(), "NEW": asked.new.resolve()}
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as made:
        base = Path(made, "base")
        command = [sys.executable, str(HERE / "speed_parts.py"), "weights", "40m", str(base)]
        subprocess.run(command, check=True)
        for work, _, side in itertools.product(asked.works, range(asked.rounds), sides):
            file = run_file(work, base, Path(made), asked)
            measured = measure(sides[side], file, asked.threads)
            found.append({"work": work, "side": side, **measured})
            print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    print(json.dumps(found))
    print(f"{'work':8} {'figure':14} {'OLD':>9} {'NEW':>9}  NEW/OLD", file=sys.stderr)
    for work, figure in itertools.product(asked.works, FIGURES):
        old, new = (
            statistics.median(
                one[figure] for one in found if (one["work"], one["side"]) == (work, side)
            )
            for side in sides
        )
        print(f"{work:8} {figure:14} {old:9.3f} {new:9.3f}  {new / old:.3f}", file=sys.stderr)


def run_file(work: str, base: Path, above: Path, asked: argparse.Namespace) -> Path:
    """The run file of a work, in a new folder below `above`."""
    folder = Path(tempfile.mkdtemp(dir=above))
    chat = WORKS[work].recipe == "sft"
    write_texts(folder, WORKS[work])
    values = {
        "recipe": WORKS[work].recipe,
        "name": "bench",
        "base.model": str(base),
        "base.dtype": asked.dtype,
        "base.quantize": "nf4" if work == "nf4" else "none",
        "adapter.r": 16,
        "adapter.lora_alpha": 32,
        "data.train": str(asked.data.resolve()) if chat else "train.txt",
        "data.eval": "eval.json" if chat else "eval.txt",
        **COMMON,
        **WORKS[work].settings,
    }
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(nested(values), sort_keys=False), encoding="utf-8")
    return file


def measure(checkout: Path, file: Path, threads: int) -> dict[str, float]:
    """Train once.

    Raises:
        RuntimeError: the command failed; its last lines.
    """
    folder = file.parent
    environment = {key: v for key, v in os.environ.items() if not key.startswith("LORA_KIT_")}
    environment |= {"PYTHONPATH": str(checkout), "LORA_KIT_CACHE": str(folder / "cache")}
    environment |= {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", "from lora_kit.cli import main; main()", "train", file.name]
    metrics = folder / "runs/bench/metrics.jsonl"
    first = 0.0
    with (folder / "log.txt").open("w") as log:
        started = time.perf_counter()
        child = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
        while True:
            ended, status, usage = os.wait4(child.pid, os.WNOHANG)
            if not first and metrics.is_file() and '"loss"' in metrics.read_text("utf-8"):
                first = time.perf_counter() - started
            if ended:
                break
            time.sleep(0.01)
        wall = time.perf_counter() - started
    if status:
        raise RuntimeError("\n".join((folder / "log.txt").read_text().splitlines()[-15:]))
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    ends = [row["seconds"] for row in rows if "loss" in row]
    steps = [after - before for before, after in itertools.pairwise(ends)][WARM_UP - 1 :]
    return {
        "step_s": round(statistics.median(steps), 4),
        "rss_mib": round(usage.ru_maxrss / 1024),
        "first_step_s": round(first, 2),
        "wall_s": round(wall, 1),
    }


if __name__ == "__main__":
    main()
