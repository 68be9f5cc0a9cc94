"""How fast lora_kit trains beside other toolkits, in turn, each in a process of its own.

    python scripts/bench/speed.py peers              # their environments, below --peers
    python scripts/bench/speed.py run lora           # three rounds; again: what is still missing
    python scripts/bench/speed.py run chat --data conversations.json
    python scripts/bench/speed.py run scale --rounds 1 --minutes 20
    python scripts/bench/speed.py table              # README.md and the plots, from results/*.json

Same seeded weights, rows, rank, optimizer, rate and steps for everybody; rounds A B A B; the matmul
ceiling before and after each. Every measurement is kept in results/ at once, so that a run that
was stopped (also by --minutes) goes on where it ended; --again forgets a work's results first.
lora_kit is run as people run it, `lora-kit train run.yaml`, judging and report included; its steps
are those of metrics.jsonl, the peers' are taken between the ends of their steps, as ours are. Peak
memory is that of the whole process, the largest of several.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from speed_table import RESULTS, compact, rate, steps_counted, write_tables

from lora_kit import nano

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = Path.home() / ".cache" / "lora_kit_bench"
PACKAGES = {
    "trl": ["trl==1.16.0", "peft==0.21.2", "transformers==5.23.0", "accelerate==1.15.0"],
    "litgpt": ["litgpt==0.5.13", "requests"],
    "llamafactory": ["llamafactory==0.9.5"],
}
# PyPI's builds of these want CUDA's libraries, and fail beside a torch for CPUs.
WITHOUT = {"llamafactory": ["torchvision", "torchaudio"]}
SCRIPTS = {"trl": "trl_sft.py", "litgpt": "litgpt_lora.py", "llamafactory": "llamafactory_sft.py"}
OUR_PACKAGES = ("lora-kit", "torch", "transformers", "peft", "accelerate", "bitsandbytes")
EVAL = "The last line of a file is judged, so that a run has something to be judged by.\n"


@dataclass(frozen=True)
class Contender:
    """Who trains: lora_kit (`settings` are changes to its run file), or a peer on a track."""

    name: str
    peer: str = ""
    track: str = ""
    shape: str = "40m"
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    settings: dict[str, Any]  # of everybody's run file, besides COMMON
    contenders: tuple[Contender, ...]
    recipe: str = "cpt"
    characters: int | None = None  # of the text; None: all of it


COMMON = {
    "train.learning_rate": 1e-3,
    "train.lr_scheduler_type": "constant",
    "train.warmup_steps": 0,
    "train.logging_steps": 1,
    "train.max_length": 256,
    "train.per_device_train_batch_size": 4,
    "prove.shots": 0,
}
OURS = Contender("lora_kit")
PLAIN = Contender("lora_kit, speed: plain", settings={"speed": "plain"})
TRL = (
    Contender("TRL + PEFT, as shipped", "trl", "shipped"),
    Contender("TRL + PEFT, best tuned", "trl", "tuned"),
)
OTHERS = (
    Contender("LitGPT, as shipped", "litgpt", "shipped"),
    Contender("LitGPT, best tuned", "litgpt", "tuned"),
    Contender("LLaMA-Factory, as shipped", "llamafactory", "shipped"),
    Contender("LLaMA-Factory, best tuned", "llamafactory", "tuned"),
)
CHAT = {
    "train.max_length": 1024,
    "train.per_device_train_batch_size": 8,
    "train.max_steps": 12,
    "data.limits": {"dropped": 1.0, "truncated": 1.0, "exact_leaks": 10**6, "near_leaks": 1.0},
}
# As recipes/configs/nano-cpt.yaml, judging and all, without its quantization.
NANO = {
    "data.train": "nano:topics",
    "data.eval": 0.3,
    "data.general": "nano:docstrings",
    "prove.shots": 3,
    "train.max_steps": 200,
    "train.per_device_train_batch_size": 16,
    "train.learning_rate": 3e-3,
    "train.logging_steps": 10,
}


def _sized(shape: str, batch: int, length: int) -> Contender:
    settings = {"train.per_device_train_batch_size": batch, "train.max_length": length}
    return Contender(f"{shape} {batch}x{length}", shape=shape, settings=settings)


WORKS = {
    "lora": Work({"train.max_steps": 18}, (OURS, *TRL, PLAIN)),
    "others": Work({"train.max_steps": 18}, (OURS, *OTHERS)),
    "top": Work(
        {"adapter.layers_to_transform": [6, 7], "train.num_train_epochs": 3.0},
        (OURS, *TRL),
        characters=30_000,
    ),
    "nf4": Work(
        {"train.max_steps": 18},
        (
            Contender("lora_kit, NF4", settings={"base.quantize": "nf4"}),
            Contender("lora_kit, bf16"),
        ),
    ),
    # For a GPU, which the smaller shapes leave idle.
    "gpu": Work(
        {
            "train.max_steps": 24,
            "train.max_length": 1024,
            "train.per_device_train_batch_size": 8,
        },
        (
            Contender("lora_kit", shape="1b"),
            *(Contender(peer.name, peer.peer, peer.track, "1b") for peer in TRL),
            Contender("lora_kit, speed: plain", shape="1b", settings={"speed": "plain"}),
            Contender("lora_kit, NF4", shape="1b", settings={"base.quantize": "nf4"}),
        ),
    ),
    "chat": Work(CHAT, (OURS, *TRL), recipe="sft"),
    "nano": Work(NANO, (OURS, Contender("trl sft", "trl", "command"))),
    "scale": Work(
        {"train.max_steps": 8},
        (
            *(_sized(shape, 4, 256) for shape in ("10m", "40m", "100m", "250m")),
            *(_sized("40m", 4096 // length, length) for length in (256, 512, 1024, 2048, 4096)),
        ),
    ),
    "ceiling": Work({}, ()),
}


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """{"a.b": 1} -> {"a": {"b": 1}}"""
    values: dict[str, Any] = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        parent = values
        for part in path:
            parent = parent.setdefault(part, {})
        parent[last] = value
    return values


def write_texts(folder: Path, work: Work) -> None:
    """The text of a work, and one document for evaluation as text and as a conversation."""
    text = "\n\n".join(text for _, text in nano.topics())[: work.characters]
    (folder / "train.txt").write_text(text, encoding="utf-8")
    (folder / "eval.txt").write_text(EVAL, encoding="utf-8")
    rows = [{"instruction": "What is evaluated?", "input": "", "response": EVAL}]
    (folder / "eval.json").write_text(json.dumps(rows), encoding="utf-8")


class Bench:
    """One work on this machine: its files below `cache`, its results, and how it goes on."""

    def __init__(self, work: str, options: argparse.Namespace) -> None:
        self.work, self.data = WORKS[work], options.data and options.data.resolve()
        self.cache, threads = options.peers.resolve(), options.threads
        self.on_cpu = options.device == "cpu"
        self.folder = self.cache / "work" / work
        self.results = RESULTS / f"{options.device}{threads}-{work}.json"
        if options.again:
            self.results.unlink(missing_ok=True)
        self.environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(ROOT),
            "LORA_KIT_CACHE": str(self.folder / "prepared"),
            "HF_DATASETS_CACHE": str(self.folder / "datasets"),
        }
        self.found: dict[str, Any] = {
            "work": work,
            "machine": machine(threads),
            "settings": {**COMMON, **self.work.settings},
            "versions": {},
            "commands": {},
            "date": "",
            "failed": {},
            "ceilings": [],
            "runs": [],
        }
        if self.results.is_file():
            self.found = json.loads(self.results.read_text(encoding="utf-8"))
        if self.found["machine"] != machine(threads):
            raise SystemExit(f"{self.results.name} is of another machine: move it, or --again")

    def base(self, shape: str) -> Path:
        folder = self.cache / "bases" / shape
        if not (folder / "config.json").is_file():
            partial = folder.with_name(folder.name + ".partial")
            self.call("speed_parts.py", "weights", shape, partial)
            partial.rename(folder)
        return folder

    def call(self, script: str, *arguments: Any) -> str:
        command = [sys.executable, HERE / script, *arguments]
        return subprocess.run(
            list(map(str, command)),
            env=self.environment,
            check=True,
            text=True,
            stdout=subprocess.PIPE,
        ).stdout

    def run_file(self, who: Contender) -> tuple[Path, dict[str, Any]]:
        """A contender's run.yaml, and its values by dotted key; also what peers' jobs are of."""
        write_texts(self.folder, self.work)
        chat = self.work.recipe == "sft"
        values = {
            "recipe": self.work.recipe,
            "name": "bench",
            "base.model": str(nano.MODEL if self.work is WORKS["nano"] else self.base(who.shape)),
            "adapter.r": 16,
            "adapter.lora_alpha": 32,
            "data.train": str(self.data) if chat else "train.txt",
            "data.eval": "eval.json" if chat else "eval.txt",
            **COMMON,
            **self.work.settings,
            **who.settings,
        }
        file = self.folder / "run.yaml"
        file.write_text(yaml.safe_dump(nested(values), sort_keys=False), encoding="utf-8")
        return file, values

    def command(self, who: Contender, out: Path) -> list[Any]:
        """What a contender's process runs; the files it needs are there afterwards."""
        file, values = self.run_file(who)
        if not who.peer:
            return [Path(sys.executable).parent / "lora-kit", "train", file]
        rows = self.folder / "rows" / "rows.jsonl"
        if not rows.is_file():
            rows.parent.mkdir()
            self.call("speed_parts.py", "rows", file, rows)
        programs = self.cache / "peers" / who.peer / "bin"
        if who.track == "command":
            return [programs / "trl", "sft", *_trl_options(values, rows.parent, out, self.on_cpu)]
        job = {
            "track": who.track,
            "chat": self.work.recipe == "sft",
            "base": values["base.model"],
            "rows": str(rows),
            "out": str(out),
            "steps": values.get("train.max_steps"),
            "epochs": values.get("train.num_train_epochs", 1.0),
            "batch": values["train.per_device_train_batch_size"],
            "max_length": values["train.max_length"],
            "learning_rate": values["train.learning_rate"],
            "r": values["adapter.r"],
            "alpha": values["adapter.lora_alpha"],
            "layers": values.get("adapter.layers_to_transform"),
            "seed": 0,
            "use_cpu": self.on_cpu,
        }
        (self.folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        script = HERE / "peers" / SCRIPTS[who.peer]
        return [programs / "python", script, self.folder / "job.json", out / "result.json"]

    def measure(self, who: Contender) -> dict[str, Any]:
        """Run a contender once, in this process's place: nothing else should run beside it."""
        out = self.folder / "out"
        for folder in (out, self.folder / "runs"):
            shutil.rmtree(folder, ignore_errors=True)
        out.mkdir()
        command = self.command(who, out)
        # The whole command counts, or the first epoch: nobody finds prepared rows, or kept states.
        if self.work in (WORKS["nano"], WORKS["top"]):
            for name in ("prepared", "datasets"):
                shutil.rmtree(self.folder / name, ignore_errors=True)
        with (self.folder / "log.txt").open("w") as log:
            started = time.perf_counter()
            child = subprocess.Popen(
                list(map(str, command)),
                cwd=self.folder,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            _, status, usage = os.wait4(child.pid, 0)
            wall = time.perf_counter() - started
        if status:
            said = (self.folder / "log.txt").read_text(errors="replace").splitlines()
            raise RuntimeError("\n".join(said[-15:]))
        self.found["commands"][who.name] = self.shown(command)
        result = self.ours() if not who.peer else self.theirs(out, who)
        versions = result.pop("versions", None)
        if versions:
            self.found["versions"][who.peer] = versions
        for name in ("seconds", "losses"):
            result[name] = [round(value, 4) for value in result[name]]
        return {"wall_s": round(wall, 1), "rss_mib": round(usage.ru_maxrss / 1024), **result}

    def shown(self, command: list[Any]) -> str:
        """A command without the folders of this machine."""
        program, *words = map(str, command)
        return self.hidden(shlex.join([Path(program).name, *words]))

    def hidden(self, text: str) -> str:
        for place in (self.folder, self.cache, ROOT, Path.home()):
            text = text.replace(f"{place}/", "")
        return text

    def ours(self) -> dict[str, Any]:
        lines = (self.folder / "runs/bench/metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [row for row in map(json.loads, lines) if "loss" in row]
        report = json.loads((self.folder / "runs/bench/report.json").read_text(encoding="utf-8"))
        result: dict[str, Any] = {"losses": [row["loss"] for row in rows]}
        for name in ("seconds", "tokens"):
            values = [0, *(row[name] for row in rows)]
            result[name] = [b - a for a, b in itertools.pairwise(values)]
        return {**result, "memory": report.get("memory")}

    def theirs(self, out: Path, who: Contender) -> dict[str, Any]:
        if who.track != "command":
            found: dict[str, Any] = json.loads((out / "result.json").read_text(encoding="utf-8"))
            return found
        (state,) = out.rglob("trainer_state.json")
        history = json.loads(state.read_text(encoding="utf-8"))["log_history"]
        return {
            "losses": [row["loss"] for row in history if "loss" in row],
            **{"seconds": [], "tokens": []},
            "versions": {p.split("==")[0]: p.split("==")[1] for p in PACKAGES[who.peer]},
        }

    def ceilings(self, number: int, when: str) -> None:
        shapes = sorted({who.shape for who in self.work.contenders} or {"40m"})
        if self.work is WORKS["nano"] or self.done(number, when, "ceilings"):
            return
        found = json.loads(self.call("speed_parts.py", "ceiling", *shapes))
        self.keep("ceilings", {"round": number, "who": when, "gflops": found})
        print(f"round {number} {when}: bf16 matmul GFLOP/s {found}", flush=True)

    def done(self, number: int, who: str, where: str = "runs") -> bool:
        return any((row["round"], row["who"]) == (number, who) for row in self.found[where])

    def keep(self, where: str, row: dict[str, Any]) -> None:
        self.found[where].append(row)
        self.found["date"] = datetime.date.today().isoformat()
        self.found["versions"]["lora_kit"] = our_versions()
        RESULTS.mkdir(exist_ok=True)
        partial = self.results.with_suffix(".partial")
        partial.write_text(compact(self.found), encoding="utf-8")
        partial.replace(self.results)

    def run(self, rounds: int, minutes: float) -> None:
        """All rounds that are missing, A B A B, until no time is left for the next measurement."""
        self.folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.folder / "rows", ignore_errors=True)  # the data may be other ones now
        started = time.monotonic()
        for number in range(1, rounds + 1):
            todo = [c for c in self.work.contenders if not self.done(number, c.name)]
            self.ceilings(number, "before")
            for who in todo:
                before = [row["wall_s"] for row in self.found["runs"] if row["who"] == who.name]
                if time.monotonic() - started + max(before, default=0) > 60 * minutes:
                    return print(f"{minutes} minutes are over: the same command again goes on")
                try:
                    result = self.measure(who)
                except RuntimeError as error:
                    self.found["failed"][who.name] = self.hidden(str(error).splitlines()[-1])
                    print(f"{who.name} failed:\n{error}", flush=True)
                    continue
                self.found["failed"].pop(who.name, None)
                self.keep("runs", {"round": number, "who": who.name, **result})
                said = line(self.found["work"], who.name, result)
                print(f"round {number}/{rounds} {said}", flush=True)
            self.ceilings(number, "after")
        print(f"all {rounds} rounds are in results/{self.results.name}")


def line(work: str, who: str, result: dict[str, Any]) -> str:
    figures = f"{who:28} {result['wall_s']:6.1f} s  {result['rss_mib']:6,} MiB"
    if counted := steps_counted(work, result):
        parts = [f"{name}{rate(result, part):,.0f} tokens/s" for name, part in counted.items()]
        figures += f"  {', '.join(parts)}"
    return f"{figures}  loss {result['losses'][0]:.3f} to {result['losses'][-1]:.3f}"


def _trl_options(values: dict[str, Any], rows: Path, out: Path, on_cpu: bool) -> list[str]:
    """`trl sft` for the same run; what is not named is its default."""
    options = {
        "model_name_or_path": values["base.model"],
        "dataset_name": rows,
        "output_dir": out,
        "lora_r": values["adapter.r"],
        "lora_alpha": values["adapter.lora_alpha"],
        "lora_dropout": 0,
        "lora_target_modules": "all-linear",
        "learning_rate": values["train.learning_rate"],
        "lr_scheduler_type": values["train.lr_scheduler_type"],
        "max_steps": values["train.max_steps"],
        "max_length": values["train.max_length"],
        "per_device_train_batch_size": values["train.per_device_train_batch_size"],
        "logging_steps": values["train.logging_steps"],
        "seed": 0,
        "data_seed": 0,
        "report_to": "none",
        "use_cpu": on_cpu,  # else bf16, its default, is refused there
    }
    pairs = [(f"--{name}", str(value)) for name, value in options.items()]
    return ["--use_peft", *(word for pair in pairs for word in pair)]


def machine(threads: int) -> dict[str, Any]:
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    found = dict(part for text in lines if len(part := [p.strip() for p in text.split(":")]) == 2)
    names = ("vendor_id", "model name", "cpu family", "model", "stepping")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    described = {
        "cpu": ", ".join(f"{name} {found[name]}" for name in names if name in found),
        "bf16": "avx512_bf16" in found.get("flags", ""),
        "amx": "amx_bf16" in found.get("flags", ""),
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_gib": round(memory),
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        described["gpu"] = torch.cuda.get_device_name()
    return described


def our_versions() -> dict[str, str]:
    found = {}
    for name in OUR_PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


def make_peers(cache: Path) -> None:
    for name, packages in PACKAGES.items():
        folder = cache / "peers" / name
        if (folder / "installed").is_file():
            continue
        print(f"{name}: installing below {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        # torch first: where the index has a CPU build, packages then take it.
        for wanted in (["torch==2.13.0"], ["torch==2.13.0", *packages]):
            pip = [folder / "bin/python", "-m", "pip", "install", "--quiet", *wanted]
            subprocess.run(list(map(str, pip)), check=True)
        if name in WITHOUT:
            pip = [folder / "bin/python", "-m", "pip", "uninstall", "--yes", *WITHOUT[name]]
            subprocess.run(list(map(str, pip)), check=True)
        (folder / "installed").write_text("\n".join(packages))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run")
    run.add_argument("work", choices=[*WORKS])
    run.add_argument("--rounds", type=int, default=3)
    run.add_argument(
        "--minutes", type=float, default=8, help="start no measurement that ends later"
    )
    run.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    run.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    run.add_argument("--data", type=Path, help="of chat: rows with instruction and response")
    run.add_argument("--again", action="store_true", help="forget this work's results")
    for verb in (run, verbs.add_parser("peers")):
        verb.add_argument("--peers", type=Path, default=CACHE, help="a folder for environments")
    verbs.add_parser("table")
    options = parser.parse_args()
    if options.verb == "peers":
        return make_peers(options.peers)
    if options.verb == "run":
        if (options.data is None) == (options.work == "chat"):
            parser.error("--data belongs to chat, and chat wants it")
        Bench(options.work, options).run(options.rounds, options.minutes)
    write_tables()


if __name__ == "__main__":
    main()
