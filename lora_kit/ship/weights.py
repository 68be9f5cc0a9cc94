"""The weights of a merge, streamed from the base's files into new ones.

One thread reads the base ahead, one hashes what was read, this one adds B A, one writes, and one
reads each finished file again. What the adapter leaves alone is copied as bytes.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import zlib
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from lora_kit.adapter.files import Adapter, write_json
from lora_kit.adapter.names import Change, plan_merge, tensor_of
from lora_kit.base import tensors as room
from lora_kit.base.tensors import DTYPES, FLOATS, INDEX, PAGE, Stored, Writer
from lora_kit.errors import CheckFailed, UserError

_AHEAD = 4  # pieces read before they are needed
_RING = _AHEAD + 2  # and two that are being written
_ROWS = 64  # that are summed at once
_STORED_AS = {"bfloat16": "BF16", "float32": "F32"}
Put = Callable[[str, Any], Future[Any]]  # have the next bytes of a tensor written


class _Piece(NamedTuple):
    """Bytes of a base file that are read at once, of one tensor; None: of the header."""

    tensor: Stored | None
    offset: int
    size: int


class Weights:
    """The tensors of a merge, and where each goes: shard by shard, as the base's lie.

    Attributes:
        entries: {tensor: (dtype, shape)} of what is written, `bytes` in all.

    Args:
        tensors: of the base's files, by the names that the merged model has.
        dtype: of what is written, `bfloat16` or `float32`.
        head: see `adapter.names.plan_merge`.
        unused: tensors of the base's files that the merged model does not have.
        guard: the name of a tensor without values that is written as well.
    """

    def __init__(
        self,
        adapter: Adapter,
        tensors: dict[str, Stored],
        config: dict[str, Any],
        dtype: str,
        head: Mapping[str, tuple[int, ...]] | None = None,
        unused: Sequence[Stored] = (),
        guard: str | None = None,
    ) -> None:
        import torch

        self.adapter, self.tensors, self.unused = adapter, tensors, unused
        self.plan = plan_merge(adapter, tensors, config, head)
        self.changed = len(self.plan.changes)
        if guard is not None:
            first = next(iter(tensors.values()))
            self.plan.changes[guard] = Change(Stored(guard, "F32", (0,), first.file, 0, 0))
        self.linear: set[str] = set()  # what goes through NF4 first, in the type of the training
        self.trained_in = torch.float32
        self.shards: dict[Path, list[str]] = {}
        sizes: Counter[str] = Counter()
        for name, tensor in tensors.items():
            self.shards.setdefault(tensor.file, []).append(name)
            sizes[tensor.dtype] += tensor.size
        # A head that the files lack comes last.
        self.shards[tensor.file] += [name for name in self.plan.changes if name not in tensors]
        # What a base of half the width keeps in float32, it keeps so on purpose.
        sharp = {n for n, t in tensors.items() if t.dtype == "F32" != sizes.most_common(1)[0][0]}
        self.entries: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name in chain.from_iterable(self.shards.values()):
            source = self.source(name)
            as_it_is = source.dtype not in FLOATS or name in sharp
            self.entries[name] = (source.dtype if as_it_is else _STORED_AS[dtype], source.shape)
        self.bytes = sum(math.prod(s) * DTYPES[d][1] for d, s in self.entries.values())
        self.halves = lru_cache(maxsize=2)(self._halves)
        self.small = lru_cache(maxsize=2)(Stored.read)  # vectors, asked for by each block of rows
        self.norms: tuple[Change | None, Any] = (None, None)

    def source(self, name: str) -> Stored:
        change = self.plan.changes.get(name)
        return change.source if change else self.tensors[name]

    def copied(self, name: str) -> bool:
        """Whether a tensor is the base's, byte for byte."""
        there, same = self.tensors.get(name), self.entries[name][0]
        untouched = name not in self.plan.changes and name not in self.linear
        return untouched and there is not None and there.dtype == same

    def quantize(self, model: Any, left_out: Sequence[str], dtype: str) -> None:
        """Let all weights that bitsandbytes would quantize go through NF4 first.

        Args:
            model: the base as shapes alone.
            left_out: modules that are not quantized.
            dtype: that it was trained in.
        """
        import torch
        from transformers.quantizers.quantizers_utils import should_convert_module

        for name, module in model.named_modules():
            if type(module).__name__ == "Conv1D":
                kind = model.config.model_type
                raise UserError(f"{kind}: not merged into NF4 weights: merge it into the base")
            if type(module) is torch.nn.Linear and should_convert_module(name, list(left_out)):
                self.linear.add(tensor_of(name, self.tensors))
        self.trained_in = getattr(torch, dtype)

    def write(
        self, folder: Path, hashes: dict[str, str], refuse: Callable[[list[str]], None]
    ) -> None:
        """Write all shards. `refuse` is called with a file of the base that is not of its hash."""
        import torch

        # Reading, hashing, writing and checking have the other cores: more threads here would only
        # spin, waiting for each other.
        threads, checks = torch.get_num_threads(), []
        torch.set_num_threads(1)
        with ExitStack() as stack:
            stack.callback(torch.set_num_threads, threads)
            checking = stack.enter_context(ThreadPoolExecutor(1))
            for file, names in self.shards.items():
                digest = hashlib.sha256() if file.name in hashes else None
                with (
                    Writer(folder / file.name, {n: self.entries[n] for n in names}) as writer,
                    ThreadPoolExecutor(1) as writing,
                ):
                    put: Put = partial(writing.submit, writer.append)  # type: ignore[call-arg]
                    _stream(file, self._pieces(file), digest, partial(self._use, put))
                    for name in names:
                        if name not in self.tensors:
                            self._replace(name, put)
                if digest and digest.hexdigest() != hashes[file.name]:
                    refuse([file.name])
                checks.append(checking.submit(_reread, writer))
            for check in checks:
                check.result()
        if (next(iter(self.shards)).parent / INDEX).is_file():
            where = {name: file.name for file, names in self.shards.items() for name in names}
            index = {"metadata": {"total_size": self.bytes}, "weight_map": where}
            write_json(folder / INDEX, index)

    def _pieces(self, file: Path) -> list[_Piece]:
        """All bytes of a base file, in order; of a tensor whole rows, if it changes."""
        tensors = [self.tensors[name] for name in self.shards[file] if name in self.tensors]
        unused = [tensor for tensor in self.unused if tensor.file == file]
        tensors = sorted([*tensors, *unused], key=lambda tensor: tensor.offset)
        pieces = [_Piece(None, at, size) for at, size in _cut(0, tensors[0].offset, room.PIECE)]
        for tensor in tensors:
            if tensor in unused:  # read for the file's hash alone
                cut = _cut(tensor.offset, tensor.offset + tensor.size, room.PIECE)
                pieces += [_Piece(None, at, size) for at, size in cut]
                continue
            step = room.PIECE if self.copied(tensor.name) else _step(tensor) * _row(tensor)
            cut = _cut(tensor.offset, tensor.offset + tensor.size, step)
            pieces += [_Piece(tensor, at, size) for at, size in cut]
        return pieces

    def _use(self, put: Put, piece: _Piece, view: memoryview, hold: list[Future[Any]]) -> None:
        """Write what becomes of a piece that was read."""
        import torch

        tensor = piece.tensor
        if tensor is None:
            return
        name = tensor.name
        if self.source(name) is not tensor or name in self.linear:
            if piece.offset == tensor.offset:  # the rest is read for its hash alone
                self._replace(name, put)
            return
        rows = torch.frombuffer(view, dtype=_torch(tensor.dtype))
        if self.copied(name):
            _check_finite(name, rows)
        else:
            for hashed in hold:
                hashed.result()  # before its bytes are overwritten
            first = (piece.offset - tensor.offset) // _row(tensor)
            rows = self._merged(name, rows.reshape(-1, _width(tensor)), first)
        hold.append(put(name, rows))

    def _replace(self, name: str, put: Put) -> None:
        """Write a tensor whose values are not in the pieces that are read."""
        source = self.source(name)
        read: Callable[[int, int], Any] = source.read
        if name in self.linear:
            read = _through_nf4(source, self.trained_in)
        for first, count in _cut(0, source.shape[0], _step(source)):
            rows = read(first, first + count).reshape(count, -1)
            put(name, self._merged(name, rows, first)).result()

    def _merged(self, name: str, rows: Any, first: int) -> Any:
        """(rows, columns) of a tensor from row `first` on, as they are written; where the type
        stays, in place."""
        import torch

        if not rows.is_floating_point():
            return rows
        change, dtype = self.plan.changes.get(name), _torch(self.entries[name][0])
        merged = rows if dtype == rows.dtype else torch.empty(rows.shape, dtype=dtype)
        # What is summed in float32 stays in the processor's cache.
        for at in range(0, len(rows), _ROWS):
            wide = rows[at : at + _ROWS].float()
            if change:
                self._add(change, wide, first + at)
            merged[at : at + _ROWS] = wide
            _check_finite(name, merged[at : at + _ROWS])
        return merged

    def _add(self, change: Change, wide: Any, first: int) -> None:
        """Change rows of float32 in place."""
        import torch

        last = first + len(wide)
        if change.module:
            left, right = self._factors(change)
            wide.addmm_(left[first:last], right, alpha=change.scale)
        if change.magnitude:
            magnitude = self.small(change.magnitude).float()
            if change.transposed:
                wide *= magnitude / self._norms(change)
            else:
                wide *= (magnitude[first:last] / wide.norm(dim=1))[:, None]
        if change.bias:
            wide += change.scale * change.bias.read(first, last).float()[:, None]
        if change.token_rows:
            tokens = torch.tensor(change.tokens)
            here = (tokens >= first) & (tokens < last)
            wide[tokens[here] - first] = self.small(change.token_rows).float()[here]

    def _factors(self, change: Change) -> tuple[Any, Any]:
        """(rows, r), (r, columns): dW is scale times their product."""
        a, b = (half[change.expert] for half in self.halves(change.module, change.rank))
        return (a.T, b.T) if change.transposed else (b[change.first :], a)

    def _halves(self, module: str, rank: int) -> tuple[Any, Any]:
        """(experts, r, in), (experts, out, r), float32; PEFT keeps those of experts as
        (experts · r, in) and (out, r · experts)."""
        a, b = (self.adapter.factors[module][half].read().float() for half in "AB")
        a = a.reshape(len(a) // rank, rank, -1)
        return a, b.reshape(len(b), rank, len(a)).permute(2, 0, 1).contiguous()

    def _norms(self, change: Change) -> Any:
        """Of each output of a matrix that lies as (in, out): its column of W + dW."""
        import torch

        if self.norms[0] is not change:
            left, right = self._factors(change)
            total: Any = 0.0
            for first, count in _cut(0, change.source.shape[0], _step(change.source)):
                wide = change.source.read(first, first + count).float()
                wide.addmm_(left[first : first + count], right, alpha=change.scale)
                total = total + wide.double().square().sum(0)
            self.norms = (change, torch.sqrt(total).float())
        return self.norms[1]


def _torch(dtype: str) -> Any:
    import torch

    return getattr(torch, DTYPES[dtype][0])


def _width(tensor: Stored) -> int:
    """Columns of a tensor as a matrix; a vector has one."""
    return math.prod(tensor.shape[1:])


def _row(tensor: Stored) -> int:
    return _width(tensor) * DTYPES[tensor.dtype][1]


def _step(tensor: Stored) -> int:
    """Rows that are read at once: whole blocks of NF4, of any width."""
    return max(1, room.PIECE // _ROWS // _row(tensor)) * _ROWS


def _cut(start: int, end: int, step: int) -> list[tuple[int, int]]:
    """[(at, size)] of a range in steps."""
    return [(at, min(step, end - at)) for at in range(start, end, step)]


def _stream(
    file: Path,
    pieces: list[_Piece],
    digest: Any,
    use: Callable[[_Piece, memoryview, list[Future[Any]]], None],
) -> None:
    """Read pieces ahead, into buffers that are used again, and give each to `use` with a list; what
    `use` puts there is waited for before the buffer is filled anew. The hash stands there first.
    """
    largest = max(piece.size for piece in pieces) + 2 * PAGE
    buffers = [mmap.mmap(-1, largest) for _ in range(_RING)]
    holds: list[list[Future[Any]]] = [[] for _ in range(_RING)]
    descriptor = room.open_past_cache(file, os.O_RDONLY)

    def read(number: int) -> memoryview:
        slot = number % _RING
        while holds[slot]:
            holds[slot].pop().result()
        view = room.read_past_cache(descriptor, buffers[slot], *pieces[number][1:])
        if digest:
            holds[slot].append(hashing.submit(digest.update, view))
        return view

    try:
        with ThreadPoolExecutor(1) as reading, ThreadPoolExecutor(1) as hashing:
            ahead = deque(reading.submit(read, n) for n in range(min(_AHEAD, len(pieces))))
            for number, piece in enumerate(pieces):
                view, hold = ahead.popleft().result(), holds[number % _RING]
                use(piece, view, hold)
                if number + _AHEAD < len(pieces):
                    ahead.append(reading.submit(read, number + _AHEAD))
            for waited in chain.from_iterable(holds):
                waited.result()
    finally:
        os.close(descriptor)


def _through_nf4(source: Stored, dtype: Any) -> Callable[[int, int], Any]:
    """Reads rows of a weight as they are after NF4 with double quantization, blocks of 64 (QLoRA,
    Dettmers et al. 2023, arXiv:2305.14314), as `base.load` has it.

    The scales are quantized together, so that half a byte of each weight is kept meanwhile.
    """
    import torch
    from bitsandbytes import functional as four

    # On a CPU bitsandbytes 0.50 gives other values for another number of rows where these are no
    # whole blocks: small matrices, which it is given whole, as in training.
    step = _step(source) if source.shape[1] % 64 == 0 else source.shape[0]
    parts = [
        four.quantize_4bit(source.read(at, at + n).to(dtype), blocksize=64, quant_type="nf4")
        for at, n in _cut(0, source.shape[0], step)
    ]
    scales = torch.cat([state.absmax for _, state in parts])
    offset = scales.mean()
    scales = four.dequantize_blockwise(*four.quantize_blockwise(scales - offset, blocksize=256))
    of_each = (scales + offset).split([len(state.absmax) for _, state in parts])
    for (_, state), own in zip(parts, of_each, strict=True):
        state.absmax = own

    def read(first: int, last: int) -> Any:
        at = first % step
        return four.dequantize_4bit(*parts[first // step])[at : at + last - first]

    return read


def _check_finite(name: str, tensor: Any) -> None:
    """Raises CheckFailed on NaN and infinity."""
    if tensor.numel() and tensor.is_floating_point() and tensor.element_size() > 1:
        least, most = tensor.aminmax()
        if not (least.isfinite() and most.isfinite()):
            raise CheckFailed(f"{name}: NaN or infinite after the merge: not written")


def _reread(writer: Writer) -> None:
    """Raises CheckFailed unless the disk holds what was written."""
    found = {name: (one.dtype, one.shape) for name, one in room.stored(writer.file).items()}
    crc, buffer = 0, mmap.mmap(-1, room.PIECE + 2 * PAGE)
    descriptor = room.open_past_cache(writer.file, os.O_RDONLY)
    try:
        for at, size in _cut(0, os.fstat(descriptor).st_size, room.PIECE):
            crc = zlib.crc32(room.read_past_cache(descriptor, buffer, at, size), crc)
    finally:
        os.close(descriptor)
    if found != writer.entries or crc != writer.crc:
        raise CheckFailed(f"{writer.file.name}: read back, it is not what was written: a bad disk?")
