"""Nothing is exported that its program would not say as base and adapter say it."""

# ruff: noqa: F811 - fixtures of another file
from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import make_base
from test_cli import Shell, run  # noqa: F401 - a fixture
from trained import finish_in, relock

from lora_kit.adapter.finished import FinishedRun
from lora_kit.errors import CheckFailed, UserError
from lora_kit.ship import export as module
from lora_kit.ship.export import OTHER_ARITHMETIC, ROUGH_GELU, ROUNDED, SAME_ARITHMETIC, export
from lora_kit.ship.merge import merge

pytestmark = pytest.mark.slow

ODD = {
    "adapter.use_rslora": True,
    "adapter.alpha_pattern": {"q_proj": 3},
    "adapter.rank_pattern": {"down_proj": 2},
}
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of rsLoRA with patterns, in float32."""
    folder = tmp_path_factory.mktemp("trained")
    base = make_base(folder / "base", TEMPLATE)
    return finish_in(folder, base, "sft", **ODD, **{"train.max_steps": 12})


@pytest.fixture(scope="module")
def told(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """A portable export, and what PEFT made of it."""
    right, answers = module.reload.reloaded, []

    def listening(*arguments: Any) -> Any:
        answers.append(json.dumps(right(*arguments)))
        return json.loads(answers[0])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.reload, "reloaded", listening)
        found = export(
            FinishedRun(trained), "portable", tmp_path_factory.mktemp("told") / "deep" / "out"
        )
    return found, answers[0]


def right(found: dict[str, Any], files: set[str], allowed: float) -> None:
    figures, out = found["reloaded"], Path(found["out"])
    assert 0 <= figures["max_difference"] <= figures["allowed"] < figures["adapter_effect"]
    assert figures["adapter_effect"] > 1 and figures["tokens"] > 20
    assert figures["allowed"] == pytest.approx(allowed)
    assert files <= {file.name for file in out.iterdir()}
    assert found["bytes_written"] == sum(f.stat().st_size for f in out.iterdir())
    assert [out] == list(out.parent.iterdir())


def test_a_portable_one(told: tuple[dict[str, Any], str]) -> None:
    right(told[0], {"adapter_model.safetensors", "tokenizer.json"}, SAME_ARITHMETIC)
    assert told[0]["notes"] == []


@pytest.mark.parametrize(
    ("arguments", "files", "allowed"),
    [
        (["merged"], {"model.safetensors", "tokenizer.json"}, SAME_ARITHMETIC),
        (["mlx"], {"adapters.safetensors", "adapter_config.json"}, OTHER_ARITHMETIC),
        (["gguf", "--type", "f32"], {"test.gguf"}, OTHER_ARITHMETIC),
        (["gguf", "--what", "adapter"], {"test.gguf"}, OTHER_ARITHMETIC),
        (["ollama", "--type", "f16"], {"Modelfile", "base.gguf", "adapter.gguf"}, None),
    ],
    ids=["merged", "mlx", "gguf", "adapter", "ollama"],
)
def test_every_form_is_loaded_and_compared(
    run: Shell, trained: Path, tmp_path: Path, arguments: Any, files: set[str], allowed: Any
) -> None:
    if arguments == ["mlx"]:
        pytest.importorskip("mlx_lm", reason="no MLX here: pip install 'lora-kit[mlx]'")
    out = tmp_path / "deep" / "out"
    done = run("export", str(trained), "--to", *arguments, "--out", str(out), "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    right(found, files, allowed or ROUNDED["f16"] * found["reloaded"]["adapter_effect"])
    words = {"ollama": "Ollama itself is not run", "mlx": "--extra-eos-token"}.get(arguments[0])
    assert (words in found["notes"][0] and words in done.err) if words else not found["notes"]


def scaled(monkeypatch: pytest.MonkeyPatch, by: float) -> None:
    """Whoever reads an adapter's files takes its scale to be another; PEFT does not."""
    from lora_kit.adapter.files import Adapter

    known = Adapter.rank_and_scale

    def wrong(self: Adapter, module: str) -> tuple[int, float]:
        rank, scale = known(self, module)
        return rank, by * scale

    monkeypatch.setattr(Adapter, "rank_and_scale", wrong)


@pytest.fixture(scope="module")
def in_bfloat16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bfloat16")
    base = make_base(folder / "base", TEMPLATE)
    # Not so loud that another scale would say nearly the same.
    mild = {"base.dtype": "bfloat16", "train.max_steps": 12, "train.learning_rate": 3e-3}
    return finish_in(folder, base, "sft", **mild)


@pytest.mark.parametrize(
    ("to", "by"),
    [
        ("merged", 1.2),
        *((to, by) for to in ("ollama f16", "gguf bf16", "ollama q8_0") for by in (0.8, 1.0, 1.2)),
        *(("logits", by) for by in (0.8, 1.0, 1.2)),
    ],
)
def test_rounding_hides_no_wrong_scale(
    in_bfloat16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, by: float
) -> None:
    scaled(monkeypatch, by)
    wrong = pytest.raises(CheckFailed, match=r"scale were (0\.[5-8]|1\.[1-4])\d+ times")
    with wrong if by != 1 else contextlib.nullcontext():
        if to == "logits":
            merge(FinishedRun(in_bfloat16), tmp_path / "out", verify="logits")
        else:
            export(
                FinishedRun(in_bfloat16), to.split()[0], tmp_path / "out", (*to.split(), None)[1]
            )
    assert (tmp_path / "out").exists() == (by == 1)


def test_a_template_that_refuses_a_turn_is_compared_where_it_does_not(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing = "{% if messages | length > 2 %}{{ raise_exception('one') }}{% endif %}" + TEMPLATE
    run = shutil.copytree(trained, tmp_path / "run")
    (run / "adapter" / "chat_template.jinja").write_text(refusing, encoding="utf-8")
    relock(run)
    told = []
    compared = module._compared
    monkeypatch.setattr(module, "_compared", lambda *a: told.append(a[1]) or compared(*a))
    for to in ("portable", "gguf"):
        export(FinishedRun(run), to, tmp_path / to)
    assert [[bool(ids) for ids in truth.conversations] for truth in told] == [[True, False]] * 2


def test_an_adapter_of_tied_ends_names_its_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gguf import GGUFReader

    monkeypatch.chdir(tmp_path)
    base = make_base(tmp_path / "base", TEMPLATE)
    head = {"adapter.target_modules": ["lm_head", "v_proj"]}
    run = finish_in(tmp_path, base, "sft", **head)
    alone = export(FinishedRun(run), "gguf", tmp_path / "alone", what="adapter")
    assert f"lora-kit export {run} --to gguf --what base" in alone["notes"][0]
    export(FinishedRun(run), "gguf", tmp_path / "whole", what="base")
    (file,) = (tmp_path / "whole").glob("*.gguf")
    assert "output.weight" in [tensor.name for tensor in GGUFReader(file).tensors]


def test_a_form_that_says_something_else_is_not_there(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaled(monkeypatch, 1.1)
    with pytest.raises(CheckFailed, match="log-probabilities differ by") as raised:
        export(FinishedRun(trained), "gguf", tmp_path / "deep" / "out", what="adapter")
    assert raised.value.exit_code == 1 and "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def longest(told: dict[str, Any]) -> dict[str, Any]:
    """The answer of most tokens."""
    return dict(max(told["answers"], key=lambda answer: len(answer["top"])))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda got: got["texts"][0].append(0), "splits texts"),
        (lambda got: got["conversations"][1].pop(), "another template"),
        (lambda got: got["ends"].clear(), "does not stop at tokens"),
        (lambda got: got["answers"][0]["top"].pop(), "does not stop where"),
        (lambda got: longest(got)["top"][3].update({"7": 0.0}), "it says token 7 in"),
        (lambda got: longest(got)["top"][3].update({"7": float("nan")}), "differ by inf"),
    ],
    ids=["texts", "template", "ends", "length", "token", "nan"],
)
def test_each_thing_that_is_compared_counts(
    trained: Path,
    tmp_path: Path,
    told: Any,
    monkeypatch: pytest.MonkeyPatch,
    change: Any,
    words: str,
) -> None:
    answer = json.loads(told[1])
    change(answer)
    monkeypatch.setattr(module.reload, "reloaded", lambda *_: answer)
    with pytest.raises(CheckFailed, match=words):
        export(FinishedRun(trained), "portable", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_llama_cpp_may_begin_a_bare_text_in_its_own_way(
    trained: Path, tmp_path: Path, told: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = json.loads(told[1])
    answer["texts"][0].insert(0, 1)
    monkeypatch.setattr(module.llama_cpp, "run", lambda *_, **__: answer)
    found = export(FinishedRun(trained), "gguf", tmp_path / "out", what="adapter")
    assert found["notes"] == ["it splits texts without a template into other tokens"]
    answer["conversations"][0].insert(0, 1)
    with pytest.raises(CheckFailed, match=r"splits texts .* another template"):
        export(FinishedRun(trained), "gguf", tmp_path / "other", what="adapter")


def test_gelu_in_llama_cpp_is_rougher() -> None:
    gemma = {to: module._allowed(to, "f32", "float32", True) for to in ("gguf", "mlx")}
    assert gemma == {"gguf": (*ROUGH_GELU, 1e-3), "mlx": (OTHER_ARITHMETIC, 0.0, 1e-3)}
    assert module._allowed("gguf", "f32", "float32", False) == gemma["mlx"]


def test_without_mlx_it_is_written_and_said_not_to_have_run(
    run: Shell, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where mlx-lm is there, but not mlx itself, as pip leaves it on Linux."""
    missing = tmp_path / "path" / "mlx"
    missing.mkdir(parents=True)
    (missing / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(missing.parent), *sys.path]))
    out = tmp_path / "out"
    done = run("export", str(trained), "--to", "mlx", "--out", str(out), "--json")
    assert done.code == 0 and json.loads(done.out)["reloaded"] is None, done.err
    assert "not run here: pip install 'lora-kit[mlx]'" in done.err
    assert (out / "adapters.safetensors").is_file()
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None)
    with pytest.raises(UserError, match=r"lora-kit\[llamacpp\]"):
        export(FinishedRun(trained), "gguf", tmp_path / "other")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--to", "portble"], "did you mean `portable`"),
        (["--to", "portable", "--type", "f16"], "--type f16: only for"),
        (["--to", "mlx", "--what", "merged"], "--what merged: only for"),
        (["--to", "gguf", "--type", "q4"], "--type q4: one of f32, f16, bf16, q8_0"),
        (["--to", "gguf", "--what", "model"], "--what model: one of adapter, merged, base"),
        (["--to", "gguf", "--what", "adapter", "--type", "q8_0"], "stays f32"),
    ],
)
def test_mistakes_are_told_in_a_line_before_the_work(
    run: Shell, trained: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    done = run("export", str(trained), *arguments, "--out", str(tmp_path / "out"))
    assert done.code == 2 and words in done.err and len(done.err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_what_is_there_stays(run: Shell, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    done = run("export", str(trained), "--to", "portable", "--out", str(tmp_path / "mine"))
    assert done.code == 2 and "exists" in done.err
    assert (tmp_path / "mine").read_text() == "mine"
