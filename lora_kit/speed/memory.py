"""Memory and time of a training step, counted on the meta device, and the batch that fits.

On the meta device tensors have shapes but no data: the bytes alive at once give the step's memory;
the bytes read and written and the FLOPs of its operations give its time. This works for any
architecture, for the fast paths and the standard one.
"""

from __future__ import annotations

import weakref
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from lora_kit.speed import fast
from lora_kit.speed.fast import Batch
from lora_kit.speed.prefix import decoder_layers, embedding_weight, first_trained_layer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ATEN = torch.ops.aten
# Operations whose FLOPs torch does not register: attention on a CPU (the same as on a GPU), and
# in-place products.
_FLASH = "_scaled_dot_product_flash_attention"
for _known, _missing in (
    (_FLASH, f"{_FLASH}_for_cpu"),
    (f"{_FLASH}_backward", f"{_FLASH}_for_cpu_backward"),
    ("addmm", "addmm_"),
    ("baddbmm", "baddbmm_"),
):
    flop_registry[getattr(_ATEN, _missing)] = flop_registry[getattr(_ATEN, _known)]
CALL_S = 15e-6  # seconds of overhead per operation, including autograd
_MARGIN = 0.10  # share of the available memory that is left free
# Allocator overhead, fitted to measurements of scripts/bench/memory.py on a CPU: glibc splits freed
# aligned blocks and allocates new ones, so the process holds more than the live memory: by a share
# of it, another share of the logits in it, and a constant for code pages.
_UNUSED_SHARE, _UNUSED_OF_LOGITS, _UNUSED_BYTES = 0.46, 0.6, 100 << 20
_RATE_REACHED = 0.72  # achieved share of the rates measured on single operations


@dataclass(frozen=True)
class PassCost:
    """Cost of one forward and backward pass of a micro-batch.

    Attributes:
        tokens: of the collated batch. peak: most bytes alive at once, without weights and adapter.
        logits: the bytes of `peak` that belong to logits: tensors as wide as the vocabulary.
        done: {(FLOPs, bytes read and written, dtype): number of operations}.
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
    """A device.

    Attributes:
        room: bytes that this process may use. framework: bytes in use before the base is loaded.
        flops: FLOP/s of matrix products by dtype. bandwidth: bytes/s of elementwise operations.
        share: of the time of their measurement that this process had a core; else others had it.
    """

    name: str
    room: int
    framework: int
    flops: dict[str, float]
    bandwidth: float
    share: float = 1.0

    @property
    def limit(self) -> int:
        """Bytes that a plan may use, after the margin."""
        return int(self.room * (1 - _MARGIN))

    def seconds(self, work: PassCost) -> float:
        """Seconds of a micro-batch, by the roofline model (Williams et al. 2009)."""
        alone = sum(
            times * max(flops / self.flops[dtype] if flops else 0.0, size / self.bandwidth)
            for (flops, size, dtype), times in work.done.items()
        )
        return alone / _RATE_REACHED + sum(work.done.values()) * CALL_S


def unused_bytes(work: PassCost) -> int:
    """Overhead of the CPU allocator, on top of live memory."""
    share = _UNUSED_SHARE * (work.peak - work.logits) + _UNUSED_OF_LOGITS * work.logits
    return _UNUSED_BYTES + int(share)


@dataclass(frozen=True)
class Choice:
    """Rows per micro-batch, micro-batches per step, and the number of layers with recomputed
    activations (gradient checkpointing), counted from the lowest layer with gradients."""

    micro_batch: int
    accumulation: int
    recomputed: int


def choose_batch(
    rows: int,
    own: int,
    again: range,
    fits: Callable[[int, int], bool],
    seconds: Callable[[int, int], float],
) -> Choice | None:
    """The fastest way to run a step of `rows` rows in micro-batches of at most `own` rows.

    Args:
        rows: per optimizer step. own: the run file's micro-batch.
        again: numbers of recomputed layers to choose from; nine evenly spaced ones are tried.
        fits, seconds: functions of (micro-batch, recomputed layers), for one micro-batch; more
            recomputed layers take less memory and more time.

    Returns:
        None: nothing fits, not even one row with all layers recomputed.
    """
    steps = sorted({again[part * (len(again) - 1) // 8] for part in range(9)})
    found: dict[Choice, float] = {}
    for micro in (n for n in range(own, 0, -1) if rows % n == 0):
        enough = bisect_left(steps, True, key=partial(fits, micro))  # the fewest that fit
        if enough < len(steps):
            choice = Choice(micro, rows // micro, steps[enough])
            found[choice] = choice.accumulation * seconds(micro, steps[enough])
        if enough == 0:
            break  # smaller micro-batches are not faster
    return min(found, key=lambda choice: found[choice], default=None)


def recompute(model: torch.nn.Module, count: int) -> int:
    """Recompute the activations of the lowest `count` layers with gradients in the backward pass
    (gradient checkpointing: Chen et al. 2016, arXiv:1604.06174). Returns how many such layers the
    model has.

    In training mode only; no gradient is forced through the frozen layers below.
    """
    layers = decoder_layers(model)[first_trained_layer(model) :]
    again = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    for number, layer in enumerate(layers):
        layer.gradient_checkpointing = number < count  # type: ignore[assignment]
        layer._gradient_checkpointing_func = again  # type: ignore[assignment]
    return len(layers)


def assume_fast(model: torch.nn.Module, flat: bool = True) -> bool:
    """Install the fast paths of `fast.make_fast` into a model on the meta device, untested. Returns
    whether batches are without padding.

    Args:
        flat: the task allows batches without padding; otherwise only the fast layers are installed.
    """
    for name, install in fast.PARTS.items():
        if flat or name in fast.FOR_ANY_MODEL:
            install(model)
    return flat and fast.takes_flat(model)


Loss = Callable[[torch.nn.Module, Batch], torch.Tensor]


def count(model: torch.nn.Module, batch: Batch, loss: Loss, backward: bool = True) -> PassCost:
    """Run a micro-batch on the meta device.

    Args:
        model: on the meta device, with the adapter attached.
        batch: its inputs (see `on_meta`). loss: a function of model and batch.
        backward: False: only the forward pass, as in evaluation.
    """
    vocabulary = len(embedding_weight(model))
    known = [*model.parameters(), *model.buffers(), *batch.values()]
    counter = _CostCounter([x for x in known if torch.is_tensor(x)], vocabulary)
    tokens = sum(v.numel() for name, v in batch.items() if name.endswith("input_ids"))
    with counter, torch.set_grad_enabled(backward):
        found = loss(model.train(backward), dict(batch))
        if backward:
            found.backward()
    model.train().zero_grad()
    return PassCost(tokens, counter.peak, counter.logits, dict(counter.done))


def on_meta(batch: Batch, masked: bool = False) -> Batch:
    """A collated batch on the meta device.

    Padding is masked with a four-dimensional mask, which transformers passes through: on the meta
    device it cannot inspect a padding mask. masked: add a mask even without padding.
    """
    moved = {n: v.to("meta") if torch.is_tensor(v) else v for n, v in batch.items()}
    moved.pop("numbers", None)  # row indices
    if "documents" in moved:
        return moved
    packed = "position_ids" in moved
    if moved.pop("attention_mask", None) is not None or packed or masked:
        rows, length = moved["input_ids"].shape
        mask = torch.empty((rows, 1, length, length), dtype=torch.bool, device="meta")
        moved["attention_mask"] = mask
    return {n: v for n, v in moved.items() if not (packed and n == "position_ids")}


class _CostCounter(TorchDispatchMode):
    """Counts every operation of the forward and backward pass."""

    def __init__(self, known: list[torch.Tensor], vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.done: Counter[tuple[int, int, str]] = Counter()
        self.alive = self.alive_logits = self.peak = self.logits = 0
        # torch returns the same Python object for a storage while it is alive.
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
            formula = flop_registry.get(func.overloadpacket)
            if formula is not None:
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


def count_attention(model: PreTrainedModel) -> bool:
    """Make the standard path of a model on the meta device use the attention kernel of a real
    device. Returns False for a model that does not use torch's SDPA."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        with _Flash():
            return sdpa_attention_forward(*args, **kwargs)

    if model.config._attn_implementation != "sdpa":
        return False
    # A name without a registered mask function, so that no mask is built from meta tensors.
    AttentionInterface.register("lora_kit_counted", counted)
    model.set_attn_implementation("lora_kit_counted")
    return True


class _Flash(TorchFunctionMode):
    """Replaces torch's SDPA kernel: on the meta device it would pick the one that stores all
    probabilities, where a real device uses FlashAttention (Dao et al. 2022, arXiv:2205.14135)."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        dropped = kwargs.get("dropout_p", 0.0)
        if func is not torch.nn.functional.scaled_dot_product_attention or dropped:
            return func(*args, **kwargs)
        mask = kwargs.get("attn_mask")
        if mask is not None:  # a bool mask is converted in each layer
            mask = torch.empty_like(mask, dtype=args[0].dtype)
        return _ATEN._scaled_dot_product_flash_attention_for_cpu(
            *args[:3], dropped, kwargs.get("is_causal", False),
            attn_mask=mask, scale=kwargs.get("scale"),
        )[0]  # fmt: skip
