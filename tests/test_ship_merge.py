"""A merged model is base + adapter to the last digits, or it is not there."""

from __future__ import annotations

import errno
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RunMaker, make_base
from trained import copied, edit, finish, on_own_base
from typer.testing import CliRunner

import lora_kit
from lora_kit.adapter.finished import FinishedRun
from lora_kit.base import tensors as files
from lora_kit.cli import app
from lora_kit.errors import CheckFailed, UserError
from lora_kit.hashes import file_hash
from lora_kit.ship import weights
from lora_kit.ship.merge import FLOAT32_TOLERANCE, ROUNDING_SHARE, Merged, merge

pytestmark = pytest.mark.slow

TEXT = "the quick brown fox jumps over the lazy dog while seven wizards make toxic brew"
# Full precision at every step: what is compared is the merge, not the run's type.
PLAIN = {"base.dtype": "float32"}


def alone(folder: Path, dtype: str = "float32") -> tuple[Any, Any]:
    """A merged model as a stranger loads it: transformers, nothing else."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    assert not any("lora" in name for name, _ in model.named_modules())
    return model, AutoTokenizer.from_pretrained(folder)


def compared(merged: Merged) -> tuple[float, float]:
    """The difference of logits, and the adapter's own effect."""
    assert merged.max_logit_difference is not None and merged.adapter_effect is not None
    return merged.max_logit_difference, merged.adapter_effect


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(**tokenizer(TEXT, return_tensors="pt")).logits.float()


def greedy(model: Any, tokenizer: Any, count: int = 64) -> list[int]:
    inputs = tokenizer(TEXT, return_tensors="pt")
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False)
    return out[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize(
    ("adapter", "tied"),
    [
        ({}, True),
        ({"use_rslora": True}, False),
        ({"use_dora": True}, True),
        (
            {"rank_pattern": {"q_proj": 2, "layers.1.mlp.*": 8}, "alpha_pattern": {"v_proj": 32}},
            False,
        ),
    ],
    ids=["plain-tied", "rslora-untied", "dora-tied", "patterns-untied"],
)
def test_merged_is_base_plus_adapter(
    run_file: RunMaker, tmp_path: Path, adapter: dict[str, Any], tied: bool
) -> None:
    base = make_base(tmp_path / "base", tie_word_embeddings=tied)
    changes = {f"adapter.{key}": value for key, value in adapter.items()}
    run = finish(run_file, **PLAIN, **changes, **{"base.model": str(base)})
    merged = merge(FinishedRun(run), tmp_path / "deep" / "merged", verify="logits")

    model, tokenizer = lora_kit.load(run)
    again, others = alone(merged.out)
    assert again.config.tie_word_embeddings is tied
    wanted, got = logits(model, tokenizer), logits(again, others)
    assert (wanted - got).abs().max().item() <= 1e-4
    assert greedy(model, tokenizer) == greedy(again, others)
    # All of which says nothing of an adapter that does nothing.
    with model.disable_adapter():
        assert (logits(model, tokenizer) - wanted).abs().max().item() > 0.1
        assert greedy(model, tokenizer) != greedy(again, others)
    difference, effect = compared(merged)
    assert difference <= FLOAT32_TOLERANCE < 0.1 < effect
    assert merged.greedy_agreement == 1.0
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["merged"]


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_adapter_on_one_of_two_tied_matrices_parts_them(
    run_file: RunMaker, tmp_path: Path, target: str
) -> None:
    targets: dict[str, Any] = {"adapter.target_modules": [target, "q_proj"]}
    run = finish(run_file, **PLAIN, **targets)
    merged = merge(FinishedRun(run), tmp_path / "merged", verify="logits")
    difference, effect = compared(merged)
    assert difference <= FLOAT32_TOLERANCE < 0.1 < effect
    model, tokenizer = alone(merged.out)
    assert model.config.tie_word_embeddings is False
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    adapted, _ = lora_kit.load(run)
    assert (logits(adapted, tokenizer) - logits(model, tokenizer)).abs().max().item() <= 1e-4


def test_a_4_bit_run_merges_into_the_16_bit_base_within_rounding(
    run_file: RunMaker, tmp_path: Path, base: Path
) -> None:
    run = finish(run_file, **{"base.dtype": "bfloat16", "base.quantize": "nf4"})
    options: Any = {"into": "base", "verify": "logits"}
    merged = merge(FinishedRun(run), tmp_path / "merged", "bfloat16", **options)
    difference, effect = compared(merged)
    assert 0 < difference <= ROUNDING_SHARE["bfloat16"] * effect
    model, tokenizer = alone(merged.out, "bfloat16")
    assert getattr(model.config, "quantization_config", None) is None
    # The unquantized base with the adapter is what it equals, up to 8 bits of mantissa.
    plain, _ = lora_kit.load(run, quantize="none", dtype="float32")
    exact = merge(FinishedRun(run), tmp_path / "exact", "float32", **options)
    assert compared(exact)[0] <= FLOAT32_TOLERANCE
    sharp, _ = alone(exact.out)
    assert next(sharp.parameters()).dtype == torch.float32
    difference = (logits(plain, tokenizer) - logits(sharp, tokenizer)).abs().max().item()
    assert difference <= 1e-4
    rounded = (logits(plain, tokenizer) - logits(model, tokenizer)).abs().max().item()
    assert difference < rounded < ROUNDING_SHARE["bfloat16"] * compared(exact)[1]


@pytest.fixture
def run(sft_run: Path) -> Path:
    return sft_run


@pytest.mark.quick
def test_the_merged_folder_answers_and_stops(sft_run: Path, base: Path, tmp_path: Path) -> None:
    run = copied(sft_run, tmp_path)
    on_own_base(run, base, tmp_path / "own")
    base = tmp_path / "own"
    # A base as they come: end tokens in a list, sampling settings with sampling off.
    edit(
        base / "generation_config.json",
        lambda c: c.update(eos_token_id=[0, 5], temperature=0.6, top_p=0.9, do_sample=False),
    )
    merged = merge(FinishedRun(run), tmp_path / "merged")
    model, tokenizer = alone(merged.out)
    _, own = lora_kit.load(run)
    assert tokenizer.chat_template == own.chat_template is not None
    assert tokenizer.get_vocab() == own.get_vocab()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert model.generation_config.eos_token_id == [0, end, 5]
    assert model.generation_config.pad_token_id == 1
    # Forced to end its answer at the third token, it says no more.
    hook = model.lm_head.register_forward_hook(
        lambda _, __, out: out.index_fill(-1, torch.tensor([end]), 99.0)
    )
    inputs = tokenizer(TEXT, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    hook.remove()
    assert out[0, inputs["input_ids"].shape[1] :].tolist() == [end]
    assert sorted(file.name for file in merged.out.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "merge.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    record = json.loads((merged.out / "merge.json").read_text())
    assert record["adapter"]["sha256"] == file_hash(run / "adapter/adapter_model.safetensors")
    assert record["base"]["model"] == "own" and "model.safetensors" in record["base"]["hashes"]
    assert (record["into"], record["dtype"]) == ("base", "float32")
    assert not any(str(base) in f.read_text("latin-1") for f in merged.out.glob("*.json"))


@pytest.mark.quick
def test_the_command_prints_what_it_measured(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    command = ["merge", str(run), "--out", str(out), "--json", "--verify", "logits"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert {"max_logit_difference", "seconds", "peak_rss_mib", "bytes_written"} <= found.keys()
    assert 0 <= found["max_logit_difference"] <= 1e-4 and found["seconds"] > 0
    assert 100 < found["peak_rss_mib"] < 100_000
    assert found["bytes_written"] == sum(file.stat().st_size for file in out.iterdir())
    # 2 layers of 7 linear weights; norms and the tied embeddings are the base's own.
    assert (found["changed"], found["copied"]) == (14, 6)
    plain = CliRunner().invoke(app, ["merge", str(run), "--out", f"{out}2"])
    assert "14 tensors changed, 6 copied unchanged; all verified" in plain.stdout


def test_a_merge_that_is_wrong_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_kit.ship.weights import Weights

    right, before = Weights._read_factors, sorted(tmp_path.rglob("*"))
    for factor, words in ((1.05, "merged model's logits differ by"), (float("nan"), "not written")):
        monkeypatch.setattr(
            Weights, "_read_factors", lambda *a, by=factor: tuple(half * by for half in right(*a))
        )
        with pytest.raises(CheckFailed, match=words) as raised:
            merge(FinishedRun(run), tmp_path / "deep" / "er" / "merged", verify="logits")
        assert raised.value.exit_code == 1 and "\n" not in str(raised.value)
        assert sorted(tmp_path.rglob("*")) == before
    monkeypatch.setattr(Weights, "_read_factors", right)

    # What lies on the disk is not what was written.
    check_file = weights._check_file

    def spoil(file: Path, *written: Any) -> None:
        with file.open("r+b") as opened:
            opened.seek(-1, 2)
            last = opened.read(1)[0]
            opened.seek(-1, 2)
            opened.write(bytes([last ^ 1]))
        check_file(file, *written)

    monkeypatch.setattr(weights, "_check_file", spoil)
    with pytest.raises(CheckFailed, match="not what was written"):
        merge(FinishedRun(run), tmp_path / "merged")
    assert sorted(tmp_path.rglob("*")) == before


def test_places_that_cannot_be_written_are_refused_before_the_work(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    for out, words in (
        (tmp_path / "file", "exists: name another folder"),
        (tmp_path / "link", "exists: name another folder"),
        (run, "exists: name another folder"),
        (tmp_path / "file" / "merged", "cannot be created|cannot be written"),
    ):
        with pytest.raises(UserError, match=words) as raised:
            merge(FinishedRun(run), out)
        assert str(out) in str(raised.value) and "\n" not in str(raised.value)
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(UserError, match="float8"):
        merge(FinishedRun(run), tmp_path / "merged", dtype="float8")
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(UserError, match=r"needs \d+ MiB of disk space, 0 MiB are free"):
        merge(FinishedRun(run), tmp_path / "deep" / "merged")
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize("size", [0, 1, 4096, files.PIECE, files.PIECE + 1, 2 * files.PIECE + 4097])
@pytest.mark.parametrize("refused", [None, "open", "read"])
def test_a_file_is_read_past_the_page_cache_or_else_through_it(
    tmp_path: Path, size: int, refused: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_bytes(random.Random(size).randbytes(size))
    really, flags = os.open, []

    def opened(path: str, flag: int) -> int:
        flags.append(flag & os.O_DIRECT)
        if refused == "open":
            raise OSError(errno.EINVAL, "Invalid argument")
        return really(tmp_path, os.O_RDONLY) if refused == "read" else really(path, flag)

    monkeypatch.setattr(os, "open", opened)
    pieces = [bytes(piece) for piece in weights._pieces(file)]
    assert b"".join(pieces) == file.read_bytes()
    assert [len(piece) for piece in pieces[:-1]] == [files.PIECE] * (len(pieces) - 1)
    assert flags == [os.O_DIRECT]
