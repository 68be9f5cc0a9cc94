"""Process batches in several worker processes; results keep the order of the batches."""

from __future__ import annotations

import ctypes
import gc
import os
import pickle
import signal
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

from lora_kit.errors import CheckFailed

Item = TypeVar("Item")
Result = TypeVar("Result")
# With fewer batches, starting processes takes longer than the work.
FEWEST_FOR_WORKERS = 8
_WORKER_ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "MALLOC_TRIM_THRESHOLD_": str(2**28),  # keep freed memory: 3% faster
}
_IDLE_SECONDS = 10
_PR_SET_PDEATHSIG = 1


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Iterator[Result]:
    """Map `function` over items in order, in several processes if there are enough items.

    Args:
        function: picklable; sent to each process once.
        items: read lazily, a few batches ahead.

    Raises:
        LoraKitError: raised by `function` or by reading an item. CheckFailed: a process was killed.
    """
    waiting = iter(items)
    first = list(islice(waiting, FEWEST_FOR_WORKERS))
    if workers == 1 or len(first) < FEWEST_FOR_WORKERS:
        for item in chain(first, waiting):
            yield function(item)
        return
    from loky.backend.reduction import dumps
    from loky.process_executor import BrokenProcessPool

    pool = _started(workers)
    running: deque[Any] = deque()
    with tempfile.TemporaryDirectory(prefix="lora_kit-") as folder:
        file = Path(folder) / "function"
        file.write_bytes(dumps(function))
        try:
            for item in chain(first, waiting):
                running.append(pool.submit(_call, str(file), item))
                if len(running) > 3 * workers:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        except BrokenProcessPool:
            raise CheckFailed(
                "a process that prepared data was killed: memory may have run out; try fewer with "
                "data.workers"
            ) from None
        finally:
            if running:  # aborted: discard the pending work
                stop(kill=True)


_pool: Any = None  # idle worker processes, kept for the next call


def _started(workers: int) -> Any:
    global _pool
    if _pool is None:
        # Unlike multiprocessing, loky does not re-run the caller's script in each process.
        from loky import ProcessPoolExecutor

        _pool = ProcessPoolExecutor(
            workers,
            timeout=_IDLE_SECONDS,
            initializer=_start,
            initargs=(os.getpid(),),
            env=_WORKER_ENVIRONMENT,
        )
    return _pool


def stop(kill: bool = False) -> None:
    """Stop the idle processes of `in_order`."""
    global _pool
    if _pool is not None:
        _pool.shutdown(wait=True, kill_workers=kill)
        _pool = None


_loaded: tuple[str, Callable[[Any], Any]] | None = None  # in this worker


def _start(parent: int) -> None:
    # If the parent is killed, a worker would otherwise wait for its next batch forever.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before prctl was called
        os._exit(1)
    gc.disable()  # it would scan millions of tokens repeatedly; there are no cycles
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent receives it too, and stops workers


def _call(file: str, item: Any) -> Any:
    global _loaded
    if _loaded is None or _loaded[0] != file:
        _loaded = file, pickle.loads(Path(file).read_bytes())
    return _loaded[1](item)
