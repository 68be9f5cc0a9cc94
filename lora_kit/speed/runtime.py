"""Settings for speed on a CPU: keep freed memory, and choose the faster dtype."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# glibc's mallopt parameters (malloc.h).
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
# Thresholds, tried in this order: the second is the largest that older versions of glibc accept.
_KEEP_BYTES = (1 << 30, 1 << 25)


def keep_freed_memory() -> bool:
    """Tell glibc to keep large freed blocks instead of returning them to the kernel.

    A training step frees and allocates the same tensors repeatedly; otherwise the kernel maps and
    zeroes their pages each time. Call it before torch does any work. Returns whether glibc accepted
    the setting.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    took = any(mallopt(_M_MMAP_THRESHOLD, size) for size in _KEEP_BYTES)
    return took and bool(mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES[0]))


def return_freed_memory() -> None:
    """Return freed blocks to the kernel, between phases that need blocks of other sizes: what
    `keep_freed_memory` keeps would be added to them."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def float32_is_faster() -> bool:
    """Whether matrix products on this CPU are at least twice as fast in float32 as in bfloat16, by
    a short measurement: without bfloat16 instructions it is tens of times slower."""
    import torch
    from torch.utils.benchmark import Timer

    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(256, 256, dtype=dtype)
        timer = Timer("x @ x", globals={"x": x}, num_threads=torch.get_num_threads())
        seconds.append(min(timer.blocked_autorange(min_run_time=0.05).times))
    return 2 * seconds[0] < seconds[1]


def on_gpu(x: torch.Tensor) -> bool:
    """Whether operations on a tensor run on a GPU; for the meta device, on which plans are made,
    whether those of the training will."""
    import torch
    from accelerate.utils import parse_flag_from_env

    planned = x.is_meta and torch.cuda.is_available()
    return x.is_cuda or (planned and not parse_flag_from_env("ACCELERATE_USE_CPU"))
