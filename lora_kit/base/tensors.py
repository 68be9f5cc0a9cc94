"""safetensors files, tensor by tensor: read with `pread`, never mapped; written from front to back.

A file is a header length (8 bytes, little endian), a JSON header {name: {dtype, shape,
data_offsets}} and the bytes (https://github.com/huggingface/safetensors#format). The library maps
the whole file, which counts as this process's memory, and takes a key that stands twice.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import mmap
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
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
# safetensors' name -> (torch's name, bytes of an element).
DTYPES = {
    **{"F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2)},
    **{"BF16": ("bfloat16", 2), "F8_E4M3": ("float8_e4m3fn", 1), "F8_E5M2": ("float8_e5m2", 1)},
    **{"I64": ("int64", 8), "I32": ("int32", 4), "I16": ("int16", 2), "I8": ("int8", 1)},
    **{"U64": ("uint64", 8), "U32": ("uint32", 4), "U16": ("uint16", 2), "U8": ("uint8", 1)},
    "BOOL": ("bool", 1),
}


@dataclass(frozen=True)
class Stored:
    """A tensor as it lies in a file: `size` bytes from `offset` on."""

    name: str
    dtype: str  # safetensors' name: BF16
    shape: tuple[int, ...]
    file: Path
    offset: int
    size: int

    def read(self, first: int = 0, last: int | None = None) -> Any:
        """The torch tensor, in its own type; of `shape[0]` only the rows from `first` to `last`."""
        import torch

        start, end, _ = slice(first, last).indices(self.shape[0] if self.shape else 1)
        shape = (end - start, *self.shape[1:]) if self.shape else ()
        row = self.size // max(1, self.shape[0] if self.shape else 1)
        buffer = bytearray(row * (end - start))
        with self.file.open("rb") as opened:
            read_into(opened, memoryview(buffer), self.offset + row * start)
        dtype = getattr(torch, DTYPES[self.dtype][0])
        if not buffer:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(buffer, dtype=dtype).reshape(shape)

    def pieces(self) -> Iterator[bytes]:
        """Its bytes, 16 MiB at a time."""
        buffer = bytearray(min(PIECE, self.size))
        with self.file.open("rb") as opened:
            for start in range(0, self.size, PIECE):
                view = memoryview(buffer)[: min(PIECE, self.size - start)]
                read_into(opened, view, self.offset + start)
                yield bytes(view)


def open_past_cache(file: Path, flags: int) -> int:
    """A file descriptor whose bytes go around the page cache, where the file system can: copies
    through it take longer than the disk does, and push out what others keep there."""
    try:
        return os.open(file, flags | _DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(file, flags & ~os.O_EXCL, 0o666)  # Linux has made it already


def _moved(transfer: Callable[[], int], descriptor: int) -> int:
    """Bytes moved by a call; what is no whole number of pages goes through the cache after all."""
    try:
        return transfer()
    except OSError as error:
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        if error.errno != errno.EINVAL or not flags & _DIRECT:
            raise
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~_DIRECT)
        return transfer()


def read_past_cache(descriptor: int, buffer: mmap.mmap, offset: int, size: int) -> memoryview:
    """`size` bytes from `offset` on, as they lie in `buffer`, which has room for two pages more.

    Raises:
        UserError: the file ends before.
    """
    start, end = offset // PAGE * PAGE, -(-(offset + size) // PAGE) * PAGE
    view, done = memoryview(buffer), 0
    while done < offset + size - start:
        rest, at = view[done : end - start], start + done
        count = _moved(partial(os.preadv, descriptor, [rest], at), descriptor)
        if count == 0:
            raise UserError("a file is shorter than its header says: copy it again")
        done += count
    return view[offset - start : offset - start + size]


def read_into(opened: BinaryIO, view: memoryview, offset: int) -> None:
    """Fill `view` from `offset` on. Raises UserError if the file ends before."""
    done = 0
    while done < len(view):
        count = os.preadv(opened.fileno(), [view[done:]], offset + done)
        if count == 0:
            raise UserError(f"{opened.name}: shorter than its header says: copy it again")
        done += count


def stored(file: Path) -> dict[str, Stored]:
    """The tensors of one file, in the order of their bytes.

    Raises:
        UserError: the header is too large, names a tensor twice, or does not fit the bytes: they
            must be covered without gap or overlap.
    """

    def wrong(why: str) -> UserError:
        return UserError(f"{file}: no safetensors file, or damaged ({why}): copy it again")

    try:
        with file.open("rb") as opened:
            whole = os.fstat(opened.fileno()).st_size
            length = int.from_bytes(opened.read(8), "little")
            if whole < 8 or length > min(_LARGEST_HEADER, whole - 8):
                raise wrong(f"a header of {length:,} bytes")
            header = json.loads(opened.read(length), object_pairs_hook=_once)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise wrong(" ".join(str(error).split())[:160]) from None
    if not isinstance(header, dict):
        raise wrong("the header is no object")
    header.pop("__metadata__", None)
    found, end = {}, 0
    try:
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            (start, stop), shape = entry["data_offsets"], tuple(entry["shape"])
            size = math.prod(shape) * DTYPES[entry["dtype"]][1]
            numbers = (start, stop, *shape)
            if any(type(n) is not int or n < 0 for n in numbers) or (start, stop - start) != (
                end,
                size,
            ):
                raise wrong(f"{name!r:.80} does not lie where its shape says")
            found[name] = Stored(name, entry["dtype"], shape, file, 8 + length + start, size)
            end = stop
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise wrong(f"an entry of the header: {error!r:.80}") from None
    if 8 + length + end != whole:
        raise wrong(f"{whole:,} bytes, its header speaks of {8 + length + end:,}")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r:.80} stands twice")
    return values


def stored_in(folder: Path) -> dict[str, Stored]:
    """The tensors of a model folder, of all its shards.

    Raises:
        UserError: a shard is missing or damaged, or two hold a tensor of the same name.
    """
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            raise UserError(f"{index}: no index of shards: copy the model again") from None
        if strange := [n for n in names if not isinstance(n, str) or Path(n).name != n]:
            raise UserError(f"{index}: names a file outside of its folder: {strange[0]!r:.80}")
    else:
        names = ["model.safetensors"]
    found: dict[str, Stored] = {}
    for name in names:
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: missing: copy the model again")
        shard = stored(folder / name)
        if twice := sorted(found.keys() & shard.keys()):
            raise UserError(f"{folder}: {twice[0]} lies in two shards: copy the model again")
        found |= shard
    return found


class Writer:
    """Writes one file whose tensors are known by name, dtype and shape, in that order.

    >>> with Writer(path, {"weight": ("BF16", (2, 3))}) as writer:  # doctest: +SKIP
    ...     writer.put("weight", tensor)

    A tensor is written whole by `put`, or in pieces by `append`, each after the one before. Without
    an error the file is whole and on the disk (fsync) at the end of the block.
    """

    def __init__(
        self,
        file: Path,
        entries: Mapping[str, tuple[str, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
        end = 0
        for name, (dtype, shape) in entries.items():
            start, end = end, end + math.prod(shape) * DTYPES[dtype][1]
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.file, self.entries = file, dict(entries)
        self.left = {name: math.prod(s) * DTYPES[d][1] for name, (d, s) in entries.items()}
        self._order: Iterator[str] = iter(entries)
        self._now = next(self._order, None)
        self.crc = 0  # of all bytes so far, to compare what is read back
        self._opened = open_past_cache(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        self._block, self._filled = memoryview(mmap.mmap(-1, PIECE)), 0
        self._write(memoryview(len(text).to_bytes(8, "little") + text))

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            if kind is None:
                self._skip_empty()
                assert self._now is None, f"{self._now} was not written"
                self._flush()
                os.fsync(self._opened)
        finally:
            os.close(self._opened)

    def put(self, name: str, tensor: Any) -> None:
        """Write a tensor; its dtype and shape are those that were promised."""
        import torch

        dtype, shape = self.entries[name]
        assert tuple(tensor.shape) == shape and tensor.dtype == getattr(torch, DTYPES[dtype][0])
        self.append(name, tensor)

    def append(self, name: str, piece: Any) -> None:
        """Write the next bytes of a tensor: a torch tensor of its dtype, or bytes."""
        import torch

        self._skip_empty()
        assert name == self._now, f"{name} is not the next one"
        if isinstance(piece, torch.Tensor):
            piece = piece.contiguous().reshape(-1).view(torch.uint8).numpy()
        self.left[name] -= len(piece)
        assert self.left[name] >= 0, f"{name} is too long"
        self._write(memoryview(piece))
        self._skip_empty()

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
            count = _moved(partial(os.write, self._opened, rest), self._opened)
            rest = rest[count:]
        self._filled = 0

    def _skip_empty(self) -> None:
        while self._now is not None and self.left[self._now] == 0:
            self._now = next(self._order, None)


def write_tensors(file: Path, tensors: Iterable[tuple[str, Any]]) -> None:
    """Write tensors that fit into memory, in their order."""
    known = dict(tensors)
    names = {torch_name: name for name, (torch_name, _) in DTYPES.items()}
    entries = {n: (names[str(t.dtype)[6:]], tuple(t.shape)) for n, t in known.items()}
    with Writer(file, entries) as writer:
        for name, tensor in known.items():
            if tensor.numel():
                writer.put(name, tensor)
