"""Starts a recipe so that accelerate shards on a CPU over gloo; otherwise it silently does not.

    accelerate launch --config_file fsdp.yaml tests/sharded_on_cpu.py recipes/cpt.py run.yaml

accelerate takes a process group on a CPU for one that cannot shard (FSDP becomes DDP), and has no
backend for DeepSpeed there. DeepSpeed would also compile collectives for CPUs, which takes a
minute. Nothing else is changed: sharding, collectives, saving and loading are those of a GPU.
"""

from __future__ import annotations

import os
import runpy
import sys
from typing import Any

from accelerate import state
from accelerate.utils import DistributedType

PARTIAL, WHOLE = state.PartialState.__init__, state.AcceleratorState.__init__
DEEPSPEED = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"


def partial(self: Any, cpu: bool = False, **options: Any) -> None:
    PARTIAL(self, cpu and not DEEPSPEED, **options)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


def whole(
    self: Any, mixed_precision: Any = None, cpu: bool = False, *rest: Any, **more: Any
) -> None:
    WHOLE(self, mixed_precision, cpu and not DEEPSPEED, *rest, **more)


if __name__ == "__main__":
    state.PartialState.__init__ = partial
    state.AcceleratorState.__init__ = whole
    if DEEPSPEED:
        from deepspeed.ops import __compatible_ops__ as compiled

        compiled["deepspeed_shm_comm"] = False
        state.PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    sys.argv.pop(0)
    runpy.run_path(sys.argv[0], run_name="__main__")
