"""No setting is idle: for each key of the run file, what it changes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_base
from trained import prepared

import lora_kit as package
from lora_kit.adapter.attach import attach
from lora_kit.adapter.audit import coverage
from lora_kit.base.load import load_base, load_tokenizer
from lora_kit.base.pin import pin
from lora_kit.errors import RunFileError
from lora_kit.run import load_run
from lora_kit.schema import Adapter, Base, Data, Run, Ship, Train
from lora_kit.tasks.causal import Conversations, Text
from lora_kit.train import arguments
from lora_kit.train.arguments import check_installed, training_arguments

# key -> another value than the default, and what the trainer's arguments then say.
ONE_STEP = {"train.max_steps": 1, "train.warmup_steps": 0}  # the first of a warm-up has a rate of 0
TRAIN: dict[str, tuple[Any, dict[str, Any]]] = {
    "max_steps": (7, {"max_steps": 7}),
    "num_train_epochs": (2.5, {"num_train_epochs": 2.5}),
    "per_device_train_batch_size": (3, {"train_batch_size": 3}),
    "gradient_accumulation_steps": (2, {"gradient_accumulation_steps": 2}),
    "per_device_eval_batch_size": (3, {"eval_batch_size": 3}),
    "learning_rate": (0.5, {"learning_rate": 0.5}),
    "lr_scheduler_type": ("linear", {"lr_scheduler_type": "linear"}),
    "warmup_steps": (5, {"warmup_steps": 5}),
    "weight_decay": (0.1, {"weight_decay": 0.1}),
    "max_grad_norm": (0.1, {"max_grad_norm": 0.1}),
    "optim": ("adamw_8bit", {"optim": "adamw_8bit"}),
    "adam_beta1": (0.8, {"adam_beta1": 0.8}),
    "adam_beta2": (0.9, {"adam_beta2": 0.9}),
    "adam_epsilon": (1e-6, {"adam_epsilon": 1e-6}),
    "gradient_checkpointing": (True, {"gradient_checkpointing": True}),
    "logging_steps": (3, {"logging_steps": 3}),
    "eval_steps": (3, {"eval_steps": 3, "eval_strategy": "steps"}),
    "save_steps": (3, {"save_steps": 3}),
    "report_to": (["tensorboard"], {"report_to": ["tensorboard"]}),
    "dataloader_num_workers": (1, {"dataloader_num_workers": 1}),
    "ddp_timeout": (7, {"ddp_timeout": 7}),
}
# Keys that our own code reads, with the test below, or the file, that proves it.
OWN_TRAIN = {
    "max_length": "test_max_length",
    "save_total_limit": "test_train_resume.py",
    "early_stopping_patience": "test_train_early_stopping.py",
    "load_best_model_at_end": "test_train_early_stopping.py",
    "trainable": "test_train_strategies.py",
    "top_layers": "test_train_strategies.py",
}
# key -> another value, and what an attached model then shows: ranks, scales and so on, by module.
ADAPTER: dict[str, Any] = {
    "r": 2,
    "lora_alpha": 3,
    "lora_dropout": 0.25,
    "target_modules": ["q_proj"],
    "exclude_modules": ["q_proj"],
    "layers_to_transform": [1],
    "rank_pattern": {"q_proj": 1},
    "alpha_pattern": {"q_proj": 1},
    "use_rslora": True,
    "use_dora": True,
}
OWN_ADAPTER = {"start": "test_train_failures.py"}
OTHERS = {
    Base: {"model", "revision", "dtype", "quantize"},
    Data: {
        *("train", "eval", "general", "columns", "chat_template"),  # below
        # tests/test_data_prepare.py
        *(
            "replay",
            "decontaminate",
            "labels",
            "supervise",
            "packing",
            "group",
            "ignore",
            "limits",
            "workers",
        ),
    },
    Run: {
        *("recipe", "name", "seed", "base", "adapter", "data", "train", "prove", "ship"),
        "speed",  # tests/test_train_speed.py
    },
    Ship: {"target"},  # tests/test_ship_targets.py
}


def test_every_key_has_a_case() -> None:
    assert set(Train.model_fields) == set(TRAIN) | set(OWN_TRAIN)
    assert set(Adapter.model_fields) == set(ADAPTER) | set(OWN_ADAPTER)
    for section, keys in OTHERS.items():
        assert set(section.model_fields) == keys, section


def a_run(**sections: Any) -> Run:
    values = {"recipe": "cpt", "name": "x", "base": {"model": "x"}, "data": {"train": "x"}}
    return Run.model_validate(values | sections)


@pytest.mark.parametrize("key", TRAIN)
def test_train_reaches_the_trainer(key: str, tmp_path: Path) -> None:
    value, expected = TRAIN[key]
    plain = training_arguments(a_run(), tmp_path)
    changed = training_arguments(a_run(train={key: value}), tmp_path)
    for name, wanted in expected.items():
        assert getattr(changed, name) == wanted
        assert getattr(plain, name) != wanted


def shape(model: Any) -> dict[str, Any]:
    """{module: (rank, scale, dropout, DoRA)} of what is adapted."""
    from peft.tuners.lora import LoraLayer

    return {
        name: (
            *(module.r["default"], module.scaling["default"]),
            *(str(module.lora_dropout["default"]), "default" in module.lora_magnitude_vector),
        )
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


@pytest.fixture(scope="module")
def all_linear(base: Path) -> dict[str, Any]:
    return shape(attach(bare(base), Adapter(), (), 0))


def bare(base: Path, **settings: Any) -> Any:
    settings = {"dtype": "float32", **settings}
    chosen = Base(model=str(base), **settings)
    return load_base(chosen, pin(chosen))


@pytest.mark.parametrize("key", ADAPTER)
def test_adapter_reaches_the_model(key: str, base: Path, all_linear: dict[str, Any]) -> None:
    assert len(all_linear) == 14
    assert set(all_linear.values()) == {(16, 2.0, "Identity()", False)}
    model = attach(bare(base), Adapter(**{key: ADAPTER[key]}), (), 0)
    found = shape(model)
    q_proj = [name for name in all_linear if name.endswith("q_proj")]
    one = {"r": (2, 16.0), "lora_alpha": (16, 3 / 16), "use_rslora": (16, 8.0)}
    one |= {"rank_pattern": (1, 32.0), "alpha_pattern": (16, 1 / 16)}
    if key == "target_modules":
        assert sorted(found) == sorted(q_proj)
        assert coverage(model).modules == {"q_proj": 2}
    elif key == "exclude_modules":
        assert sorted(found) == sorted(set(all_linear) - set(q_proj))
    elif key == "layers_to_transform":
        assert sorted(found) == sorted(name for name in all_linear if ".layers.1." in name)
    elif key == "lora_dropout":
        assert {value[2] for value in found.values()} == {"Dropout(p=0.25, inplace=False)"}
    elif key == "use_dora":
        assert {value[3] for value in found.values()} == {True}
    else:
        where = q_proj if key.endswith("_pattern") else list(all_linear)
        rank, scale = one[key]
        for name in all_linear:
            expected = (rank, pytest.approx(scale)) if name in where else (16, 2.0)
            assert found[name][:2] == expected


def test_base(base: Path, tmp_path: Path) -> None:
    import bitsandbytes as bnb

    q_proj = "model.layers.0.self_attn.q_proj"
    for dtype in ("float32", "bfloat16"):
        assert {p.dtype for p in bare(base, dtype=dtype).parameters()} == {getattr(torch, dtype)}
    four = bare(base, dtype="bfloat16", quantize="nf4").get_submodule(q_proj)
    assert isinstance(four, bnb.nn.Linear4bit)
    assert four.weight.quant_state.nested  # double quantization
    assert four.compute_dtype == torch.bfloat16
    assert isinstance(bare(base, quantize="int8").get_submodule(q_proj), bnb.nn.Linear8bitLt)
    other = make_base(tmp_path / "other", num_hidden_layers=1)
    assert len(bare(other).model.layers) == 1
    with pytest.raises(ValueError, match=r"base\.revision: .* remove it"):
        pin(Base(model=str(base), revision="main"))


def rows_of(file: Path, task: Any = None, **changes: Any) -> tuple[list[str], ...]:
    """What is said in the rows to learn from, to judge by, and of general text."""
    run = load_run(file, [f"{key}={value}" for key, value in changes.items()])
    tokenizer = load_tokenizer(pin(run.base).folder)
    data = prepared(run, task or Text())
    parts = (data.train, data.eval, data.general or ())
    return tuple([tokenizer.decode(row["input_ids"]) for row in part] for part in parts)


@pytest.mark.slow
def test_data(run_file: Any, work: Path, plain_base: Path) -> None:
    (work / "more.txt").write_text("<|endoftext|>".join(f"row {n}" for n in range(25)))
    whole = {"data.packing": "none"}
    train, held_out, general = rows_of(run_file("cpt", **whole))
    assert (len(train), len(held_out), len(general)) == (36, 24, 0)
    assert [len(p) for p in rows_of(run_file("cpt", **whole, **{"data.eval": 0.1}))] == [54, 6, 0]
    both = rows_of(run_file("cpt", **whole, **{"data.train": ["text.txt", "more.txt"]}))
    assert len(both[0]) + len(both[1]) == 85
    train, held_out, _ = rows_of(run_file("cpt", **whole, **{"data.eval": "more.txt"}))
    assert len(train) == 60
    assert held_out == [f"<eos>row {n}" for n in range(25)]
    assert rows_of(run_file("cpt", **{"data.general": "more.txt"}))[2] == held_out
    (work / "named.jsonl").write_text(
        "\n".join(json.dumps({"q": f"ask {n}", "a": f"say {n}"}) for n in range(9))
    )
    columns = {"prompt": "q", "completion": "a"}
    file = run_file("sft", **{"data.train": "named.jsonl", "data.columns": columns})
    said = "".join(key for part in rows_of(file, Conversations()) for key in part)
    assert "ask 0<|im_end|>" in said and "say 0<|im_end|>" in said
    # A template for a base without one stands beside the adapter.
    file = run_file("sft", **{"base.model": str(plain_base), **ONE_STEP})
    for name, override in (("without", "null"), ("with", "chatml")):
        package.train(file, f"name={name}", f"data.chat_template={override}")
        saved = load_tokenizer(f"runs/{name}/adapter")
        assert bool(saved.chat_template) == (name == "with")


def test_max_length(run_file: Any, base: Path) -> None:
    rows = prepared(load_run(run_file("cpt", **{"train.max_length": 24})), Text()).train
    assert set(rows.sizes("input_ids")[:-1]) == {24}


@pytest.mark.slow
def test_top(run_file: Any) -> None:
    """seed: the split and the adapter's A; name: the folder; recipe: which journey."""
    file = run_file("cpt", **ONE_STEP)
    assert rows_of(file) == rows_of(file)
    run = load_run(file)
    assert rows_of(file)[1] != rows_of(file, seed=1)[1]
    first, same, second = (
        attach(bare(Path(run.base.model)), run.adapter, (), seed).state_dict() for seed in (0, 0, 1)
    )
    (name, *_) = [name for name in first if "lora_A" in name]
    assert torch.equal(first[name], same[name])
    assert not torch.equal(first[name], second[name])
    assert training_arguments(load_run(file, ["seed=3"]), Path("x")).data_seed == 3
    package.train(file, "name=deep/er", "seed=3")
    assert json.loads(Path("runs/deep/er/run.lock.json").read_text())["seed"] == 3
    with pytest.raises(ValueError, match="such as `recipe: cpt`"):
        package.train(file, "recipe=sft", "name=sft")


@pytest.mark.slow
def test_eval_save_and_workers_act(run_file: Any) -> None:
    from lora_kit.train.callbacks import read_metrics

    changes = {"eval_steps": 2, "save_steps": 2, "save_total_limit": 9, "logging_steps": 3}
    changes |= {"dataloader_num_workers": 1, "max_grad_norm": 0, "lr_scheduler_type": "constant"}
    package.train(run_file("cpt", **{f"train.{key}": value for key, value in changes.items()}))
    rows = read_metrics(Path("runs/test/metrics.jsonl"))
    assert [row["step"] for row in rows if "loss" in row] == [3]
    assert [row["step"] for row in rows if "eval_loss" in row] == [2, 4]
    assert all(math.isfinite(row["eval_loss"]) for row in rows if "eval_loss" in row)
    folders = sorted(folder.name for folder in Path("runs/test/checkpoints").iterdir())
    assert folders == ["checkpoint-2", "checkpoint-4"]


def test_numbers_on_this_machine(tmp_path: Path) -> None:
    """bf16 autocast belongs to a bf16 base on a GPU; a float32 base is never rounded."""
    for dtype in ("float32", "bfloat16"):
        made = training_arguments(a_run(base={"model": "x", "dtype": dtype}), tmp_path)
        assert made.bf16 == (dtype == "bfloat16" and torch.cuda.is_available())
        assert made.fp16 is False
        assert made.use_cpu != torch.cuda.is_available()


def test_installed_classes_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    train = {key: value for key, (value, _) in TRAIN.items()}
    check_installed(a_run(train=train))
    check_installed(a_run(adapter=ADAPTER))
    real = arguments.typing.get_type_hints  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setattr(
            arguments.typing,  # type: ignore[attr-defined]
            "get_type_hints",
            lambda upstream: real(upstream) | {"r": str, "learning_rate": bool},
        )
        with pytest.raises(RunFileError) as caught:
            check_installed(a_run())
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "adapter.r",
        "train.learning_rate",
    ]
    fields = arguments.dataclasses.fields  # type: ignore[attr-defined]
    monkeypatch.setattr(
        arguments.dataclasses,  # type: ignore[attr-defined]
        "fields",
        lambda upstream: [f for f in fields(upstream) if f.name not in ("use_dora", "optim")],
    )
    with pytest.raises(RunFileError) as caught:
        check_installed(a_run())
    assert caught.value.problems == [
        "adapter.use_dora: the installed LoraConfig has no such field",
        "train.optim: the installed TrainingArguments has no such field",
    ]
