"""`train:` -> the arguments of a task's trainer, checked against the installed classes."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError

from lora_kit.adapter.attach import OWN_FIELDS as OWN_ADAPTER_FIELDS
from lora_kit.base.load import gpu_is_used
from lora_kit.errors import RunFileError
from lora_kit.schema import Json, Run, Train

if TYPE_CHECKING:
    from transformers import TrainingArguments

# Fields of `train:` that TrainingArguments does not have.
_NOT_UPSTREAM = {"trainable", "top_layers", "max_length", "early_stopping_patience"}
# Fields that are not passed on unchanged: the guards track the best checkpoint and delete old ones;
# max_steps and eval_steps are translated below.
_NOT_HANDED_ON = {"max_steps", "eval_steps", "save_total_limit", "load_best_model_at_end"}


def training_arguments(
    run: Run,
    checkpoints: Path,
    planned: Mapping[str, object] | None = None,
    arguments_class: type[TrainingArguments] | None = None,
) -> TrainingArguments:
    """The trainer's arguments for a run; `checkpoints` is the output directory.

    Args:
        planned: fields of `train:` replaced by the memory plan.
        arguments_class: the task's; None: TrainingArguments.
    """
    from transformers import TrainingArguments

    train = run.train
    upstream = arguments_class or TrainingArguments
    known = {field.name for field in dataclasses.fields(upstream)}
    values = train.model_dump(exclude=_NOT_UPSTREAM | _NOT_HANDED_ON)
    for name in values.keys() - known - Train.model_fields.keys():
        del values[name]  # a key that only the task reads
    values |= planned or {}
    if "max_length" in known:  # TRL truncates rows as well; ours are truncated already
        values["max_length"] = train.max_length
    arguments = upstream(
        output_dir=str(checkpoints),
        max_steps=train.max_steps or -1,
        eval_strategy="steps" if train.eval_steps else "no",
        eval_steps=train.eval_steps,
        run_name=run.name,
        seed=run.seed,
        data_seed=run.seed,
        # On a GPU the adapter's matmuls run in bf16 like the base's; its weights stay fp32.
        bf16=run.base.dtype == "bfloat16" and gpu_is_used(),
        use_cpu=not gpu_is_used(),
        save_strategy="steps",
        logging_nan_inf_filter=False,  # a NaN loss must be seen, not replaced by an average
        prediction_loss_only=True,
        disable_tqdm=True,
        dataloader_pin_memory=gpu_is_used(),
        ddp_find_unused_parameters=False,
        label_names=["labels"],
        remove_unused_columns=False,  # it would drop position_ids
        **values,
    )
    # With several visible GPUs a single process would use DataParallel and multiply the batch size;
    # here each process uses one GPU. Reading `device` first sets `_n_gpu`, which is overwritten.
    if arguments.device is not None:
        arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def check_installed(run: Run, arguments_class: type[TrainingArguments] | None = None) -> None:
    """Check every field of `adapter:` and `train:` against the installed classes.

    The classes themselves do not check types: `TrainingArguments(learning_rate="abc")` constructs.

    Args:
        arguments_class: the task's; None: TrainingArguments.

    Raises:
        RunFileError: the installed version does not have a field, or has another type for it; or
            a package of `train.report_to` is not installed.
    """
    from peft import LoraConfig
    from transformers import TrainingArguments

    upstream = arguments_class or TrainingArguments
    adapter = {k: v for k, v in run.adapter if k not in OWN_ADAPTER_FIELDS}
    fields = {field.name for field in dataclasses.fields(upstream)}
    # A task's own keys are not checked unless upstream has them: its loss may read them.
    expected = (Train.model_fields.keys() - _NOT_UPSTREAM) | fields
    train = {k: v for k, v in run.train if k in expected}
    problems = _not_accepted("adapter", adapter, LoraConfig)
    problems += _not_accepted("train", train, upstream)
    for name in run.train.report_to:
        packages = ("tensorboard", "tensorboardX") if name == "tensorboard" else (name,)
        if not any(map(find_spec, packages)):
            problems.append(f"train.report_to: {name} is not installed: pip install {name}")
    if problems:
        raise RunFileError("run.yaml", problems)


def _not_accepted(section: str, values: Json, upstream: type) -> list[str]:
    """Keys of a section that a dataclass of the installed libraries lacks, or takes as another
    type. None is always accepted."""
    hints = typing.get_type_hints(upstream)
    fields = {field.name for field in dataclasses.fields(upstream)}
    problems = []
    for name, value in values.items():
        if value is None:
            continue
        if name not in fields:
            problems.append(
                f"{section}.{name}: the installed {upstream.__name__} has no such field"
            )
            continue
        try:  # enums are matched by value
            hint = TypeAdapter(hints[name], config={"arbitrary_types_allowed": True})
            hint.validate_python(value)
        except ValidationError:
            problems.append(
                f"{section}.{name}: {value!r} has the wrong type for {upstream.__name__}"
            )
    return problems
