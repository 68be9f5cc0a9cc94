"""Adapters that were made to harm whoever opens them: nothing of theirs runs, one line says why."""

# ruff: noqa: F811 - fixtures of another file
from __future__ import annotations

import json
import math
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_base
from test_adapter_inspect import rewrite
from test_cli import Shell, run  # noqa: F401 - a fixture
from trained import edit

import lora_kit
from lora_kit.adapter import files
from lora_kit.adapter.files import open_adapter
from lora_kit.errors import UserError

WEIGHTS = files.WEIGHTS
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A loud adapter that PEFT saved, with its tokenizer beside it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = make_base(tmp_path_factory.mktemp("own") / "base")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    targets = ["q_proj", "v_proj", "up_proj"]
    model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    for name, values in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(values, std=0.5)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(honest: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to spoil, the working folder importable, as it is for whoever runs `python -m`."""
    monkeypatch.syspath_prepend(str(work))
    shutil.copytree(honest, work / "sent")
    return work / "sent"


def touching(canary: Path) -> str:
    return f"import pathlib\npathlib.Path({str(canary)!r}).touch()\n"


def _pickle(folder: Path, canary: Path) -> None:
    class Canary:
        def __reduce__(self) -> Any:
            return (Path.touch, (canary,))

    (folder / WEIGHTS).unlink()
    for name in ("adapter_model.bin", "pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(pickle.dumps(Canary()))


def _auto_mapping(folder: Path, canary: Path) -> None:
    Path("evil_library.py").write_text(touching(canary) + "Evil = object\n")
    mapping = {"base_model_class": "Evil", "parent_library": "evil_library"}
    change = {"auto_mapping": mapping, "task_type": None, "megatron_core": "evil_library"}
    edit(folder / "adapter_config.json", lambda c: c.update(change))


def _megatron(folder: Path, canary: Path) -> None:
    Path("evil_core.py").write_text(touching(canary))
    change = {"megatron_config": {"a": 1}, "megatron_core": "evil_core"}
    edit(folder / "adapter_config.json", lambda c: c.update(change))


def _traversal(folder: Path, canary: Path) -> None:
    name = FIRST.replace("model.layers", f"../../{canary}")
    rewrite(folder, lambda t: t.update({name: t.pop(FIRST)}))


def _symlink(folder: Path, canary: Path) -> None:
    shutil.move(folder / WEIGHTS, "elsewhere.safetensors")
    (folder / WEIGHTS).symlink_to(Path("elsewhere.safetensors").resolve())


def _secret(folder: Path, canary: Path) -> None:
    """A key of whoever opens it, to be copied into what is shared next."""
    Path("id_ed25519").write_text("PRIVATE")
    (folder / "added_tokens.json").symlink_to(Path("id_ed25519").resolve())


def _template(folder: Path, canary: Path) -> None:
    opened = f"_.__globals__['os'].system('touch {canary}')"
    names = "cycler.__init__", "lipsum", "namespace.__init__", "().__class__.__base__"
    text = "{{ " + " ~ ".join(opened.replace("_", name, 1) for name in names) + " }}"
    (folder / "chat_template.jinja").write_text(text)


def _endless(folder: Path, canary: Path) -> None:
    text = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    (folder / "chat_template.jinja").write_text(text)


def _header(folder: Path, canary: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes((2**62).to_bytes(8, "little") + whole[8:])


def _twice(folder: Path, canary: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = whole[8 : 8 + size].decode()
    entry = json.dumps({FIRST: json.loads(header)[FIRST]})[1:-1]
    header = "{" + entry + "," + header[1:]
    (folder / WEIGHTS).write_bytes(
        len(header).to_bytes(8, "little") + header.encode() + whole[8 + size :]
    )


FORMS = ("portable", "merged", "gguf", "ollama", "mlx")
NO_TEMPLATE = {"inspect", "check", "combine", "push"}  # read or copy it, and render nothing
# Each with the verbs that need not notice it.
ATTACKS: list[tuple[Any, str, set[str]]] = [
    (_pickle, "adapter_model.bin can run code and is not read", set()),
    (_auto_mapping, "`auto_mapping`", set()),
    (_megatron, "`megatron_config`", set()),
    (_traversal, "is not a valid tensor name", set()),
    (_symlink, "a link to elsewhere", set()),
    (_secret, "a link to elsewhere", set()),
    (_template, "chat template", NO_TEMPLATE),
    (_endless, "did not finish", NO_TEMPLATE),
    (_header, "a header of 4,611,686,018,427,387,904 bytes", set()),
    (_twice, "duplicate key", set()),
]


@pytest.mark.parametrize(("attack", "words", "blind"), ATTACKS)
def test_nothing_of_it_runs_and_one_line_says_why(
    run: Shell, adapter: Path, attack: Any, words: str, blind: set[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr("lora_kit.base.templates.SECONDS_TO_RENDER", 0.2)
    canary = Path("canary").resolve()
    attack(adapter, canary)
    before = {file for file in Path().rglob("*") if "__pycache__" not in str(file)}
    verbs: list[tuple[str, ...]] = [
        ("inspect", str(adapter)),
        ("generate", str(adapter), "What is it?"),
        ("merge", str(adapter), "--out", "out"),
        ("check", str(adapter), "--target", "vllm"),
        *(("export", str(adapter), "--to", to, "--out", "out") for to in FORMS),
        ("combine", str(adapter), str(adapter), "--out", "out"),
        ("push", str(adapter), "me/it", "--dry-run"),
        *([] if blind else [("serve", str(adapter), "--port", "0")]),
    ]
    for verb in verbs:
        done = run(*verb)
        assert not canary.exists(), verb
        if verb[0] in blind:
            shutil.rmtree("out", ignore_errors=True)
            continue
        assert (done.code, len(done.errors)) == (2, 1), (verb, done)
        assert words in done.err and "Traceback" not in done.err, (verb, done.err)
    assert {file for file in Path().rglob("*") if "__pycache__" not in str(file)} == before
    assert not {"evil_library", "evil_core"} & sys.modules.keys()


def test_the_honest_one_is_what_peft_loads(adapter: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    ids = torch.arange(4, 60)[None]
    alone = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32).eval()
    with torch.inference_mode():
        model, _ = lora_kit.load(adapter, dtype="float32")
        got = model(ids).logits
        assert torch.equal(got, alone(ids).logits)
        with model.disable_adapter():
            assert (model(ids).logits - got).abs().max() > 0.1
    # Links of the Hub's cache, from a snapshot to its blobs, are no attack.
    (blobs, snapshot) = Path("models--a--b/blobs"), Path("models--a--b/snapshots/abc")
    blobs.mkdir(parents=True)
    shutil.copytree(adapter, snapshot)
    (snapshot / WEIGHTS).rename(blobs / "0123")
    (snapshot / WEIGHTS).symlink_to("../../blobs/0123")
    assert len(open_adapter(snapshot).factors) == 6


def _nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors[FIRST][0, 0] = torch.nan


def _wide(tensors: dict[str, torch.Tensor]) -> None:
    tensors[FIRST] = torch.ones(4, 65)


def _of_the_base(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.model.norm.weight"] = torch.zeros(64)


def _under_the_adapter(tensors: dict[str, torch.Tensor]) -> None:
    tensors[FIRST.replace("lora_A", "base_layer")] = torch.zeros(64, 64)


def _nowhere(tensors: dict[str, torch.Tensor]) -> None:
    for half in "AB":
        name = FIRST.replace("layers.0", "layers.7").replace("lora_A", f"lora_{half}")
        tensors[name] = torch.ones(4, 64) if half == "A" else torch.ones(64, 4)


def _lost(tensors: dict[str, torch.Tensor]) -> None:
    for half in "AB":
        del tensors[FIRST.replace("lora_A", f"lora_{half}")]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_nan, "q_proj.lora_A.weight: NaN or infinite"),
        (_wide, "does not fit the base: .*size mismatch"),
        (_of_the_base, "unexpected tensor base_model.model.model.norm.weight"),
        (_under_the_adapter, "unexpected tensor .*q_proj.base_layer.weight"),
        (_nowhere, r"unexpected tensor .*layers\.7"),
        (_lost, r"missing tensor .*layers\.0\.self_attn\.q_proj"),
    ],
)
def test_tensors_that_do_not_belong_there(adapter: Path, change: Any, words: str) -> None:
    rewrite(adapter, change)
    with pytest.raises(UserError, match=words) as raised:
        lora_kit.load(adapter)
    assert str(adapter) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layer_replication": [[0, 2], [0, 2]]}, "`layer_replication`: unsupported"),
        ({"alora_invocation_tokens": [1]}, "`alora_invocation_tokens`"),
        ({"some_new_field": True}, "`some_new_field`"),
        ({"init_lora_weights": "corda"}, "`init_lora_weights`"),
        ({"init_lora_weights": "lora_ga"}, "`init_lora_weights`"),
        ({"auto_mapping": ["a"]}, "not a JSON object"),
        ({"base_model_name_or_path": 5}, "invalid"),
        ({"target_modules": {"a": 1}}, "invalid"),
        ({"rank_pattern": {"(([a-z0-9_.])+)+!": 4}}, "takes too long"),
    ],
)
def test_settings_that_would_change_what_it_does(
    adapter: Path, change: Any, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_SECONDS_TO_MATCH", 0.3)
    edit(adapter / "adapter_config.json", lambda c: c.update(change))
    with pytest.raises(UserError, match=words) as raised:
        lora_kit.load(adapter)
    assert str(adapter) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "change",
    [
        {"auto_mapping": {"base_model_class": "X", "parent_library": "transformers.models.llama"}},
        {"peft_version": "9.9", "a_new_field_that_is_off": None, "another": []},
        {"target_modules": r"(([a-z0-9_.])+)+!|.*\.(q|v|up)_proj"},
        {"exclude_modules": r"(([a-z0-9_.])+)+!"},
    ],
)
def test_settings_that_change_nothing(honest: Path, adapter: Path, change: Any) -> None:
    edit(adapter / "adapter_config.json", lambda c: c.update(change))
    ids = torch.arange(4, 60)[None]
    with torch.inference_mode():
        logits = [lora_kit.load(folder)[0](ids).logits for folder in (honest, adapter)]
    assert torch.equal(*logits)


def test_the_injected_template_would_run_without_the_sandbox(adapter: Path) -> None:
    import jinja2

    canary = Path("canary").resolve()
    _template(adapter, canary)
    first = (adapter / "chat_template.jinja").read_text().split(" ~ ")[0]
    jinja2.Environment().from_string(first + " }}").render()
    assert canary.exists()


def test_code_beside_a_tokenizer_is_not_run(run: Shell, adapter: Path) -> None:
    canary = Path("canary").resolve()
    (adapter / "tok.py").write_text(touching(canary) + "class Tok: pass\n")
    change = {"auto_map": {"AutoTokenizer": ["tok.Tok", "tok.Tok"]}, "tokenizer_class": "Tok"}
    edit(adapter / "tokenizer_config.json", lambda c: c.update(change))
    (adapter / "config.json").write_text(
        json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "tok.Tok"}})
    )
    done = run("generate", str(adapter), "x")
    assert not canary.exists() and (done.code == 0 or len(done.errors) == 1), done


@pytest.mark.parametrize(
    "settings",
    [
        *({"lora_alpha": math.nan}, {"lora_alpha": "16"}, {"lora_alpha": None}, {"r": 0}),
        *({"r": 4.0}, {"r": True}, {"rank_pattern": {"zzz": "x"}}, {"alpha_pattern": {"v": 1e400}}),
        *({"rank_pattern": [4]}, {"alpha_pattern": {"v_proj": {}}}),
    ],
    ids=str,
)
def test_a_rank_or_a_scale_that_is_no_number_is_refused(
    adapter: Path, settings: dict[str, Any]
) -> None:
    edit(adapter / "adapter_config.json", lambda config: config.update(settings))
    with pytest.raises(UserError, match="invalid"):
        open_adapter(adapter)
