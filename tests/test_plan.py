"""`lora-kit plan`: what a run will need, from its configuration; and a way of running that fits."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import RunMaker, sentences

from lora_kit import cli, plan
from lora_kit.base.load import load_base
from lora_kit.base.pin import Pinned, pin
from lora_kit.errors import UserError
from lora_kit.run import load_run
from lora_kit.speed import attention, memory
from lora_kit.speed.memory import Choice, Machine, PassCost
from lora_kit.tasks.causal import Conversations, Text
from lora_kit.tasks.encode import rows_of

ROOM = 1 << 40
NOTHING = PassCost(0, 0, 0, {})
CAUSES = ("adapter", "gradients", "optimizer", "activations", "logits", "buffers", "framework")


def planned(run_file: RunMaker, recipe: str = "cpt", **changes: Any) -> Any:
    """The plan of a run file."""
    run = load_run(run_file(recipe, **changes))
    return plan.plan_run(run, *parts_of(run))


def parts_of(run: Any) -> tuple[Any, Any, Any, Any]:
    """Task, base, tokenizer and rows of a run."""
    task = Text() if run.recipe == "cpt" else Conversations()
    pinned = pin(run.base)
    return task, pinned, *rows_of(task, run, pinned, limits=False)


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets what a process may hold that holds nothing yet, on a device of known rates."""

    def set_to(limit: float) -> None:
        rates = {"float32": 1e11, "bfloat16": 4e11}
        device = Machine("cpu", int(limit), 0, rates, 1e10)
        monkeypatch.setattr(plan, "_machine", lambda *_: device)

    set_to(ROOM)
    return set_to


def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[Any, str, str]:
    monkeypatch.setattr(sys, "argv", ["lora-kit", "plan", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code, *capsys.readouterr()


# --- The verb


def test_the_verb_needs_no_weights(
    run_file: RunMaker,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "shapes"
    folder.mkdir()
    for file in base.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    file = str(run_file("sft", **{"base.model": str(folder)}))
    monkeypatch.setattr("lora_kit.plan._LEAST_SHARE", 0.0)  # also on a busy machine
    code, out, _ = command(monkeypatch, capsys, file, "--json")
    assert code == 0
    found = json.loads(out)
    assert {*CAUSES, "weights float32"} <= found["memory_mib"].keys()
    assert sum(found["memory_mib"].values()) == pytest.approx(found["total_mib"], abs=1)
    assert found["memory_mib"]["framework"] > 100  # Python and torch are there already
    assert found["fits"] is True and found["total_mib"] < found["room_mib"]
    assert found["chosen"] == {"micro_batch": 4, "accumulation": 1, "recomputed": 0}
    assert found["tokens_per_second"] > 0 and found["seconds"] > 0
    assert found["evaluation_seconds"] > 0
    assert found["disk_mib"].keys() == {"checkpoints", "adapter", "merged model"}
    code, out, _ = command(monkeypatch, capsys, file, "train.max_steps=8", "speed=plain")
    assert code == 0 and "activations" in out and "tokens/s" in out and "as written" in out


def test_a_rate_that_others_disturbed_is_unknown(
    run_file: RunMaker, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lora_kit.plan.time.thread_time", lambda: 0.0)  # this thread had no core
    code, out, _ = command(monkeypatch, capsys, str(run_file()), "--json")
    found = json.loads(out)
    assert (code, found["tokens_per_second"], found["seconds"]) == (0, None, None)
    code, out, _ = command(monkeypatch, capsys, str(run_file()))
    assert code == 0 and "tokens/s unknown (other processes use the CPU)" in out


def test_mistakes_are_one_line(
    run_file: RunMaker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = run_file()
    for arguments, words in (
        ([str(file), "train.max_lenght=9"], "did you mean `max_length`"),
        ([str(file), "train.max_length=4096"], "positions"),
        ([str(file), "adapter.layers_to_transform=[7]"], "layers 0 to 1"),
        (["none.yaml"], "none.yaml"),
    ):
        code, out, err = command(monkeypatch, capsys, *arguments)
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert code == 2 and len(errors) == 1 and words in errors[0] and not out


def test_a_base_that_cannot_be_counted_says_so(run_file: RunMaker, room: Any) -> None:
    file = load_run(run_file()).base.model
    folder = Path("unknown")
    shutil.copytree(file, folder)
    (folder / "config.json").write_text('{"model_type": "never_heard_of"}')
    with pytest.raises(plan.Uncountable, match=r"unknown: cannot be planned: .*never_heard_of"):
        planned(run_file, **{"base.model": str(folder.resolve())})
    run = load_run(run_file())
    task, pinned, tokenizer, data = parts_of(run)
    said: list[str] = []
    unknown = Pinned("", str(folder))
    assert plan.plan_training(run, task, unknown, tokenizer, data, said.append) is None
    found = plan.plan_training(run, task, pinned, tokenizer, data, said.append)
    assert found is not None and found.why in said[1]
    assert said[0].startswith("no memory plan: using the batch as written") and len(said) == 2


# --- What is predicted


def test_the_evaluation_is_planned(run_file: RunMaker, room: Any) -> None:
    """Its time within the budget, and its memory: that of the larger of both."""
    room(2**33)
    whole = planned(run_file)
    least = planned(run_file, **{"prove.budget": 1e-3})
    assert 0 < least.evaluation_seconds < whole.evaluation_seconds / 2
    assert f"{whole.evaluation_seconds:,.0f} s of evaluation" in str(whole)
    # Long rows after training on short ones.
    rows = [{"prompt": f"{n}?", "completion": " ".join(sentences(9, n))} for n in range(30)]
    Path("long.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    one = {"train.per_device_train_batch_size": 1, "train.max_length": 256}
    short = planned(run_file, "sft", **one)
    long = planned(run_file, "sft", **one, **{"data.eval": "long.jsonl"})
    assert long.memory["logits"] > short.memory["logits"]


def test_an_architecture_that_the_quick_paths_do_not_know_is_planned_by_the_plain_one(
    run_file: RunMaker, room: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: Any, **__: Any) -> Any:
        raise NotImplementedError("attention with dropout")

    plain = planned(run_file, speed="plain")
    monkeypatch.setattr(attention.DocumentAttention, "apply", unknown)
    assert planned(run_file).memory == plain.memory


@pytest.mark.parametrize("quantize", ["none", "nf4", "int8"])
def test_bytes_of_the_base_are_those_of_the_loaded_one(run_file: RunMaker, quantize: str) -> None:
    changes = {"base.dtype": "bfloat16", "base.quantize": quantize}
    run = load_run(run_file(**changes))
    task, pinned, _, data = parts_of(run)
    _, held, file, merged = plan._on_meta(run, task, pinned, data)
    loaded: dict[int, int] = {}

    def add(x: Any) -> None:
        loaded[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()

    parameters = 0
    for parameter in load_base(run.base, pin(run.base)).parameters():
        add(parameter)
        parameters += parameter.numel()
        if state := getattr(parameter, "quant_state", None):
            for x in (state.absmax, state.code, state.state2.absmax, state.state2.code):
                add(x)
        for name in ("CB", "SCB"):
            if getattr(parameter, name, None) is not None:
                add(getattr(parameter, name))
    predicted = sum(n for cause, n in held.items() if cause[:7] in ("weights", "quantiz"))
    # Code tables are shared by some versions, and are all there is to a layer as small as these.
    assert predicted == pytest.approx(sum(loaded.values()), rel=0.06)
    assert file == 2 * merged  # it is stored in float32
    assert quantize != "none" or merged == 2 * parameters


def test_longer_rows_and_higher_ranks_take_more(run_file: RunMaker, room: Any) -> None:
    one = {"train.per_device_train_batch_size": 1}
    small = planned(run_file, **one)
    long = planned(run_file, **one, **{"train.max_length": 256})
    wide = planned(run_file, **one, **{"adapter.r": 16})
    assert long.memory["activations"] > 1.5 * small.memory["activations"]
    assert wide.memory["adapter"] == 4 * small.memory["adapter"]
    assert wide.memory["optimizer"] == 2 * wide.memory["gradients"] == 2 * wide.memory["adapter"]
    eight = planned(run_file, **one, **{"adapter.r": 64, "train.optim": "adamw_8bit"})
    assert eight.memory["optimizer"] < eight.memory["adapter"]
    assert long.flops > 1.9 * small.flops


def test_packed_rows_and_conversations_are_measured_by_their_lengths(
    run_file: RunMaker, room: Any
) -> None:
    padded = planned(run_file, "sft", **{"train.max_length": 256})
    packed = planned(run_file, "sft", **{"train.max_length": 256, "data.packing": "documents"})
    assert packed.memory["activations"] > padded.memory["activations"]  # rows are full
    assert packed.flops > padded.flops


def test_judging_while_it_trains_is_counted(run_file: RunMaker, room: Any) -> None:
    one = {"train.per_device_train_batch_size": 1, "train.max_length": 16}
    plain = {"speed": "plain", **one}
    judged = {**plain, "train.eval_steps": 2, "train.per_device_eval_batch_size": 8}
    without, with_it = planned(run_file, **plain), planned(run_file, **judged)
    assert with_it.memory["logits"] > 2 * without.memory["logits"]
    assert with_it.flops == without.flops


# --- What is chosen


@pytest.mark.slow
def test_less_memory_means_smaller_passes_of_the_same_step_then_recomputation(
    run_file: RunMaker, room: Any
) -> None:
    changes = {"train.per_device_train_batch_size": 8, "train.max_length": 64}
    whole = planned(run_file, **changes)
    assert whole.choice == Choice(8, 1, 0)
    assert whole.why.startswith(
        "8 rows a micro-batch, 1 micro-batch a step; no layer is recomputed: as wri"
    )
    always = memory.unused_bytes(NOTHING)
    seen = []
    for share in (0.9, 0.5, 0.3, 0.125):
        limit = always + (whole.total - always) * share
        room(limit / 0.9)
        found = planned(run_file, **changes)
        assert found.fits and found.total <= limit
        assert found.choice.micro_batch * found.choice.accumulation == 8
        assert "fastest that fits" in found.why
        seen.append((found.choice.micro_batch, found.choice.recomputed))
    assert seen[-1] == (1, 2) and seen[0] != seen[-1]


@pytest.mark.slow
def test_nothing_fits_and_nothing_is_left_to_change(
    run_file: RunMaker, room: Any, cpt_run: Path
) -> None:
    room(1)
    changes = {"adapter": {"start": str(cpt_run)}, "base.quantize": "nf4", "train.max_length": 64}
    with pytest.raises(UserError, match="too much; use a smaller base or more memory"):
        planned(run_file, **changes)


@pytest.mark.slow
def test_nothing_fits_and_what_it_names_does(run_file: RunMaker, room: Any) -> None:
    changes = {"train.max_length": 256}
    one = {"train.per_device_train_batch_size": 1, "train.gradient_checkpointing": True}
    room((planned(run_file, **changes, **one).total - 200_000) / 0.9)
    with pytest.raises(UserError, match=r"does not fit into memory: .* MiB too much; ") as error:
        planned(run_file, **changes)
    line = str(error.value)
    assert "\n" not in line and "would fit" in line
    named = [item for item in line.split("too much; ")[1].split() if "=" in item]
    assert named
    for item in named:
        key, value = item.split("=")
        changes[key] = int(value) if value.isdigit() else value
    assert planned(run_file, **changes).fits
    room(memory.unused_bytes(NOTHING))  # nothing takes less
    with pytest.raises(UserError, match="a smaller base or more memory"):
        planned(run_file, **changes)


def test_gradient_checkpointing_is_all_layers_and_plain_is_as_written(
    run_file: RunMaker, room: Any
) -> None:
    forced = planned(run_file, **{"train.gradient_checkpointing": True})
    assert forced.choice.recomputed == forced.layers == 2
    room(1 << 20)
    plain = planned(run_file, speed="plain")
    assert plain.choice == Choice(4, 1, 0)
    assert not plain.fits and "does not fit" in plain.why


# --- What is free


def test_what_is_free_counts_not_what_there_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    available = psutil.virtual_memory()._replace(total=100 << 30, available=7 << 30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: available)
    monkeypatch.setattr(plan, "_CGROUPS", tmp_path)
    assert plan.free_memory() == 7 << 30
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 1000\nfile 3\n")
    (tmp_path / "memory.current").write_text("5000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert plan.free_memory() == 7 << 30
    (tmp_path / "memory.max").write_text("9000\n")
    assert plan.free_memory() == 9000 - 5000 + 1000
