"""The card says what lock file and report hold, with the licences' own words, and nothing else."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from reports import full

from lora_kit.base.head import SEQUENCE
from lora_kit.errors import UserError
from lora_kit.ship import card as module
from lora_kit.ship.card import LOCAL, Card, make_card

SHA = "5" * 40
CONFIG: dict[str, Any] = {
    "base_model_name_or_path": "org/base",
    "revision": SHA,
    "r": 24,
    "lora_alpha": 32,
    "target_modules": ["q_proj", "v_proj"],
}
LOCK: dict[str, Any] = {
    "base": {"model": "org/base", "revision": SHA, "licence": "apache-2.0", "hashes": {"a": "b1"}},
    "kind": "chat",
    "data": {"org/set[train]": "d1", "local data 1": "d2"},
    "commits": {"org/set[train]": "c1"},
    "batch": {"rows_per_step": 16, "max_length": 256},
    "seed": 0,
    "versions": {"torch": "2.13.0"},
}
LICENCES = {"org/set": "mit"}


@pytest.fixture(autouse=True)
def licences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_licence_of", lambda name, commit: LICENCES.get(name))


def made(base: str = "org/base", licence: str | None = "apache-2.0", **more: Any) -> Card:
    lock = copy.deepcopy(more.pop("lock", LOCK))
    lock.setdefault("base", {})["licence"] = licence
    config = {**CONFIG, "base_model_name_or_path": base, **more.pop("config", {})}
    repo, report = more.pop("repo", "me/my-sft"), more.pop("report", {})
    return make_card(repo, config, lock, report, **more)


def front(card: Card) -> dict[str, Any]:
    """As the Hub's own client reads it."""
    read = ModelCard(card.text)
    values: dict[str, Any] = yaml.safe_load(card.text.split("---\n")[1])
    assert read.data.to_dict().get("license") == values["license"]
    return values


def test_the_front_matter_is_the_hubs() -> None:
    values = front(made())
    assert values["base_model"] == "org/base" and values["base_model_relation"] == "adapter"
    assert (values["library_name"], values["license"]) == ("peft", "apache-2.0")
    assert values["datasets"] == ["org/set"] and "language" not in values
    assert "model-index" not in values
    merged = front(made(merged=True))
    assert (merged["base_model_relation"], merged["library_name"]) == ("merge", "transformers")
    assert front(made(merged=True, pooled="mean"))["library_name"] == "sentence-transformers"
    assert "base_model" not in front(made(LOCAL)) and front(made("nano"))["base_model"] == "nano"


def test_only_what_was_trained_on_is_listed_as_that() -> None:
    data = {"org/set[train]": "d1", "org/held[test]": "d2", "org/bench": "d3", "local data 1": "d4"}
    uses = {"d1": "train", "d2": "eval", "d3": "decontaminate", "d4": "general"}
    commits = {name: "c1" for name in data if "/" in name}
    card = made(lock={**LOCK, "data": data, "commits": commits, "uses": uses}, report=full())
    assert front(card)["datasets"] == ["org/set"]
    (result,) = front(card)["model-index"][0]["results"][:1]
    assert result["dataset"]["type"] == "org/held"
    trained, _, rest = card.text.partition("## Results")
    assert "- data: `org/set[train]`" in trained
    assert "org/held" not in trained.partition("## How it was trained")[2]
    for line in ("- held-out data: `org/held[test]` at `c1`", "- general text: `local data 1`",
                 "- text that was kept out of the training data: `org/bench`"):  # fmt: skip
        assert line in rest and line not in trained, line
    # Only what was trained on binds the weights.
    assert not any("licence of 3" in line for line in card.warnings)


def test_the_body_says_base_data_and_how_to_load_it() -> None:
    text = made().text
    for line in (
        "- model: `org/base`\n",
        f"- revision: `{SHA}`\n",
        "- sha256 of `a`: `b1`\n",
        "- adapter: rank 24, alpha 32, on `q_proj, v_proj`\n",
        "`org/set[train]` at `c1`, sha256 of the rows read `d1`, licence: mit\n",
        "`local data 1`, sha256 of the rows read `d2`, licence: not known\n",
        f'base = AutoModelForCausalLM.from_pretrained("org/base", revision="{SHA}")\n',
        'model = PeftModel.from_pretrained(base, "me/my-sft")\n',
        f"vllm serve org/base --revision {SHA} --enable-lora --max-lora-rank 32 "
        "--lora-modules my-sft=me/my-sft\n",
        "lora-kit pull me/my-sft --out my-sft\n",
        "It was not compared with its base: nothing is claimed about its quality.",
    ):
        assert line in text, line
    assert "vllm serve me/my-sft\n" in made(merged=True).text
    assert "vllm" not in made(config={"use_dora": True}).text
    for base in (LOCAL, "nano"):
        assert "vllm" not in made(base).text and "PeftModel" not in made(base).text
    assert 'lora_kit.load("my-sft", base="FOLDER")\n' in made(LOCAL).text
    assert 'lora_kit.load("my-sft")\n' in made("nano").text
    odd = {**LOCK, "batch": {"rows_per_step": 16, "max_length": '64}\nprint("x")\n{'}}
    code = made(lock=odd, auto=SEQUENCE).text.partition("```python")[2]
    assert "max_length" not in code and 'print("x")' not in code
    assert '"max_length": 256, ' in made(auto=SEQUENCE).text
    assert "compare the hashes with those of your copy" in made(LOCAL).text
    empty = make_card("me/x", CONFIG, {}, {})
    assert front(empty)["license"] == "unknown"


def test_the_comparison_is_the_reports() -> None:
    report = full()
    card = made(report=report)
    loss = report["domain"]["loss"]
    row = f"| held-out data | {report['domain']['documents']} | loss | {loss['base']:.4f} "
    assert row + f"| {loss['adapted']:.4f} | {loss['difference']:+.4f} |" in card.text
    assert "- domain: " in card.text and "better than the base on held-out data" in card.text
    worse = copy.deepcopy(report)
    worse["verdict"]["general"] = "forgot"
    assert "general text got worse: the adapter forgets" in made(report=worse).text
    assert "model-index" not in front(card)  # part of the text was local
    hub = {**LOCK, "data": {"org/set[train]": "d1"}}
    [index] = front(made(report=report, lock=hub))["model-index"]
    [result] = index["results"]
    assert result["dataset"]["type"] == "org/set" and result["dataset"]["revision"] == "c1"
    assert result["metrics"][0] == {"type": "loss", "value": loss["adapted"]}
    parsed = ModelCard(made(report=report, lock=hub).text).data.eval_results
    assert [one.metric_type for one in parsed] == ["loss", "bits_per_byte"]
    with pytest.raises(UserError, match=r"not as they were written"):
        made(report={**report, "domain": {"loss": 3}})


def test_licences_that_are_not_known_or_at_odds(monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = made(licence=None)
    assert front(unknown)["license"] == "unknown"
    assert "the licence of the base is not known" in unknown.warnings
    assert "the licence of 1 of 2 sets of data is not known" in unknown.warnings
    assert all(line.replace("-", "") in unknown.text.replace("-", "") for line in unknown.warnings)
    assert not any("conflict" in line for line in made().warnings)
    for licence, words in (
        ("cc-by-nc-4.0", ["forbids commercial use"]),
        ("cc-by-nc-sa-4.0", ["forbids commercial use", "asks for the same licence"]),
        ("cc-by-nd-4.0", ["forbids changed versions"]),
    ):
        monkeypatch.setitem(LICENCES, "org/set", licence)
        found = [line for line in made().warnings if line.startswith("conflict of licences")]
        assert len(found) == len(words)
        assert all(word in line for word, line in zip(words, found, strict=True))
        assert "conflict of licences: org/set" in made().text.replace("\\", "")
        assert not any("conflict" in line for line in made(licence=licence).warnings)
    odd = made(licence="Some: terms\n- of: *ours*")
    assert front(odd)["license"] == "other" and "terms - of: \\*ours\\*" in odd.text


@pytest.mark.parametrize(
    ("base", "licence", "notice", "built_with", "begins"),
    [
        ("meta-llama/Llama-3.2-1B", "llama3.2", "Llama 3.2 is licensed under", "Llama", "Llama"),
        ("x/y", "llama3.1", "Llama 3.1 is licensed under the Llama 3.1 Comm", "Llama", "Llama"),
        ("x/y", "llama4", "Llama 4 is licensed under the Llama 4 Community", "Llama", "Llama"),
        ("x/y", "llama3", "Meta Llama 3 is licensed under the", "Meta Llama 3", "Llama-3"),
        ("meta-llama/Meta-Llama-3-8B", None, "Meta Llama 3 is", "Meta Llama 3", "Llama-3"),
        ("x/y", "llama2", "Llama 2 is licensed under the LLAMA 2 Community", "", ""),
        ("google/gemma-2-2b", "gemma", "Gemma is provided under and subject to", "", ""),
        ("google/gemma-3-1b-pt", None, "Gemma is provided under and subject to", "", ""),
    ],
)
def test_what_llamas_and_gemmas_terms_ask_for(
    base: str, licence: str | None, notice: str, built_with: str, begins: str
) -> None:
    card = made(base, licence)
    assert card.notice and card.notice.startswith(notice) and "\n" not in card.notice
    assert card.notice in card.text.partition("## Notices")[2]
    assert (f"**Built with {built_with}**" in card.text) == bool(built_with)
    name = f"name that begins with {begins}: {begins}-my-sft"
    assert any(name in line for line in card.warnings) == bool(begins)
    assert any("for a copy of them" in line for line in card.warnings)
    right = made(base, licence, repo=f"me/{begins or 'X'}-my-sft", has_licence=True)
    assert not any("terms ask" in line for line in right.warnings)
    if licence:
        assert front(card)["license"] == licence


def test_others_owe_no_notice() -> None:
    for base, licence in (
        ("TinyLlama/TinyLlama-1.1B", "apache-2.0"),
        ("google/gemma-4-2b", None),
        ("google/gemma-4-2b", "apache-2.0"),
    ):
        card = made(base, licence)
        assert card.notice is None and "## Notices" not in card.text


EVIL = (
    "x\n---\nlicense: mit\n---\n# Injected",
    "{{ 7 * 191 }}{% raw %}",
    "<script>alert(1)</script><img src=x onerror=y>",
    "[click](https://evil.example) ![](http://evil.example/a.png) www.evil.example",
    "```\nrm -rf ~\n```",
    "a | b | c",
    "\x1b[31m!!python/object/apply:os.system",
    "&anchor *alias",
)


@pytest.mark.parametrize("evil", EVIL)
def test_names_cannot_break_out(evil: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_licence_of", lambda name, commit: evil)
    plain = made(report=full(), lock={**LOCK, "data": {"a": "d1"}, "commits": {}})
    lock = {
        **LOCK,
        "base": {"licence": evil, "hashes": {evil: evil}},
        "data": {evil: evil, f"org/set{evil}[train]": evil, "org/set[x]": "d"},
        "commits": {evil: evil, f"org/set{evil}[train]": evil, "org/set[x]": evil},
        "versions": {evil: evil},
    }
    report = full() | {"not_measured": [evil]}
    config = {"target_modules": [evil], "revision": evil, "r": 8, "lora_alpha": evil}
    card = make_card("me/my-sft", {**CONFIG, **config}, lock, report)
    values = front(card)
    assert values["license"] == "other" and values["base_model"] == "org/base"
    assert values["datasets"] == ["org/set"]
    assert card.text.count("\n---\n") == 1 and not card.text.startswith("---\n---")
    body, right = card.text.split("\n---\n")[1], plain.text.split("\n---\n")[1]
    headings = [line for line in body.splitlines() if line.startswith("#")]
    assert headings == [line for line in right.splitlines() if line.startswith("#")]
    assert body.count("\n```") == right.count("\n```")
    assert "1337" not in body and "\x1b" not in body
    # Code spans and what a backslash stands before are text in Markdown.
    unquoted = re.sub(r"\\.", "", "".join(body.split("`")[::2]))
    for mark in ("<script", "<img", "](", "![", "https://evil", "www.evil"):
        assert mark not in unquoted
    base = make_card("me/x", {**CONFIG, "base_model_name_or_path": evil}, LOCK, {})
    assert "base_model" not in front(base) and "vllm" not in base.text


def test_a_sets_licence_is_read_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "datasets--org--set" / "snapshots" / SHA
    folder.mkdir(parents=True)
    for content, licence in (
        ("---\nlicense: cc-by-sa-4.0\n---\n", "cc-by-sa-4.0"),
        ("---\nlicense: unknown\n---\n", None),
        ("---\n{\n---\n", None),
        ("no front matter", None),
    ):
        (folder / "README.md").write_text(content)
        assert module._licence_of("org/set", SHA) == licence
    assert module._licence_of("org/other", SHA) is None
    assert module._licence_of("no//id", SHA) is None
