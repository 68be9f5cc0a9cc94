"""The code of a model card, run as it is printed on what was pushed, with the card's own command.

Each run is trained on a tiny base, pushed to the loopback Hub, and used there by its repository's
name, in a process that knows nothing else of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from classifiers import SIGNS, classify_file, make_body
from conftest import make_base, sentences
from hub import SHA
from hub_commands import Done, commands
from hub_writing import WritableHub, writable
from trained import copied, edit, finish, folder_maker

import lora_kit
from lora_kit.adapter.finished import FinishedRun

pytestmark = pytest.mark.slow

# {run: (its base, how it is trained)}
CLASSIFIERS: dict[str, tuple[str, dict[str, Any]]] = {
    "own-pooling": ("Bert", {}),
    "mean": ("Bert", {"base.pooling": "mean"}),
    "mean-of-a-decoder": ("Llama", {"base.pooling": "mean"}),
    "last-of-an-encoder": ("Bert", {"base.pooling": "last"}),
    "last-of-a-decoder": ("Qwen3", {}),
}
LANGUAGE_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "cpt": ("plain", {}),
    "sft": ("chat", {}),
    "dpo": ("chat", {"data.train": "pairs.jsonl", "train.learning_rate": 1e-2}),
}
TRAINED = {**CLASSIFIERS, **LANGUAGE_MODELS}
# Those whose base others find on the Hub; of the others only whoever trained them has it.
ON_HUB = ("own-pooling", "mean", *LANGUAGE_MODELS)
LOCAL = {"cpt-local": "cpt", "sft-local": "sft"}  # the same with a local base
FORMS = ("adapter", "merged")


def with_a_base_of_the_hub(run: Path, name: str) -> None:
    """Let a run that was trained on a folder name a repository instead."""
    file = run / "run.yaml"
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    values["base"] |= {"model": name, "revision": SHA}
    file.write_text(json.dumps(values), encoding="utf-8")
    edit(run / "run.lock.json", lambda v: v["base"].update(model=name, revision=SHA))
    config = {"base_model_name_or_path": name, "revision": SHA}
    edit(run / "adapter" / "adapter_config.json", lambda v: v.update(config))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("place")


@pytest.fixture(scope="module")
def bases(place: Path) -> dict[str, Path]:
    made = {name: make_body(place / name, name) for name in ("Bert", "Llama", "Qwen3")}
    made["plain"] = make_base(place / "plain", chat_template=None)
    made["chat"] = make_base(place / "chat")
    return made


@pytest.fixture(scope="module")
def hub(place: Path, bases: dict[str, Path]) -> Iterator[WritableHub]:
    with writable(place / "hub") as running:
        for name, folder in bases.items():
            running.repos[f"org/{name}"] = {SHA: folder}
            running.heads[f"org/{name}"] = SHA
        yield running


@pytest.fixture(scope="module")
def runs(place: Path, bases: dict[str, Path]) -> dict[str, Path]:
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for name, (base, changes) in TRAINED.items():
            folder = place / "trained" / name
            folder.mkdir(parents=True)
            patch.chdir(folder)
            found[name] = folder / "runs" / "test"
            if name in CLASSIFIERS:
                loud = {"train.max_steps": 8, "train.learning_rate": 3e-2, **changes}
                lora_kit.train(classify_file(folder, bases[base], **loud))
            else:
                pairs = [
                    {"prompt": f"What is {n}?", "chosen": text, "rejected": f" {n}"}
                    for n, text in enumerate(sentences(60))
                ]
                (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
                finish(folder_maker(folder, bases[base]), name, **changes)
    for name, same in LOCAL.items():
        found[name] = copied(found[same], place / name)
    for name in ON_HUB:
        with_a_base_of_the_hub(found[name], f"org/{TRAINED[name][0]}")
    return found


@pytest.fixture(scope="module")
def done(
    hub: WritableHub, runs: dict[str, Path], bases: dict[str, Path], place: Path
) -> dict[str, Done]:
    """Everything that is typed in this module, in its order."""
    typed = [f"cd {place}"]
    for name, run in runs.items():
        base = bases[TRAINED[LOCAL.get(name, name)][0]]
        typed += [
            f"merge {run} --base {base} --out {place}/merged-{name}",
            f"push {run} me/{name}-adapter --json",
            f"push {run} me/{name}-merged --merged {place}/merged-{name} --json",
            *(f"card me/{name}-{form} {run} {base}" for form in FORMS),
        ]
    return commands(hub, place / "home", *typed)


def of_card(done: dict[str, Done], repo: str) -> dict[str, Any]:
    [line] = [one for one in done if one.startswith("card ") and f" {repo} " in one]
    assert done[line].code == 0, done[line].err
    found: dict[str, Any] = json.loads(done[line].out)
    return found


def test_everything_was_pushed(done: dict[str, Done]) -> None:
    failed = {line: one.err for line, one in done.items() if one.code}
    assert not failed


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_code_of_a_classifiers_card_names_the_label(
    name: str, form: str, done: dict[str, Done], runs: dict[str, Path]
) -> None:
    found = of_card(done, f"me/{name}-{form}")
    wanted, base = (torch.tensor(found[key]) for key in ("logits", "base"))
    label = FinishedRun(runs[name]).head.labels[int(wanted.argmax())]
    assert label in SIGNS and (wanted - base).abs().max() > 0.01
    [block] = found["blocks"]
    assert block["printed"] == label
    assert (torch.tensor(block["logits"]) - wanted).abs().max() <= 1e-5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [*LANGUAGE_MODELS, *LOCAL])
def test_the_code_of_a_language_models_card_generates(
    name: str, form: str, done: dict[str, Done]
) -> None:
    found = of_card(done, f"me/{name}-{form}")
    assert found["generated"] and found["blocks"]
    for block in found["blocks"]:
        if "PeftModel" in block["code"]:  # it knows no end of a turn
            assert block["printed"].startswith(found["generated"])
        else:
            assert block["printed"] == found["generated"]
    assert len(found["blocks"]) == (2 if form == "adapter" and name in ON_HUB else 1)
