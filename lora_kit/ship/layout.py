"""The layout of a merged model: which tensors it has, under which names, and in which class.

A language model keeps the names of its base's files. A model with another head uses the names of
transformers' class: the base's files may have those of the body alone (`encoder.layer.0...` instead
of `bert.encoder.layer.0...`), or another head (`cls.predictions...`), which is dropped. If that
class does not support the pooling (see `base.pooled`), the result is a folder of
sentence-transformers: the body, a pooling, and the head as a separate layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_kit.adapter.files import Adapter
from lora_kit.adapter.finished import FinishedRun
from lora_kit.base.head import CAUSAL, is_head, skeleton_of, with_head_on_meta
from lora_kit.base.tensors import Stored
from lora_kit.errors import UserError
from lora_kit.schema import Json

if TYPE_CHECKING:
    from lora_kit.base.load import Model

_PREFIX = "base_model.model."  # of names in an adapter's file
# Keys of config.json that depend on the head.
_HEAD_KEYS = ("id2label", "label2id", "problem_type", "classifier_pooling")


@dataclass(frozen=True)
class Layout:
    """The parts of a merged model.

    Attributes:
        adapter: the adapter, without a head that is in `score`.
        tensors: {name in the merged model: tensor of the base's files}.
        auto: the class of transformers that loads it.
        skeleton: the model on the meta device; None for a language model.
        head: {name: shape} of head parameters that the adapter may replace or add; None for a
            language model.
        score: weight and bias of a head that gets a file of its own.
        guard: the name of an empty tensor to be written (see `base.pooled.guard_of`).
    """

    adapter: Adapter
    tensors: dict[str, Stored]
    auto: str = CAUSAL
    skeleton: Any = None
    head: dict[str, tuple[int, ...]] | None = None
    score: dict[str, Stored] = field(default_factory=dict)
    guard: str | None = None

    def update_config(self, config: Json) -> None:
        """Set the class, its labels and its pooling in a config.json."""
        if self.skeleton is None:
            return
        own = self.skeleton.config
        saved = self.skeleton.encoder if self.score else self.skeleton
        config["architectures"] = [type(saved).__name__]
        for key in _HEAD_KEYS:
            if getattr(own, key, None) is not None:
                config[key] = getattr(own, key)
        # A decoder finds the end of a text by its padding token.
        part = config.get("text_config") or config
        part["pad_token_id"] = own.get_text_config().pad_token_id

    def write_parts(self, folder: Path, max_length: int) -> None:
        """Write a head that gets a file of its own, and its pooling."""
        if self.score:
            from lora_kit.base.pooled import write_parts

            score = {name: tensor.read().float() for name, tensor in self.score.items()}
            write_parts(folder, score, self.skeleton.pooling, max_length)

    def load(self, folder: Path, dtype: str) -> Model:
        """Load the merged model with transformers alone."""
        import transformers

        from lora_kit.base.pooled import read_folder

        if self.score:
            return read_folder(folder, dtype)
        auto = getattr(transformers, self.auto)
        return auto.from_pretrained(folder, dtype=dtype, trust_remote_code=False).eval()


def layout(run: FinishedRun, stored: Mapping[str, Stored]) -> Layout:
    """The layout of a run's merged model.

    Args:
        stored: the tensors of the base's files.

    Raises:
        UserError: a layer of the head is neither in the adapter nor in the base, or the base does
            not support the head.
    """
    if run.auto == CAUSAL:
        return Layout(run.adapter, dict(stored))
    import transformers

    from lora_kit.base.pooled import PooledClassifier, guard_of

    skeleton: Any = with_head_on_meta(run.base, run.located, run.head)[0]
    pooled = isinstance(skeleton, PooledClassifier)
    outer = skeleton.base_model_prefix
    inner = f"{(skeleton.encoder if pooled else skeleton).base_model_prefix}."
    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    # In the files either the body's names begin with `inner`, or all are the body's, without it.
    prefixed = any(name.startswith(inner) for name in stored)
    tensors = {}
    for name, tensor in stored.items():
        within = name.removeprefix(inner)
        in_body = within != name or not prefixed
        whole = f"{outer}.{within}" if in_body else name  # as in the skeleton
        unused = is_head(whole, outer) and whole not in shapes
        if in_body and pooled and not unused:
            tensors[within] = replace(tensor, name=within)
        elif not pooled and not unused:
            tensors[whole] = replace(tensor, name=whole)
    head = {name: shape for name, shape in shapes.items() if is_head(name, outer)}
    brought = {name.removeprefix(_PREFIX): tensor for name, tensor in run.adapter.others.items()}
    missing = sorted(head.keys() - brought.keys() - tensors.keys())
    if missing:
        raise UserError(f"{run.folder}: {missing[0]} is neither in the adapter nor in the base")
    if not pooled:
        return Layout(run.adapter, tensors, run.auto, skeleton, head)
    for name, shape in head.items():
        if brought[name].shape != shape:
            raise UserError(f"{run.folder}: {name} is {brought[name].shape}, not {shape}")
    others = {n: t for n, t in run.adapter.others.items() if n.removeprefix(_PREFIX) not in head}
    return Layout(
        replace(run.adapter, others=others),
        tensors,
        run.auto,
        skeleton,
        head,
        {name.removeprefix("score."): brought[name] for name in head},
        guard_of(skeleton_of(getattr(transformers, run.auto), skeleton.config)),
    )
