"""The autograd functions of speed/ against the same arithmetic in float64."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

from lora_kit.speed.attention import DocumentAttention, _blocks, attention, padded_length
from lora_kit.speed.linear import LoraLinear
from lora_kit.speed.loss import causal_loss
from lora_kit.speed.norm import FrozenRMSNorm

# Of all gradients and outputs together, as the largest relative error allowed.
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
DTYPES = pytest.mark.parametrize("dtype", ALLOWED, ids=["float32", "bfloat16"])


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def compare(
    own: Callable[..., torch.Tensor],
    reference: Callable[..., torch.Tensor],
    learned: list[torch.Tensor],
    dtypes: list[torch.dtype],
    allowed: float,
) -> None:
    """Outputs and gradients of both, under the same random gradient of the output."""
    narrow = [
        tensor.to(d).requires_grad_(tensor.is_floating_point())
        for tensor, d in zip(learned, dtypes, strict=True)
    ]
    exact = [tensor.detach().double().requires_grad_() for tensor in narrow]
    found, expected = own(*narrow), reference(*exact)
    along = rows(*expected.shape, seed=9)
    found.backward(along.to(found.dtype))
    expected.backward(along.to(found.dtype).double())
    pairs = [(found, expected), *((n.grad, e.grad) for n, e in zip(narrow, exact, strict=True))]
    for one, other in pairs:
        assert one is not None and other is not None
        off = float((one.detach().double() - other.detach()).norm() / other.detach().norm())
        assert off <= allowed, off


@DTYPES
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_a_frozen_linear_layer_and_its_lora(dtype: Any, dropped: bool, biased: bool) -> None:
    weight = rows(96, 64, seed=1).to(dtype)
    bias = rows(96, seed=2).to(dtype) if biased else None
    kept = (rows(2, 33, 64, seed=3) > 0) / 0.5

    def own(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        seen = x * kept.to(x.dtype) if dropped else x
        return LoraLinear.apply(x, seen, lambda _: weight, bias, A, B, 1.7)

    def reference(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        seen = x * kept if dropped else x
        wide = None if bias is None else bias.double()
        return functional.linear(x, weight.double(), wide) + 1.7 * (seen @ A.t() @ B.t())

    learned = [rows(2, 33, 64), rows(8, 64, seed=4) / 8, rows(96, 8, seed=5)]
    compare(own, reference, learned, [dtype, torch.float32, torch.float32], ALLOWED[dtype])


def test_no_gradient_is_made_for_an_input_that_needs_none() -> None:
    """Below the lowest adapted layer nothing is propagated: the frozen weight is used once."""
    asked: list[torch.dtype] = []

    def dense(dtype: torch.dtype) -> torch.Tensor:
        asked.append(dtype)
        return torch.ones(4, 3, dtype=dtype)

    A, B = torch.ones(2, 3, requires_grad=True), torch.ones(4, 2, requires_grad=True)
    x = torch.ones(5, 3)
    LoraLinear.apply(x, x, dense, None, A, B, 1.0).sum().backward()
    assert len(asked) == 1 and A.grad is not None
    x.requires_grad_()
    LoraLinear.apply(x, x, dense, None, A, B, 1.0).sum().backward()
    assert len(asked) == 3 and x.grad is not None


@DTYPES
@pytest.mark.parametrize("items", [None, 50])
def test_the_loss_of_a_frozen_head(
    dtype: Any, items: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_kit.speed import loss

    # Chunks of 32, in parts of seven.
    monkeypatch.setattr(loss, "_AT_ONCE", {"cpu": (40 * 301, 7 * 301)})
    head = (rows(301, 32, seed=1) / 3).to(dtype)
    labels = torch.randint(0, 301, (2, 60), generator=torch.Generator().manual_seed(2))
    labels[0, :9] = -100
    labels[1, 45:] = -100  # 95 are left

    def own(hidden: torch.Tensor) -> torch.Tensor:
        return causal_loss(hidden, head, labels, items)

    def reference(hidden: torch.Tensor) -> torch.Tensor:
        logits = (hidden @ head.double().t())[:, :-1].reshape(-1, 301)
        total = functional.cross_entropy(logits, labels[:, 1:].reshape(-1), reduction="sum")
        return total / (items or int((labels[:, 1:] != -100).sum()))

    compare(own, reference, [rows(2, 60, 32)], [dtype], ALLOWED[dtype])


def test_an_improbable_label_costs_what_it_should() -> None:
    """Its probability is 0 in float32, its loss is not infinite."""
    head = torch.eye(3)
    hidden = torch.tensor([[[300.0, 0.0, 0.0], [0.0, 0.0, 0.0]]])
    assert float(causal_loss(hidden, head, torch.tensor([[0, 1]]))) == pytest.approx(300)


def test_a_sure_token_costs_little_to_the_last_digit() -> None:
    head = torch.eye(3)
    hidden = torch.tensor([[[9.0, 0.0, 0.0], [0.0, 0.0, 0.0]]])
    labels = torch.tensor([[0, 0]])
    right = functional.cross_entropy(hidden[0, :1], labels[0, 1:])
    assert float(causal_loss(hidden, head, labels)) == pytest.approx(float(right), rel=1e-4)


def test_a_batch_with_nothing_to_learn_has_no_gradient_and_no_nan() -> None:
    hidden = torch.ones(1, 4, 8, requires_grad=True)
    loss = causal_loss(hidden, torch.ones(5, 8), torch.full((1, 4), -100), 12)
    loss.backward()
    assert float(loss) == 0 and hidden.grad is not None and not hidden.grad.any()


@DTYPES
@pytest.mark.parametrize("window", [None, 5, 150])
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("documents", [[7, 300, 1, 40], [60, 60, 60]])
def test_attention_of_documents(
    dtype: Any, window: int | None, groups: int, documents: list[int], monkeypatch: Any
) -> None:
    """Against a mask of (tokens, tokens), with probabilities kept for some and made again for
    others."""
    from lora_kit.speed import attention as module

    monkeypatch.setattr(module, "_KEPT", 50)
    tokens = sum(documents)
    number = torch.repeat_interleave(torch.arange(len(documents)), torch.tensor(documents))
    place = torch.arange(tokens)
    seen = (number[:, None] == number) & (place[:, None] >= place)
    if window is not None:
        seen &= place[:, None] - place < window

    def own(*learned: torch.Tensor) -> torch.Tensor:
        after = (0, 0, 0, padded_length(documents) - tokens)
        q, k, v = (functional.pad(x, after, value=2.0)[None] for x in learned)
        out, _ = attention(
            None, q, k, v, None, documents=documents, scaling=0.3, sliding_window=window
        )
        assert not out[0, tokens:].any()
        return out[0, :tokens].transpose(0, 1)

    def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        each = (x.repeat_interleave(4 // groups, 0) for x in (k, v))
        return functional.scaled_dot_product_attention(q, *each, attn_mask=seen, scale=0.3)

    learned = [rows(n, tokens, 16, seed=n + s) for s, n in enumerate((4, groups, groups))]
    learned[1] += 10  # as from a bias: it changes nothing, and must not cost digits
    compare(own, reference, learned, [dtype] * 3, ALLOWED[dtype])


def test_probabilities_of_short_documents_are_kept_those_of_long_ones_are_not() -> None:
    def kept(documents: list[int]) -> int:
        q, k, v = (rows(2, sum(documents), 8, seed=s).requires_grad_() for s in range(3))
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.append(t.numel()) or t, lambda t: t
        ):
            DocumentAttention.apply(q, k, v, documents, 1.0, None, 1)
        return sum(sizes) - 3 * q.numel()

    assert kept([100, 28]) == 2 * (100 * 100 + 28 * 28)
    assert kept([1025]) == 0


def test_arithmetic_that_is_not_here_is_not_passed_over() -> None:
    q = rows(1, 2, 4, 8)
    for asked in ({"softcap": 30.0}, {"s_aux": q}, {"dropout": 0.1}):
        with pytest.raises(NotImplementedError):
            attention(None, q, q, q, None, documents=[4], **asked)


@DTYPES
@pytest.mark.parametrize("mixed", [False, True])
def test_a_frozen_norm(dtype: Any, mixed: bool) -> None:
    weight = (1 + rows(64, seed=1) / 10).to(dtype)

    def reference(x: torch.Tensor) -> torch.Tensor:
        return weight.double() * x * (x.pow(2).mean(-1, keepdim=True) + 1e-3).rsqrt()

    def own(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            return FrozenRMSNorm.apply(x, weight, 1e-3)

    compare(own, reference, [rows(3, 5, 64)], [dtype], ALLOWED[dtype])


def test_lengths_of_blocks_and_rows_come_again() -> None:
    """Each new shape would be prepared for, and what was prepared kept."""
    shapes = {
        (block.queries.stop - block.queries.start, block.keys.stop - block.keys.start)
        for length in range(1, 1001)
        for block in _blocks([length, 5], None, 32)
    }
    assert len(shapes) == 32
    rooms = {padded_length([length]) for length in range(1, 4097)}
    assert len(rooms) <= 7 * 16
    assert all(n <= padded_length([n]) <= max(n + 32, n * 17 / 16 + 32) for n in range(1, 4097))
    # A block may reach over the ends of several documents, not over that of the row.
    for documents in ([33, 1], [300, 1, 2, 3], [31, 33, 257]):
        blocks = _blocks(documents, None, 32)
        assert max(block.queries.stop for block in blocks) <= padded_length(documents)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("version", ["2.10", "2.11", "2.12"])
def test_the_gpu_kernel_is_called_as_its_version_takes_it(
    version: str, grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stubs with the signatures of torch's releases; before 2.12 as many keys as queries."""
    from lora_kit.speed.attention import _on_gpu

    def kernel(q: Any, k: Any, v: Any, ends: Any, scale: float | None, grouped: bool) -> Any:
        assert grouped or q.shape == k.shape == v.shape
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        row = torch.arange(len(q[0]))
        document = torch.bucketize(row, ends[1:], right=True)
        seen = (document[:, None] == document) & (row[:, None] >= row)
        out = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, scale=scale, enable_gqa=grouped
        )
        return out.transpose(0, 1)

    def torch_2_10(
        query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int,
        is_causal: bool = False, return_aux: Any = None,
    ) -> Any:  # fmt: skip
        assert is_causal and return_aux is None
        return kernel(query, key, value, cu_seq_q, None, False)

    def torch_2_11(
        query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int,
        *, return_aux: Any = None, scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Any:  # fmt: skip
        assert window_size == (-1, 0) and return_aux is None
        return kernel(query, key, value, cu_seq_q, scale, False)

    def torch_2_12(
        query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int,
        *, return_aux: Any = None, scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
    ) -> Any:  # fmt: skip
        assert window_size == (-1, 0) and return_aux is None and enable_gqa == grouped
        return kernel(query, key, value, cu_seq_q, scale, enable_gqa)

    called = {"2.10": torch_2_10, "2.11": torch_2_11, "2.12": torch_2_12}[version]
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", called)
    q, k, v = rows(4, 9, 8), rows(2 if grouped else 4, 9, 8, seed=1), rows(4, 9, 8, seed=2)
    states = q, k, v[: len(k)]
    found = _on_gpu(states, [5, 4], 0.3, None)
    repeated = (x.repeat_interleave(4 // len(x), 0) for x in states[1:])
    expected = torch.cat(
        [
            functional.scaled_dot_product_attention(*part, is_causal=True, scale=0.3)
            for part in zip(*(x.split([5, 4], 1) for x in (q, *repeated)), strict=True)
        ],
        1,
    )
    assert torch.allclose(found, expected.transpose(0, 1))


def test_a_kernel_that_a_version_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is raised here ends as the notice that attention takes the standard path."""
    from lora_kit.speed.attention import _on_gpu

    states = rows(2, 4, 8), rows(2, 4, 8), rows(2, 4, 8)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)  # torch 2.9
    with pytest.raises(NotImplementedError, match=r"a GPU, which needs torch 2\.10"):
        _on_gpu(states, [4], 1.0, None)

    def torch_2_10(
        query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int,
        is_causal: bool = False, return_aux: Any = None,
    ) -> Any:  # fmt: skip
        raise AssertionError("it has no windows")

    monkeypatch.undo()
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", torch_2_10)
    with pytest.raises(NotImplementedError, match=r"a sliding window on a GPU, .* torch 2\.11"):
        _on_gpu(states, [4], 1.0, 2)
