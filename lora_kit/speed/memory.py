"""What a training step needs, counted without running it, and the choice of what fits.

A step is run on the meta device, where tensors have shapes and no content: what is alive at once is
its memory, what its operations read, write and multiply is its time. That holds for any
architecture, and for the quick path as for the plain one.
"""

from __future__ import annotations

import weakref
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from lora_kit.speed import attention, fast
from lora_kit.speed.prefix import decoder_layers, first_trained_layer

_ATEN = torch.ops.aten
for _end in ("", "_backward"):  # torch counts the FLOPs of a GPU's alone; a CPU's are the same
    _gpu, _cpu = (f"_scaled_dot_product_flash_attention{where}{_end}" for where in ("", "_for_cpu"))
    flop_registry[getattr(_ATEN, _cpu)] = flop_registry[getattr(_ATEN, _gpu)]
for _name in ("addmm", "baddbmm"):  # and none of what happens in place
    flop_registry[getattr(_ATEN, f"{_name}_")] = flop_registry[getattr(_ATEN, _name)]
CALL_S = 15e-6  # that starting an operation takes, autograd's part included
_MARGIN = 0.10  # of what may be held, for what is not foreseen
# Fitted to what scripts/bench/memory.py measures on a CPU. glibc gives an aligned block that was
# freed to smaller ones, and takes new memory for the next of its size: a share of what is alive is
# held besides, and pages of code that computes.
_UNUSED_SHARE, _UNUSED_OF_LOGITS, _UNUSED_BYTES = 0.46, 0.6, 100 << 20
_RATE_REACHED = 0.72  # of the rates that are measured on one operation alone


@dataclass(frozen=True)
class Work:
    """One forward and backward pass of a micro-batch.

    Args:
        tokens: of the batch as it is handed over. peak: bytes alive at once, beside weights and
            adapter. logits: the part of them that is as wide as the vocabulary.
        done: how often an operation of (FLOPs, bytes read and written, dtype) is carried out.
    """

    tokens: int
    peak: int
    logits: int
    done: dict[tuple[int, int, str], int]

    @property
    def flops(self) -> int:
        return sum(flops * times for (flops, _, _), times in self.done.items())


@dataclass(frozen=True)
class Machine:
    """A device: bytes that this process may come to hold, those that it holds before the base is
    loaded, FLOP/s of matrix products by dtype, bytes a second of simple operations."""

    name: str
    room: int
    framework: int
    flops: dict[str, float]
    bandwidth: float

    @property
    def limit(self) -> int:
        """What a plan may come to, a margin left."""
        return int(self.room * (1 - _MARGIN))

    def seconds(self, work: Work) -> float:
        """A pass, each operation bound by arithmetic or by memory (Williams et al. 2009)."""
        alone = sum(
            times * max(flops / self.flops[dtype] if flops else 0.0, size / self.bandwidth)
            for (flops, size, dtype), times in work.done.items()
        )
        return alone / _RATE_REACHED + sum(work.done.values()) * CALL_S


def unused_bytes(work: Work) -> int:
    """What the allocator of a CPU's process holds besides what is alive."""
    share = _UNUSED_SHARE * (work.peak - work.logits) + _UNUSED_OF_LOGITS * work.logits
    return _UNUSED_BYTES + int(share)


@dataclass(frozen=True)
class Choice:
    """Rows of a pass, passes of a step, and how many layers, from the lowest one that keeps
    anything, are computed again in the backward pass."""

    micro_batch: int
    accumulation: int
    recomputed: int


def choose(
    rows: int,
    own: int,
    again: range,
    fits: Callable[[int, int], bool],
    seconds: Callable[[int, int], float],
) -> Choice | None:
    """The quickest way to do a step of `rows` rows in passes of `own` rows or fewer.

    Args:
        again: the numbers of layers that may be computed again; those between are tried in eighths.
        fits, seconds: of one pass, both of (micro-batch, layers computed again); more layers take
            less memory and more time.

    Returns:
        None: not even a row at a time, all layers computed again, fits.
    """
    steps = sorted({again[part * (len(again) - 1) // 8] for part in range(9)})
    found: dict[Choice, float] = {}
    for micro in (n for n in range(own, 0, -1) if rows % n == 0):
        enough = bisect_left(steps, True, key=partial(fits, micro))
        for recomputed in steps[enough : enough + 1]:
            choice = Choice(micro, rows // micro, recomputed)
            found[choice] = choice.accumulation * seconds(micro, recomputed)
        if enough == 0:
            break  # a smaller pass is no quicker
    return min(found, key=lambda choice: found[choice], default=None)


def recompute(model: Any, count: int) -> int:
    """Let the lowest `count` layers that keep anything for the backward pass keep their input
    alone, and be computed again (Chen et al. 2016, arXiv:1604.06174). Returns how many there are.

    While the model is in training mode; no gradient is forced through the layers below them.
    """
    layers = decoder_layers(model)[first_trained_layer(model) :]
    again = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    for number, layer in enumerate(layers):
        layer.gradient_checkpointing = number < count  # type: ignore[assignment]
        layer._gradient_checkpointing_func = again  # type: ignore[assignment]
    return len(layers)


def assume_fast(model: Any, flat: bool = True) -> bool:
    """Put the quick paths of `fast.make_fast` into a model on the meta device, where there is no
    content to try them on. Returns whether rows come without padding.

    Args:
        flat: of a causal language model, whose batches may come so; others get the quick layers.
    """
    for name, (install, _) in fast.PARTS.items():
        if flat or name in ("linear", "norm"):
            install(model)
    return flat and bool(model.get_base_model().config._attn_implementation == attention.NAME)


Loss = Callable[[Any, dict[str, Any]], torch.Tensor]


def count(model: Any, batch: dict[str, Any], loss: Loss, backward: bool = True) -> Work:
    """Run a pass on the meta device.

    Args:
        model: on the meta device, its adapter attached.
        batch: its inputs there (see `on_meta`). loss: of model and batch.
        backward: a training pass; without it the forward alone, as in evaluation.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    known = [*model.parameters(), *model.buffers(), *batch.values()]
    counter = _Count([x for x in known if torch.is_tensor(x)], vocabulary)
    tokens = sum(v.numel() for name, v in batch.items() if name.endswith("input_ids"))
    with counter, torch.set_grad_enabled(backward):
        found = loss(model.train(backward), dict(batch))
        if backward:
            found.backward()
    model.train().zero_grad()
    return Work(tokens, counter.peak, counter.logits, dict(counter.done))


def on_meta(batch: dict[str, Any], masked: bool = False) -> dict[str, Any]:
    """A collated batch without content.

    What of a padded batch is not seen is masked by four dimensions, which transformers hands
    through: it cannot look for padding where there is no content. masked: there is a mask even
    where all is seen.
    """
    moved = {n: v.to("meta") if torch.is_tensor(v) else v for n, v in batch.items()}
    moved.pop("numbers", None)  # of rows of the data
    if "documents" in moved:
        return moved
    packed = "position_ids" in moved
    if moved.pop("attention_mask", None) is not None or packed or masked:
        rows, length = moved["input_ids"].shape
        mask = torch.empty((rows, 1, length, length), dtype=torch.bool, device="meta")
        moved["attention_mask"] = mask
    return {n: v for n, v in moved.items() if not (packed and n == "position_ids")}


class _Count(TorchDispatchMode):
    """Sees every operation of the forward and the backward pass."""

    def __init__(self, known: list[torch.Tensor], vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.done: Counter[tuple[int, int, str]] = Counter()
        self.alive = self.alive_logits = self.peak = self.logits = 0
        # A storage is one object in Python as long as it lives (torch keeps it).
        self.seen = weakref.WeakSet(x.untyped_storage() for x in known)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        made = [x for x in tree_leaves(out) if torch.is_tensor(x)]
        if not func.is_view and made:
            read = [x for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)]
            size = sum(x.numel() * x.element_size() for x in read + made)
            flops = 0
            if formula := flop_registry.get(func.overloadpacket):
                flops = int(formula(*args, **kwargs, out_val=out))
            self.done[flops, size, str(made[0].dtype).removeprefix("torch.")] += 1
        for tensor in made:
            self._add(tensor)
        return out

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self.seen:
            return
        self.seen.add(storage)
        size, wide = storage.nbytes(), tensor.shape[-1:] == (self.vocabulary,)
        weakref.finalize(storage, self._remove, size, wide)
        self.alive += size
        self.alive_logits += size * wide
        if self.alive > self.peak:
            self.peak, self.logits = self.alive, self.alive_logits

    def _remove(self, size: int, wide: bool) -> None:
        self.alive -= size
        self.alive_logits -= size * wide


def count_attention(model: Any) -> bool:
    """Let the plain path of a model on the meta device attend as it would on a CPU or a GPU.
    Returns False for one that does without torch's attention."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        with _Flash():
            return sdpa_attention_forward(*args, **kwargs)

    if model.config._attn_implementation != "sdpa":
        return False
    # Under a name without a mask of its own, so that none is made from what has no content.
    AttentionInterface.register("lora_kit_counted", counted)
    model.set_attn_implementation("lora_kit_counted")
    return True


class _Flash(TorchFunctionMode):
    """On the meta device torch would take the attention that keeps all probabilities, as a CPU does
    with dropout; else it takes one that keeps none (Dao et al. 2022, arXiv:2205.14135)."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        dropped = kwargs.get("dropout_p", 0.0)
        if func is not torch.nn.functional.scaled_dot_product_attention or dropped:
            return func(*args, **kwargs)
        mask = kwargs.get("attn_mask")
        if mask is not None:  # one of bools becomes numbers, in each layer
            mask = torch.empty_like(mask, dtype=args[0].dtype)
        return _ATEN._scaled_dot_product_flash_attention_for_cpu(
            *args[:3], dropped, kwargs.get("is_causal", False),
            attn_mask=mask, scale=kwargs.get("scale"),
        )[0]  # fmt: skip
