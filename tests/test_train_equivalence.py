"""Different ways to the same place: starts, processes, interruptions, trainers, paddings."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import make_base
from forked import two_ranks
from processes import adapter_hash, finish, lora_kit, start
from trained import prepared

import lora_kit as package
from lora_kit.errors import Interrupted
from lora_kit.run import load_run, shipped
from lora_kit.train.callbacks import read_metrics

pytestmark = pytest.mark.slow


def losses(run: str = "runs/test", key: str = "loss") -> list[float]:
    return [row[key] for row in read_metrics(Path(run) / "metrics.jsonl") if key in row]


def test_three_ways_to_start(run_file: Any) -> None:
    file = run_file("sft")
    config = shipped("accelerate_configs") / "cpu.yaml"
    code, said = lora_kit("train", file, "name=one")
    assert code == 0, said
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    recipe = shipped("recipes") / "sft.py"
    code, said = finish(start([*launcher, str(recipe), str(file), "name=two"]))
    assert code == 0, said
    cores = len(os.sched_getaffinity(0))
    assert (f"--num_cpu_threads_per_process {cores}" in said) == (cores > 1)
    report = package.train(file, "name=three")
    assert report["training"]["steps"] == 4
    assert adapter_hash("runs/one") == adapter_hash("runs/two") == adapter_hash("runs/three")


def test_two_processes_are_two_accumulation_steps(run_file: Any) -> None:
    # Three epochs over chat rows of different lengths; the rows divide evenly into steps of 8.
    file = run_file(
        "sft",
        **{
            "data.eval": 12 / 60,
            "train.max_steps": 18,
            "train.per_device_train_batch_size": 4,
            "train.eval_steps": 9,
        },
    )
    one = package.train(file, "name=one", "train.gradient_accumulation_steps=2")
    code, said = two_ranks("sft", file, "name=two")
    assert code == 0, said
    assert losses("runs/two") == pytest.approx(losses("runs/one"), abs=1e-4)
    evals = [losses(run, "eval_loss") for run in ("runs/one", "runs/two")]
    assert evals[1] == pytest.approx(evals[0], abs=1e-4)
    # 12 rows in batches of 8 and 4: each label counts once, as in the comparison at the end.
    assert evals[0][-1] == pytest.approx(one["domain"]["loss"]["adapted"], abs=1e-4)
    alone, together = (read_metrics(Path(f"runs/{run}/metrics.jsonl")) for run in ("one", "two"))
    assert [row.get("tokens") for row in together] == [row.get("tokens") for row in alone]
    assert (len(alone), len(evals[0])) == (20, 2)
    two = json.loads(Path("runs/two/report.json").read_text())
    assert two["audit"]["problems"] == []
    assert all(check["passed"] is True for check in two["audit"]["checks"])
    assert two["training"]["world_size"] == 2
    assert two["training"]["tokens"] == one["training"]["tokens"]
    assert two["domain"]["documents"] == one["domain"]["documents"] == 12
    assert two["domain"]["loss"]["base"] == pytest.approx(one["domain"]["loss"]["base"], abs=2e-4)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])
def test_resumed_is_uninterrupted(
    run_file: Any, tmp_path: Path, optim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at step 5 of 10 by a signal, in the second epoch, with dropout and accumulation."""
    import torch

    from lora_kit.train import trainer as module
    from lora_kit.train.callbacks import Progress

    # 32 x 128 = 4096 elements, the least that bitsandbytes keeps in 8 bits.
    wide = make_base(tmp_path / "wide", hidden_size=128, intermediate_size=256)
    changes = {"optim": optim, "max_steps": 10, "gradient_accumulation_steps": 2}
    file = run_file(
        "sft",
        **{f"train.{key}": value for key, value in changes.items()},
        **{"base.model": str(wide), "adapter.r": 32, "adapter.lora_dropout": 0.1},
    )

    class Stop(Progress):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 5:
                signal.raise_signal(signal.SIGTERM)

    package.train(file, "name=straight")
    with monkeypatch.context() as patch:
        patch.setattr(module, "Progress", Stop)
        with pytest.raises(Interrupted) as caught:
            package.train(file, "name=stopped")
    assert caught.value.exit_code == 143
    folder = Path("runs/stopped/checkpoints/checkpoint-5")
    kinds = {tensor.dtype for tensor in large(torch.load(folder / "optimizer.pt")["state"])}
    assert kinds == {torch.uint8 if optim == "adamw_8bit" else torch.float32}
    package.train(file, "name=stopped", resume=True)
    assert adapter_hash("runs/stopped") == adapter_hash("runs/straight")
    assert losses("runs/stopped") == losses("runs/straight")
    last = [read_metrics(Path(f"runs/{r}/metrics.jsonl"))[-1] for r in ("stopped", "straight")]
    assert last[0]["tokens"] == last[1]["tokens"]


def large(state: Any) -> list[Any]:
    """The tensors of at least 4096 elements, however deep they lie."""
    if isinstance(state, dict):
        return [tensor for value in state.values() for tensor in large(value)]
    return [state] if getattr(state, "numel", int)() >= 4096 else []


def test_losses_are_those_of_trl(run_file: Any, tmp_path: Path) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    from lora_kit.adapter.attach import attach
    from lora_kit.base.load import load_tokenizer
    from lora_kit.base.pin import pin

    file = run_file("sft", **{"train.max_steps": 6, "train.gradient_accumulation_steps": 2})
    package.train(file)
    run = load_run(file)
    pinned = pin(run.base)
    tokenizer = load_tokenizer(pinned.folder)
    rows = list(prepared(run).train)
    model = AutoModelForCausalLM.from_pretrained(pinned.folder, dtype=torch.float32)
    names = ("learning_rate", "max_steps", "per_device_train_batch_size", "lr_scheduler_type")
    names += ("warmup_steps", "weight_decay", "max_grad_norm", "gradient_accumulation_steps")
    theirs = SFTTrainer(
        model=attach(model, run.adapter, (), run.seed),
        args=SFTConfig(
            output_dir=str(tmp_path / "trl"),
            dataset_kwargs={"skip_prepare_dataset": True},
            max_length=None,
            packing=False,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            seed=run.seed,
            data_seed=run.seed,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **{name: getattr(run.train, name) for name in names},
        ),
        train_dataset=Dataset.from_list(
            [{name: row[name].tolist() for name in ("input_ids", "labels")} for row in rows]
        ),
        processing_class=tokenizer,
    )
    theirs.train()
    their_losses = [row["loss"] for row in theirs.state.log_history if "loss" in row]
    assert len(their_losses) == 6
    assert losses() == pytest.approx(their_losses, abs=1e-4)
    assert losses()[0] - losses()[-1] > 0.1  # something was learned, so that the steps count


def test_padding_changes_no_loss(base: Path) -> None:
    """The loss of a padded batch is the mean over its labels, each computed in its row alone."""
    import torch
    from transformers import AutoModelForCausalLM

    from lora_kit.tasks.batches import IGNORED, collator

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    rows = []
    for length, masked in ((5, 0), (40, 30), (17, 8)):
        ids = torch.arange(20, 20 + length).tolist()
        rows.append({"input_ids": ids, "labels": [IGNORED] * masked + ids[masked:]})
    collate = collator(1)
    with torch.inference_mode():
        together = model(**collate(rows)).loss
        alone = [model(**collate([row])).loss for row in rows]
        counts = [sum(label != IGNORED for label in row["labels"][1:]) for row in rows]
    weighted = sum(float(loss) * n for loss, n in zip(alone, counts, strict=True)) / sum(counts)
    assert counts == [4, 10, 9]
    assert float(together) == pytest.approx(weighted, abs=1e-5)
    assert abs(float(sum(alone)) / 3 - weighted) > 1e-4  # the plain mean of rows is another number
