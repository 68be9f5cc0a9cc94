"""Commands as they are typed, many in one process that sees a loopback Hub alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from hub import client
from hub_writing import TOKEN, WritableHub

# Runs every command of COMMANDS; `load` compares two runs' logits, `cut` takes the network away,
# `cd` goes to a folder, `card` runs what a model card prints and compares it with the run's own.
_SCRIPT = """
import contextlib, io, json, os, sys, traceback
from lora_kit import cli
from lora_kit.ship import hub

hub.FIRST_WAIT = 0.02

def logits(run):
    import torch, lora_kit
    model, _ = lora_kit.load(run, dtype="float32")
    with torch.inference_mode():
        out = model(input_ids=torch.arange(5, 69)[None]).logits
        with model.disable_adapter():
            return out, model(input_ids=torch.arange(5, 69)[None]).logits

def typed(arguments):
    # The exit code of a command of lora-kit.
    sys.argv = ["lora-kit", *arguments]
    try:
        cli.main()
    except SystemExit as ended:
        return ended.code or 0
    return 0

def card(repo, run, base):
    import re, torch, lora_kit
    from huggingface_hub import hf_hub_download
    from lora_kit.adapter.finished import FinishedRun
    from lora_kit.prove.show import complete

    opened = FinishedRun(run, base)
    with open(hf_hub_download(repo, "README.md"), encoding="utf-8") as file:
        text = file.read()
    [pull] = re.findall(r"^lora-kit (pull .*)$", text, re.M)
    assert typed(pull.split()) == 0
    blocks, found = [], {}
    for code in re.findall(r"^```python\\n(.*?)^```$", text, re.M | re.S):
        names, printed = {}, io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code.replace("FOLDER", base), names)
        logits = names["logits"].tolist() if "logits" in names else None
        blocks.append({"code": code, "printed": printed.getvalue().strip(), "logits": logits})
    model, tokenizer = lora_kit.load(run, base=base)
    if opened.head.labels:
        batch = tokenizer(["a text"], return_tensors="pt")
        with torch.inference_mode():
            found["logits"] = model(**batch).logits.tolist()
            with model.disable_adapter():
                found["base"] = model(**batch).logits.tolist()
    else:
        prompt = "a question" if opened.lock["kind"] == "chat" else "The beginning of a text"
        found["generated"] = complete(opened, prompt, False, 64).strip()
    return {**found, "blocks": blocks}

for arguments in json.loads(os.environ["COMMANDS"]):
    out, err, code = io.StringIO(), io.StringIO(), 0
    if arguments[0] == "cut":
        import huggingface_hub.constants
        huggingface_hub.constants.ENDPOINT = "http://127.0.0.1:9"
    elif arguments[0] == "load":
        (one, base), (other, _) = map(logits, arguments[1:])
        found = [(one - other).abs().max().item(), (one - base).abs().max().item()]
        out.write(json.dumps(found))
    elif arguments[0] == "cd":
        os.chdir(arguments[1])
    else:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            if arguments[0] == "card":
                try:
                    with contextlib.redirect_stdout(err):
                        found = card(*arguments[1:])
                    out.write(json.dumps(found))
                except Exception:
                    traceback.print_exc()
                    code = 1
            else:
                code = typed(arguments)
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""


class Done(NamedTuple):
    code: int
    out: str
    err: str


def commands(hub: WritableHub, home: Path, *typed: str, **environment: str) -> dict[str, Done]:
    """{a command as typed: what came of it}; the same one twice is told by a trailing space."""
    settings: dict[str, Any] = {"HF_TOKEN": TOKEN, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    lines = json.dumps([line.split() for line in typed])
    found = client(_SCRIPT, hub.url, home, COMMANDS=lines, **{**settings, **environment})
    return {line: Done(*one) for line, one in zip(typed, found, strict=True)}
