"""A full fine-tune that was a LoRA comes back as that LoRA; what no LoRA can carry is named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_base
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lora_kit.adapter import extract as room
from lora_kit.adapter.extract import extract, factored
from lora_kit.cli import app

IDS = torch.arange(3, 67)[None]


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model: Any) -> Any:
    with torch.inference_mode():
        return model(input_ids=IDS).logits


def tune(base: Path, out: Path, targets: Any = "all-linear", shards: str = "5GB") -> Path:
    """A fine-tune whose updates have rank 4: a LoRA that was merged."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer

    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False)
    model = get_peft_model(load(base), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data *= 3
    model.merge_and_unload().save_pretrained(out, max_shard_size=shards)
    AutoTokenizer.from_pretrained(base).save_pretrained(str(out))
    return out


@pytest.fixture(scope="module")
def tuned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tune(base, tmp_path_factory.mktemp("tuned") / "model", shards="100KB")


def changed(tuned: Path, out: Path, change: Any) -> Path:
    """A copy of a model whose tensors went through `change`."""
    model = load(tuned)
    out.mkdir()
    for file in tuned.glob("*.json"):
        if "index" not in file.name:
            (out / file.name).write_bytes(file.read_bytes())
    tensors = {n: t.clone() for n, t in model.state_dict().items() if n != "lm_head.weight"}
    change(tensors)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def test_a_merged_lora_comes_back(base: Path, tuned: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoTokenizer

    assert len(list(tuned.glob("*.safetensors"))) > 1
    out = tmp_path / "adapter"
    done = CliRunner().invoke(
        app, ["extract", str(base), str(tuned), "--out", str(out), "--rank", "4", "--json"]
    )
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["modules"] == 14 and found["not_carried"] == []
    assert found["relative_error"]["4"] < 1e-5
    before, wanted = logits(load(base)), logits(load(tuned))
    got = logits(PeftModel.from_pretrained(load(base), str(out)))
    assert (wanted - before).abs().max() > 0.5
    assert (wanted - got).abs().max() <= 1e-4
    assert AutoTokenizer.from_pretrained(out).get_vocab()
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 4 and "q_proj" in config["target_modules"]
    lock = json.loads((out / "run.lock.json").read_text())
    assert lock["base"]["hashes"]["model.safetensors"] and lock["extracted"]["from"] == "model"
    # The errors of lower ranks are those of the exact decomposition.
    old, new = load(base).state_dict(), load(tuned).state_dict()
    every = [
        torch.linalg.svdvals((new[n] - old[n]).double())[:8] for n in old if "_proj.weight" in n
    ]
    exact = (sum(v[2:] @ v[2:] for v in every) / sum(v @ v for v in every)) ** 0.5
    assert found["relative_error"]["2"] == pytest.approx(float(exact), rel=1e-4)


def test_the_found_factors_are_nearly_the_best_and_their_error_is_true(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 300)).Q for n in (400, 300))
    for decay in (1.0, 0.3, 0.0):  # 0: all singular values are alike
        s = torch.arange(1, 301).float() ** -decay
        matrix = u * s @ v.T
        monkeypatch.setattr(room, "_BLOCK", 300 * 37)

        def blocks(matrix: Any = matrix) -> Any:
            return ((rows, matrix[rows]) for rows in room.row_slices(400, 300))

        for most, allowed in ((256, 1.01), (300, 1 + 1e-5)):
            monkeypatch.setattr(room, "_EXACT", most)
            b, a, errors = factored(blocks, (400, 300), 16, 0, "matrix")
            assert b.shape == (400, 16) and a.shape == (16, 300)
            for k in (0, 1, 8, 16):
                true = float((matrix - b[:, :k] @ a[:k]).norm())
                assert errors[k].item() == pytest.approx(true, rel=1e-4)
                assert true <= allowed * float(s[k:].norm())


def test_what_no_lora_can_carry_is_named(
    base: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(tensors: dict[str, Any]) -> None:
        tensors["model.norm.weight"] *= 1.5
        tensors["model.embed_tokens.weight"] = torch.cat(
            [tensors["model.embed_tokens.weight"], torch.ones(2, 64)]
        )
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(64)

    other = changed(tuned, tmp_path / "other", change)
    found = extract(str(base), str(other), tmp_path / "adapter", rank=4)
    named = {one["name"]: one for one in found["not_carried"]}
    assert named["model.norm.weight"]["relative"] == pytest.approx(0.5)
    assert named["model.embed_tokens.weight"]["why"] == "400 rows became 402"
    assert named["model.layers.0.self_attn.q_proj.bias"]["why"] == "only in TUNED"
    assert len(named) == 3 and found["modules"] == 14
    room.show(found)
    said = capsys.readouterr().out
    assert "not extracted: 1 model.norm.weight: a norm or bias, changed by at most 50.00%" in said
    assert "400 rows became 402" in said and "rank 4, 14 modules" in said


def test_an_untied_head_and_some_modules_alone_are_carried(tmp_path: Path) -> None:
    from peft import PeftModel

    base = make_base(tmp_path / "base", tie_word_embeddings=False)
    tuned = tune(base, tmp_path / "tuned", targets=["lm_head", "layers.1.mlp.up_proj"])
    found = extract(str(base), str(tuned), tmp_path / "adapter", rank=200)
    assert found["modules"] == 2 and found["not_carried"] == []
    got = PeftModel.from_pretrained(load(base), str(tmp_path / "adapter"))
    assert (logits(got) - logits(load(tuned))).abs().max() <= 1e-4
    assert (logits(load(base)) - logits(load(tuned))).abs().max() > 0.5


def test_mistakes_are_one_line(base: Path, tuned: Path, tmp_path: Path) -> None:
    def name_of(case: str, change: Any) -> str:
        return str(changed(base, tmp_path / case, change))

    def conv(tensors: dict[str, Any]) -> None:
        tensors["h.0.attn.c_attn.weight"] = torch.ones(4, 12)

    def wider(tensors: dict[str, Any]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.ones(128, 65)

    def packed(tensors: dict[str, Any]) -> None:
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = tensors[name].to(torch.uint8)

    cases = [
        (str(base), str(base), 1, "nothing changed since"),
        (str(base), name_of("norm", lambda t: t["model.norm.weight"].add_(1)), 1, "model.norm"),
        (str(base), name_of("wider", wider), 2, "name the base that it was fine-tuned from"),
        (str(base), name_of("packed", packed), 2, "name the unquantized model"),
        (
            str(base),
            name_of("nan", lambda t: t["model.layers.1.mlp.up_proj.weight"].fill_(float("nan"))),
            2,
            "model.layers.1.mlp.up_proj.weight: NaN or infinite values",
        ),
        (name_of("gpt2", conv), str(tuned), 2, "transposed"),
        (str(base), str(tmp_path / "nowhere"), 2, "no such folder"),
    ]
    (tmp_path / "there").mkdir()
    for before, after, code, words in cases:
        done = refusal(before, after, tmp_path / "out")
        assert (done[0], words in done[1]) == (code, True), done
        assert not (tmp_path / "out").exists()
    # Said before anything is read.
    code, said = refusal("gone", "gone", tmp_path / "there")
    assert code == 2 and "exists" in said


def refusal(before: str, after: str, out: Path) -> tuple[int, str]:
    from lora_kit.errors import LoraKitError

    try:
        extract(before, after, out)
    except LoraKitError as error:
        assert "\n" not in str(error)
        return error.exit_code, str(error)
    return 0, ""


def test_transformers_is_not_needed(base: Path, tuned: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from lora_kit.adapter.extract import extract; "
        f"extract({str(base)!r}, {str(tuned)!r}, {str(tmp_path / 'out')!r}); "
        "assert 'torch' in sys.modules and not {'transformers', 'peft'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert len(load_file(tmp_path / "out" / "adapter_model.safetensors")) == 28
