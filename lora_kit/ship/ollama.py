"""GGUF and a Modelfile for Ollama, with a template that renders what the chat template renders.

Ollama does not run Jinja: without TEMPLATE it uses the built-in one that resembles the GGUF's
(ollama#6823). The text between two turns depends, nearly always, only on their roles: it is found
by rendering sentinels as contents, written in Go's template language, and compared with the chat
template on whole conversations. Go cannot strip white space around contents, which some chat
templates do. Tools are not supported.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from lora_kit.adapter.finished import FinishedRun
from lora_kit.adapter.load import rendered
from lora_kit.errors import UserError
from lora_kit.ship.gguf import Kind, What, export_gguf, open_source
from lora_kit.ship.merge import Into, generation
from lora_kit.tasks.task import Processor

# Ollama allocates the whole context when it loads the model.
_LARGEST_CONTEXT = 8192
_ROLES = {"s": "system", "u": "user", "a": "assistant"}
# Conversations that together have every pair of consecutive roles.
_SAMPLES = ("u", "su", "uau", "suau", "usu", "uasu", "au", "sau", "uu")
# Conversations on which the two templates are compared.
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
    """Write the files for `ollama create NAME -f Modelfile` into an existing folder.

    Args:
        what: `adapter`: base.gguf and adapter.gguf; `merged` or `base`: one of them alone.

    Raises:
        UserError: see `export_gguf`; or the chat template cannot be written for Ollama.
    """
    tokenizer, base = run.processor, Path(run.pinned.folder)
    template = go_template(tokenizer)  # fails before a large file is written
    parts: tuple[What, ...] = ("adapter", "base") if what == "adapter" else (what,)
    *adapters, model = [
        export_gguf(run, out, kind, part, into).rename(out / f"{part}.gguf").name for part in parts
    ]
    context = min(open_source(base).context, _LARGEST_CONTEXT)
    stops = [tokenizer.decode([n]) for n in generation(base, tokenizer)["eos_token_id"]]
    lines = [f"FROM ./{model}", *(f"ADAPTER ./{file}" for file in adapters)]
    lines += [f'TEMPLATE """{template}"""', f"PARAMETER num_ctx {context}"]
    lines += ["PARAMETER repeat_penalty 1"]  # Ollama's default is 1.1
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    modelfile = out / "Modelfile"
    modelfile.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return modelfile


def go_template(tokenizer: Processor) -> str:
    """A tokenizer's chat template in Go's template language, over Ollama's `.Messages`.

    Raises:
        UserError: the text between turns depends on more than their roles.
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
    # Ollama adds the BOS token to the prompt itself.
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


def joints(tokenizer: Processor) -> Joints:
    """The text between the contents of two turns: {(role, next role): text}. The role before the
    first turn and after the last is ""; the text after the last is the generation prompt."""
    known: Joints = {}
    for sample in _SAMPLES:
        roles = [_ROLES[letter] for letter in sample]
        marks = [f"sentinel{n}x" for n in range(len(roles))]
        text = rendered(tokenizer, _turns(roles, marks)) or ""
        pieces = re.split("|".join(marks), text)
        if re.findall("sentinel[0-9]+x", text) == marks:  # else it rejects, drops or repeats turns
            pairs = zip(["", *roles], [*roles, ""], strict=True)
            known = dict(zip(pairs, pieces, strict=True)) | known  # the first sample decides
    return known


def _holds(tokenizer: Processor, known: Joints, sample: str) -> bool:
    """Whether Go's template renders the same; true if the chat template rejects such turns."""
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
    """A text as a Go expression, which template trimming leaves alone; Go's strings are JSON's."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""
