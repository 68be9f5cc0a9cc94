"""Adapters that are damaged or odd, and what the verb says of them."""

# ruff: noqa: F811 - fixtures of another file
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_adapter_inspect import WEIGHTS, Maker, made, rewrite  # noqa: F401 - a fixture
from test_cli import Shell, run  # noqa: F401 - a fixture
from trained import copied, edit

from lora_kit.adapter.files import open_adapter
from lora_kit.adapter.finished import FinishedRun
from lora_kit.adapter.inspect import inspect
from lora_kit.errors import UserError

# --- Files that are no good


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA': only LoRA"),
        (
            {"r": 8},
            "r is 8 and the scale 1.5 in its config, but A is [4, 128] and B is [64, 4] (and",
        ),
        ({"r": 0}, "invalid: "),
        ({"r": "4"}, "invalid: "),
        ({"lora_alpha": None}, "invalid: "),
        ({"rank_pattern": {"(": 2}}, "invalid: "),
        ({"alpha_pattern": [1]}, "invalid: "),
    ],
)
def test_a_config_that_does_not_fit_is_refused(made: Maker, change: Any, words: str) -> None:
    _, folder = made()
    edit(folder / "adapter_config.json", lambda c: c.update(change))
    with pytest.raises(UserError) as raised:
        open_adapter(folder).figures()
    assert words in str(raised.value) and str(folder) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_broken_files_and_pickles_are_refused(made: Maker) -> None:
    _, folder = made()
    config, weights = folder / "adapter_config.json", folder / WEIGHTS
    whole = weights.read_bytes()

    def refusal() -> str:
        with pytest.raises(UserError) as raised:
            inspect(FinishedRun(folder))
        assert str(folder) in str(raised.value) and "\n" not in str(raised.value)
        return str(raised.value)

    for damaged in (b"", whole[:-10], whole[:50], b"\xff" * 200):
        weights.write_bytes(damaged)
        assert "corrupt" in refusal()
    weights.write_bytes(whole)
    rewrite(folder, lambda t: t.pop(min(n for n in t if "lora_B" in n)))
    assert "has no lora_B" in refusal()
    rewrite(folder, lambda t: t.clear() or t.update({"score.weight": torch.ones(2)}))
    assert "no lora_A" in refusal()
    weights.unlink()
    assert "copy the whole adapter again" in refusal()
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch canary'\ntR.")
    assert "can run code and is not read" in refusal()
    for text in ("{", "[]", "\x00", '"LORA"', "[" * 100_000):
        config.write_text(text, encoding="utf-8")
        assert "not a JSON object" in refusal()


# --- What a loader would trip over

PART = "only some of q, k and v, or up without gate"
OWN = "an initialisation from the base's weights"


@pytest.mark.parametrize(
    ("config", "who", "what"),
    [
        ({"use_dora": True}, ["vLLM, SGLang, llama.cpp, MLX"], "use_dora"),
        ({"use_rslora": True}, ["SGLang, llama.cpp"], "use_rslora"),
        ({"rank_pattern": {"q_proj": 2}}, ["SGLang"], "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, ["SGLang, llama.cpp"], "alpha_pattern"),
        ({"r": 17}, ["vLLM"], "a rank over 16"),
        ({"lora_bias": True}, ["vLLM, SGLang, llama.cpp, MLX"], "lora_bias"),
        ({"bias": "all"}, ["vLLM, SGLang, llama.cpp, MLX"], "trained bias"),
        ({"init_lora_weights": "pissa"}, ["vLLM", "SGLang, llama.cpp, MLX"], OWN),
        ({"modules_to_save": ["score"]}, ["vLLM, llama.cpp, MLX", "SGLang"], "modules_to_save"),
        (
            {"trainable_token_indices": [3]},
            ["vLLM, llama.cpp, MLX", "SGLang"],
            "trainable_token_indices",
        ),
    ],
)
def test_what_a_loader_trips_over(made: Maker, config: Any, who: list[str], what: str) -> None:
    plain = {line["what"] for line in inspect(FinishedRun(made()[1]))["loaders"]}
    assert plain == {"a base named by local path", "no tokenizer", PART}
    if "modules_to_save" in config:  # the tiny base has neither
        _, folder = made("b")
        edit(folder / "adapter_config.json", lambda c: c.update(config))
    else:
        _, folder = made("b", **config)
    found = inspect(FinishedRun(folder))
    lines = [line for line in found["loaders"] if line["what"] not in plain]
    assert [(line["what"], line["who"]) for line in lines] == [(what, one) for one in who]
    beside = {"trainable_token_indices": "trainable_tokens_delta", "use_dora": "magnitude_vector"}
    assert all(any(beside[k] in n for n in found["others"]) for k in config if k in beside)


def test_where_the_base_is(made: Maker) -> None:
    _, folder = made()
    (folder / "tokenizer.json").touch()
    for model, revision, what in (
        ("owner/name", None, "a base without revision"),
        ("owner/name", "a" * 40, None),
        (None, None, "no base model named"),
        ("../base", None, "a base named by local path"),
        ("C:\\base", None, "a base named by local path"),
    ):
        values = {"base_model_name_or_path": model, "revision": revision}
        edit(folder / "adapter_config.json", lambda c, v=values: c.update(v))
        found = [line["what"] for line in inspect(FinishedRun(folder))["loaders"]]
        assert found == [PART, *[what] * bool(what)]


# --- The verb


def test_the_verb_on_a_run_and_its_adapter(run: Shell, cpt_run: Path, tmp_path: Path) -> None:
    home = copied(cpt_run, tmp_path)
    found = json.loads(run("inspect", str(home), "--json").out)
    digest = found["base"]["hashes"]["model.safetensors"]
    inside = json.loads(run("inspect", str(home / "adapter"), "--json").out)
    assert {**found, "adapter": inside["adapter"]} == inside
    assert found["modules"] == json.loads(json.dumps(open_adapter(home).figures()))
    done = run("inspect", str(home))
    assert done.code == 0 and digest in done.out and "\nPEFT: a base named by" in done.out
    layers = [line for line in done.out.splitlines() if line.startswith("layers.")]
    assert len(layers) == 2
    done = run("inspect", str(home), str(home / "adapter"))
    assert "the adapters are identical: difference 0" in done.out
    rewrite(home / "adapter", lambda t: [v.mul_(2) for v in t.values()])
    found = json.loads(run("inspect", str(home), "--json").out)
    assert "adapter_model.safetensors changed since the run" in [
        ln["what"] for ln in found["loaders"]
    ]


def test_two_bases_are_both_named_and_nothing_steers_the_terminal(run: Shell, made: Maker) -> None:
    (_, first), (_, second) = made("a"), made("b", target_modules=["q_proj"])
    evil = {"base_model_name_or_path": "\x1b[2Jevil\u202e[bold]", "task_type": "\x1b]0;x\x07"}
    edit(second / "adapter_config.json", lambda c: c.update(evil))
    rewrite(second, lambda t: t.update({"red.lora_A.weight": torch.ones(4, 2)}))
    rewrite(second, lambda t: t.update({"red.lora_B.weight": torch.zeros(2, 4)}))
    for arguments in ([second], [first, second]):
        done = run("inspect", *map(str, arguments))
        assert done.code == 0 and "evil" in done.out and "red" in done.out
        assert not {"\x1b", "\x07", "\u202e"} & set(done.out)
    assert "DIFFERENT BASES" in done.out and "only first: model.layers.0" in done.out
    done = run("inspect", str(first / "gone"))
    assert (done.code, len(done.errors)) == (2, 1)
    rewrite(second, lambda t: t.update({"\x1b[31mred.lora_B.weight": torch.zeros(2, 4)}))
    done = run("inspect", str(second))
    assert (done.code, len(done.errors)) == (2, 1) and "\x1b" not in done.err
