"""What of a model trains: the keys of `train:` that say it, each with its meaning.

A strategy is chosen before the adapter is attached. It changes what is attached, and names the
groups of tensors that then train; the audit checks exactly these. The frozen prefix and the memory
plan see the same in the model itself. A new strategy is a class here and keys in `schema.Train`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_kit.adapter.attach import NO_MODULE
from lora_kit.adapter.audit import Groups
from lora_kit.errors import UserError
from lora_kit.schema import Adapter, Train


@dataclass(frozen=True)
class Strategy:
    """LoRA in all target modules, and the fresh modules of a task: the default.

    Attributes:
        adapter: `adapter:` of the run file, as `attach` has to take it.
    """

    adapter: Adapter

    def groups(self, groups: Groups) -> Groups:
        """Those of a task's groups that train."""
        return groups


class HeadOnly(Strategy):
    """`train.trainable: head`: the fresh modules alone, without LoRA: a linear probe, trained by
    gradient descent on the frozen base."""

    def groups(self, groups: Groups) -> Groups:
        return {name: has for name, has in groups.items() if name != "adapter"}


def choose(train: Train, adapter: Adapter, model: Any, fresh: Sequence[str]) -> Strategy:
    """The strategy that the run file asks for.

    Args:
        model: the base, on its device or as shapes alone.
        fresh: the names of its fresh modules.

    Raises:
        UserError: the base has no fresh module or not that many layers, or the adapter settles
            the same otherwise.
    """
    if train.trainable == "head":
        return _head_only(adapter, fresh)
    if train.top_layers is not None:
        return _top_layers(train.top_layers, adapter, model)
    return Strategy(adapter)


def _head_only(adapter: Adapter, fresh: Sequence[str]) -> Strategy:
    if not fresh:
        raise UserError(
            "train.trainable: head: the base has no new module that could train alone: a language "
            "model's head is its own; use adapter"
        )
    if adapter.start:
        raise UserError(
            "train.trainable: head: adapter.start brings LoRA modules, which would not train: "
            "leave one of the two out"
        )
    own: dict[str, Any] = {"target_modules": NO_MODULE, "exclude_modules": None}
    own |= {"layers_to_transform": None, "rank_pattern": {}, "alpha_pattern": {}}
    return HeadOnly(adapter.model_copy(update=own))


def _top_layers(count: int, adapter: Adapter, model: Any) -> Strategy:
    """`train.top_layers: k`: LoRA in the k layers next to the head; the layers below run without
    gradients."""
    if adapter.layers_to_transform is not None:
        raise UserError(
            "train.top_layers: adapter.layers_to_transform names the layers already: leave one of "
            "the two out"
        )
    if adapter.start:
        raise UserError(
            "train.top_layers: adapter.start brings its own layers: leave one of the two out"
        )
    layers: int = model.config.get_text_config().num_hidden_layers
    if count > layers:
        raise UserError(f"train.top_layers: {count}: the base has {layers} layers")
    highest = list(range(layers - count, layers))
    return Strategy(adapter.model_copy(update={"layers_to_transform": highest}))
