"""Fast paths for a model; each is used only after it gave the same loss and gradients.

There is no list of supported architectures: each part is installed into the model that will train,
compared with the standard path on two short documents, and removed again if loss or gradients
differ by more than rounding.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from lora_kit.errors import in_a_line
from lora_kit.speed import attention, linear, norm
from lora_kit.speed.loss import causal_loss, causal_nats, labelled_places
from lora_kit.speed.patch import also_without_gradients, part_of, put_in, take_out
from lora_kit.speed.prefix import causal_model, embedding_weight
from lora_kit.speed.runtime import on_gpu

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Batch = dict[str, Any]
Collate = Callable[[Sequence[dict[str, Any]]], Batch]  # rows -> a batch
# The loss of a fixed batch, to compare paths on: (flat: without padding) -> float32 ().
FixedLoss = Callable[[bool], torch.Tensor]

# Relative differences due to rounding, of the loss and of the concatenated gradients; a wrong
# scale, mask or term causes larger ones.
_LOSS_OFF = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
_GRADIENT_OFF = {torch.float32: 1e-3, torch.bfloat16: 4e-2}
# Lengths of the two documents; the first is longer than a window or chunk of at most _MOST tokens.
_TOKENS = (75, 6)
_MOST = 512
UNSUPPORTED = "unsupported by this architecture"
# Keys of a batch without padding that are not the model's inputs.
_NOT_MODEL_INPUTS = {"numbers", "places"}
_IGNORED = -100  # torch's ignore_index


def make_fast(
    model: torch.nn.Module, fixed_loss: FixedLoss, parts: Sequence[str] | None = None
) -> dict[str, str]:
    """Install the fast paths into a PEFT model, before it is wrapped for training.

    >>> # A causal language model, and any other one:
    >>> standard = make_fast(model, documents_loss(model, collator(0), in_one_row))
    >>> standard = make_fast(model, lambda flat: model(**batch).loss, ("linear", "norm"))

    Args:
        model: on its device, with the adapter attached.
        fixed_loss: returns the loss of the same batch on each call, with gradients.
        parts: keys of `PARTS` to try, such as FOR_ANY_MODEL; None: all.

    Returns:
        {part: why it was not installed}. Batches may be without padding (`documents`) unless
        `attention` is one of the keys.
    """
    standard: dict[str, str] = {}  # parts that use the standard path, and why
    tried = {name: PARTS[name] for name in PARTS if parts is None or name in parts}
    with _random_adapter(model):
        try:
            expected = _loss_and_gradients(model, fixed_loss, flat=False)
        except Exception as error:  # for instance nothing trains, which the audit reports
            return dict.fromkeys(tried, f"cannot be tested: {type(error).__name__}")
        for name, install in tried.items():
            flat = name in ("attention", "loss") and "attention" not in standard
            try:
                if not install(model):
                    standard[name] = UNSUPPORTED
                    continue
                found = _loss_and_gradients(model, fixed_loss, flat)
                wrong = _difference(expected, found, _dtype(model))
                if name == "attention" and not _keeps_apart(model):
                    wrong = "attends across documents"
            except Exception as error:  # an untested architecture can raise anything
                wrong = in_a_line(error)
            if wrong:
                _remove(model, name)
                standard[name] = wrong
    # A model without RMSNorm is not worth reporting.
    return {name: why for name, why in standard.items() if (name, why) != ("norm", UNSUPPORTED)}


def documents_loss(model: torch.nn.Module, pad: Collate, concatenate: Collate) -> FixedLoss:
    """The loss of two documents, to compare the paths of a causal language model on.

    Args:
        pad, concatenate: collators of rows with `input_ids` and `labels`, with and without padding.
    """

    from accelerate.utils import send_to_device

    def loss(flat: bool) -> torch.Tensor:
        weight = embedding_weight(model)
        noise = torch.Generator().manual_seed(0)
        lengths = _lengths(causal_model(model).config.get_text_config())
        rows = [torch.randint(0, len(weight), (n,), generator=noise).numpy() for n in lengths]
        collate = concatenate if flat else pad
        batch = collate([{"input_ids": row, "labels": row.copy()} for row in rows])
        batch = send_to_device(batch, weight.device)
        found: torch.Tensor = model(**batch, num_items_in_batch=sum(lengths)).loss
        return found

    return loss


def label_nats(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """The loss of each label in nats, float32 (count,), with the model's fast paths.

    Unlike elsewhere they are also used without gradients, so that a reference computed before
    training has the arithmetic of training. The model itself is called, so wrappers (DDP) work.

    Args:
        batch: the model's inputs, with `labels`; optionally `places` (see `labelled_places`), which
            give the order of the result.
    """
    with also_without_gradients():
        if part_of(_unwrapped(model)) == "loss":
            nats: torch.Tensor = model(**batch, reduction="none").loss
            return nats
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        if "documents" not in batch:  # only the fast attention reads it
            inputs = {k: v for k, v in inputs.items() if k not in _NOT_MODEL_INPUTS}
        logits = model(**inputs, use_cache=False).logits
    labels, places = batch["labels"], batch.get("places")
    places = labelled_places(labels) if places is None else places
    row, column = places // (labels.shape[1] - 1), places % (labels.shape[1] - 1)
    return torch.nn.functional.cross_entropy(
        logits[row, column].float(), labels[row, column + 1], reduction="none"
    )


def takes_flat(model: torch.nn.Module) -> bool:
    """Whether the model takes batches without padding: its attention separates documents."""
    found: str = _unwrapped(model).config._attn_implementation
    return found == attention.NAME


def _unwrapped(model: torch.nn.Module) -> PreTrainedModel:
    """transformers' own model inside PEFT's, and inside wrappers such as DDP."""
    from accelerate.utils import extract_model_from_parallel

    return causal_model(extract_model_from_parallel(model))


def make_plain(model: torch.nn.Module) -> None:
    """Remove the fast paths."""
    for part in reversed(PARTS):
        _remove(model, part)


def _remove(model: torch.nn.Module, part: str) -> None:
    take_out(model, part)
    if takes_flat(model) and part == "attention":
        causal_model(model).set_attn_implementation("sdpa")
    elif takes_flat(model) and part == "loss":  # its forward replaced that of `attention`
        _with_forward(causal_model(model), _without_padding, "attention")


def _dtype(model: torch.nn.Module) -> torch.dtype:
    """The model's compute dtype: that of embeddings and norms, even if it is quantized."""
    frozen = (p.dtype for p in model.parameters() if not p.requires_grad)
    return next((dtype for dtype in frozen if dtype.is_floating_point), torch.float32)


def _install_attention(model: torch.nn.Module) -> bool:
    whole = causal_model(model)
    by_interface = getattr(whole, "_supports_attention_backend", False)
    hooked = part_of(whole) is not None  # by another library
    if hooked or not by_interface or whole.config._attn_implementation != "sdpa":
        return False
    attention.register()
    whole.set_attn_implementation(attention.NAME)
    _with_forward(whole, _without_padding, "attention")
    return True


def _install_loss(model: torch.nn.Module) -> bool:
    whole = causal_model(model)
    head = whole.get_output_embeddings()
    simple = type(head) is torch.nn.Linear and head.bias is None and not head.weight.requires_grad
    # A mixture of experts may add a loss of its own.
    adds = getattr(whole.config, "output_router_logits", False)
    hooked = part_of(whole) not in (None, "attention")
    if hooked or adds or not simple or not _is_only_the_head(whole, head):
        return False
    _with_forward(whole, _with_own_loss, "loss")
    return True


# In the order of installation; the last two replace the forward of the whole model.
PARTS: dict[str, Callable[[torch.nn.Module], object]] = {
    "linear": linear.install,
    "norm": norm.install,
    "attention": _install_attention,
    "loss": _install_loss,
}
FOR_ANY_MODEL = ("linear", "norm")  # the other parts are for causal language models


def _with_forward(
    whole: PreTrainedModel, make: Callable[..., Callable[..., Any]], part: str
) -> None:
    """Replace a model's forward, keeping the signature of its class's, which trainers inspect."""
    plain = type(whole).forward
    put_in(whole, functools.wraps(plain)(make(plain)), part)


def _without_padding(plain: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Any, **inputs: Any) -> Any:
        return plain(self, **_own_inputs(inputs))

    return forward


def _with_own_loss(plain: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Any, *args: Any, **inputs: Any) -> Any:
        from transformers.modeling_outputs import CausalLMOutput

        if args or inputs.get("labels") is None:
            return plain(self, *args, **_own_inputs(inputs))
        labels = inputs.pop("labels")
        items = inputs.pop("num_items_in_batch", None)
        places = inputs.pop("places", None)
        reduction = inputs.pop("reduction", "mean")
        # A KV cache would take memory and defeat the separation of packed documents.
        inputs["use_cache"] = False
        hidden = self.base_model(**_own_inputs(inputs))[0]
        head = self.get_output_embeddings().weight
        if reduction == "none":
            return CausalLMOutput(loss=causal_nats(hidden, head, labels, places))
        return CausalLMOutput(loss=causal_loss(hidden, head, labels, items, places))

    return forward


def _own_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """The model's own inputs of a batch.

    A batch with `documents` gets an empty four-dimensional mask, which transformers passes through
    instead of building an unused (tokens, tokens) one. On a CPU it is padded to one of a few
    lengths, since oneDNN prepares for each new one.
    """
    documents = inputs.get("documents")
    if documents is not None:
        inputs["attention_mask"] = torch.empty(1, 1, 1, 0)
        inputs["use_cache"] = False
        if not on_gpu(inputs["input_ids"]):
            more = attention.padded_length(documents) - sum(documents)
            for name, value in (("input_ids", 0), ("position_ids", 0), ("labels", _IGNORED)):
                if inputs.get(name) is not None:
                    inputs[name] = torch.nn.functional.pad(inputs[name], (0, more), value=value)
    return {name: value for name, value in inputs.items() if name not in _NOT_MODEL_INPUTS}


def _is_only_the_head(whole: PreTrainedModel, head: torch.nn.Linear) -> bool:
    """Whether the logits are the head's output itself, with no softcap or scale after it."""
    made: list[Any] = []
    hook = head.register_forward_hook(lambda module, given, out: made.append(out))
    places = torch.arange(2, device=head.weight.device)[None]
    inputs: dict[str, Any] = {"input_ids": places, "position_ids": places, "use_cache": False}
    if takes_flat(whole):
        inputs["documents"] = [2]  # transformers cannot build its masks on the meta device
    try:
        with torch.no_grad():
            logits = whole(**inputs).logits
    finally:
        hook.remove()
    return logits is made[-1]


@contextlib.contextmanager
def _random_adapter(model: torch.nn.Module) -> Iterator[None]:
    """Inside, LoRA's weights have noise added, so that A has a gradient; restored afterwards."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    before = [parameter.detach().clone() for _, parameter in trained]
    training = model.training
    model.eval()  # no dropout, no gradient checkpointing
    try:
        with torch.no_grad():
            for number, (name, parameter) in enumerate(trained):
                if "lora_" in name:
                    noise = torch.Generator().manual_seed(number)
                    random = torch.randn(parameter.shape, generator=noise) * 0.02
                    parameter.add_(random.to(parameter))
        yield
    finally:
        with torch.no_grad():
            for (_, parameter), value in zip(trained, before, strict=True):
                parameter.copy_(value)
                parameter.grad = None
        model.train(training)


def _loss_and_gradients(
    model: torch.nn.Module, fixed_loss: FixedLoss, flat: bool
) -> tuple[float, torch.Tensor]:
    """The loss of the fixed batch, and all gradients concatenated, float32."""
    device = next(model.parameters()).device
    model.zero_grad(set_to_none=True)
    mixed = device.type == "cuda" and _dtype(model) == torch.bfloat16  # as in the trainer
    with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
        loss = fixed_loss(flat)
    loss.backward()
    grads = [p.grad.float().reshape(-1) for p in model.parameters() if p.grad is not None]
    return float(loss.detach()), torch.cat(grads)


def _lengths(config: Any) -> tuple[int, int]:
    """Lengths of two documents; the first is longer than the model's windows and chunks, unless
    they exceed _MOST or its context."""
    spans = [
        value
        for name, value in config.to_dict().items()
        if ("window" in name or "chunk" in name) and isinstance(value, int)
    ]
    room = getattr(config, "max_position_embeddings", None) or _MOST
    longest = max([_TOKENS[0], *(n + 11 for n in spans if n <= _MOST)])  # some tokens beyond
    return min(longest, room), _TOKENS[1]


def _keeps_apart(model: torch.nn.Module) -> bool:
    """Whether a document's logits do not depend on the document before it. Convolutions and
    recurrent states leak across documents, but too little to show in the gradients.

    The forward pass in training mode is only to raise: with dropout, `attention` is unsupported.
    Random states are restored.
    """
    device = embedding_weight(model).device
    ids = torch.arange(24, device=device)[None]
    others = torch.cat([ids[:, 12:].flip(1), ids[:, 12:]], 1)
    given: dict[str, Any] = {"position_ids": ids % 12, "documents": [12, 12]}
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        model.train()(input_ids=ids, **given)
        model.eval()
        a, b = (model(input_ids=x, **given).logits[:, 12:24].float() for x in (ids, others))
    return bool((a - b).norm() <= _GRADIENT_OFF[_dtype(model)] * a.norm())


def _difference(
    expected: tuple[float, torch.Tensor], found: tuple[float, torch.Tensor], dtype: torch.dtype
) -> str:
    """A difference larger than rounding, in words, or ""."""
    off = abs(found[0] - expected[0]) / abs(expected[0])
    if not off <= _LOSS_OFF[dtype]:  # also if it is NaN
        return f"loss differs by {off:.2%}"
    if len(found[1]) != len(expected[1]):
        return "different parameters have gradients"
    wrong = float((found[1] - expected[1]).norm() / expected[1].norm())
    return "" if wrong <= _GRADIENT_OFF[dtype] else f"gradients differ by {wrong:.2%}"
