"""Causal attention over documents packed into one row without padding.

A document attends only to itself, and no (tokens, tokens) mask is built. On a CPU, torch's kernel
takes two to three times as long in bfloat16 as matrix products over blocks, which this uses: blocks
of queries, each with the keys up to its end. The probabilities of short documents are kept for the
backward pass; those of long ones are recomputed (Rabe & Staats 2021, arXiv:2112.05682). On a GPU
this is torch's variable-length FlashAttention.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch

from lora_kit.speed.runtime import on_gpu

NAME = "lora_kit"
_BLOCK = 256  # queries per block
# oneDNN caches half a megabyte for each new shape. So block lengths are multiples of this, and rows
# are padded to one of sixteen lengths between two powers of two.
_MULTIPLE = 32
# Longest document whose probabilities are kept for the backward pass: on average tokens / 2 values
# per token and head.
_KEPT = 1024
_SLIDING = "sliding_attention"
_KINDS = ("full_attention", _SLIDING)
# Arguments that do not change the arithmetic below; any other (softcap, sinks, a position bias) is
# unsupported.
_HARMLESS = {
    "cache_position", "is_causal", "num_items_in_batch", "output_attentions",
    "output_hidden_states", "past_key_values", "position_embeddings", "position_ids", "use_cache",
}  # fmt: skip

_States = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # q, k, v


class DocumentAttention(torch.autograd.Function):
    """softmax(scale Q K' + causal mask) V within each document.

    Args (of `apply`):
        q: (heads, tokens, size). k, v: (groups, tokens, size); heads is a multiple of groups.
        documents: their lengths; positions after them get zeros.
        scale: of the scores. window: of sliding-window attention, in tokens; None: full attention.
        multiple: block lengths are rounded up to it, past the end of a document; so unless it is 1,
            q, k and v must have `padded_length` tokens.

    Returns:
        (heads, tokens, size)
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        documents: Sequence[int],
        scale: float,
        window: int | None,
        multiple: int,
    ) -> torch.Tensor:
        out = torch.empty_like(q)
        kept: list[torch.Tensor] = []
        recorded = any(ctx.needs_input_grad)
        blocks = _blocks(documents, window, multiple)
        for block in blocks:
            weights = _probabilities(q, k, block, scale, window)
            some = out[:, block.queries]
            some.copy_((weights @ v[:, block.keys]).view(some.shape))
            if block.kept and recorded:
                kept.append(weights)
        out[:, sum(documents) :] = 0
        ctx.save_for_backward(q, k, v, *kept)
        ctx.rest = blocks, sum(documents), scale, window
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        blocks, end, scale, window = ctx.rest
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for block in blocks:
            queries, keys, some = block.queries, block.keys, q[:, block.queries]
            weights = kept.pop(0) if block.kept else _probabilities(q, k, block, scale, window)
            grad = _by_group(grads[0][:, queries], len(k))
            dv[:, keys].baddbmm_(weights.mT, grad)
            inner = torch._softmax_backward_data(grad @ v[:, keys].mT, weights, -1, weights.dtype)
            dq[:, queries] = (inner @ k[:, keys]).view(some.shape).mul_(scale)
            dk[:, keys].baddbmm_(inner.mT, _by_group(some, len(k)), alpha=scale)
        dq[:, end:] = 0
        return dq, dk, dv, None, None, None, None


class _Block(NamedTuple):
    """A block of a document's queries, and the keys that they may attend to.

    Rounded up to a multiple, it may extend past the document's end. Keys there are masked by the
    causal mask; queries after the first `own` get zero probabilities, and their outputs are
    overwritten by the next block.
    """

    queries: slice
    keys: slice
    own: int
    kept: bool  # keep the probabilities (short documents)


def _blocks(documents: Sequence[int], window: int | None, multiple: int) -> list[_Block]:
    blocks = []
    for length, end in zip(documents, accumulate(documents), strict=True):
        for first in range(end - length, end, _BLOCK):
            own = min(_BLOCK, end - first)
            last = first + _round_up(own, multiple)
            seen = end - length if window is None else max(end - length, first - window + 1)
            blocks.append(_Block(slice(first, last), slice(seen, last), own, length <= _KEPT))
    return blocks


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def padded_length(documents: Sequence[int]) -> int:
    """Tokens of a row on a CPU, including the padding after the documents: as far as the blocks
    reach, rounded up to a sixteenth of the power of two below."""
    ends = zip(documents, accumulate(documents), strict=True)
    reached = max(end - length + _round_up(length, _MULTIPLE) for length, end in ends)
    sixteenth = 1 << (reached.bit_length() - 5)
    return _round_up(reached, max(_MULTIPLE, sixteenth))


def _by_group(x: torch.Tensor, groups: int) -> torch.Tensor:
    """(heads, tokens, size) -> (groups, heads / groups * tokens, size)"""
    return x.reshape(groups, -1, x.shape[-1])


def _probabilities(
    q: torch.Tensor, k: torch.Tensor, block: _Block, scale: float, window: int | None
) -> torch.Tensor:
    """(groups, heads / groups * queries, keys)"""
    queries, keys = block.queries, block.keys
    scores = (_by_group(q[:, queries], len(k)) * scale) @ k[:, keys].mT
    # Earlier keys are all visible, so only the block's own need a mask; with a window all keys do.
    masked = queries.start if window is None else keys.start
    query = torch.arange(queries.start, queries.stop, device=q.device)[:, None]
    key = torch.arange(masked, keys.stop, device=q.device)
    hidden = key > query  # (queries, masked keys)
    if window is not None:
        hidden |= key <= query - window
    by_head = scores.view(len(k), -1, len(query), scores.shape[-1])
    # Adding -inf is faster than masked_fill on the scores.
    by_head[..., masked - keys.start :] += scores.new_zeros(()).masked_fill(hidden, float("-inf"))
    weights = torch.softmax(scores, -1)
    weights.view(by_head.shape)[:, :, block.own :] = 0
    return weights


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    documents: Sequence[int] | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' interface: query (1, heads, tokens, size) -> (1, tokens, heads, size).

    Without `documents`, as in generation, this is transformers' own SDPA.

    Raises:
        NotImplementedError: the model needs an unsupported kind of attention.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if documents is None:
        if sliding_window is not None:
            others["sliding_window"] = sliding_window
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **others
        )
    given = {name for name, value in others.items() if value is not None and value is not False}
    unknown = sorted(given - _HARMLESS)
    if unknown or dropout or not getattr(module, "is_causal", True):
        raise NotImplementedError(f"attention with {', '.join(unknown) or 'dropout'}")
    kind = _kind(module)
    if kind not in _KINDS or (kind == _SLIDING and sliding_window is None):
        raise NotImplementedError(f"{kind}, which needs a mask")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    compute = _on_gpu if on_gpu(query) else _on_cpu
    return compute((query[0], key[0], value[0]), documents, scale, sliding_window)[None], None


def _kind(module: torch.nn.Module) -> str:
    """The kind of attention that transformers' mask gives a layer."""
    config = getattr(module, "config", None)
    if getattr(config, "attention_chunk_size", None):
        return "chunked_attention"
    if kinds := getattr(config, "layer_types", None):
        return str(kinds[module.layer_idx])
    slides = getattr(config, "sliding_window", None) is not None
    return _SLIDING if slides and getattr(config, "use_sliding_window", True) else _KINDS[0]


def _on_cpu(
    states: _States, documents: Sequence[int], scale: float, window: int | None
) -> torch.Tensor:
    """(tokens, heads, size)"""
    q, k, v = states
    heads, tokens, size = q.shape
    groups, count = len(k), len(documents)
    if k.dtype != torch.float32:
        # Scores are rounded to 16 bits. The mean of all keys adds a constant to a query's scores,
        # which softmax cancels: subtracting it first keeps the scores small.
        own = k[:, : sum(documents)].detach().float()
        k = k - own.mean(1, keepdim=True).to(k.dtype)
    compute: Callable[..., torch.Tensor] = DocumentAttention.apply
    if count == 1 or len(set(documents)) > 1:
        return compute(q, k, v, documents, scale, window, _MULTIPLE).transpose(0, 1)
    # Documents of equal length: as a batch, with one group of heads per document.
    length, end = documents[0], sum(documents)
    q = q[:, :end].reshape(groups, -1, count, length, size).transpose(1, 2)
    k, v = (x[:, :end].reshape(groups * count, length, size) for x in (k, v))
    out = compute(q.reshape(-1, length, size), k, v, documents[:1], scale, window, 1)
    out = out.view(groups, count, -1, length, size).permute(1, 3, 0, 2, 4)
    out = out.reshape(end, heads, size)
    return torch.nn.functional.pad(out, (0, 0, 0, 0, 0, tokens - end))


def _on_gpu(
    states: _States, documents: Sequence[int], scale: float, window: int | None
) -> torch.Tensor:
    """(tokens, heads, size)"""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        raise NotImplementedError("a GPU, which needs torch 2.10") from None

    takes = inspect.signature(varlen_attn).parameters
    query, key, value = (x.transpose(0, 1).contiguous() for x in states)
    if "window_size" in takes:  # a window of w tokens includes the token itself: w - 1 to the left
        left_right = (-1 if window is None else window - 1, 0)
        options: dict[str, Any] = {"scale": scale, "window_size": left_right}
    elif window is None:  # torch 2.10, which scales by size ** -0.5
        options = {"is_causal": True}
        query = query * (scale * query.shape[-1] ** 0.5)
    else:
        raise NotImplementedError("a sliding window on a GPU, which needs torch 2.11")
    if query.shape[1] != key.shape[1]:
        if "enable_gqa" in takes:
            options["enable_gqa"] = True
        else:  # before torch 2.12: a key and a value for each head of the query
            repeats = query.shape[1] // key.shape[1]
            key = key.repeat_interleave(repeats, 1)
            value = value.repeat_interleave(repeats, 1)
    ends = torch.tensor([0, *accumulate(documents)], dtype=torch.int32).to(
        states[0].device, non_blocking=True
    )
    longest = max(documents)
    out: Any = varlen_attn(query, key, value, ends, ends, longest, longest, **options)
    return out


def register() -> None:
    """Register the attention with transformers under `NAME`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
