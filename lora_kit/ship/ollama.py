"""GGUF and a Modelfile for Ollama, whose template writes what the tokenizer's own does.

Ollama does not run Jinja: without TEMPLATE it takes the one of its own that resembles the GGUF's
(ollama#6823). What a chat template writes between turns depends, nearly always, on the two roles
alone: it is found by rendering sentinels, written in Go's template language, and compared with the
template on whole conversations. White space around what is said, which some templates remove, is
kept: Go has nothing to remove it with. Tools are not written.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_kit.adapter.finished import FinishedRun
from lora_kit.adapter.load import rendered
from lora_kit.errors import UserError
from lora_kit.ship.gguf import Kind, What, export_gguf, open_source
from lora_kit.ship.merge import Into, generation

# Memory for all of it is taken when the model is loaded.
_LARGEST_CONTEXT = 8192
_ROLES = {"s": "system", "u": "user", "a": "assistant"}
# Between the turns of these stands every pair of roles that a template may take.
_SAMPLES = ("u", "su", "uau", "suau", "usu", "uasu", "au", "sau", "uu")
# Whether the pieces hold where they were not found.
_TRIED = ("u", "su", "uau", "uauau", "suauau")
_CONTENTS = (
    "How are you?",
    "{{ .Content }} {% if x %} 'a' \"b\" \\n <b>&amp;</b> C:\\temp",
    "Größe 日本 😀\n\n  def f():\n\treturn 1",
    "x",
    '"""quoted""" $1 #2',
    "And then?",
)
Joints = dict[tuple[str, str], str]


def export_ollama(run: FinishedRun, out: Path, kind: Kind, what: What, into: Into = "base") -> Path:
    """Fill an existing folder with what `ollama create NAME -f Modelfile` takes.

    Args:
        what: `adapter`: base.gguf and adapter.gguf; `merged` or `base`: one of them alone.

    Raises:
        UserError: see `export_gguf`; or the chat template cannot be written for Ollama.
    """
    tokenizer, base = run.processor, Path(run.pinned.folder)
    template = go_template(tokenizer)  # before anything large is written
    parts: tuple[What, ...] = ("adapter", "base") if what == "adapter" else (what,)
    *rest, first = [
        export_gguf(run, out, kind, part, into).rename(out / f"{part}.gguf").name for part in parts
    ]
    context = min(open_source(base).context, _LARGEST_CONTEXT)
    stops = [tokenizer.decode([n]) for n in generation(base, tokenizer)["eos_token_id"]]
    lines = [f"FROM ./{first}", *(f"ADAPTER ./{file}" for file in rest)]
    lines += [f'TEMPLATE """{template}"""', f"PARAMETER num_ctx {context}"]
    lines += ["PARAMETER repeat_penalty 1"]  # it was trained without
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    modelfile = out / "Modelfile"
    modelfile.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return modelfile


def go_template(tokenizer: Any) -> str:
    """A tokenizer's chat template in Go's template language, over Ollama's `.Messages`.

    Raises:
        UserError: what it writes depends on more than roles, so that Go's would differ.
    """
    if not tokenizer.chat_template:
        return "{{ .Prompt }}"
    known = joints(tokenizer)
    differ = [sample for sample in _TRIED if not _holds(tokenizer, known, sample)]
    if differ or ("", "user") not in known:
        turns = " ".join(_ROLES[letter] for letter in (differ or ["u"])[0])
        raise UserError(
            f"the chat template cannot be written for Ollama: of {turns} it writes more than their "
            "roles decide: export it with --to gguf, whose template llama.cpp runs itself"
        )
    if "strftime_now" in tokenizer.chat_template:
        print("the chat template writes the date: in Ollama it stays today's", file=sys.stderr)
    if ("", "system") not in known:
        print("the chat template takes no system turn: Ollama leaves it out", file=sys.stderr)
    # The token that Ollama puts before a prompt itself, as the tokenizer does.
    ids, begin = tokenizer("a").input_ids, ""
    if tokenizer.bos_token is not None and ids[:1] == [tokenizer.bos_token_id]:
        begin = str(tokenizer.bos_token)
    lines = ['{{- $before := "" }}', "{{- range .Messages }}"]
    names = _ROLES.values()
    cases = [(before, [r for r in names if (before, r) in known]) for before in ("", *names)]
    for n, (before, roles) in enumerate((b, r) for b, r in cases if r):
        lines.append(f'{{{{- {"else " if n else ""}if eq $before "{before}" }}}}')
        for m, role in enumerate(roles):
            text = known[before, role].removeprefix("" if before else begin)
            choice = f'{{{{- {"else " if m else ""}if eq .Role "{role}" }}}}'
            lines.append(f"{choice}{_quoted(text)}{{{{ .Content }}}}{{{{ $before = .Role }}}}")
        lines.append("{{- end }}")
    lines += ["{{- end }}", "{{- end }}"]
    for before in ("system", "user"):
        if text := known.get((before, ""), ""):
            lines.append(f'{{{{- if eq $before "{before}" }}}}{_quoted(text)}{{{{ end }}}}')
    return "\n".join(lines)


def joints(tokenizer: Any) -> Joints:
    """What is written between a turn's content and the next: {(role, next role): text}; before
    the first role is "", after the last comes the prompt for an answer."""
    known: Joints = {}
    for sample in _SAMPLES:
        roles = [_ROLES[letter] for letter in sample]
        marks = [f"sentinel{n}x" for n in range(len(roles))]
        text = rendered(tokenizer, _turns(roles, marks)) or ""
        pieces = re.split("|".join(marks), text)
        if re.findall("sentinel[0-9]+x", text) == marks:
            pairs = zip(["", *roles], [*roles, ""], strict=True)
            known = dict(zip(pairs, pieces, strict=True)) | known
    return known


def _holds(tokenizer: Any, known: Joints, sample: str) -> bool:
    """Whether Go's template writes the same, or the template refuses such turns."""
    roles = [_ROLES[letter] for letter in sample]
    contents = _CONTENTS[: len(roles)]
    if (wanted := rendered(tokenizer, _turns(roles, contents))) is None:
        return True
    pieces = [known.get(pair) for pair in zip(["", *roles], [*roles, ""], strict=True)]
    ours = zip(pieces, [*contents, ""], strict=True)
    return None not in pieces and "".join(f"{joint}{content}" for joint, content in ours) == wanted


def _turns(roles: Sequence[str], contents: Sequence[str]) -> list[dict[str, str]]:
    return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]


def _quoted(text: str) -> str:
    """Go reads JSON's texts as its own; so no space is lost to its trimming."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""
