"""Do two checkouts train the same adapter, byte for byte?

    python scripts/bench/same_bytes.py OLD NEW                                   # all cases
    python scripts/bench/same_bytes.py OLD NEW --only sft-padding resumed-sft
    python scripts/bench/same_bytes.py OLD NEW --keep RESULTS --jobs 2

OLD and NEW are folders of checkouts. Each case of same_bytes.yaml is a run file on the embedded
base, with small data that this script writes. Both checkouts train it with `lora-kit train`, the
same interpreter and the same libraries, on one CPU thread, each in an empty working folder with an
empty cache. The table compares the SHA-256 of adapter/adapter_model.safetensors. Where adapters
differ, it names the first logged step whose loss differs and the largest difference of a weight:
step 1 points at the rows or the base, a later step at the gradients or the optimizer.

Exit code 1 if a case differs, fails, or drops or cuts rows (the cases are meant to keep every row).
--keep stores what OLD trained; a later call trains OLD again only for a changed run file, changed
data, another OLD, other library versions or another CPU.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from same_bytes_data import write_data

LORA_KIT = [sys.executable, "-c", "from lora_kit.cli import main; main()"]
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "tokenizers")
OF_THE_SCRIPT = ("accelerate", "after", "interrupted")  # keys of a case that no run file has
WEIGHTS, METRICS, RESULT = "adapter_model.safetensors", "metrics.jsonl", "result.json"
LIMIT_S = 3600  # of one command; a busy machine takes ten times as long
# {section: keys} of every run file, and {case: its dotted keys}
COMMON, CASES = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8")).values()


class Failed(Exception):
    """A case trained no adapter, or not from all of its rows."""


@dataclass(frozen=True)
class Result:
    """Of one training. `folder` holds the weights and metrics.jsonl, or `error` says why not."""

    folder: Path
    sha256: str = ""
    seconds: float = 0.0
    error: str = ""


def run_file(name: str) -> str:
    """The run file of a case, as JSON, which is YAML."""
    values: dict[str, Any] = {"name": name, **copy.deepcopy(COMMON)}
    for key, value in CASES[name].items():
        *sections, last = key.split(".")
        place = values
        for section in sections:
            place = place[section]
        if key not in OF_THE_SCRIPT:
            place[last] = value
    return json.dumps(values)


def lora_kit(checkout: Path, folder: Path, arguments: list[str], interrupt: bool = False) -> None:
    """`lora-kit ARGUMENTS` of a checkout, in a working folder.

    Raises:
        Failed: the exit code is not 0; or, with `interrupt`, not that of a SIGINT.
    """
    environment = {key: v for key, v in os.environ.items() if not key.startswith("LORA_KIT_")}
    environment |= {"PYTHONPATH": str(checkout), "LORA_KIT_CACHE": str(folder / "cache")}
    environment |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        command = [*LORA_KIT, *arguments]
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
        try:
            while interrupt and process.poll() is None:
                if any(folder.glob("runs/*/checkpoints/checkpoint-*")):
                    process.send_signal(signal.SIGINT)
                    break
                time.sleep(0.02)
            code = process.wait(LIMIT_S)
        finally:
            process.kill()
    wanted = 128 + signal.SIGINT if interrupt else 0
    if code != wanted:
        lines = (folder / "log.txt").read_text(encoding="utf-8").splitlines()
        raise Failed(f"exit code {code} instead of {wanted}: " + " | ".join(lines[-3:]))


def train(name: str, checkout: Path, data: Path, folder: Path) -> Result:
    """Train a case in `folder`, which is made; its adapter and metrics are left there."""
    shutil.copytree(data, folder, copy_function=os.link)
    case, run = CASES[name], Path("runs", name)
    interrupted = case.get("interrupted", False)
    started = time.monotonic()
    try:
        for each in filter(None, [case.get("after"), name]):
            file = folder / f"{each}.yaml"
            file.write_text(run_file(each), encoding="utf-8")
            options = ["--accelerate", case.get("accelerate", "cpu")]
            lora_kit(checkout, folder, ["train", file.name, *options], interrupted)
        if interrupted:
            lora_kit(checkout, folder, ["train", str(run / "run.yaml"), *options, "--resume"])
        census = json.loads((folder / run / "census.json").read_text(encoding="utf-8"))
        if census["dropped"] or census["truncated"]:
            raise Failed(f"rows were dropped {census['dropped']} or cut {census['truncated']}")
    except (Failed, subprocess.TimeoutExpired) as error:
        return Result(folder, error=str(error))
    seconds = time.monotonic() - started
    shutil.copy(folder / run / "adapter" / WEIGHTS, folder)
    shutil.copy(folder / run / METRICS, folder)
    return Result(folder, hash_of([folder / WEIGHTS]), seconds)


def train_or_read(name: str, key: str, keep: Path, *how: Any) -> Result:
    """`train`, unless `keep` has a result of this key; a new one is kept there."""
    folder = keep / name
    if (folder / RESULT).is_file():
        kept = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        if kept.pop("key") == key:
            return Result(folder, **kept)
    result = train(name, *how)
    if not result.error:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for file in (WEIGHTS, METRICS):
            shutil.copy(result.folder / file, folder)
        values = {"key": key, "sha256": result.sha256, "seconds": result.seconds}
        (folder / RESULT).write_text(json.dumps(values), encoding="utf-8")
    return result


def hash_of(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def environment_key(checkout: Path) -> list[Any]:
    """What decides the bytes of every case: the checkout's code, the libraries, the CPU."""
    folders = [checkout / name for name in ("lora_kit", "recipes", "accelerate_configs")]
    files = sorted(file for folder in folders for file in folder.rglob("*") if file.is_file())
    code = hash_of([file for file in files if "__pycache__" not in file.parts])
    cpu = {line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line}
    return [code, sys.version, sorted(cpu), {name: version(name) for name in LIBRARIES}]


def case_key(name: str, data: Path, environment: list[Any]) -> str:
    """What decides the bytes of one case, as a hash."""
    case = CASES[name]
    names = [each for each in (case.get("after"), name) if each]
    how = {key: case[key] for key in OF_THE_SCRIPT if key in case}
    text = json.dumps([environment, how]) + "".join(map(run_file, names))
    files = [file for file in sorted(data.rglob("*")) if file.is_file()]
    named = [file for file in files if f'"{file.relative_to(data).parts[0]}"' in text]
    return hashlib.sha256(f"{text} {hash_of(named)}".encode()).hexdigest()


def difference(old: Path, new: Path) -> str:
    """Where two trainings of one case part, in a line."""
    from safetensors.numpy import load_file

    rows = [(f / METRICS).read_text(encoding="utf-8").splitlines() for f in (old, new)]
    losses = [[(row["step"], row.get("loss")) for row in map(json.loads, some)] for some in rows]
    parted = [one for one, other in zip(*losses, strict=False) if one != other]
    where = f"losses differ from step {parted[0][0]} on" if parted else "the losses are equal"
    before, after = load_file(old / WEIGHTS), load_file(new / WEIGHTS)
    if {n: t.shape for n, t in before.items()} != {n: t.shape for n, t in after.items()}:
        return f"{where}; the adapters have other tensors"
    largest = {name: float(abs(before[name] - after[name]).max()) for name in before}
    most = max(largest, key=lambda name: largest[name])
    differing = sum(value > 0 for value in largest.values())
    return f"{where}; {differing} of {len(largest)} tensors, up to {largest[most]:.1e} in {most}"


def report(name: str, old: Result, new: Result) -> bool:
    """Print a case's row, and what is wrong with it; returns whether the adapters are equal."""
    equal = old.sha256 == new.sha256 and bool(new.sha256)
    hashes = f"{old.sha256[:12] or 'failed':12} {new.sha256[:12] or 'failed':12}"
    times = f"{old.seconds:8.1f} {new.seconds:8.1f}"
    print(f"{name:24} {hashes} {'yes' if equal else 'NO':5} {times}", flush=True)
    for checkout, result in (("OLD", old), ("NEW", new)):
        if result.error:
            print(f"    {checkout}: {result.error}", flush=True)
    if old.sha256 and new.sha256 and not equal:
        print(f"    {difference(old.folder, new.folder)}", flush=True)
    return equal


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("old", type=Path, help="a checkout")
    parser.add_argument("new", type=Path, help="another, or the same: tests determinism")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=CASES, default=list(CASES))
    parser.add_argument("--keep", type=Path, metavar="DIR", help="results of OLD: read and stored")
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time; changes no result")
    arguments = parser.parse_args()
    old, new = arguments.old.resolve(), arguments.new.resolve()
    for checkout in (old, new):
        if not (checkout / "lora_kit" / "__init__.py").is_file():
            parser.error(f"{checkout}: no checkout: lora_kit/ is missing")
    work = Path(tempfile.mkdtemp(prefix="same_bytes-"))
    data, keep = work / "data", arguments.keep or work / "keep"
    write_data(data, old)
    environment = environment_key(old)

    def both(name: str) -> tuple[Result, Result]:
        key = case_key(name, data, environment)
        before = train_or_read(name, key, keep, old, data, work / "old" / name)
        return before, train(name, new, data, work / "new" / name)

    print(f"{'case':24} {'OLD':12} {'NEW':12} equal  seconds of OLD and NEW")
    started, equal = time.monotonic(), 0
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for name, results in zip(arguments.only, pool.map(both, arguments.only), strict=True):
            equal += report(name, *results)
    count = len(arguments.only)
    print(f"{equal} of {count} equal, {time.monotonic() - started:.0f} s")
    if equal == count:
        shutil.rmtree(work)
        return 0
    print(f"the working folders are kept: {work}")
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
