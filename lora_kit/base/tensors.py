"""safetensors files: headers are checked, tensors are read and written one at a time.

A file is a header length (8 bytes, little endian), a JSON header {name: {dtype, shape,
data_offsets}} and the bytes (https://github.com/huggingface/safetensors#format). The library maps
the whole file, which counts as this process's memory, and accepts duplicate keys; its writer needs
all tensors of a file in memory.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from lora_kit.errors import UserError, reason_of
from lora_kit.trust import read_json

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
_LARGEST_HEADER = 25_000_000  # bytes; the library takes 100,000,000
# Tensors of a file, and of a model: 384 experts in 60 layers are 70,000.
_MOST_IN_FILE, _MOST = 65_536, 100_000
_LARGEST_SHAPE = 16  # dimensions
PIECE = 16 * 2**20  # bytes of a large tensor that are in memory at once
# safetensors dtype -> (torch dtype, bytes per element).
# fmt: off
DTYPES = {
    "F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1), "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8), "I32": ("int32", 4), "I16": ("int16", 2), "I8": ("int8", 1),
    "U64": ("uint64", 8), "U32": ("uint32", 4), "U16": ("uint16", 2), "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
# fmt: on
FLOATS = {"F64", "F32", "F16", "BF16"}


def torch_dtype(dtype: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype."""
    import torch

    found: torch.dtype = getattr(torch, DTYPES[dtype][0])
    return found


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, which is not read yet: `size` bytes at `offset`."""

    name: str
    dtype: str  # safetensors' name: BF16
    shape: tuple[int, ...]
    file: Path
    offset: int
    size: int

    @property
    def rows(self) -> int:
        """Length of the first dimension; 1 for a single number."""
        return self.shape[0] if self.shape else 1

    @property
    def width(self) -> int:
        """Elements of a row."""
        return math.prod(self.shape[1:])

    def read(self, first: int = 0, last: int | None = None) -> torch.Tensor:
        """The tensor in its own dtype; optionally only the rows first:last.

        Raises:
            UserError: the file is truncated.
        """
        import torch

        start, end, _ = slice(first, last).indices(self.rows)
        row_bytes = self.size // max(1, self.rows)
        values = torch.empty(row_bytes * (end - start), dtype=torch.uint8)
        with self.file.open("rb") as opened:
            opened.seek(self.offset + row_bytes * start)
            if opened.readinto(values.numpy().data) < len(values):
                raise UserError(f"{self.file}: truncated: copy it again")
        shape = (end - start, *self.shape[1:]) if self.shape else ()
        return values.view(torch_dtype(self.dtype)).reshape(shape)

    def blocks(self, multiple: int = 1) -> Iterator[slice]:
        """The rows in blocks of about 16 MiB, each of a `multiple` of rows but the last."""
        row_bytes = self.size // max(1, self.rows)
        step = max(1, PIECE // multiple // max(1, row_bytes)) * multiple
        for first in range(0, self.rows, step):
            yield slice(first, min(first + step, self.rows))


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
        why = reason_of(error)
        raise UserError(f"{file}: corrupt safetensors file ({why}): copy it again") from None


def _parsed(file: Path, opened: BinaryIO) -> dict[str, Stored]:
    """See `stored`. Raises ValueError, KeyError, TypeError, ... on an invalid header."""
    file_size = os.fstat(opened.fileno()).st_size
    length = int.from_bytes(opened.read(8), "little")
    if file_size < 8 or length > min(_LARGEST_HEADER, file_size - 8):
        raise ValueError(f"a header of {length:,} bytes")
    header = json.loads(opened.read(length), object_pairs_hook=_unique_keys)
    header.pop("__metadata__", None)
    if len(header) > _MOST_IN_FILE:
        raise ValueError(f"{len(header):,} tensors")
    found: dict[str, Stored] = {}
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = entry["data_offsets"]
        shape = tuple(entry["shape"][: _LARGEST_SHAPE + 1])
        whole_numbers = all(type(n) is int and 0 <= n < 2**63 for n in (start, stop, *shape))
        if len(shape) > _LARGEST_SHAPE:
            raise ValueError(f"{name!r:.80}: more than {_LARGEST_SHAPE} dimensions")
        size = math.prod(shape) * DTYPES[entry["dtype"]][1]
        if not whole_numbers or start != end or stop - start != size:
            raise ValueError(f"{name!r:.80}: offsets do not match its shape")
        offset = 8 + length + start
        found[name] = Stored(name, entry["dtype"], shape, file, offset, stop - start)
        end = stop
    if 8 + length + end != file_size:
        raise ValueError(f"{file_size:,} bytes instead of {8 + length + end:,}")
    return found


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
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
            names = set(read_json(index, _LARGEST_HEADER)["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            raise UserError(f"{index}: invalid shard index: copy the model again") from None
        for name in names:
            if not isinstance(name, str) or Path(name).name != name:
                raise UserError(f"{index}: lists a file outside of its folder: {name!r:.80}")
    found: dict[str, Stored] = {}
    for name in sorted(names):
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: missing: copy the model again")
        shard = stored(folder / name)
        twice = sorted(found.keys() & shard.keys())
        if twice:
            raise UserError(f"{folder}: {twice[0]} is in two shards: copy the model again")
        found |= shard
        if len(found) > _MOST:
            raise UserError(f"{folder}: more than {_MOST:,} tensors: use another model")
    return found


def write_file(
    file: Path,
    entries: Mapping[str, tuple[str, tuple[int, ...]]],
    blocks: Callable[[str], Iterable[torch.Tensor]],
) -> int:
    """Write a new file, of which only two blocks are in memory at a time; it is on disk at the end.

    Args:
        entries: {name: (dtype, shape)}, in the order of the file.
        blocks: the values of a tensor by its name, in consecutive blocks of the declared dtype,
            which stay as they are: a block is written while the next one is asked for.

    Returns:
        zlib's crc32 of the whole file.
    """
    import torch

    header: dict[str, dict[str, object]] = {"__metadata__": {"format": "pt"}}
    sizes: dict[str, int] = {}
    end = 0
    for name, (dtype, shape) in entries.items():
        sizes[name] = math.prod(shape) * DTYPES[dtype][1]
        start, end = end, end + sizes[name]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start_of_file = len(text).to_bytes(8, "little") + text
    crc = 0

    def put(data: bytes | memoryview) -> None:
        nonlocal crc
        crc = zlib.crc32(data, crc)
        opened.write(data)
        if hasattr(os, "posix_fadvise"):  # the disk begins to write now, not at the end
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    # A thread writes each block while the next one is computed.
    with file.open("xb") as opened, ThreadPoolExecutor(1) as writer:
        last = writer.submit(put, start_of_file)
        for name, (dtype, _) in entries.items():
            left = sizes[name]
            for block in blocks(name):
                assert block.dtype == torch_dtype(dtype), f"{name} is {block.dtype}"
                data = block.contiguous().reshape(-1).view(torch.uint8).numpy().data
                left -= len(data)
                last.result()
                last = writer.submit(put, data)
            assert left == 0, f"{name}: {sizes[name]} bytes declared, {sizes[name] - left} written"
        last.result()
        opened.flush()
        os.fsync(opened.fileno())
    return crc
