"""Checks the machine: versions, devices, and what is missing."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

from lora_kit.cache import BOUND_VARIABLE, CACHE_VARIABLE, installed, root_folder, size_of
from lora_kit.errors import reason_of
from lora_kit.run import recipe_file
from lora_kit.schema import Json, Run

NEEDED = (
    "torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes", "datasets", "evaluate",
    "huggingface_hub", "safetensors", "pydantic", "typer", "rich", "pyarrow", "rensa", "loky",
    "filelock",
)  # fmt: skip
# package -> (purpose, how to install)
OPTIONAL = {
    "lm_eval": ("tasks of lm-evaluation-harness", "pip install 'lora-kit[harness]'"),
    "pypdf": ("PDF files as data", "pip install 'lora-kit[documents]'"),
    "trafilatura": ("HTML files as data", "pip install 'lora-kit[documents]'"),
    "deepspeed": ("--accelerate zero3", "pip install deepspeed"),
}


# Any: values that are printed or written as JSON, of several types.
def examine() -> dict[str, Any]:
    """Versions, devices, memory, disk and problems: the output of `lora-kit doctor --json`."""
    import psutil

    versions = {name: installed(name) for name in (*NEEDED, *OPTIONAL)}
    missing = [name for name in NEEDED if versions[name] is None]
    fix = "pip install -c scripts/constraints.txt lora-kit"
    problems = [{"what": f"{name} is not installed", "fix": fix} for name in missing]
    devices = _devices(problems) if versions["torch"] else []
    memory = psutil.virtual_memory()
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions,
        "devices": devices,
        "cores": len(os.sched_getaffinity(0)),
        "memory_mib": memory.total // 2**20,
        "memory_free_mib": memory.available // 2**20,
        "disk_free_mib": shutil.disk_usage(".").free // 2**20,
        "cache": {"folder": str(root_folder()), "mib": size_of(root_folder()) // 2**20},
        "hub": "offline (HF_HUB_OFFLINE)" if os.environ.get("HF_HUB_OFFLINE") == "1" else "online",
        "missing": {n: list(OPTIONAL[n]) for n in OPTIONAL if versions[n] is None},
        "problems": problems,
    }


def _devices(problems: list[dict[str, str]]) -> list[dict[str, Any]]:
    """The GPUs, else the CPU; what is wrong is added to `problems`."""
    try:
        import torch
    except (ImportError, OSError) as error:  # a missing system library
        what = f"torch cannot be imported ({reason_of(error)})"
        fix = "reinstall it: pip install --force-reinstall torch"
        problems.append({"what": what, "fix": fix})
        return []
    if torch.cuda.is_available():
        found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        return [{"name": p.name, "memory_mib": p.total_memory // 2**20} for p in found]
    if shutil.which("nvidia-smi"):
        what = f"there is an NVIDIA driver, but torch {torch.__version__} sees no GPU"
        fix = "install the CUDA build: pip install torch, without PyTorch's CPU index"
        problems.append({"what": what, "fix": fix})
    return [{"name": f"CPU, {torch.get_num_threads()} threads", "memory_mib": None}]


def show(found: dict[str, Any]) -> None:
    """Print what `examine` found."""
    print(f"Python {found['python']} on {found['system']}, {found['cores']} cores")
    print(f"memory: {found['memory_mib']:,} MiB, {found['memory_free_mib']:,} free")
    print(f"disk here: {found['disk_free_mib']:,} MiB free; Hub: {found['hub']}")
    cache, limit = found["cache"], os.environ.get(BOUND_VARIABLE)
    at_most = f"at most {limit} GB" if limit else f"{BOUND_VARIABLE} bounds it"
    print(f"cache: {cache['folder']}, {cache['mib']:,} MiB ({CACHE_VARIABLE} moves it, {at_most})")
    for device in found["devices"]:
        memory = f", {device['memory_mib']:,} MiB" if device["memory_mib"] else ""
        print(f"device: {device['name']}{memory}")
    print(", ".join(f"{name} {number}" for name, number in found["versions"].items() if number))
    for name, (what, how) in found["missing"].items():
        print(f"not installed: {name}, for {what}: {how}")
    for problem in found["problems"]:
        print(f"PROBLEM: {problem['what']}: {problem['fix']}")
    if not found["problems"]:
        print("Ready.")


def check_loss(path: Path, overrides: list[str]) -> Json:
    """`lora-kit doctor --loss`: the result of `prove.self_test`."""
    from lora_kit.launch import prepare_process, read_run
    from lora_kit.start import start

    run, recipe = read_run(path, overrides)
    prepare_process()
    from lora_kit.prove.self_test import self_test
    from lora_kit.train.interrupt import StopSignal

    def in_two_processes(config: str) -> None:
        # This file instead of the recipe; `resume` skips the check for an existing run.
        start(path, overrides, config, 2, resume=True, script=Path(__file__).resolve())

    with StopSignal().listening():
        return self_test(run, recipe.task, in_two_processes)


def main(run: Run, resume: bool = False) -> Json:
    """One of the two processes of `check_loss`."""
    from lora_kit.prove.self_test import one_rank
    from lora_kit.tasks.recipe import load_recipe

    return one_rank(run, load_recipe(recipe_file(run.recipe)).task)


if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose file names could shadow other modules
    from lora_kit.launch import recipe_main

    raise SystemExit(recipe_main(main))
