"""Settings of the process that make a step on a CPU quicker. Called before torch does any work."""

from __future__ import annotations

import ctypes
import sys

# glibc's mallopt parameters (malloc.h).
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
# The second is the most that older versions of glibc take.
_KEEP_BYTES = (1 << 30, 1 << 25)


def keep_freed_memory() -> bool:
    """Tell glibc to keep large freed blocks instead of handing them back to the kernel.

    A training step frees and takes the same tensors again and again; each time the kernel would
    have to map and zero their pages. Returns whether the allocator (glibc's) took the setting.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    took = any(mallopt(_M_MMAP_THRESHOLD, size) for size in _KEEP_BYTES)
    return took and bool(mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES[0]))
