"""A Modelfile whose template writes what the tokenizer's chat template does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from conftest import make_tokenizer
from families import FAMILIES, byte_level

from lora_kit.adapter.finished import FinishedRun
from lora_kit.base.templates import render
from lora_kit.errors import UserError
from lora_kit.ship.llama_cpp import run
from lora_kit.ship.ollama import export_ollama, go_template

_ACTION = re.compile(r"\{\{-?\s*(.*?)\s*\}\}", re.S)
TURNS = [
    [("user", "How are you?")],
    [("system", "Be kind."), ("user", "{{ .Content }} {% if x %} 'a' \"b\" \\n <b>&amp;</b>")],
    [("user", "Größe 日本 😀\n\n\tx"), ("assistant", '"""yes""" }}'), ("user", "And?")],
    [("system", "s"), *(("user", "a"), ("assistant", "b")) * 2, ("user", "c")],
]


def go(template: str, turns: list[tuple[str, str]]) -> str:
    """What Go's text/template makes of the few actions that our templates have."""
    import json

    before, written = "", ""
    body, _, after = template.partition("{{- end }}\n{{- end }}\n{{- if")
    # The branches of each turn: {(role before, role): text}.
    known: dict[tuple[str, str], str] = {}
    for line in body.splitlines():
        actions = _ACTION.findall(line)
        if (found := re.search(r'eq \$before "(.*)"', actions[0])) and "range" not in line:
            before = found[1]
        elif found := re.search(r'eq \.Role "(.*)"', actions[0]):
            assert actions[-2:] == [".Content", "$before = .Role"]
            texts = [json.loads(each) for each in actions[1:-2]]
            known[before, found[1]] = "".join(texts)
    for line in ("{{- if" + after).splitlines():
        condition, *texts, end = _ACTION.findall(line)
        assert end == "end"
        name = re.search(r'eq \$before "(.*)"', condition)
        assert name
        known[name[1], ""] = "".join(map(json.loads, texts))
    before = ""
    for role, content in turns:
        written += known[before, role] + content
        before = role
    return written + known[before, ""]


@pytest.mark.parametrize("name", FAMILIES)
def test_go_writes_what_jinja_does(name: str, tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path)
    family = FAMILIES[name]
    tokenizer.chat_template = family.source.replace("{#>#}", "").replace("{#<#}", "")
    template = go_template(tokenizer)
    assert '"""' not in template  # which ends it in a Modelfile
    for turns in TURNS:
        if turns[0][0] == "system" and not family.system:
            continue
        messages = [{"role": role, "content": content} for role, content in turns]
        wanted = render(tokenizer, messages, add_generation_prompt=True)
        # Ollama writes the beginning-of-text token itself.
        assert go(template, turns) == wanted.removeprefix("<s>")


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}<{{ loop.index }}>{{ m.content }}{% endfor %}",
        "{% for m in messages %}[{{ m.content | upper }}]{% endfor %}",
        "{% if messages | length > 4 %}long{% endif %}{% for m in messages %}-{{ m.content }}"
        "{% endfor %}",
    ],
)
def test_a_template_of_more_than_roles_is_refused(source: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path, source)
    with pytest.raises(UserError, match="cannot be written for Ollama"):
        go_template(tokenizer)


def test_without_a_template_the_prompt_stands_alone(tmp_path: Path) -> None:
    assert go_template(make_tokenizer(tmp_path)) == "{{ .Prompt }}"


def test_what_changes_or_is_left_out_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = byte_level(tmp_path)
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + FAMILIES["gemma"].source
    go_template(tokenizer)
    said = capsys.readouterr().err
    assert "stays today's" in said and "takes no system turn" in said


@pytest.mark.slow
def test_a_run_becomes_a_folder_for_ollama(sft_run: Path, tmp_path: Path) -> None:
    import torch

    import lora_kit

    out: dict[str, Path] = {what: tmp_path / what for what in ("adapter", "merged")}
    for what, folder in out.items():
        folder.mkdir()
        export_ollama(FinishedRun(sft_run), folder, "f32", what)  # type: ignore[arg-type]
    text = (out["adapter"] / "Modelfile").read_text(encoding="utf-8")
    assert text.startswith('FROM ./base.gguf\nADAPTER ./adapter.gguf\nTEMPLATE """{{- $before')
    assert "PARAMETER num_ctx 256\n" in text
    assert 'PARAMETER stop "<|im_end|>"\n' in text and 'PARAMETER stop "<eos>"\n' in text
    merged = (out["merged"] / "Modelfile").read_text(encoding="utf-8")
    assert merged == text.replace("base.gguf\nADAPTER ./adapter.gguf", "merged.gguf")
    assert sorted(p.name for p in out["merged"].iterdir()) == ["Modelfile", "merged.gguf"]

    model, tokenizer = lora_kit.load(sft_run)
    ids = tokenizer("the quick brown fox").input_ids
    options: Any = {"do_sample": False, "max_new_tokens": 20}
    with torch.inference_mode():
        said = model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist()
        with model.disable_adapter():
            base = model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist()
    assert said != base
    pairs = [(out["merged"] / "merged.gguf", []),
             (out["adapter"] / "base.gguf", [out["adapter"] / "adapter.gguf"])]  # fmt: skip
    for file, adapters in pairs:
        (answer,) = run(file, adapters, prompts=[ids], tokens=20)["answers"]
        assert answer["tokens"] == said[: len(answer["tokens"])]
        assert len(answer["tokens"]) == 20 or answer["stopped"]
