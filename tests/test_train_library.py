"""A whole run whose loss is a library's: TRL's SFTTrainer on the rows of `sft`, guarded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import RunMaker
from processes import adapter_hash

import lora_kit as package
from lora_kit.hashes import file_hash
from lora_kit.run import shipped
from lora_kit.train.callbacks import read_metrics
from lora_kit.train.save import read_seal

pytestmark = pytest.mark.slow
TASK = '''
class Keys(Train):
    """`train:` with a key of SFTConfig: the rows are tokenized already."""

    dataset_kwargs: dict[str, bool] = {"skip_prepare_dataset": True}


class ByTrl(Conversations):
    """Conversations that TRL trains on."""

    loss = Task.loss  # left to the trainer
    flat = False
    settings = {"train": Keys}

    def classes(self):
        from trl import SFTConfig, SFTTrainer

        return SFTTrainer, SFTConfig

    def collate(self, processor, flat=False):
        return None


TASK = ByTrl()
'''


@pytest.fixture
def recipe(work: Path) -> Path:
    """The shipped recipe with another task."""
    file = work / "by_trl.py"
    text = (shipped("recipes") / "sft.py").read_text(encoding="utf-8")
    assert text.count("\nTASK = Conversations()\n") == 1
    text = text.replace("\nTASK = Conversations()\n", TASK)
    imports = "from lora_kit.schema import Json, Run"
    more = f"{imports}, Train\nfrom lora_kit.tasks.task import Task"
    file.write_text(text.replace(imports, more), encoding="utf-8")
    return file


def test_trl_trains_what_ours_trains(run_file: RunMaker, recipe: Path) -> None:
    settings = {"train.eval_steps": 2, "train.gradient_accumulation_steps": 2}
    file = run_file("sft", **settings)
    package.train(file, "name=ours", "speed=plain")
    report = package.train(file, "name=theirs", f"recipe={recipe}")
    ours, theirs = (read_metrics(Path(f"runs/{name}/metrics.jsonl")) for name in ("ours", "theirs"))
    assert [row["step"] for row in theirs] == [row["step"] for row in ours]
    for mine, other in zip(ours, theirs, strict=True):
        assert other.keys() >= mine.keys()
        assert other.get("loss") == pytest.approx(mine.get("loss"), abs=1e-4)
        assert other.get("tokens") == mine.get("tokens")
    assert "mean_token_accuracy" in theirs[0]
    assert report["audit"]["problems"] == []
    assert report["domain"]["loss"]["adapted"] == pytest.approx(ours[-1]["eval_loss"], abs=1e-3)
    read_seal(Path("runs/theirs/checkpoints/checkpoint-4"))
    lock = json.loads(Path("runs/theirs/run.lock.json").read_text(encoding="utf-8"))
    assert lock["adapter"]["sha256"] == adapter_hash("runs/theirs")
    assert lock["recipe"] == {"name": "by_trl", "sha256": file_hash(recipe)}
    assert (lock["auto"], lock["fresh"]) == ("AutoModelForCausalLM", [])
    assert lock["facts"] == {"kind": "chat", "joiner": lock["joiner"]}
