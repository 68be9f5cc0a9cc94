"""A frozen base + LoRA -> a PEFT model in which only the adapter trains."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from lora_kit.adapter import files
from lora_kit.adapter.audit import coverage
from lora_kit.errors import UserError, out_of_memory, reason_of
from lora_kit.run import nearest
from lora_kit.schema import Adapter
from lora_kit.trust import bounded

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

    from lora_kit.base.load import Model

# Fields of `adapter:` that are not arguments of PEFT's LoraConfig.
OWN_FIELDS = {"start"}
_SECONDS_TO_MATCH = 4.0
_PATTERNS = ("target_modules", "exclude_modules")  # a string there is a regular expression
# PEFT's value for LoRA on no module (it rejects an empty list), to train only a new head.
NO_MODULE = "dummy-target-modules"


def attach(model: Model, adapter: Adapter, fresh: Sequence[str], seed: int) -> PeftModel:
    """Attach a new adapter, or the one of `adapter.start`, to a frozen base.

    The seed is set first, so that A is initialised the same on every rank.

    Args:
        fresh: names of newly initialised modules, as returned by `Task.model`: they are fully
            trained and saved, without LoRA.

    Raises:
        UserError: the patterns match no module, or the start adapter does not fit the base.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    set_seed(seed)
    _freeze_statistics(model)
    if adapter.start:
        found = files.open_adapter(adapter.start)
        try:
            return load_adapter(model, found, trainable=True)
        except UserError as error:
            raise UserError(f"adapter.start: {error}") from None
    linear = _linear_names(model)
    _check_layers(model, adapter)
    _check_names(model, adapter, linear)
    if adapter.layers_to_transform and adapter.target_modules == "all-linear":
        # PEFT supports layers_to_transform only with a list of names.
        adapter = adapter.model_copy(update={"target_modules": linear})
    # PEFT fully trains every module whose name ends with one of these, such as `pre_classifier` for
    # `classifier`, but keeps LoRA out of exactly matching modules only: so all are listed.
    whole = [name for name, _ in model.named_modules() if name.endswith(tuple(fresh))]
    try:
        config = LoraConfig(
            # With a task type PEFT adds modules to train by name, and replaces heads.
            task_type="CAUSAL_LM" if model.can_generate() else None,
            modules_to_save=whole or None,
            **adapter.model_dump(exclude=OWN_FIELDS),
        )
        attached = get_peft_model(model, config)
    except ValueError as error:
        raise _rejected(adapter, linear, error) from None
    _check_patterns(attached, adapter)
    return attached


def _rejected(adapter: Adapter, linear: list[str], error: ValueError) -> UserError:
    """The error for settings that PEFT rejects."""
    text = str(error)
    if "not found in the base model" not in text and "No modules were targeted" not in text:
        return UserError(f"adapter: {reason_of(error, most=240)}")
    wanted, hint = adapter.target_modules, ""
    if isinstance(wanted, str):
        hint = nearest(wanted, linear)
        if wanted in linear:
            hint = f"; a string is a regular expression for the full name: write [{wanted}]"
    return UserError(
        f"adapter.target_modules: {wanted!r} matches no module{hint}; "
        f"linear modules: {', '.join(linear)}"
    )


def _freeze_statistics(model: Model) -> None:
    """Keep BatchNorm in evaluation mode during training: its running statistics are not saved with
    the adapter, so they must not change."""
    from torch.nn.modules.batchnorm import _BatchNorm

    for module in model.modules():
        if isinstance(module, _BatchNorm):
            vars(module)["train"] = partial(_keep_mode, module)


def _keep_mode(module: torch.nn.Module, mode: bool = True) -> torch.nn.Module:
    """Replaces `Module.train`."""
    return module


def load_adapter(model: Model, found: files.Adapter, trainable: bool = False) -> PeftModel:
    """Load an adapter's files onto a base, as a PEFT model.

    PEFT gets only known settings and the tensors, never the folder, from which it would load
    pickles, import modules named in the config, initialise missing tensors randomly, and overwrite
    weights of the base.

    Raises:
        UserError: the adapter does not fit the base, has unexpected tensors, or NaN.
    """
    from peft import LoraConfig, PeftModel, PeftModelForCausalLM, get_peft_model_state_dict
    from peft import set_peft_model_state_dict as load_tensors

    tensors = found.tensors()
    for name, tensor in tensors.items():
        if not (tensor.is_floating_point() and tensor.float().isfinite().all()):
            raise UserError(
                f"{found.folder}: {name}: NaN or infinite values, or not a floating dtype"
            )
    whole = _resize_vocabulary(model, found, tensors)
    generates = model.can_generate()
    wrapper: Any = PeftModelForCausalLM if generates else PeftModel
    kind = "CAUSAL_LM" if generates else None
    try:
        config = LoraConfig(**_settings(found), task_type=kind, inference_mode=not trainable)
        attached: PeftModel = wrapper(model, config)
        # If tokens were added, PEFT saves embeddings and head as well.
        known = get_peft_model_state_dict(attached, save_embedding_layers=False).keys()
        loaded: Any = load_tensors(attached, tensors)
    except Exception as error:  # PEFT raises anything on settings and shapes
        if out_of_memory(error):
            raise
        raise _does_not_fit(found, reason_of(error)) from None
    unknown = [n for n in tensors if n not in known and n not in whole and ".lora_" not in n]
    unexpected = [*sorted(unknown), *loaded.unexpected_keys]
    if unexpected:
        raise _does_not_fit(found, f"unexpected tensor {unexpected[0]:.200}")
    parts = ("lora_",) if generates else ("lora_", ".modules_to_save.")
    missing = [
        name
        for name in loaded.missing_keys
        if ".default" in name and any(part in name for part in parts)
    ]
    if missing:
        raise _does_not_fit(found, f"missing tensor {missing[0]} and {len(missing) - 1} more")
    return attached if trainable else attached.eval()


def _does_not_fit(found: files.Adapter, why: str) -> UserError:
    return UserError(f"{found.folder}: the adapter does not fit the base: {why}")


def _resize_vocabulary(
    model: Model, found: files.Adapter, tensors: Mapping[str, torch.Tensor]
) -> set[str]:
    """Give the base as many tokens as the adapter's embeddings and head have, if it has them whole.

    Returns:
        The names of these tensors.
    """
    both: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    ends = [module for module in both if module is not None]
    names = [name for name, module in model.named_modules() if module in ends]
    pattern = re.compile(rf"base_model\.model\.({'|'.join(names)})(\.base_layer)?\.weight")
    whole = {name: match[1] for name in tensors if (match := pattern.fullmatch(name))}
    rows = {len(tensors[name]) for name in whole} - {len(ends[0].weight)}
    distinct = len({id(end.weight) for end in ends})  # tied ones count once
    if rows and len(set(whole.values())) < distinct:
        only = next(iter(whole.values()))
        raise _does_not_fit(found, f"tokens were added, but only {only} has their rows")
    if len(rows) == 1:
        model.resize_token_embeddings(rows.pop(), mean_resizing=False)
    return set(whole)


def _settings(found: files.Adapter) -> dict[str, Any]:
    """The arguments of `LoraConfig`, with module names in place of regular expressions, which can
    take forever to match."""
    about = {"peft_type", "task_type", "base_model_name_or_path", "revision"}
    values = {key: value for key, value in found.config.items() if key not in about}
    # Only for these does PEFT change the base's weights on attaching, as it did before training.
    init = str(values.get("init_lora_weights"))
    values["init_lora_weights"] = init if init.startswith(("pissa", "olora")) else True
    by_pattern = [key for key in _PATTERNS if isinstance(values.get(key), str)]
    if by_pattern or values.get("layers_pattern"):
        parents = [name.rpartition(".")[0] for name in values.get("target_parameters") or []]
        modules = []
        for module in found.factors:
            # PEFT adapts parameters of fused experts by target_parameters.
            if not module.removesuffix(".base_layer").endswith(tuple(parents)):
                modules.append(module)
        values["target_modules"] = modules if found.factors else NO_MODULE
        for key in ("exclude_modules", "layers_to_transform", "layers_pattern"):
            values[key] = None
    return values


def describe(model: PeftModel) -> str:
    """What trains, how much of the base it covers, and likely mistakes: a line each."""
    covered = coverage(model)
    trainable, total = model.get_nb_trainable_parameters()
    train = f"{trainable:,} trainable parameters ({trainable / total:.2%} of all)"
    lines = [f"no LoRA: {train}"]
    if covered.modules:
        names = ", ".join(f"{count} {name}" for name, count in covered.modules.items())
        lines = [f"adapter on {names}: {train}", f"adapted modules hold {covered}"]
    if covered.whole:
        lines.append(f"new layers, fully trained: {', '.join(covered.whole)}")
    for problem in covered.problems:
        lines.append("warning: {what}: {cause}; {fix}".format(**problem))
    return "\n".join(lines)


def _linear_names(model: Model) -> list[str]:
    """The distinct name endings of the linear modules, without the language-model head."""
    import torch
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layers

    head = model.get_output_embeddings()
    return sorted(
        {
            name.rsplit(".", 1)[-1]
            for name, module in model.named_modules()
            if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head
        }
    )


def _check_layers(model: Model, adapter: Adapter) -> None:
    """PEFT silently ignores layer numbers that do not exist."""
    count: int = model.config.get_text_config().num_hidden_layers
    beyond = [n for n in adapter.layers_to_transform or [] if not 0 <= n < count]
    if beyond:
        raise UserError(
            f"adapter.layers_to_transform: {beyond}: the base has layers 0 to {count - 1}"
        )


def _check_names(model: Model, adapter: Adapter, linear: list[str]) -> None:
    """Every given name must match a module; PEFT only requires that one of them does."""
    names = [name for name, _ in model.named_modules()]
    regular = [p for p in (adapter.target_modules, adapter.exclude_modules) if isinstance(p, str)]
    late = "adapter: matching its patterns to modules takes too long: write simpler ones"
    # PEFT matches them without a limit, and reports invalid ones.
    with bounded(_SECONDS_TO_MATCH, late), suppress(re.error):
        for pattern in (*regular, *adapter.rank_pattern, *adapter.alpha_pattern):
            for name in names:
                re.match(rf"(.*\.)?({pattern})$", name)
    problems = []
    for key in ("target_modules", "exclude_modules"):
        given = getattr(adapter, key)
        for word in given if isinstance(given, list) else []:
            if not any(name == word or name.endswith(f".{word}") for name in names):
                problems.append(
                    f"adapter.{key}: `{word}` matches no module{nearest(word, linear)}; "
                    f"linear modules: {', '.join(linear)}"
                )
    excluded = adapter.exclude_modules
    if isinstance(excluded, str) and not any(re.fullmatch(excluded, name) for name in names):
        problems.append(f"adapter.exclude_modules: `{excluded}` matches no module's full name")
    if problems:
        raise UserError("\n".join(problems))


def _check_patterns(model: PeftModel, adapter: Adapter) -> None:
    """rank_pattern and alpha_pattern must match adapted modules."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = [name for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    # PEFT matches a pattern at the end of a name, from the start or after a dot.
    problems = [
        f"adapter.{key}: `{pattern}` matches no adapted module"
        for key in ("rank_pattern", "alpha_pattern")
        for pattern in getattr(adapter, key)
        if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in adapted)
    ]
    if problems:
        raise UserError("\n".join(problems))
