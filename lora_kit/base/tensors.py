"""safetensors files, tensor by tensor: read without mapping, written sequentially.

A file is a header length (8 bytes, little endian), a JSON header {name: {dtype, shape,
data_offsets}} and the bytes (https://github.com/huggingface/safetensors#format). The library maps
the whole file, which counts as this process's memory, and accepts duplicate keys.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import mmap
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from lora_kit.errors import UserError

INDEX = "model.safetensors.index.json"
_LARGEST_HEADER = 100_000_000  # bytes; the library's own limit
PIECE = 16 * 2**20
PAGE = 4096
_DIRECT: int = getattr(os, "O_DIRECT", 0)
# safetensors dtype -> (torch dtype, bytes per element).
DTYPES = {
    **{"F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2)},
    **{"BF16": ("bfloat16", 2), "F8_E4M3": ("float8_e4m3fn", 1), "F8_E5M2": ("float8_e5m2", 1)},
    **{"I64": ("int64", 8), "I32": ("int32", 4), "I16": ("int16", 2), "I8": ("int8", 1)},
    **{"U64": ("uint64", 8), "U32": ("uint32", 4), "U16": ("uint16", 2), "U8": ("uint8", 1)},
    "BOOL": ("bool", 1),
}
FLOATS = {"F64", "F32", "F16", "BF16"}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: `size` bytes at `offset`."""

    name: str
    dtype: str  # safetensors' name: BF16
    shape: tuple[int, ...]
    file: Path
    offset: int
    size: int

    def read(self, first: int = 0, last: int | None = None) -> Any:
        """The torch tensor, in its own dtype; optionally only the rows first:last."""
        import torch

        rows = self.shape[0] if self.shape else 1
        start, end, _ = slice(first, last).indices(rows)
        row = self.size // max(1, rows)
        buffer = self._bytes(row * start, row * (end - start))
        shape = (end - start, *self.shape[1:]) if self.shape else ()
        dtype = getattr(torch, DTYPES[self.dtype][0])
        if not buffer:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(buffer, dtype=dtype).reshape(shape)

    def pieces(self) -> Iterator[bytearray]:
        """The bytes, 16 MiB at a time."""
        for start in range(0, self.size, PIECE):
            yield self._bytes(start, min(PIECE, self.size - start))

    def _bytes(self, start: int, size: int) -> bytearray:
        buffer = bytearray(size)
        with self.file.open("rb") as opened:
            opened.seek(self.offset + start)
            if opened.readinto(buffer) < size:
                raise UserError(f"{self.file}: truncated: copy it again")
        return buffer


def open_past_cache(file: Path, flags: int) -> int:
    """A file descriptor with O_DIRECT, if the file system supports it: large copies through the
    page cache are slower than the disk and evict other files."""
    try:
        return os.open(file, flags | _DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(file, flags & ~os.O_EXCL, 0o666)  # Linux has created it already


def _transferred(transfer: Callable[[], int], descriptor: int) -> int:
    """Bytes transferred by a call; retried without O_DIRECT unless it is whole pages."""
    try:
        return transfer()
    except OSError as error:
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        if error.errno != errno.EINVAL or not flags & _DIRECT:
            raise
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~_DIRECT)
        return transfer()


def read_past_cache(descriptor: int, buffer: mmap.mmap, offset: int, size: int) -> memoryview:
    """Read `size` bytes at `offset`; `buffer` must have room for two more pages.

    Raises:
        UserError: the file is truncated.
    """
    start, end = offset // PAGE * PAGE, -(-(offset + size) // PAGE) * PAGE
    view, done = memoryview(buffer), 0
    while done < offset + size - start:
        rest, at = view[done : end - start], start + done
        count = _transferred(partial(os.preadv, descriptor, [rest], at), descriptor)
        if count == 0:
            raise UserError("a file is truncated: copy it again")
        done += count
    return view[offset - start : offset - start + size]


def stored(file: Path) -> dict[str, Stored]:
    """The tensors of one file, in byte order.

    Raises:
        UserError: the header is too large, has duplicate names, or does not match the bytes, which
            it must cover without gap or overlap.
    """
    try:
        with file.open("rb") as opened:
            return _parsed(file, opened)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = " ".join(str(error).split())[:160]
        raise UserError(f"{file}: corrupt safetensors file ({why}): copy it again") from None


def _parsed(file: Path, opened: BinaryIO) -> dict[str, Stored]:
    """Raises ValueError, KeyError, TypeError, ... on an invalid header."""
    whole = os.fstat(opened.fileno()).st_size
    length = int.from_bytes(opened.read(8), "little")
    if whole < 8 or length > min(_LARGEST_HEADER, whole - 8):
        raise ValueError(f"a header of {length:,} bytes")
    header = json.loads(opened.read(length), object_pairs_hook=_unique_keys)
    header.pop("__metadata__", None)
    found: dict[str, Stored] = {}
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        (start, stop), shape = entry["data_offsets"], tuple(entry["shape"])
        sound = all(type(n) is int and n >= 0 for n in (start, stop, *shape)) and start == end
        if not sound or stop - start != math.prod(shape) * DTYPES[entry["dtype"]][1]:
            raise ValueError(f"{name!r:.80}: offsets do not match its shape")
        offset = 8 + length + start
        found[name] = Stored(name, entry["dtype"], shape, file, offset, stop - start)
        end = stop
    if 8 + length + end != whole:
        raise ValueError(f"{whole:,} bytes instead of {8 + length + end:,}")
    return found


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"duplicate key {twice!r:.80}")
    return values


def stored_in(folder: Path) -> dict[str, Stored]:
    """The tensors of all shards of a model folder.

    Raises:
        UserError: a shard is missing or corrupt, or two have a tensor of the same name.
    """
    index, names = folder / INDEX, {"model.safetensors"}
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            raise UserError(f"{index}: invalid shard index: copy the model again") from None
        if strange := [n for n in names if not isinstance(n, str) or Path(n).name != n]:
            raise UserError(f"{index}: lists a file outside of its folder: {strange[0]!r:.80}")
    found: dict[str, Stored] = {}
    for name in sorted(names):
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: missing: copy the model again")
        shard = stored(folder / name)
        if twice := sorted(found.keys() & shard.keys()):
            raise UserError(f"{folder}: {twice[0]} is in two shards: copy the model again")
        found |= shard
    return found


class Writer:
    """Writes one file with the given tensors (name, dtype, shape), in that order.

    >>> with Writer(path, {"weight": ("BF16", (2, 3))}) as writer:  # doctest: +SKIP
    ...     writer.put("weight", tensor)

    A tensor is written whole by `put`, or in consecutive pieces by `append`. At the end of the
    block the file is complete and on disk (fsync).
    """

    def __init__(self, file: Path, entries: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._left: dict[str, int] = {}  # remaining bytes per tensor, in order
        end = 0
        for name, (dtype, shape) in entries.items():
            start, end = end, end + math.prod(shape) * DTYPES[dtype][1]
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
            if end > start:
                self._left[name] = end - start
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.file, self.entries = file, dict(entries)
        self.crc = 0  # of all bytes so far, for verification
        self._opened = open_past_cache(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        self._block, self._filled = memoryview(mmap.mmap(-1, PIECE)), 0
        self._write(memoryview(len(text).to_bytes(8, "little") + text))

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            if kind is None:
                assert not self._left, f"{next(iter(self._left))} was not written"
                self._flush()
                os.fsync(self._opened)
        finally:
            os.close(self._opened)

    def put(self, name: str, tensor: Any) -> None:
        """Write a tensor; its dtype and shape must be the declared ones."""
        import torch

        dtype, shape = self.entries[name]
        assert tuple(tensor.shape) == shape and tensor.dtype == getattr(torch, DTYPES[dtype][0])
        self.append(name, tensor)

    def append(self, name: str, piece: Any) -> None:
        """Write the next piece of a tensor: a torch tensor of its dtype, or bytes."""
        import torch

        if isinstance(piece, torch.Tensor):
            piece = piece.contiguous().reshape(-1).view(torch.uint8).numpy()
        if not len(piece):
            return
        assert name == next(iter(self._left), None), f"{name} is not the next one"
        self._left[name] -= len(piece)
        assert self._left[name] >= 0, f"{name} is too long"
        self._write(memoryview(piece))
        if not self._left[name]:
            del self._left[name]

    def _write(self, rest: memoryview) -> None:
        self.crc = zlib.crc32(rest, self.crc)
        while rest:
            part = rest[: PIECE - self._filled]
            self._block[self._filled : self._filled + len(part)] = part
            self._filled, rest = self._filled + len(part), rest[len(part) :]
            if self._filled == PIECE:
                self._flush()

    def _flush(self) -> None:
        rest = self._block[: self._filled]
        while rest:
            count = _transferred(partial(os.write, self._opened, rest), self._opened)
            rest = rest[count:]
        self._filled = 0
