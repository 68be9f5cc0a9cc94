"""What a merge refuses, in a line each and before anything is left; and what a kill leaves."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_base
from processes import run
from safetensors.torch import load_file, save_file
from test_ship_merge_peft import adapted, causal
from trained import edit

from lora_kit.adapter.finished import FinishedRun
from lora_kit.base.tensors import INDEX
from lora_kit.errors import CheckFailed, UserError
from lora_kit.hashes import file_hash
from lora_kit.ship.merge import merge

SHARDED = {"shard": "60KB", "target_modules": "all-linear"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base/ (shards) and adapter/. Copy it before you change it."""
    folder = tmp_path_factory.mktemp("source")
    adapted(causal("Llama", tie_word_embeddings=False), folder, **SHARDED)
    return folder


@pytest.fixture
def place(source: Path, tmp_path: Path) -> Path:
    """A copy of it as a run, with a lock file that knows the base's files."""
    shutil.copytree(source / "base", tmp_path / "base")
    shutil.copytree(source / "adapter", tmp_path / "run" / "adapter")
    base, run = tmp_path / "base", tmp_path / "run"
    edit(run / "adapter" / "adapter_config.json", lambda c: c.update(base_model_name_or_path="?"))
    for file in base.glob("tokenizer*"):
        shutil.copy(file, run / "adapter")
    values = {"recipe": "cpt", "name": "test", "base": {"model": str(base), "dtype": "float32"}}
    (run / "run.yaml").write_text(json.dumps({**values, "data": {"train": str(base)}}))
    hashed = [*base.glob("*.safetensors"), base / "config.json", *base.glob("tokenizer*")]
    pinned = {"model": str(base), "hashes": {file.name: file_hash(file) for file in hashed}}
    weights = file_hash(run / "adapter" / "adapter_model.safetensors")
    lock = {"base": pinned, "adapter": {"sha256": weights}}
    (run / "run.lock.json").write_text(json.dumps(lock))
    return tmp_path


def tensors(file: Path, change: Any) -> None:
    """Change the tensors of a file."""
    found = load_file(file)
    change(found)
    save_file(found, file, {"format": "pt"})


def refused(place: Path, words: str, kind: type[Exception] = UserError, **settings: Any) -> str:
    before = sorted(place.rglob("*"))
    with pytest.raises(kind, match=words) as raised:
        merge(FinishedRun(place / "run"), place / "deep" / "merged", **settings)
    assert sorted(place.rglob("*")) == before  # not even the folder above
    assert all(0 < len(line) < 400 for line in str(raised.value).splitlines())
    return str(raised.value)


def forget_hashes(place: Path) -> None:
    (place / "run" / "run.lock.json").write_text('{"finished": true}')


def test_a_run_merges_with_its_hashes_checked_on_the_way(place: Path) -> None:
    merged = merge(FinishedRun(place / "run"), place / "deep" / "merged")
    assert merged.changed == 14 and merged.peak_rss_mib > 100
    assert (merged.max_logit_difference, merged.adapter_effect) == (None, None)
    assert [file.name for file in (place / "deep").iterdir()] == ["merged"]


@pytest.mark.parametrize("which", [0, -1])
def test_another_base_is_seen_while_it_is_read(place: Path, which: int) -> None:
    file = sorted((place / "base").glob("*.safetensors"))[which]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    text = refused(place, "differs; an adapter only works on its own base")
    assert file.name in text and "\n" not in text


def test_another_configuration_is_another_base(place: Path) -> None:
    edit(place / "base" / "config.json", lambda c: c.update(rms_norm_eps=0.1))
    assert "config.json differs" in refused(place, "trained on another")


def test_an_adapter_that_was_damaged(place: Path) -> None:
    file = place / "run" / "adapter" / "adapter_model.safetensors"
    tensors(file, lambda t: t.popitem())
    refused(place, "was changed since the run saved it")


def test_an_adapter_of_another_base_names_every_misfit(place: Path) -> None:
    make_base(place / "other", hidden_size=32, num_hidden_layers=1)
    forget_hashes(place)
    for name in ("config.json", INDEX):
        (place / "base" / name).unlink()
    for file in (place / "base").glob("*.safetensors"):
        file.unlink()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(place / "other" / name, place / "base")
    text = refused(place, "another base")
    assert "layers.0.mlp.down_proj: B A is (64, 96), model.layers.0" in text
    assert "and 9 more" in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(init_lora_weights="pissa"), "pissa: convert it to standard LoRA"),
        (lambda c: c.update(use_dora=True), "its magnitude .DoRA. None"),
        (lambda c: c.update(r=8), "r is 8"),
        (lambda c: c.update(peft_type="LOHA"), "only LoRA adapters"),
    ],
)
def test_settings_that_cannot_be_merged(place: Path, change: Any, words: str) -> None:
    forget_hashes(place)
    edit(place / "run" / "adapter" / "adapter_config.json", change)
    refused(place, words)


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("model.layers.0.mlp.up_proj.weight", torch.zeros(96, 64), "does not list"),
        ("model.layers.7.self_attn.q_proj.lora_A.weight", torch.zeros(4, 64), "has no lora_B"),
        (
            "model.layers.0.mlp.up_proj.lora_E",
            torch.zeros(4),
            "unsupported tensor, cannot be merged",
        ),
        ("model.embed_tokens.weight", torch.zeros(416, 32), "another base"),
        ("model.layers.0.mlp.up_proj.lora_magnitude_vector", torch.zeros(96), "its magnitude"),
        ("model.layers.9.mlp.up_proj.lora_magnitude_vector", torch.zeros(96), "without lora_A"),
        ("model.layers.0.mlp.up_proj.lora_B.bias", torch.zeros(96), "no such bias"),
        (
            "model.embed_tokens.token_adapter.trainable_tokens_delta",
            torch.zeros(2, 64),
            "trainable_token_indices do not match",
        ),
    ],
)
def test_tensors_that_fit_nowhere(place: Path, name: str, tensor: Any, words: str) -> None:
    forget_hashes(place)
    file = place / "run" / "adapter" / "adapter_model.safetensors"
    tensors(file, lambda t: t.update({f"base_model.model.{name}": tensor}))
    refused(place, words)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_a_weight_that_is_not_finite_is_not_written(place: Path, value: float) -> None:
    forget_hashes(place)
    file = place / "run" / "adapter" / "adapter_model.safetensors"
    last = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"
    tensors(file, lambda t: t[last].fill_(value))
    assert "layers.1.mlp.down_proj" in refused(place, "NaN or infinite", CheckFailed)


def test_a_base_that_is_quantized_broken_or_gone(place: Path) -> None:
    forget_hashes(place)
    shard = sorted((place / "base").glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-5])
    refused(place, "corrupt")
    shard.unlink()
    refused(place, "missing: copy the model again")
    shard.write_bytes(content)
    edit(place / "base" / "config.json", lambda c: c.update(quantization_config={}))
    merge(FinishedRun(place / "run"), place / "fine")
    edit(
        place / "base" / "config.json",
        lambda c: c.update(quantization_config={"quant_method": "gptq"}),
    )
    refused(place, "already quantized")


def test_a_disk_that_is_full_before_or_on_the_way(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import os

    calls, real = [0], os.fsync

    def full(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr("lora_kit.base.tensors.os.fsync", full)
        refused(place, "cannot be written .No space left on device.: nothing was created")
    needed = sum(file.stat().st_size for file in (place / "base").glob("*.safetensors"))
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": needed - 1}))
    refused(place, "MiB of disk space")


def test_dequantized_is_what_the_adapter_saw_in_training(place: Path) -> None:
    from bitsandbytes.functional import dequantize_4bit

    from lora_kit.base.load import load_base
    from lora_kit.base.pin import pin
    from lora_kit.schema import Base

    refused(place, "not trained on nf4", into="dequantized")
    edit(place / "run" / "run.yaml", lambda c: c["base"].update(quantize="nf4"))
    # Half of the linear weights are adapted, all of them went through 4 bits.
    file = place / "run" / "adapter" / "adapter_model.safetensors"
    tensors(file, lambda t: [t.pop(n) for n in list(t) if ".mlp." in n])
    edit(
        file.with_name("adapter_config.json"),
        lambda c: c.update(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
    )
    edit(place / "run" / "run.lock.json", lambda c: c.pop("adapter"))
    merged = merge(
        FinishedRun(place / "run"), place / "merged", into="dequantized", verify="logits"
    )
    assert merged.max_logit_difference is not None and merged.adapter_effect is not None
    assert merged.max_logit_difference <= 1e-4 * max(1, merged.adapter_effect)
    ours: dict[str, Any] = {}
    for shard in merged.out.glob("*.safetensors"):
        ours |= load_file(shard)
    settings = Base(model=str(place / "base"), dtype="float32", quantize="nf4")
    model = load_base(settings, pin(settings))
    found = 0
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear4bit" and ".mlp." in name:
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
            assert torch.equal(ours[f"{name}.weight"], weight)
            found += 1
    assert found == 6 and merged.changed == 8 and merged.copied == len(ours) - 14


KILLS = """
import os, random, signal, sys
from pathlib import Path
from lora_kit.folders import new_folder
from lora_kit.adapter.finished import FinishedRun
from lora_kit.ship.merge import merge
from transformers import AutoTokenizer
run, out = Path(sys.argv[1]), Path(sys.argv[2])
counted, code = out.with_name("counted"), new_folder.__wrapped__.__code__

def merged(last=0):
    # In a process that is killed in its call number `last`; leaves the numbers of the first call
    # that writes and of the last one. Returns whether it came to its end.
    if child := os.fork():
        return os.waitpid(child, 0)[1] == 0
    calls = begin = 0
    def count(frame, event, argument):
        nonlocal calls, begin
        calls += 1
        if calls == last:
            os.kill(os.getpid(), signal.SIGKILL)
        if frame.f_code is code:
            begin = begin or calls
    try:
        opened = FinishedRun(run)
        sys.setprofile(count)
        merge(opened, out)
        sys.setprofile(None)
        counted.write_text(f"{begin} {calls}")
        os._exit(0)
    finally:
        os._exit(1)

def files():
    return {file.name: file.read_bytes() for file in out.iterdir()}

assert merged()
begin, end = map(int, counted.read_text().split())
wanted = files()
partial, chooser = out.with_name(f".{out.name}.lora-kit-partial"), random.Random(0)
kept = whole = 0
for number in range(20):
    if out.exists():
        out.rename(out.with_name(f"done{number}"))
    merged(chooser.randrange(begin, end))
    kept += any(partial.glob("*"))
    if out.exists():
        assert files() == wanted
        whole += 1
if out.exists():
    out.rename(out.with_name("done"))
assert merged() and files() == wanted and not partial.exists()
print(kept, whole, begin, end)
"""


@pytest.mark.slow
def test_killed_at_20_moments_it_never_looks_finished(place: Path) -> None:
    (place / "out").mkdir()
    done = run([sys.executable, "-c", KILLS, place / "run", place / "out" / "merged"])
    assert done.returncode == 0, done.stderr[-2000:]
    # Many of the kills fell into the writing, and left what the next merge removed.
    assert int(done.stdout.split()[0]) >= 10, done.stdout
