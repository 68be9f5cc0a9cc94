"""What pretraining was worth: a randomly initialised model of the base's architecture."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from lora_kit.base.load import gpu_is_used
from lora_kit.prove.scores import against
from lora_kit.schema import Run
from lora_kit.tasks.encode import Prepared
from lora_kit.tasks.task import Processor, Task
from lora_kit.train.arguments import training_arguments


def against_scratch(
    task: Task,
    run: Run,
    adapted: Any,
    processor: Processor,
    data: Prepared,
    batch: dict[str, int],
    steps: int | None,
) -> dict[str, Any]:
    """Train random weights of the base's shape in float32 on the same rows for as many steps, all
    of them trainable, with the run's own optimizer settings; compare it with the adapter.

    Args:
        adapted: the run's PEFT model. batch: the geometry in the run's lock file; what several
            processes did is done in more passes. steps: that the run took; None: as planned.

    Returns:
        {"parameters", "seconds", "steps"} and what `against` returns, the new model as the rival.
    """
    import torch
    from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, set_seed

    run = run.model_copy(update={"prove": run.prove.model_copy(update={"metrics": []})})
    after = task.score(adapted, data.eval, processor, data.facts, run)
    config = adapted.get_base_model().config.__class__.from_dict(adapted.config.to_dict())
    config.quantization_config = None
    set_seed(run.seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    passes = batch["processes"] * batch["gradient_accumulation_steps"]
    own: dict[str, Any] = {"eval_steps": None, "report_to": []}
    own["gradient_accumulation_steps"] = passes
    if steps is not None:
        own["max_steps"] = steps
    run = run.model_copy(update={"train": run.train.model_copy(update=own)})
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(run, Path(folder))
        arguments.save_strategy = "no"
        started = time.perf_counter()
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=data.train,
            data_collator=task.collate(processor),
        )
        trainer.remove_callback(PrinterCallback)
        trainer._loss_shifts_labels = True  # as for every model here, whatever its class is called
        trainer.train()
    seconds = time.perf_counter() - started
    model = model.to("cuda") if gpu_is_used() else model
    before = task.score(model, data.eval, processor, data.facts, run)
    parameters = sum(p.numel() for p in model.parameters())
    made = {"parameters": parameters, "seconds": round(seconds, 1)}
    made["steps"] = trainer.state.global_step
    return made | against("scratch", before, after, seed=0)
