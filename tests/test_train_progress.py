"""What is seen of a training: a bar or lines, TensorBoard's files, warnings before the start."""

from __future__ import annotations

import importlib.util
import io
import re
import struct
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import RunMaker, make_base
from trained import labelled

import lora_kit as package
from lora_kit.errors import RunFileError, UserError
from lora_kit.schema import Run
from lora_kit.tasks.causal import Text
from lora_kit.tasks.packing import Packed
from lora_kit.train import arguments
from lora_kit.train.arguments import check_installed
from lora_kit.train.callbacks import Progress, read_metrics
from lora_kit.train.trainer import too_little

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "rope_theta": 1e4,
}


def test_a_line_for_each_logged_step(run_file: RunMaker, capfd: Any) -> None:
    package.train(run_file("cpt", **{"train.logging_steps": 2, "train.eval_steps": 3}))
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("step ")]
    figures = r"loss \d\.\d{3}  [\d,]+ tokens/s  [\d,]+ MiB"
    expected = [
        *(rf"step 2/4  {figures}", "step 3/4  evaluating on held-out rows"),
        *(r"step 3/4  eval_loss \d\.\d{3}", rf"step 4/4  {figures}"),
        *("step 4/4  evaluating on held-out rows", r"step 4/4  eval_loss \d\.\d{3}"),
    ]
    assert len(lines) == len(expected)
    for line, pattern in zip(lines, expected, strict=True):
        assert re.fullmatch(pattern, line), line
    memory = int(re.findall(r"([\d,]+) MiB", lines[0])[0].replace(",", ""))
    assert 100 < memory < 100_000


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """One bar: what is going on, losses, speed, memory, time left; no line beside it."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm")
    state = SimpleNamespace(is_world_process_zero=True, global_step=3, max_steps=8)
    bar = Progress()
    bar.on_train_begin(None, state, None)
    try:
        bar.on_log(None, state, None, {"loss": 2.5, "tokens_per_second": 1234.0})
        bar.on_prediction_step(None, state, None)
        assert bar.bar.tasks[0].description == "evaluating"
        bar.on_log(None, state, None, {"eval_loss": 2.75})
        assert bar.bar.tasks[0].description == "training"
        state.global_step = 4
        bar.on_step_end(None, state, None)
        bar.on_log(None, state, None, {"loss": 2.25, "tokens_per_second": 1234.0})
        bar.bar.refresh()
    finally:
        bar.on_train_end(None, state, None)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    assert re.search(
        r"training +\S+ 4/8 loss 2\.250  1,234 tokens/s  [\d,]+ MiB  eval_loss 2\.750 +\S", shown
    )
    assert "step 4/8" not in shown


def test_the_bar_of_an_evaluation(monkeypatch: pytest.MonkeyPatch, base: Path) -> None:
    """The share of the tokens that were scored, over all contenders, and the time left."""
    from lora_kit.base.load import load_base
    from lora_kit.base.pin import Pinned
    from lora_kit.schema import Base
    from lora_kit.tasks.measure import evaluation_bar, measure

    model = load_base(Base(model=str(base), dtype="float32"), Pinned("x", str(base)))
    rows = labelled([([5] * 10, [5] * 10)] * 16, list(range(16)), [1] * 16)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm")
    shares = []
    with evaluation_bar() as bar:
        assert bar is not None
        measure(model, rows, 1)  # before it is known how much there is to do
        assert bar.bar.tasks[0].total is None
        bar.total = 320
        model.register_forward_hook(lambda *_: shares.append(bar.bar.tasks[0].percentage))
        with bar.phase(160):
            measure(model, rows, 1)
        assert bar.bar.tasks[0].percentage == 50
        with bar.phase(160):  # a task of the user's that does not use `each_row`
            pass
        bar.bar.refresh()
    assert shares == [0, 25]  # before each batch of eight
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    assert re.search(r"evaluating +\S+ 100% 0:00:00", shown)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with evaluation_bar() as none:
        assert none is None
        measure(model, rows, 1)


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """{name: {step: value}} of TensorBoard's files: length, checksum, event, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, dict[int, float]] = {}
    for file in folder.iterdir():
        content, at = file.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + length])
            at += 12 + length + 4
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


@pytest.mark.slow
def test_tensorboard(run_file: RunMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures are those of metrics.jsonl; the files lie in the run and name no other place."""
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    package.train(run_file(), "train.report_to=[tensorboard]", "train.eval_steps=2")
    run = Path("runs/test")
    told = scalars(run / "tensorboard")
    rows = read_metrics(run / "metrics.jsonl")
    for tag, name in (
        ("train/loss", "loss"),
        ("eval/loss", "eval_loss"),
        ("train/tokens", "tokens"),
    ):
        expected = {row["step"]: row[name] for row in rows if name in row}
        assert len(expected) >= 2
        assert told[tag] == {step: pytest.approx(value) for step, value in expected.items()}
    assert not list((run / "checkpoints").glob("runs"))
    written = b"".join(file.read_bytes() for file in (run / "tensorboard").iterdir())
    assert str(Path.cwd()).encode() not in written and b"/base" not in written
    # Whoever sets transformers' variable has decided.
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "elsewhere")
    package.train(run_file(), "train.report_to=[tensorboard]", "name=other")
    assert scalars(Path("elsewhere")) and not Path("runs/other/tensorboard").exists()


def test_a_package_that_is_missing(run_file: RunMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def nothing(name: str) -> Any:
        asked.append(name)

    monkeypatch.setattr(arguments, "find_spec", nothing)
    with pytest.raises(RunFileError) as caught:
        package.train(run_file(), "train.report_to=[tensorboard, trackio, wandb]")
    assert caught.value.problems == [
        f"train.report_to: {name} is not installed: pip install {name}"
        for name in ("tensorboard", "trackio", "wandb")
    ]
    assert asked == ["tensorboard", "tensorboardX", "trackio", "wandb"]
    assert not Path("runs").exists()
    monkeypatch.setattr(arguments, "find_spec", lambda name: name == "tensorboardX" or None)
    check_installed(a_run(report_to=["tensorboard"]))


def test_nobody_is_told_unasked(cpt_run: Path) -> None:
    assert importlib.util.find_spec("tensorboardX")
    assert not (cpt_run / "tensorboard").exists()


def a_run(**train: Any) -> Run:
    values = {"recipe": "cpt", "name": "x", "base": {"model": "x"}, "data": {"train": "x"}}
    return Run.model_validate({**values, "train": train})


def rows_of(count: int, tokens: int) -> Any:
    """Rows in which all tokens but the first are trained on."""
    ids = list(range(tokens + 1))
    rows = labelled([(ids, [-100, *ids[1:]])] * count, list(range(count)), [1] * count)
    return SimpleNamespace(train=rows, rows=lambda use: rows)


# rows, labels in each, settings, parameters -> the words of the warnings
LITTLE: dict[str, tuple[int, int, dict[str, Any], int, list[str]]] = {
    "a usual run": (2_000, 150, {"num_train_epochs": 3.0}, 42_000_000, []),
    "a small one": (100, 150, {"num_train_epochs": 3.0}, 42_000_000, []),
    "few rows": (
        *(20, 150, {"num_train_epochs": 3.0}, 42_000_000),
        ["9,000 labels (3,000 x 3.0 epochs) for 42,000,000 trainable parameters"],
    ),
    "many steps": (
        *(64, 150, {"max_steps": 160}, 40_000),  # of 8 rows
        ["20.0 epochs over 9,600 labels: beyond about 10, models overfit; lower "
         "train.max_steps"],
    ),
    "many epochs": (64, 9, {"num_train_epochs": 11.0}, 40_000, ["lower train.num_train_epochs"]),
    "as many as are fine": (64, 9, {"num_train_epochs": 10.0}, 40_000, []),
    "watched": (64, 9, {"num_train_epochs": 11.0, "eval_steps": 5}, 40_000, []),
    "both": (4, 5, {"max_steps": 8}, 400_000, ["320 labels (20 x", "16.0 epochs over 20"]),
}  # fmt: skip


@pytest.mark.parametrize("case", LITTLE)
def test_too_little(case: str) -> None:
    count, tokens, train, parameters, words = LITTLE[case]
    said = too_little(Text(), a_run(**train).train, rows_of(count, tokens), parameters)
    assert len(said) == len(words)
    for line, word in zip(said, words, strict=True):
        assert line.startswith("warning: ") and word in line and "\n" not in line


def test_packed_rows_are_fewer() -> None:
    """An epoch is one over the documents, however many are in a row."""
    data = rows_of(64, 9)
    packed = Packed(data.train, room=100)
    assert len(packed) == 7
    both = SimpleNamespace(train=packed, rows=data.rows)
    (line,) = too_little(Text(), a_run(max_steps=20).train, both, 1)
    assert f"{20 * 8 / 7:.1f} epochs over {64 * 9} labels" in line
    assert np.isclose(float(line.split()[1]), 20 * 8 / 7, atol=0.05)


@pytest.mark.slow
def test_said_before_the_start(run_file: RunMaker, capfd: Any) -> None:
    package.train(run_file("cpt", **{"train.max_steps": 40, "train.logging_steps": 40}))
    lines = capfd.readouterr().err.splitlines()
    (at,) = [n for n, line in enumerate(lines) if "epochs over" in line]
    assert at < next(n for n, line in enumerate(lines) if line.startswith("step "))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "most"),
    [
        ({}, 256),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, 512),
        # The stated positions are the extended ones, as in Llama 3.1.
        ({"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 32}}, 256),
    ],
)
def test_rows_longer_than_the_positions(
    run_file: RunMaker, work: Path, config: dict[str, Any], most: int
) -> None:
    base = make_base(work / "own", **config)
    file = run_file("cpt", **{"base.model": str(base), "train.max_steps": 2})
    with pytest.raises(UserError, match=rf"train\.max_length: {most + 1} is too long") as got:
        package.train(file, f"train.max_length={most + 1}")
    assert f"has {most} positions: use at most {most}" in str(got.value)
    assert not Path("runs").exists()
    package.train(file, f"train.max_length={most}")
