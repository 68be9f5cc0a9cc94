"""Commands as they are typed, many in one process that sees a loopback Hub alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from hub import client
from hub_writing import TOKEN, WritableHub

# Runs every command of COMMANDS; `load` compares two runs' logits, `cut` takes the network away.
_SCRIPT = """
import contextlib, io, json, os, sys
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

for arguments in json.loads(os.environ["COMMANDS"]):
    out, err, code = io.StringIO(), io.StringIO(), 0
    if arguments[0] == "cut":
        import huggingface_hub.constants
        huggingface_hub.constants.ENDPOINT = "http://127.0.0.1:9"
    elif arguments[0] == "load":
        (one, base), (other, _) = map(logits, arguments[1:])
        found = [(one - other).abs().max().item(), (one - base).abs().max().item()]
        out.write(json.dumps(found))
    else:
        sys.argv = ["lora-kit", *arguments]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                cli.main()
            except SystemExit as ended:
                code = ended.code or 0
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
