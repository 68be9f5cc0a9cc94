"""Are the verdicts right, and what do they cost?

    python scripts/bench/prove.py intervals            # false alarms and coverage, on nano
    python scripts/bench/prove.py intervals --run RUN  # the same on the held-out text of a run
    python scripts/bench/prove.py throughput           # against the trainer's own evaluate, A B A B
    python scripts/bench/prove.py share                # of the demo's time that judging takes

`intervals` measures base and adapter on every held-out unit. Null comparisons: differences of that
comparison, centred so that their true value is 0, drawn again in samples of 20, 50 and 200 units;
a verdict other than `no different` is a false alarm. Coverage: in subsamples of 50 units, how
often the 95% interval holds the value of the full set.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from lora_kit.launch import prepare_process

UNITS = (20, 50, 200)
COMPARISONS = 40
SUBSAMPLES = 100
SUBSAMPLE = 50  # units


def trained(folder: Path) -> Path:
    """A run of nano on questions about functions, half of them held out."""
    from lora_kit.run import shipped

    settings = ["data.eval=0.5", "name=run", "prove.shots=0", "train.num_train_epochs=1"]
    command = [sys.executable, "-c", "from lora_kit.cli import main; main()", "train"]
    run_file = shipped("recipes") / "configs" / "nano-sft.yaml"
    subprocess.run([*command, run_file, *settings], cwd=folder, check=True, capture_output=True)
    return folder / "runs" / "run"


def judged(run: Path) -> tuple[Any, Any, Any, Any]:
    """(model, tokenizer, what was prepared, run) of a finished run."""
    from lora_kit.adapter.finished import FinishedRun
    from lora_kit.adapter.load import load_model
    from lora_kit.prove.compare import prepared_again

    finished = FinishedRun(run)
    model, tokenizer = load_model(finished)
    from lora_kit.tasks.causal import Conversations

    _, data = prepared_again(finished, Conversations())
    return model, tokenizer, data, finished.require_run()


def intervals(run: Path) -> None:
    from lora_kit.tasks.bootstrap import compared, verdict
    from lora_kit.tasks.measure import measure
    from lora_kit.tasks.task import Score

    model, tokenizer, data, _ = judged(run)
    adapted = measure(model, data.eval, tokenizer.pad_token_id)
    with model.disable_adapter():
        base = measure(model, data.eval, tokenizer.pad_token_id)
    count = len(base.nats)

    def losses(nats: np.ndarray, chosen: Any) -> Score:
        return Score("loss", np.stack([nats[chosen], base.tokens[chosen]], 1), better="lower")

    full = compared(losses(base.nats, slice(None)), losses(adapted.nats, slice(None)), 0)
    print(f"{count} units: {full['base']} -> {full['adapted']} nats per token, {full['ci95']}")
    null = adapted.nats - full["difference"] * base.tokens
    print(
        f"each unit's difference, nats per token: sd {np.std((null - base.nats) / base.tokens):.3f}"
    )

    for units in UNITS:
        alarms = 0
        for seed in range(COMPARISONS):
            chosen = np.random.default_rng(seed).integers(0, count, units)
            found = compared(losses(base.nats, chosen), losses(null, chosen), seed)
            alarms += verdict(found, units) != "no different"
        print(f"null, {units} units: {alarms} false alarms of {COMPARISONS}")
    covered = 0
    for seed in range(SUBSAMPLES):
        chosen = np.random.default_rng(1000 + seed).permutation(count)[: min(SUBSAMPLE, count // 2)]
        pair = losses(base.nats, chosen), losses(adapted.nats, chosen)
        low, high = compared(*pair, seed)["ci95"]
        covered += low <= full["difference"] <= high
    print(f"coverage: {covered} of {SUBSAMPLES} intervals over {len(chosen)} units")


def throughput(run: Path, rounds: int) -> None:
    from lora_kit.schema import Run
    from lora_kit.tasks.causal import Conversations
    from lora_kit.tasks.measure import measure
    from lora_kit.train.journey import Journey
    from lora_kit.train.strategies import Strategy
    from lora_kit.train.trainer import make_trainer

    model, tokenizer, data, opened = judged(run)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)  # the trainer wants something that trains
    values = opened.model_dump()
    values["train"] |= {"eval_steps": 1}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        journey = Journey(Run(**values), Conversations())
        journey.run.directory.mkdir(parents=True)
        strategy = Strategy(opened.adapter)
        trainer = make_trainer(journey, model, (), tokenizer, data, strategy)
        tokens = int(data.eval.sizes("input_ids").sum())
        times: dict[str, list[float]] = {"measure": [], "evaluate": []}
        for _ in range(rounds + 1):  # the first one warms up
            for name in times:
                started = time.perf_counter()
                if name == "measure":
                    found = measure(model, data.eval, tokenizer.pad_token_id)
                    loss = found.nats.sum() / found.tokens.sum()
                else:
                    theirs = trainer.evaluate()["eval_loss"]
                times[name].append(time.perf_counter() - started)
    print(f"loss: measure {loss:.5f}, evaluate {theirs:.5f}; {tokens:,} tokens")
    for name, taken in times.items():
        middle = statistics.median(taken[1:])
        print(f"{name:9} {tokens / middle:9,.0f} tokens/s ({middle:.2f} s)")


def share(folder: Path) -> None:
    command = [sys.executable, "-c", "from lora_kit.cli import main; main()", "demo"]
    started = time.perf_counter()
    judging = begun = 0.0
    with subprocess.Popen(
        command, cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stderr
        for line in process.stderr:
            if line.startswith("judging"):
                begun = time.perf_counter()
            elif line.startswith("written to"):
                judging += time.perf_counter() - begun
    whole = time.perf_counter() - started
    rest = whole - judging
    print(f"demo {whole:.1f} s, of it judging {judging:.1f} s: {judging / rest:+.1%} of the rest")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=["intervals", "throughput", "share"])
    parser.add_argument("--run", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    prepare_process()  # as every verb does
    with tempfile.TemporaryDirectory() as folder:
        if asked.what == "share":
            share(Path(folder))
            return
        run = asked.run or trained(Path(folder))
        if asked.what == "intervals":
            intervals(run)
        else:
            throughput(run, asked.rounds)


if __name__ == "__main__":
    main()
