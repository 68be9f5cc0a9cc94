"""Strategies: which parts of a model train, as set by keys of `train:`.

A strategy is chosen before the adapter is attached. It adjusts `adapter:` and selects the groups of
tensors that train, which the audit checks. Once it is attached, the frozen prefix and the memory
plan only look at `requires_grad` of the parameters. A new strategy is a function here, and keys in
`schema.Train`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_kit.adapter.attach import NO_MODULE
from lora_kit.adapter.audit import Groups
from lora_kit.errors import UserError
from lora_kit.schema import Adapter, Train

if TYPE_CHECKING:
    from lora_kit.base.load import Model


@dataclass(frozen=True)
class Strategy:
    """What trains. By default LoRA in all target modules, and the fresh modules of a task: those
    without weights in the base's files, such as a new head.

    Attributes:
        adapter: `adapter:` of the run file, adjusted for `attach`.
        lora: False: only the fresh modules train.
    """

    adapter: Adapter
    lora: bool = True

    def groups(self, groups: Groups) -> Groups:
        """Those of the task's groups (`Task.groups`) that train."""
        return {name: has for name, has in groups.items() if self.lora or name != "adapter"}


def choose(train: Train, adapter: Adapter, model: Model, fresh: Sequence[str]) -> Strategy:
    """The strategy set in the run file.

    Args:
        model: the base, on its device or on the meta device.
        fresh: the names of its fresh modules.

    Raises:
        UserError: the base has no fresh module or too few layers, or `adapter:` conflicts with the
            strategy.
    """
    if train.trainable == "head":
        return _head_only(adapter, fresh)
    if train.top_layers is not None:
        return _top_layers(train.top_layers, adapter, model)
    return Strategy(adapter)


def _head_only(adapter: Adapter, fresh: Sequence[str]) -> Strategy:
    """`train.trainable: head`: only the fresh modules train, without LoRA: a linear probe on the
    frozen base, trained by gradient descent."""
    if not fresh:
        raise UserError(
            "train.trainable: head: this task adds no new head to train: use train.trainable: "
            "adapter"
        )
    if adapter.start:
        raise UserError(
            "train.trainable: head: conflicts with adapter.start, whose LoRA modules would not "
            "train: remove one of the two"
        )
    own: dict[str, object] = {
        "target_modules": NO_MODULE,
        "exclude_modules": None,
        "layers_to_transform": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    return Strategy(adapter.model_copy(update=own), lora=False)


def _top_layers(count: int, adapter: Adapter, model: Model) -> Strategy:
    """`train.top_layers: k`: LoRA in the k layers closest to the head; the layers below run without
    gradients."""
    if adapter.layers_to_transform is not None:
        raise UserError(
            "train.top_layers: conflicts with adapter.layers_to_transform: remove one of the two"
        )
    if adapter.start:
        raise UserError(
            "train.top_layers: conflicts with adapter.start, which has its own layers: remove one "
            "of the two"
        )
    layers: int = model.config.get_text_config().num_hidden_layers
    if count > layers:
        raise UserError(f"train.top_layers: {count}: the base has {layers} layers")
    highest = list(range(layers - count, layers))
    return Strategy(adapter.model_copy(update={"layers_to_transform": highest}))
