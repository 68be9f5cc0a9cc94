"""`speed: auto` trains what `speed: plain` trains, in less memory than was thought if need be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import lora_kit
from trained import prepared
from transformers import Trainer

import lora_kit as package
from lora_kit.errors import UserError
from lora_kit.run import load_run
from lora_kit.speed import attention, linear
from lora_kit.tasks.batches import halves, in_one_row, real_tokens
from lora_kit.tasks.packing import Packed
from lora_kit.train import trainer as module
from lora_kit.train.callbacks import read_metrics

pytestmark = pytest.mark.slow


def losses(run: str, key: str = "loss") -> list[float]:
    return [row[key] for row in read_metrics(Path(f"runs/{run}/metrics.jsonl")) if key in row]


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [
        ("cpt", {}),
        ("sft", {"data.packing": "documents", "train.gradient_accumulation_steps": 2}),
        ("sft", {"train.eval_steps": 2, "adapter.use_rslora": True}),
        ("sft", {"adapter.layers_to_transform": [1], "train.gradient_checkpointing": True}),
        ("sft", {"adapter.use_dora": True}),
    ],
)
def test_auto_trains_what_plain_trains(
    run_file: Any, recipe: str, settings: dict[str, Any]
) -> None:
    file = run_file(recipe, **settings)
    plain = package.train(file, "name=plain", "speed=plain")
    auto = package.train(file, "name=auto")
    for key in ("loss", "eval_loss", "grad_norm"):
        assert losses("auto", key) == pytest.approx(losses("plain", key), rel=2e-4)
    assert auto["training"]["tokens"] == plain["training"]["tokens"]
    found, expected = (report["domain"]["loss"]["adapted"] for report in (auto, plain))
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_auto_trains_what_plain_trains_on_a_quantized_base(run_file: Any, quantize: str) -> None:
    file = run_file("sft", **{"base.quantize": quantize})
    package.train(file, "name=plain", "speed=plain")
    package.train(file, "name=auto")
    assert losses("auto") == pytest.approx(losses("plain"), rel=1e-2)


def test_plain_takes_no_quick_path_and_auto_does(run_file: Any, monkeypatch: Any) -> None:
    counted = {"linear": 0, "attention": 0}

    def counting(owner: Any, name: str) -> None:
        forward = owner.forward

        def count(*args: Any) -> Any:
            counted[name] += 1
            return forward(*args)

        monkeypatch.setattr(owner, "forward", staticmethod(count))

    counting(linear.LoraLinear, "linear")
    counting(attention.DocumentAttention, "attention")
    file = run_file("sft", **{"train.max_steps": 1})
    package.train(file, "name=plain", "speed=plain")
    assert counted == {"linear": 0, "attention": 0}
    package.train(file, "name=auto")
    assert counted["linear"] and counted["attention"]


def test_an_unknown_architecture_is_said_once_and_trains(
    tmp_path: Path, run_file: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    from conftest import make_tokenizer
    from transformers import BloomConfig, BloomForCausalLM

    folder = tmp_path / "bloom"
    make_tokenizer(folder)
    BloomForCausalLM(
        BloomConfig(vocab_size=400, hidden_size=64, n_layer=2, n_head=4)
    ).save_pretrained(folder)
    package.train(run_file("sft", **{"base.model": str(folder)}))
    said = capfd.readouterr().err
    assert said.count("speed: standard path for attention (unsupported by this architecture)") == 1
    assert len(losses("test")) == 4


def test_rows_without_padding_are_the_rows(run_file: Any) -> None:
    rows = prepared(load_run(run_file("sft"))).train
    some = [{**rows[n], "row": n} for n in (4, 0, 2)]
    batch = in_one_row(some)
    assert batch["documents"] == [len(row["labels"]) for row in some]
    assert batch["numbers"] == [4, 0, 2]
    assert real_tokens(batch) == batch["input_ids"].numel() == sum(batch["documents"])
    for name in ("input_ids", "labels"):
        parts = batch[name][0].split(batch["documents"])
        assert all(
            part[1:].tolist() == row[name][1:].tolist()
            for part, row in zip(parts, some, strict=True)
        )
    learned = batch["labels"][0, 1:][batch["places"]]
    assert (learned != -100).all() and len(learned) == (batch["labels"] != -100).sum()


def test_packed_rows_keep_their_documents(run_file: Any) -> None:
    rows = Packed(prepared(load_run(run_file("sft"))).train, 128)
    batch = in_one_row([rows[0], rows[1]])
    expected = [len(rows.rows[n]["labels"]) for bin in rows.bins[:2] for n in bin]
    assert batch["documents"] == expected
    assert batch["position_ids"].max() == max(expected) - 1
    assert ((batch["position_ids"] == 0).sum()) == len(expected)


@pytest.mark.parametrize("padded", [False, True])
def test_halves_of_a_batch_are_the_batch(run_file: Any, padded: bool) -> None:
    from lora_kit.tasks.batches import collator

    rows = prepared(load_run(run_file("sft"))).train
    batch = (collator(0) if padded else in_one_row)([rows[n] for n in range(5)])
    parts = [part for part, _ in halves(batch)]
    assert len(parts) == 2
    if padded:
        found = [row[row >= 0].tolist() for part in parts for row in part["labels"]]
        assert sorted(found) == sorted(row[row >= 0].tolist() for row in batch["labels"])
        for part in parts:
            longest = part["attention_mask"].sum(1).max()
            assert int(longest) == part["input_ids"].shape[1]
    else:
        for name in ("input_ids", "labels"):
            assert torch.equal(torch.cat([part[name] for part in parts], dim=1), batch[name])
        assert parts[0]["documents"] + parts[1]["documents"] == batch["documents"]
        sizes = [part["input_ids"].numel() for part in parts]
        assert max(sizes) <= 2 * min(sizes) + max(batch["documents"])
    assert halves((collator(0) if padded else in_one_row)([rows[0]]))[1:] == []


class SmallMemory:
    """A step that has room for so many tokens, and breaks off when gradients were added already."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
        self.sizes: list[int] = []
        plain = Trainer.training_step

        def step(trainer: Any, model: Any, inputs: dict[str, Any], items: Any = None) -> Any:
            size = inputs["input_ids"].numel()
            loss = plain(trainer, model, inputs, items)
            if size > room:
                raise RuntimeError(
                    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't "
                    "allocate memory: you tried to allocate 1 bytes. Error code 12"
                )
            self.sizes.append(size)
            return loss

        monkeypatch.setattr(Trainer, "training_step", step)


@pytest.mark.parametrize("speed", ["auto", "plain"])
@pytest.mark.parametrize(("room", "halved"), [(4, 1), (2, 2), (1, 3)])
def test_a_batch_that_is_too_large_is_halved_and_the_step_stays_the_same(
    run_file: Any, speed: str, room: int, halved: int, monkeypatch: Any, capfd: Any
) -> None:
    """Eight rows a pass, and room for fewer: as many passes as are needed, and no more."""
    Path("text.txt").unlink(missing_ok=True)
    batch = {"train.per_device_train_batch_size": 8, "train.gradient_accumulation_steps": 2}
    file = run_file("cpt", **batch, **{"speed": speed, "train.max_length": 64})
    package.train(file, "name=roomy")
    seen = SmallMemory(monkeypatch, room * 64)
    report = package.train(file, "name=tight")
    assert losses("tight") == pytest.approx(losses("roomy"), rel=1e-4)
    assert losses("tight", "tokens") == losses("roomy", "tokens")
    assert max(seen.sizes) == room * 64
    assert report["training"]["micro_batch_halved"] == halved
    said = capfd.readouterr().err
    assert [f"each micro-batch now runs in {2**n} parts" in said for n in (1, 2, 3, 4)] == [
        n <= halved for n in (1, 2, 3, 4)
    ]


def test_padded_rows_are_computed_by_length(run_file: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the architecture wants padding: the same steps, with less of it."""
    monkeypatch.setattr(
        module, "make_fast", lambda *_: {"attention": "unsupported by this architecture"}
    )
    words = " ".join(["bread"] * 120)
    rows = [{"prompt": "a", "completion": words if n % 4 == 0 else "b" + str(n)} for n in range(40)]
    limits = {"exact_leaks": 99, "near_leaks": 1.0}
    file = run_file("sft", **{"data.limits": limits, "train.max_length": 256})
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    package.train(file, "name=plain", "speed=plain")
    seen = SmallMemory(monkeypatch, 10**6)
    package.train(file, "name=auto")
    assert losses("auto") == pytest.approx(losses("plain"), rel=1e-4)
    assert losses("auto", "tokens") == losses("plain", "tokens")
    assert len(seen.sizes) > 4 and sum(seen.sizes) < 1.5 * losses("auto", "tokens")[-1]


def test_out_of_memory_for_good_is_one_line(run_file: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    SmallMemory(monkeypatch, 1)
    with pytest.raises(
        UserError, match=r"out of memory, even with the micro-batch in \d+ parts: lower"
    ):
        package.train(run_file("sft", **{"train.per_device_train_batch_size": 16}))


def test_another_error_is_no_lack_of_memory(run_file: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(Trainer, "training_step", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        package.train(run_file("sft"))


def test_the_key_is_checked(run_file: Any) -> None:
    code, said = lora_kit("train", run_file("cpt"), "speed=fast")
    assert code == 2 and "speed" in said and "auto" in said
