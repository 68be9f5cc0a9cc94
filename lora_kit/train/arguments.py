"""`train:` -> the arguments of a task's trainer, checked against the installed classes."""

from __future__ import annotations

import dataclasses
import typing
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from lora_kit.adapter.attach import OWN_FIELDS as OWN_ADAPTER_FIELDS
from lora_kit.base.load import gpu_is_used
from lora_kit.errors import RunFileError
from lora_kit.schema import Run, Train

if TYPE_CHECKING:
    from transformers import TrainingArguments

# Fields of `train:` that TrainingArguments does not have.
_NOT_UPSTREAM = {"trainable", "top_layers", "max_length", "early_stopping_patience"}
# Fields that our own code reads: max_length truncates rows, save_total_limit limits sealed
# checkpoints (the guards track the best); max_steps and eval_steps are translated below.
OWN_FIELDS = _NOT_UPSTREAM | {
    "max_steps",
    "save_total_limit",
    "eval_steps",
    "load_best_model_at_end",
}


def training_arguments(
    run: Run,
    checkpoints: Path,
    planned: dict[str, Any] | None = None,
    arguments_class: type[TrainingArguments] | None = None,
) -> Any:
    """The trainer's arguments for a run; `checkpoints` is the output directory.

    Args:
        planned: fields of `train:` replaced by the memory plan.
        arguments_class: the task's; None: TrainingArguments.
    """
    from transformers import TrainingArguments

    train = run.train
    made = arguments_class or TrainingArguments
    known = {field.name for field in dataclasses.fields(made)}
    values = {
        name: value
        for name, value in train.model_dump(exclude=OWN_FIELDS).items()
        if name in known or name in Train.model_fields  # may be read by the task only
    }
    if "max_length" in known:  # TRL truncates rows as well; ours are truncated already
        values["max_length"] = train.max_length
    arguments = made(
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
        remove_unused_columns=False,  # else position_ids
        **{**values, **(planned or {})},
    )
    # With several visible GPUs one process would use DataParallel and multiply the batch size; here
    # each GPU has a process. Reading `device` sets the private field that is overwritten.
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

    problems = []
    for section, upstream, own in (
        ("adapter", LoraConfig, OWN_ADAPTER_FIELDS),
        ("train", arguments_class or TrainingArguments, _NOT_UPSTREAM),
    ):
        hints = typing.get_type_hints(upstream)
        fields = {field.name for field in dataclasses.fields(upstream)}
        for name, value in getattr(run, section):
            if name in own or value is None:
                continue
            if section == "train" and name not in Train.model_fields and name not in fields:
                continue  # a task's own key, for its loss only
            if name not in fields:
                problems.append(
                    f"{section}.{name}: the installed {upstream.__name__} has no such field"
                )
            elif not _fits(value, hints[name]):
                problems.append(
                    f"{section}.{name}: {value!r} has the wrong type for {upstream.__name__}"
                )
    for name in run.train.report_to:
        packages = ("tensorboard", "tensorboardX") if name == "tensorboard" else (name,)
        if not any(map(find_spec, packages)):
            problems.append(f"train.report_to: {name} is not installed: pip install {name}")
    if problems:
        raise RunFileError("run.yaml", problems)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a plain value fits a type annotation; enums are matched by value."""
    try:
        TypeAdapter(hint, config={"arbitrary_types_allowed": True}).validate_python(value)
    except ValidationError:
        return False
    return True
