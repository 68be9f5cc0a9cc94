"""lora_kit: adapt a language model to your field, prove that it got better, ship it.

In: a run file (`schema`, `run`) with its data and base. Out: a run directory with the adapter, a
lock file and a report. The steps are the subpackages, in this order: `data` (sources to rows),
`base`, `speed`, `adapter`, `tasks` (rows to batches, losses and scores), `train`, `prove`, `ship`;
`nano` is the embedded model. `cli` has the verbs of `lora-kit`: `train` is in `launch`, others in
the module of their name (`plan`, `preview`, `doctor`, `demo`) or in a subpackage. What a recipe of
your own imports is in `recipe`.

The public names are `train`, `load` and `compare`; each is imported on first use, so that
`import lora_kit` and `lora-kit --help` are fast.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import lora_kit.train as _package

if TYPE_CHECKING:
    from lora_kit.adapter.load import load
    from lora_kit.prove.compare import compare
    from lora_kit.schema import Json

__version__ = "0.1.0"
__all__ = ["compare", "load", "train"]

# Libraries such as TRL send telemetry to the Hub unless this is set. Child processes inherit it.
# huggingface_hub reads it on import, which may have happened before.
_telemetry = os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
_constants: Any = sys.modules.get("huggingface_hub.constants")
if _constants and _telemetry == "1":
    _constants.HF_HUB_DISABLE_TELEMETRY = True


def _cores_are_taken() -> bool:
    """Whether other processes keep all cores busy: Linux counts the threads that run or could."""
    votes = [0, 0]
    while max(votes) < 5:  # most of nine readings
        try:
            running = int(Path("/proc/loadavg").read_text().split()[3].split("/")[0])
        except OSError:  # another system
            return False
        votes[running > (os.cpu_count() or 1)] += 1  # this process is counted as well
        time.sleep(0.002)
    return votes[True] == 5


# OpenMP's threads spin while they wait for each other: beside other processes they take the cores
# from the threads that they wait for. libgomp reads this when torch is imported.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "2000" if _cores_are_taken() else "5000"


class _CallablePackage(ModuleType):
    """`lora_kit.train` is both a subpackage and the function that runs a run file: Python binds the
    subpackage to the name on import, so it is made callable."""

    def __call__(self, path: str | Path, *overrides: str, resume: bool = False) -> Json:
        """See `lora_kit.launch.train`."""
        from lora_kit.launch import train

        return train(path, *overrides, resume=resume)


_package.__class__ = _CallablePackage
train = sys.modules["lora_kit.train"]


def __getattr__(name: str) -> object:
    if name == "load":
        from lora_kit.adapter.load import load

        return load
    if name == "compare":
        from lora_kit.prove.compare import compare

        return compare
    raise AttributeError(f"module 'lora_kit' has no attribute {name!r}")
