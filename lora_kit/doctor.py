"""What this machine has, what is missing, and how to get it."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from typing import Any

NEEDED = (
    *("torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets"),
    *("huggingface_hub", "safetensors", "pydantic", "typer", "rich"),
    *("pyarrow", "rensa", "loky", "filelock"),
)
# package -> what it is for and how it comes
OPTIONAL = {
    "evaluate": ("metrics of answers by name", "pip install 'lora-kit[metrics]'"),
    "trl": ("the test that compares our losses with TRL's", "pip install 'lora-kit[test]'"),
    "pypdf": ("PDF files as data", "pip install 'lora-kit[documents]'"),
    "trafilatura": ("HTML files as data", "pip install 'lora-kit[documents]'"),
    "deepspeed": ("--accelerate zero3", "pip install deepspeed"),
}


def examine() -> dict[str, Any]:
    """Versions, devices, memory, disk and problems, as `lora-kit doctor --json` prints them."""
    import psutil

    problems: list[dict[str, str]] = []
    versions: dict[str, str | None] = {}
    for name in (*NEEDED, *OPTIONAL):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
            if name in NEEDED:
                fix = "pip install -c scripts/constraints.txt lora-kit"
                problems.append({"what": f"{name} is not installed", "fix": fix})
    devices = _devices(problems) if versions["torch"] else []
    memory = psutil.virtual_memory()
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions,
        "devices": devices,
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_mib": memory.total // 2**20,
        "memory_free_mib": memory.available // 2**20,
        "disk_free_mib": shutil.disk_usage(".").free // 2**20,
        "hub": "offline (HF_HUB_OFFLINE)" if os.environ.get("HF_HUB_OFFLINE") == "1" else "online",
        "missing": {n: list(OPTIONAL[n]) for n in OPTIONAL if versions[n] is None},
        "problems": problems,
    }


def _devices(problems: list[dict[str, str]]) -> list[dict[str, Any]]:
    try:
        import torch
    except (ImportError, OSError) as error:  # a library of the system that is not there
        what = f"torch cannot be imported ({' '.join(str(error).split())[:120]})"
        problems.append(
            {"what": what, "fix": "install it anew: pip install --force-reinstall torch"}
        )
        return []
    if platform.system() != "Linux":
        what = f"{platform.system()} is not supported yet"
        problems.append({"what": what, "fix": "use Linux (WSL2 on Windows)"})
    if torch.cuda.is_available():
        devices = []
        for number in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(number)
            memory = properties.total_memory // 2**20
            devices.append({"name": properties.name, "memory_mib": memory})
        return devices
    if shutil.which("nvidia-smi"):
        what = f"an NVIDIA driver is here, but torch {torch.__version__} sees no GPU"
        fix = "install the CUDA build: pip install torch, without PyTorch's CPU index"
        problems.append({"what": what, "fix": fix})
    return [{"name": f"CPU, {torch.get_num_threads()} threads", "memory_mib": None}]
