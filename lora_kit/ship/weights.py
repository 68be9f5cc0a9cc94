"""The weights of a merged model, streamed from the base's files into new ones.

W + scale · B A is summed in float32, float64 weights in float64, and rounded once. Tensors that the
adapter does not change are copied. Only a block of rows is in memory, or one matrix where that is
needed (NF4, and DoRA on transposed weights).
"""

from __future__ import annotations

import math
import mmap
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from lora_kit.adapter.files import Adapter, write_json
from lora_kit.adapter.names import Change, plan_merge, tensor_of
from lora_kit.base import tensors as files
from lora_kit.base.head import head_layers
from lora_kit.base.tensors import DTYPES, FLOATS, INDEX, Stored, torch_dtype
from lora_kit.errors import CheckFailed, UserError
from lora_kit.hashes import file_hash
from lora_kit.schema import Json
from lora_kit.speed.runtime import keep_freed_memory

if TYPE_CHECKING:
    import torch

    from lora_kit.base.load import Model

_ROWS = 64  # summed in float32 at once, so that they stay in the processor's cache
_STORED_AS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


class Weights:
    """The tensors of a merged model, in shards of the base's names and order.

    Attributes:
        entries: {tensor: (dtype, shape)} to be written, `bytes` in all.
        changed: number of tensors that the adapter changes.
        shards: {file of the base: names of its tensors in the merged model}.
        dtype: of most of the written weights, as torch names it.

    Args:
        tensors: of the base's files, by the names that the merged model has.
        dtype: of the written tensors, `bfloat16`, `float16` or `float32`; None: each keeps the
            base's.
        head: see `adapter.names.plan_merge`.
        guard: the name of a tensor without values that is written as well.
    """

    def __init__(
        self,
        adapter: Adapter,
        tensors: dict[str, Stored],
        config: Json,
        dtype: str | None,
        head: Mapping[str, tuple[int, ...]] | None = None,
        guard: str | None = None,
    ) -> None:
        self.adapter, self.tensors = adapter, tensors
        self.has_head = head is not None
        self.plan = plan_merge(adapter, tensors, config, head)
        self.changed = len(self.plan.changes)
        if guard is not None:
            first = next(iter(tensors.values()))
            self.plan.changes[guard] = Change(Stored(guard, "F32", (0,), first.file, 0, 0))
        # Set by `quantize`: tensors that are quantized to NF4 and back before B A is added, and the
        # dtype that they are quantized from.
        self.linear: set[str] = set()
        self.trained_in = "float32"
        self.shards: dict[Path, list[str]] = {}
        sizes: Counter[str] = Counter()
        for name, tensor in tensors.items():
            self.shards.setdefault(tensor.file, []).append(name)
            if tensor.dtype in FLOATS:
                sizes[tensor.dtype] += tensor.size
        # A head that the files lack comes last.
        self.shards[tensor.file] += [name for name in self.plan.changes if name not in tensors]
        main = max(sizes, key=sizes.__getitem__, default="F32")
        self.dtype = dtype or DTYPES[main][0]
        self.entries: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name in chain.from_iterable(self.shards.values()):
            source = self._source(name)
            kind = _STORED_AS[dtype] if dtype else main
            # A 16-bit base keeps some tensors in float32 on purpose: they stay so.
            if name in tensors and (dtype is None or (tensors[name].dtype == "F32" != main)):
                kind = tensors[name].dtype
            if source.dtype not in FLOATS:
                kind = source.dtype
            self.entries[name] = (kind, source.shape)
        self.bytes = sum(math.prod(s) * DTYPES[d][1] for d, s in self.entries.values())
        # The experts of a layer share one pair of factors, which is needed for many tensors.
        self._factors_of = lru_cache(maxsize=2)(self._read_factors)

    def copied(self, name: str) -> bool:
        """Whether a tensor is the base's, byte for byte."""
        source = self.tensors.get(name)
        if source is None or name in self.plan.changes or name in self.linear:
            return False
        return source.dtype == self.entries[name][0]

    def quantize(self, model: Model, dtype: str) -> None:
        """Use the NF4-dequantized weights wherever bitsandbytes would quantize.

        Args:
            model: the base with its head on the meta device.
            dtype: that it was trained in.
        """
        import torch
        from transformers.quantizers.base import get_keys_to_not_convert
        from transformers.quantizers.quantizers_utils import should_convert_module

        skipped = head_layers(model) if self.has_head else get_keys_to_not_convert(model)
        for name, module in model.named_modules():
            if type(module).__name__ == "Conv1D":
                kind = model.config.model_type
                raise UserError(f"{kind}: not merged into NF4 weights: merge it into the base")
            if type(module) is torch.nn.Linear and should_convert_module(name, list(skipped)):
                self.linear.add(tensor_of(name, self.tensors))
        self.trained_in = dtype

    def write(
        self, folder: Path, hashes: dict[str, str], refuse: Callable[[list[str]], None]
    ) -> None:
        """Write all shards and their index.

        Args:
            hashes: {file: sha256} of the base; `refuse` is called with a file that differs.

        Raises:
            CheckFailed: a value is not finite, or a file read back is not what was written.
        """
        import torch

        keep_freed_memory()  # each block would be mapped, zeroed and unmapped
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the work is too small to share, and hashing has the other cores
        try:
            with ThreadPoolExecutor(2) as pool:
                checks = []
                for file, names in self.shards.items():
                    hashed = pool.submit(file_hash, file) if file.name in hashes else None
                    entries = {name: self.entries[name] for name in names}
                    written = folder / file.name
                    crc = files.write_file(written, entries, self._blocks)
                    checks.append(pool.submit(_check_file, written, entries, crc))
                    if hashed and hashed.result() != hashes[file.name]:
                        refuse([file.name])
                for check in checks:
                    check.result()
        finally:
            torch.set_num_threads(threads)
        if (next(iter(self.shards)).parent / INDEX).is_file():
            where = {name: file.name for file, names in self.shards.items() for name in names}
            index = {"metadata": {"total_size": self.bytes}, "weight_map": where}
            write_json(folder / INDEX, index)

    def _source(self, name: str) -> Stored:
        """The tensor that a tensor of the merged model is made of."""
        change = self.plan.changes.get(name)
        return change.source if change else self.tensors[name]

    def _blocks(self, name: str) -> Iterator[torch.Tensor]:
        """The values of a tensor as they are written, in blocks of rows.

        Raises:
            CheckFailed: a value is not finite.
        """
        import torch

        source, change = self._source(name), self.plan.changes.get(name)
        add = self._adder(change) if change else None
        dtype = torch_dtype(self.entries[name][0])
        blocks = source.blocks(_ROWS)
        if name in self.linear:  # the scales of NF4 are quantized together
            blocks = iter([slice(0, source.rows)])
        for rows in blocks:
            values = source.read(rows.start, rows.stop).reshape(-1, source.width)
            if name in self.linear:
                values = _through_nf4(values, self.trained_in)
            written = values
            if values.is_floating_point() and not self.copied(name):
                if values.dtype != dtype:
                    written = torch.empty(values.shape, dtype=dtype)
                for at in range(0, len(values), _ROWS):
                    wide = values[at : at + _ROWS].to(_sum_dtype(source))
                    if add:
                        add(wide, rows.start + at)
                    written[at : at + _ROWS] = wide
            _check_finite(name, written)
            yield written

    def _adder(self, change: Change) -> Callable[[torch.Tensor, int], None]:
        """A function that applies a change in place to rows in `_sum_dtype`, given the number of
        the first one."""
        import torch

        exact = _sum_dtype(change.source)
        product = magnitude = norms = bias = None
        if change.module:
            a, b = self._factors_of(change.module, change.rank)
            a, b = a[change.expert].to(exact), b[change.expert, change.first :].to(exact)
            # dW is scale times the product of these.
            product = (a.T, b.T) if change.transposed else (b, a)
        if change.magnitude and product:
            magnitude = change.magnitude.read().to(exact)
            if change.transposed:  # (in, out): the norm of an output is that of its column
                whole = change.source.read().to(exact).addmm_(*product, alpha=change.scale)
                norms = whole.double().norm(dim=0).to(exact)
        if change.bias:
            bias = change.bias.read().to(exact)
        tokens = torch.tensor(change.tokens)
        token_rows = change.token_rows.read().to(exact) if change.token_rows else None

        def add(wide: torch.Tensor, first: int) -> None:
            last = first + len(wide)
            if product:
                wide.addmm_(product[0][first:last], product[1], alpha=change.scale)
            if norms is not None:
                wide *= magnitude / norms
            elif magnitude is not None:
                wide *= (magnitude[first:last] / wide.norm(dim=1))[:, None]
            if bias is not None:
                wide += change.scale * bias[first:last, None]
            if token_rows is not None:
                here = (tokens >= first) & (tokens < last)
                wide[tokens[here] - first] = token_rows[here]

        return add

    def _read_factors(self, module: str, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(experts, r, in), (experts, out, r), float32 or float64."""
        import torch

        a, b = self.adapter.read_factors(module, rank)
        exact = torch.promote_types(a.dtype, torch.float32)
        return a.to(exact), b.to(exact).contiguous()


def _sum_dtype(source: Stored) -> torch.dtype:
    """The dtype that a tensor and its change are summed in: float32, of a float64 one float64."""
    import torch

    return torch.float64 if source.dtype == "F64" else torch.float32


def _through_nf4(weight: torch.Tensor, dtype: str) -> torch.Tensor:
    """A weight (out, in) as it is after NF4 with double quantization, blocks of 64 (QLoRA, Dettmers
    et al. 2023, arXiv:2305.14314), as `base.load` has it."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = weight.to(getattr(torch, dtype))
    packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    return dequantize_4bit(packed, state)


def _check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raises CheckFailed on NaN and infinity."""
    if tensor.numel() and tensor.is_floating_point() and tensor.element_size() > 1:
        least, most = tensor.aminmax()
        if not (least.isfinite() and most.isfinite()):
            raise CheckFailed(f"{name}: NaN or infinite after the merge: not written")


def _check_file(file: Path, entries: dict[str, tuple[str, tuple[int, ...]]], crc: int) -> None:
    """Raises CheckFailed unless the disk has what was written."""
    found = {name: (one.dtype, one.shape) for name, one in files.stored(file).items()}
    again = 0
    for piece in _pieces(file):
        again = zlib.crc32(piece, again)
    if found != entries or again != crc:
        raise CheckFailed(f"{file.name}: read back, it is not what was written: a bad disk?")


def _pieces(file: Path) -> Iterator[memoryview]:
    """The bytes of a file in pieces of 16 MiB, each overwritten by the next; past the page cache
    where the file system can."""

    def direct(path: str, flags: int) -> int:
        return os.open(path, flags | getattr(os, "O_DIRECT", 0))

    piece = mmap.mmap(-1, files.PIECE)  # O_DIRECT needs whole pages of memory
    try:
        opened = open(file, "rb", buffering=0, opener=direct)  # noqa: SIM115
        count = opened.readinto(piece)
    except OSError:  # EINVAL: for instance on tmpfs
        opened = file.open("rb", buffering=0)
        if hasattr(os, "posix_fadvise"):  # what the cache holds is read from the disk again
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        count = opened.readinto(piece)
    with opened:
        left = os.fstat(opened.fileno()).st_size
        while count:
            yield memoryview(piece)[:count]
            left -= count
            count = opened.readinto(piece) if left else 0
