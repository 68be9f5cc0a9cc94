"""Libraries that lora_kit uses do not report their use to the Hub, unless the user asks for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import hub
import pytest

SWITCHES = ("HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK")
IMPORTED = """
import os, subprocess, sys
{imports}
import huggingface_hub.constants
child = "import huggingface_hub.constants as c; print(c.HF_HUB_DISABLE_TELEMETRY)"
print(huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY, flush=True)
subprocess.run([sys.executable, "-c", child], check=True)
"""
# The second trainer shows that the first one would have sent something. TRL sends nothing in CI.
TRAINERS = """
import sys
import urllib.request
import lora_kit
import huggingface_hub.constants
from datasets import Dataset
from huggingface_hub.utils._telemetry import _TELEMETRY_QUEUE
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

base, out = sys.argv[1:]

def make_trainer():
    SFTTrainer(
        AutoModelForCausalLM.from_pretrained(base),
        SFTConfig(out, use_cpu=True, report_to=[], dataset_kwargs={"skip_prepare_dataset": True}),
        train_dataset=Dataset.from_list([{"input_ids": [5, 6, 7]}]),
        processing_class=AutoTokenizer.from_pretrained(base),
    )
    _TELEMETRY_QUEUE.join()

make_trainer()
try:
    urllib.request.urlopen(huggingface_hub.constants.ENDPOINT + "/between")
except urllib.error.HTTPError:
    pass
huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = False
make_trainer()
"""


def without_switches(environment: dict[str, str]) -> dict[str, str]:
    left = {name: value for name, value in environment.items() if name not in SWITCHES}
    left.pop("CI", None)
    return left


@pytest.mark.parametrize(
    ("imports", "asked_for", "here", "child"),
    [
        ("import lora_kit", None, "True", "True"),
        ("import huggingface_hub.constants, lora_kit", None, "True", "True"),
        ("import lora_kit", "0", "False", "False"),
        ("import huggingface_hub.constants, lora_kit", "0", "False", "False"),
    ],
)
def test_it_is_off_here_and_in_children(
    imports: str, asked_for: str | None, here: str, child: str
) -> None:
    environment = without_switches(dict(os.environ))
    if asked_for:
        environment["HF_HUB_DISABLE_TELEMETRY"] = asked_for
    command = [sys.executable, "-c", IMPORTED.format(imports=imports)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == [here, child], done.stderr


@pytest.mark.slow
def test_a_trainer_of_trl_sends_nothing(base: Path, tmp_path: Path) -> None:
    with hub.serving({}, {}) as served:
        environment = without_switches(hub.settings(served.url, tmp_path / "home"))
        command = [sys.executable, "-c", TRAINERS, str(base), str(tmp_path / "out")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert served.asked[0] == "/between"
    assert "/api/telemetry/trl/SFTTrainer" in served.asked[1:]
