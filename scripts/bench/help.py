"""How long `lora-kit --help` takes beside `trl --help` and `trl sft --help`, in turn (A B C A B C).

    python scripts/bench/help.py --rounds 20

Prints the median and the quartiles of each in milliseconds. Both must be installed here.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = ["lora-kit --help", "trl --help", "trl sft --help"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    times: dict[str, list[float]] = {command: [] for command in COMMANDS}
    for _ in range(parser.parse_args().rounds):
        for command in COMMANDS:
            program, *arguments = command.split()
            path = Path(sys.executable).parent / program
            started = time.perf_counter()
            subprocess.run([path, *arguments], check=True, capture_output=True)
            times[command].append((time.perf_counter() - started) * 1000)
    for command, taken in times.items():
        low, middle, high = statistics.quantiles(taken, n=4)
        print(f"{command:16} {middle:7.0f} ms  ({low:.0f} to {high:.0f})")


if __name__ == "__main__":
    main()
