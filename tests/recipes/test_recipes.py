"""Each recipe on a tiny base: the files it leaves, how far it went, and what is in them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from prepared import tokens
from trained import prepared

import lora_kit as package
from lora_kit.run import load_run, shipped

RUN = Path("runs/test")
FILES = {
    *("run.yaml", "run.lock.json", "census.json", "metrics.jsonl", "report.json", "report.html"),
    ".writer",  # the lock of the process that writes
    *("adapter/adapter_config.json", "adapter/adapter_model.safetensors"),
    *("adapter/tokenizer.json", "adapter/tokenizer_config.json", "adapter/chat_template.jinja"),
    *(
        f"checkpoints/checkpoint-4/{name}"
        for name in (
            *("adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt"),
            *("rng_state.pth", "trainer_state.json", "seal.json"),
        )
    ),
}
METRICS = {"step", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "seconds"}
# Both layers: q 64+64, k and v 64+32, o 64+64, gate and up 64+128, down 128+64; rank 4.
TRAINABLE = 2 * 4 * (128 + 96 + 96 + 128 + 192 + 192 + 192)


@pytest.mark.parametrize("recipe", ["cpt", "sft"])
def test_recipe_leaves_a_whole_run(
    run_file: Any, work: Path, recipe: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (work / "general.txt").write_text("<|endoftext|>".join(f"a text {n}" for n in range(30)))
    file = run_file(recipe, **{"data.general": "general.txt"})
    returned = package.train(file)
    out, said = capfd.readouterr()
    assert out == ""  # what people read goes to stderr
    assert "eval: 24 rows read, 24 kept" in said
    assert f"{TRAINABLE:,} trainable parameters" in said and "adapted modules hold " in said
    assert "step 4/4" in said

    found = {str(path.relative_to(RUN)) for path in RUN.rglob("*") if path.is_file()}
    assert found == FILES
    assert load_run(RUN / "run.yaml") == load_run(file)  # the resolved file alone repeats it

    rows = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row.keys() == METRICS for row in rows)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert [row["tokens"] for row in rows] == sorted({row["tokens"] for row in rows})

    report = json.loads((RUN / "report.json").read_text())
    assert report == json.loads(json.dumps(returned))
    assert report.keys() >= {"verdict", "domain", "general", "training", "memory"}
    assert report["verdict"].keys() - {"few_shot"} == {"domain", "general"}
    for part, documents in (("domain", 24), ("general", 30)):
        assert report[part]["documents"] == documents
        for measure in ("loss", "bits_per_byte"):
            figures = report[part][measure]
            assert figures.keys() == {"base", "adapted", "difference", "ci95", "better", "changed"}
            low, high = figures["ci95"]
            assert low <= figures["difference"] <= high
    epochs = report["training"].pop("epochs")
    predicted = report["training"].pop("predicted_tokens_per_second")
    assert predicted is None or predicted > 0  # unknown on a busy machine
    assert epochs == pytest.approx(4 / 9 if recipe == "sft" else 4, abs=1e-3)
    assert report["training"] == {
        "steps": 4,
        "tokens": rows[-1]["tokens"],
        "tokens_per_second": rows[-1]["tokens_per_second"],
        "seconds": pytest.approx(rows[-1]["seconds"], abs=1e-3),
        "trainable_parameters": TRAINABLE,
        "world_size": 1,
        "chosen": {"micro_batch": 4, "accumulation": 1, "recomputed": 0},
        "micro_batch_halved": 0,
    }
    assert report["memory"].keys() == {"predicted_mib", "measured_mib"}

    lock = json.loads((RUN / "run.lock.json").read_text())
    assert lock["finished"] is True
    assert lock["seed"] == 0
    assert lock["batch"]["rows_per_step"] == 4
    assert set(lock["base"]["hashes"]) == {
        *("model.safetensors", "config.json", "chat_template.jinja"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    assert len(lock["data"]) == 2
    assert len(lock["adapter"]["sha256"]) == len(lock["adapter"]["files"]["tokenizer.json"]) == 64


def test_tokens_count_no_padding(run_file: Any) -> None:
    """Rows of different lengths: what is counted is what was trained on, once an epoch."""
    file = run_file("sft", **{"train.max_steps": 9})  # 36 rows in batches of 4: one epoch
    report = package.train(file)
    run = load_run(file)
    rows = prepared(run).train
    assert len(set(rows.sizes("input_ids"))) > 1
    assert report["training"]["tokens"] == tokens(rows)


def test_own_recipe_by_path(run_file: Any, work: Path) -> None:
    """A copied recipe, changed, runs the same journey; one without `main` is refused."""
    shutil.copy(shipped("recipes") / "cpt.py", work / "mine.py")
    mine = work / "mine.py"
    changed = mine.read_text().replace(
        'directory.say(f"sample:', 'run.seed and directory.say(f"sample:'
    )
    mine.write_text(changed.replace("return prove(", "return {'mine': True} | prove("))
    assert package.train(run_file(), "recipe=mine.py")["mine"] is True
    mine.write_text("x = 1\n")
    with pytest.raises(ValueError, match=r"mine\.py: defines no main"):
        package.train(run_file(), "recipe=mine.py", "name=other")
    assert not Path("runs/other").exists()
