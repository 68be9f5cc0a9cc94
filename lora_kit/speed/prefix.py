"""The frozen prefix: the layers below the lowest adapted one run without autograd, and their output
is cached over epochs.

Nothing in them trains, so a row's hidden states after them are the same in every epoch and in the
next run on the same rows: they are cached in a file that later epochs read. With only the head
trained (feature extraction), the prefix is the whole body.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from lora_kit import cache
from lora_kit.errors import in_a_line
from lora_kit.schema import Json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STATES = "states.bin"
# Increased whenever the same model and rows give a different file.
VERSION = 1
# Largest file: this share of the free disk space, and this many bytes.
SHARE_OF_FREE = 0.25
MOST_BYTES = 64 << 30
_CHECK_BYTES = 4
_LIBRARIES = ("lora-kit", "torch", "transformers", "bitsandbytes")


def decoder_layers(model: torch.nn.Module) -> torch.nn.ModuleList:
    """The decoder layers of a PEFT or transformers model; empty if they are not found."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    whole = causal_model(model)
    count = whole.config.get_text_config().num_hidden_layers
    lists = [m for m in whole.get_decoder().modules() if isinstance(m, torch.nn.ModuleList)]
    for some in lists:
        if len(some) == count and all(isinstance(m, GradientCheckpointingLayer) for m in some):
            return some
    return torch.nn.ModuleList()


def first_trained_layer(model: torch.nn.Module) -> int:
    """Index of the lowest layer with trainable parameters. 0 if any are outside of the layers and
    the head, such as embeddings; the number of layers if only the head trains, or nothing."""
    layers = decoder_layers(model)
    whole = causal_model(model)
    head = whole.get_output_embeddings()  # None for a classifier
    # Later entries win: a head that is tied to the embeddings counts as embeddings.
    place = {id(p): len(layers) for p in head.parameters()} if head is not None else {}
    place |= {id(p): 0 for p in whole.get_input_embeddings().parameters()}
    for number, layer in reversed(list(enumerate(layers))):
        place |= {id(p): number for p in layer.parameters()}
    trained = [place.get(id(p), 0) for p in model.parameters() if p.requires_grad]
    return min(trained, default=len(layers))


def causal_model(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT model; a transformers model itself."""
    unwrap = getattr(model, "get_base_model", None)
    return cast("PreTrainedModel", unwrap() if unwrap else model)


def embedding_weight(model: torch.nn.Module) -> torch.Tensor:
    """(vocabulary, width)"""
    return cast(torch.Tensor, causal_model(model).get_input_embeddings().weight)


class Store:
    """Hidden states of rows in a file: per row a CRC-32 and (tokens, width) in the model's dtype.

    A row is valid only if it is complete and matches its checksum, so incomplete rows of a killed
    process, a full disk or a second writer are ignored and no lock is needed.

    Args:
        lengths: int64 (rows,), tokens of each row.
    """

    def __init__(self, file: Path, lengths: np.ndarray, width: int, dtype: torch.dtype) -> None:
        self.lengths, self.width, self.dtype = lengths, width, dtype
        sizes = lengths * width * dtype.itemsize + _CHECK_BYTES
        self.starts = np.cumsum(sizes) - sizes
        self.grows = True  # False once writing has failed
        self.file = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)

    def read(self, rows: Sequence[int]) -> torch.Tensor | None:
        """(1, tokens, width): the rows concatenated; None unless all of them are stored."""
        count = int(self.lengths[list(rows)].sum())
        states = torch.empty(count, self.width, dtype=self.dtype)
        for row, part in self._parts(rows, states):
            check = bytearray(_CHECK_BYTES)
            got = os.preadv(self.file, [check, part], int(self.starts[row]))
            if got != _CHECK_BYTES + part.nbytes or check != _checksum(part):
                return None
        return states[None]

    def write(self, rows: Sequence[int], states: torch.Tensor) -> None:
        """Store (1, tokens, width), without the padding after the rows. Batches with NaN or
        infinite states are not stored."""
        count = int(self.lengths[list(rows)].sum())
        states = states[:, :count]
        if not self.grows or not bool(torch.isfinite(states).all()):
            return
        found = (*states.shape, states.dtype)
        wanted = (1, count, self.width, self.dtype)
        if found != wanted:
            self._stop(f"{found} instead of {wanted}")
            return
        try:
            for row, part in self._parts(rows, states[0].detach().cpu().contiguous()):
                os.pwritev(self.file, [_checksum(part), part], int(self.starts[row]))
        except OSError as error:
            self._stop(str(error.strerror))

    def _stop(self, why: str) -> None:
        self.grows = False
        print(f"speed: stopped caching hidden states: {why}", file=sys.stderr, flush=True)

    def _parts(self, rows: Sequence[int], states: torch.Tensor) -> Iterator[tuple[int, memoryview]]:
        """(row, its bytes) of states (tokens, width) on the CPU; the bytes are views of them."""
        ends = np.cumsum(self.lengths[list(rows)])[:-1]
        # numpy has no bfloat16.
        parts = np.split(states.view(torch.uint8).numpy(), ends)
        for row, part in zip(rows, parts, strict=True):
            yield row, part.data


def _checksum(part: memoryview) -> bytes:
    return zlib.crc32(part).to_bytes(_CHECK_BYTES, "little")


class Prefix:
    """The frozen layers of a model. Their `forward` is replaced on the instances until `close`, and
    has an effect only inside `batch`; saved models are unaffected.

    Args:
        model: on its device, neither wrapped nor sharded, with the adapter attached.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.layers = list(decoder_layers(model))[: first_trained_layer(model)]
        self.store: Store | None = None
        # Inside `batch`: the rows of the batch, and their cached states, if all are stored.
        self._active = False
        self._rows: Sequence[int] = ()
        self._kept: torch.Tensor | None = None
        for layer in self.layers:
            layer.forward = self._forward(layer.forward, layer is self.layers[-1])

    def close(self) -> None:
        """Restore the layers' own `forward`."""
        for layer in self.layers:
            layer.__dict__.pop("forward")
        if self.store:
            os.close(self.store.file)
        self.layers, self.store = [], None

    @contextmanager
    def batch(self, rows: Sequence[int]) -> Iterator[None]:
        """Context of the forward pass of a batch without padding, (1, tokens): these rows of the
        data concatenated. Nothing is cached for rows without indices."""
        before = self._rows, self._active, self._kept
        self._rows, self._active = rows, True
        self._kept = self.store.read(rows) if self.store and rows else None
        try:
            yield
        finally:
            self._rows, self._active, self._kept = before

    def _forward(self, plain: Callable[..., Any], last: bool) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not self._active:
                return plain(*args, **kwargs)
            if self._kept is None:
                # Gradient checkpointing can make the embeddings' output require gradients.
                with torch.no_grad():
                    out = plain(*args, **kwargs)
                if last and self.store and self._rows:
                    self.store.write(self._rows, out)
                return out
            states = args[0] if args else kwargs["hidden_states"]
            if last:
                kept = self._kept.to(states.device, non_blocking=True)
                states = torch.nn.functional.pad(kept, (0, 0, 0, states.shape[1] - kept.shape[1]))
            return states

        return forward

    def keep(self, lengths: np.ndarray, content: str, epochs: float) -> str:
        """Cache the states of the training rows, if they are reused and the model allows it.

        Args:
            lengths: int64 (rows,), tokens per row; `batch` takes row indices.
            content: a hash of all rows' tokens and their boundaries.
            epochs: of this run.

        Returns:
            The decision and its reason, in one line for the log.
        """
        if not self.layers:
            return "frozen layers: none below the trained ones"
        frozen = f"frozen layers: the first {len(self.layers)} run without gradients"
        states = self._checked_states()
        if isinstance(states, str):
            return f"{frozen}; their output is not cached: {states}"
        about = self._about(content)

        def describe(new: Path) -> None:
            text = json.dumps(about, sort_keys=True, default=str)
            (new / "about.json").write_text(text, encoding="utf-8")

        try:
            file = cache.prepared(cache.key_of(about), describe) / STATES
            return frozen + self._open_store(file, lengths, states, epochs)
        except OSError as error:
            return f"{frozen}; their output is not cached: {error.strerror}"

    def _open_store(
        self, file: Path, lengths: np.ndarray, states: torch.Tensor, epochs: float
    ) -> str:
        existing = file.stat() if file.exists() else None
        earlier = existing is not None and existing.st_size > 0
        if epochs <= 1 and not earlier:
            return "; their output is not cached: there is only one epoch"
        needed = int(lengths.sum()) * states[0, 0].nbytes
        free = shutil.disk_usage(file.parent).free + (existing.st_blocks * 512 if existing else 0)
        room = min(MOST_BYTES, int(SHARE_OF_FREE * free))
        size = f"{needed / 2**20:,.0f} MiB"
        if needed > room:
            size += f", more than the {room / 2**20:,.0f} allowed"
            return f"; their output is not cached: {size}"
        self.store = Store(file, lengths, states.shape[-1], states.dtype)
        used = "reusing an earlier run's" if earlier else "later epochs skip them"
        return f"; their output is cached ({size}): {used}"

    def _checked_states(self) -> torch.Tensor | str:
        """Compare the logits of two documents with those from cached states, computed with the
        documents in the other order. Returns states (1, tokens, width) if the logits agree, else
        the reason why the states cannot be cached."""
        embeddings = embedding_weight(self.model)
        noise, device = torch.Generator().manual_seed(0), embeddings.device
        a, b = (torch.randint(0, len(embeddings), (n,), generator=noise) for n in (40, 24))
        # The last layer's output, and the random state after it.
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []

        def logits(*documents: torch.Tensor) -> torch.Tensor:
            positions = [torch.arange(len(document)) for document in documents]
            lengths = [len(document) for document in documents]
            torch.manual_seed(0)  # LoRA's own dropout is the same each time
            found: torch.Tensor = self.model(
                input_ids=torch.cat(documents)[None].to(device),
                position_ids=torch.cat(positions)[None].to(device),
                documents=lengths,
                use_cache=False,
            ).logits
            return found[:, : sum(lengths)]

        hook = self.layers[-1].register_forward_hook(
            lambda _, __, out: seen.append((out, _random_state(device)))
        )
        training, gpus = self.model.training, [device] if device.type == "cuda" else []
        try:
            # In training mode: int8 layers round differently in evaluation mode.
            self.model.train()
            with torch.no_grad(), torch.random.fork_rng(gpus):
                expected = logits(b, a)
                logits(a, b)  # last, so that any state kept in the model is of this order
                out, after = seen[1]
                torch.manual_seed(0)
                if not torch.equal(after, _random_state(device)):
                    return "they use random numbers (dropout)"
                if not torch.is_tensor(out):
                    return "the layers return more than hidden states"
                states = out[:, : len(a) + len(b)]
                with self.batch(()):
                    self._kept = torch.cat(states.split([len(a), len(b)], 1)[::-1], 1)
                    found = logits(b, a)
        except Exception as error:  # an untested architecture can raise anything
            return in_a_line(error)
        finally:
            hook.remove()
            self.model.train(training)
        if not (found - expected).abs().max() <= 0.05 * expected.std():  # also if it is NaN
            return "later layers depend on more than these states"
        return states

    def _about(self, content: str) -> Json:
        """Everything that the states depend on."""
        above = decoder_layers(self.model)[len(self.layers) :]
        other = {id(p) for p in above.parameters()}
        tensors = self.model.state_dict(keep_vars=True).values()
        below = [t for t in tensors if not t.requires_grad and id(t) not in other]
        return {
            "version": VERSION,
            "layers": len(self.layers),
            "model": described(self.model, below),
            "rows": content,
        }


def described(model: torch.nn.Module, tensors: Iterable[torch.Tensor]) -> Json:
    """Everything that the outputs of a model with these tensors depend on, as plain JSON. Weights
    are hashed in memory, since a start adapter may differ from the files on disk."""
    config = causal_model(model).config
    return {
        "libraries": {name: cache.installed(name) for name in _LIBRARIES},
        "attention": config._attn_implementation,
        "device": model.device.type,
        "config": config.to_dict() | {"_name_or_path": None},
        "weights": hashlib.sha256(str([_fingerprint(t) for t in tensors]).encode()).hexdigest(),
    }


def _fingerprint(tensor: torch.Tensor) -> tuple[str | int, ...]:
    """Type, shape and CRC-32 of the data."""
    raw: Any = tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy()
    return (str(tensor.dtype), *tensor.shape, zlib.crc32(raw))


def _random_state(device: torch.device) -> torch.Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
