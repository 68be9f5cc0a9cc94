"""Which tensors a merged model has, by which names, and what its folder holds besides them.

A language model keeps the names of its base's files. A model with a head of its own has those of
transformers' class: the files of its base may be those of the body alone (`encoder.layer.0...` for
`bert.encoder.layer.0...`), or have a head that is not wanted (`cls.predictions...`). Where the
pooling is none of that class (see `base.pooled`) it becomes a folder of sentence-transformers: the
body, a pooling, and the head as a layer of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_kit.adapter.files import Adapter
from lora_kit.adapter.finished import FinishedRun
from lora_kit.base.head import CAUSAL, head_layers, is_head, skeleton_of, with_head_on_meta
from lora_kit.base.tensors import Stored
from lora_kit.errors import UserError

_START = "base_model.model."  # of names in an adapter's file
# Keys of config.json that the head decides.
_DECIDED = ("id2label", "label2id", "problem_type", "classifier_pooling")


@dataclass(frozen=True)
class Layout:
    """What a merged model is made of.

    Attributes:
        adapter: what is merged.
        tensors: {name in the merged model: as the base's files hold it}
        auto: the class of transformers that loads it.
        skeleton: a model with a head as shapes alone; None: a language model.
        head: {name: shape} of the parameters that the adapter may bring whole; None: as skeleton.
        score: weight and bias of a head that is a file of its own.
        guard: the name of a tensor without values to be written (see `base.pooled.guard_of`).
    """

    adapter: Adapter
    tensors: dict[str, Stored]
    auto: str = CAUSAL
    skeleton: Any = None
    head: dict[str, tuple[int, ...]] | None = None
    score: dict[str, Stored] = field(default_factory=dict)
    guard: str | None = None

    def settle(self, config: dict[str, Any]) -> None:
        """Name the class, its labels and its pooling in a config.json."""
        if self.skeleton is None:
            return
        named, own = self.skeleton, self.skeleton.config
        config["architectures"] = [type(named.encoder if self.score else named).__name__]
        for key in _DECIDED:
            if getattr(own, key, None) is not None:
                config[key] = getattr(own, key)
        # By it a decoder finds the end of a text.
        part = config.get("text_config") or config
        part["pad_token_id"] = own.get_text_config().pad_token_id

    def write_parts(self, folder: Path, max_length: int) -> None:
        """Write a head that is a file of its own, and its pooling."""
        if self.score:
            from lora_kit.base.pooled import write_parts

            score = {name: tensor.read().float() for name, tensor in self.score.items()}
            write_parts(folder, score, self.skeleton.pooling, max_length)

    def on_meta(self, base: Path) -> tuple[Any, list[str]]:
        """The model as shapes alone, and those of its modules that are never quantized."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.quantizers.base import get_keys_to_not_convert

        if self.skeleton is not None:
            return self.skeleton, head_layers(self.skeleton)
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        return model, get_keys_to_not_convert(model)

    def load(self, folder: Path, dtype: str) -> Any:
        """The merged model as an application loads it, by transformers alone."""
        import transformers

        options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": False}
        if not self.score:
            return getattr(transformers, self.auto).from_pretrained(folder, **options).eval()
        from lora_kit.base.pooled import read_folder

        return read_folder(folder, dtype=dtype)


def layout(run: FinishedRun, stored: Mapping[str, Stored]) -> Layout:
    """The layout of a run's merged model.

    Args:
        stored: the tensors of the base's files.

    Raises:
        UserError: neither adapter nor base has a layer of the head; or the base takes no such head.
    """
    if run.auto == CAUSAL:
        return Layout(run.adapter, dict(stored))
    skeleton, _ = with_head_on_meta(run.base, run.located, run.head)
    import transformers

    from lora_kit.base.pooled import PooledClassifier, guard_of

    pooled = isinstance(skeleton, PooledClassifier)
    outer = skeleton.base_model_prefix
    inner = f"{(skeleton.encoder if pooled else skeleton).base_model_prefix}."
    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    prefixed = any(name.startswith(inner) for name in stored)
    tensors = {}
    for name, tensor in stored.items():
        within = name.removeprefix(inner)
        in_body = within != name or not prefixed
        whole = f"{outer}.{within}" if in_body else name
        unused = is_head(whole, outer) and whole not in shapes
        if in_body and pooled and not unused:
            tensors[within] = replace(tensor, name=within)
        elif not pooled and not unused:
            tensors[whole] = replace(tensor, name=whole)
    head = {name: shape for name, shape in shapes.items() if is_head(name, outer)}
    brought = {name.removeprefix(_START): tensor for name, tensor in run.adapter.others.items()}
    if missing := sorted(head.keys() - brought.keys() - tensors.keys()):
        raise UserError(f"{run.folder}: {missing[0]} is neither in the adapter nor in the base")
    if not pooled:
        return Layout(run.adapter, tensors, run.auto, skeleton, head)
    for name, shape in head.items():
        if brought[name].shape != shape:
            raise UserError(f"{run.folder}: {name} is {brought[name].shape}, not {shape}")
    others = {n: t for n, t in run.adapter.others.items() if n.removeprefix(_START) not in head}
    return Layout(
        replace(run.adapter, others=others),
        tensors,
        run.auto,
        skeleton,
        head,
        {name.removeprefix("score."): brought[name] for name in head},
        guard_of(skeleton_of(getattr(transformers, run.auto), skeleton.config)),
    )
