"""The loss self-test: the same in every family of models, and every planted mistake is found."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
from conftest import make_tokenizer
from processes import here, left_over, send_when

from lora_kit.errors import UserError
from lora_kit.prove import self_test as module
from lora_kit.prove.self_test import compare_steps, make_setup, one_step, self_test
from lora_kit.run import load_run
from lora_kit.tasks.causal import Causal, Conversations, Text
from lora_kit.train.guards import Guards

pytestmark = pytest.mark.slow

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
OPT = {"hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
OPT["word_embed_proj_dim"] = 64
FAMILIES: dict[str, dict[str, Any]] = {
    "LlamaConfig": SIZES,
    "Qwen3Config": {**SIZES, "head_dim": 16},
    "GemmaConfig": {**SIZES, "head_dim": 16},
    "GPT2Config": {"n_embd": 64, "n_layer": 2, "n_head": 4},  # with dropout of its own
    "OPTConfig": OPT,  # packing is not for it
}


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the two processes, which take seconds."""
    monkeypatch.setattr(module, "_two_processes", lambda start: None)


def no_processes(config: str) -> None:
    raise AssertionError("not to be started")


def found_in(file: Path, *overrides: str) -> tuple[dict[str, Any], dict[str, bool | None]]:
    """What the self-test says, and each comparison's outcome."""
    run = load_run(file, overrides)
    task = Text() if run.recipe == "cpt" else Conversations()
    found = self_test(run, task, no_processes)
    return found, {one["name"]: one["passed"] for one in found["comparisons"]}


CLEAN = {
    **{"accumulation": True, "packing": True, "padding": True, "processes": None},
    "speed": True,
}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A random base of a family, made once."""

    def make(name: str) -> Path:
        import torch
        import transformers

        folder = tmp_path_factory.getbasetemp() / f"family-{name}"
        if not folder.exists():
            make_tokenizer(folder)
            special = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0}
            torch.manual_seed(0)
            config = getattr(transformers, name)(vocab_size=400, **FAMILIES[name], **special)
            transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize("recipe", ["cpt", "sft"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_clean_model_passes(
    run_file: Any, alone: None, family: Any, name: str, recipe: str
) -> None:
    file = run_file(recipe, **{"base.model": str(family(name)), "adapter.lora_dropout": 0.5})
    found, passed = found_in(file)
    assert passed == {**CLEAN, "packing": None if name == "OPTConfig" else True}
    assert len(set(found["labels"])) >= 4
    for one in found["comparisons"]:
        if one["ways"]:  # far from what is allowed
            assert one["loss_difference"] < one["tolerance"]["loss"] / 3
            assert one["gradient_difference"] < one["tolerance"]["gradient"] / 3


@pytest.mark.parametrize(
    ("dtype", "changes"),
    [
        ("bfloat16", {}),
        ("bfloat16", {"base.quantize": "nf4"}),
        ("float32", {"base.quantize": "nf4", "train.gradient_checkpointing": True}),
        ("float32", {"adapter.use_dora": True, "data.packing": "documents"}),
    ],
)
def test_types_and_settings(run_file: Any, alone: None, dtype: str, changes: Any) -> None:
    found, passed = found_in(run_file("sft", **{"base.dtype": dtype}, **changes))
    assert passed == CLEAN
    assert (found["dtype"], found["quantize"]) == (dtype, changes.get("base.quantize", "none"))
    assert found["comparisons"][0]["tolerance"]["loss"] == (1e-5 if dtype == "float32" else 5e-3)


def averaged(self: Any, model: Any, inputs: Any, num_items_in_batch: Any = None, **_: Any) -> Any:
    """The bug of old: each pass's own mean, then the mean of those."""
    return model(**inputs).loss / self.current_gradient_accumulation_steps


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("recipe", ["cpt", "sft"])
def test_a_loss_averaged_by_pass_is_found(
    run_file: Any, alone: None, monkeypatch: pytest.MonkeyPatch, recipe: str, dtype: str
) -> None:
    monkeypatch.setattr(Guards, "compute_loss", averaged)
    found, passed = found_in(run_file(recipe), f"base.dtype={dtype}")
    assert passed == {**CLEAN, "accumulation": False}
    assert "the means of the passes are averaged" in found["comparisons"][0]["note"]


def spoiled(change: Callable[[dict[str, Any], int], None]) -> Callable[..., Any]:
    """`Causal.collate`, whose batches are changed."""

    def collate(self: Causal, processor: Any, flat: bool = False) -> Any:
        def changed(rows: Any) -> dict[str, Any]:
            batch = (module.in_one_row if flat else module.collator(processor.pad_token_id))(rows)
            change(batch, processor.pad_token_id)
            return batch

        return changed

    return collate


def without_positions(batch: dict[str, Any], pad_id: int) -> None:
    batch.pop("position_ids", None)


def left_without_mask(batch: dict[str, Any], pad_id: int) -> None:
    """Padding on the left and no mask: every token attends to it. On the right no token of a
    causal model can, mask or not."""
    for number, mask in enumerate(batch.pop("attention_mask", ())):
        for name in ("input_ids", "labels"):
            batch[name][number] = batch[name][number].roll(int((mask == 0).sum()))


def learned_from(batch: dict[str, Any], pad_id: int) -> None:
    if "attention_mask" in batch:
        batch["labels"][batch["attention_mask"] == 0] = pad_id


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("change", "name", "note"),
    [
        (without_positions, "packing", "documents of one row see each other"),
        (left_without_mask, "padding", "padding is attended to"),
        (learned_from, "padding", "padding is attended to or trained on"),
    ],
)
def test_a_collator_gone_wrong_is_found(
    run_file: Any,
    alone: None,
    monkeypatch: pytest.MonkeyPatch,
    change: Any,
    name: str,
    note: str,
    dtype: str,
) -> None:
    monkeypatch.setattr(Causal, "collate", spoiled(change))
    found, passed = found_in(run_file("sft"), f"base.dtype={dtype}")
    assert passed[name] is False
    (said,) = (one["note"] for one in found["comparisons"] if one["name"] == name)
    assert said.startswith(note)
    if name == "padding":  # named as the cause where one pass is padded and the others are not
        assert found["comparisons"][0]["note"].endswith("see padding")
    else:
        assert passed == {**CLEAN, "packing": False}


def test_an_attention_that_ignores_positions_fails_only_where_packing_is_asked_for(
    run_file: Any, alone: None, family: Any
) -> None:
    file = run_file("cpt", **{"base.model": str(family("OPTConfig"))})
    found, passed = found_in(file)
    assert passed["packing"] is None
    assert found["comparisons"][1]["note"] == "not supported by this base"
    with pytest.raises(UserError, match=r"data\.packing: documents: OPTForCausalLM does not"):
        found_in(file, "data.packing=documents")


def test_summed_gradients_of_two_processes_are_found(run_file: Any) -> None:
    run = load_run(run_file("sft"))

    def two(scale: float) -> Callable[[str], None]:
        def start(config: str) -> None:
            assert config == "cpu_2proc"
            setup = make_setup(run, Conversations())
            step = one_step(setup, setup.rows, 8, 1)
            file = os.environ[module.STEP_VARIABLE]
            np.savez(file, loss=step.loss, gradient=step.gradient * scale)

        return start

    assert self_test(run, Conversations(), two(1.0))["comparisons"][-1]["passed"] is True
    last = self_test(run, Conversations(), two(2.0))["comparisons"][-1]
    assert (last["name"], last["passed"]) == ("processes", False)
    assert last["gradient_difference"] == pytest.approx(1.0)
    assert last["note"].startswith("gradients are summed")


def test_one_gpu_is_not_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "gpu_is_used", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert module._two_processes(no_processes) is None


def test_what_is_not_a_number_does_not_pass() -> None:
    one = module.Step(1.0, np.ones(2, np.float32))
    nan = module.Step(1.0, np.array([1, np.nan], np.float32))
    assert compare_steps("padding", ["a", "b"], one, one, (0, 0))["passed"] is True
    assert compare_steps("padding", ["a", "b"], one, nan, (1, 1))["passed"] is False


@pytest.mark.parametrize("count", [3, 40])
def test_rows_differ_where_all_answers_are_short(run_file: Any, work: Path, count: int) -> None:
    file = run_file("sft", **{"data.eval": "held.jsonl"})
    rows = [{"prompt": f"Is {n} even?", "completion": "no"} for n in range(count)]
    (work / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows = [{"prompt": f"Is {n}{n} even?", "completion": "no"} for n in range(50, 80)]
    (work / "held.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows = make_setup(load_run(file), Conversations()).rows
    assert len(rows) == 8
    assert len({int((row["labels"][1:] != -100).sum()) for row in list(rows)}) >= 2


def test_the_command_checks_two_processes_and_leaves_nothing(run_file: Any, work: Path) -> None:
    file = run_file("sft", **{"data.packing": "documents"})
    before = sorted(work.iterdir())
    process = processes.start([*processes.LORA_KIT, "doctor", "--loss", str(file), "--json"])
    printed, said = process.communicate(timeout=processes.LIMIT_S)
    assert process.returncode == 0, said
    found = json.loads(printed)
    assert [one["passed"] for one in found["comparisons"]] == [True] * 5
    assert found["comparisons"][-1]["ways"] == ["one process", "two processes"]
    assert sorted(work.iterdir()) == before


def test_a_table_and_an_exit_code(
    run_file: Any,
    alone: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from lora_kit.cli import main

    monkeypatch.setattr("sys.argv", ["lora-kit", "doctor", "--loss", str(run_file("cpt"))])
    with pytest.raises(SystemExit) as ended:
        main()
    out = capsys.readouterr().out
    assert ended.value.code == 0
    assert out.count("  pass") == 4 and "FAIL" not in out and "not checked" in out
    assert max(map(len, out.splitlines()[2:])) <= 80
    monkeypatch.setattr(Guards, "compute_loss", averaged)
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    assert ended.value.code == 1
    assert printed.out.count("FAIL") == 1
    assert "error: accumulation: the means of the passes" in printed.err


def test_mistakes_are_the_users(run_file: Any, alone: None) -> None:
    assert here("doctor", "--loss", "nothing.yaml")[0] == 2
    code, said = here("doctor", "base.dtype=float32")
    assert code == 2 and "settings need --loss RUN.yaml" in said
    file = run_file("sft")
    with pytest.raises(UserError, match="adapter\\.target_modules"):
        found_in(file, "adapter.target_modules=[nowhere]")


def test_ctrl_c_ends_it_and_both_processes(run_file: Any, work: Path) -> None:
    file = run_file("sft")
    process = processes.start([*processes.LORA_KIT, "doctor", "--loss", str(file)])
    send_when(process, lambda: len(left_over(str(work))) >= 4, signal.SIGINT)
    code, said = processes.finish(process)
    assert code == 130, said
    assert said.splitlines()[-1] == "stopped by SIGINT"
    assert not left_over(str(work))
