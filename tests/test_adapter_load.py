"""What an application gets: the model as it was trained, ready to answer; or why it cannot."""

# ruff: noqa: F811 - fixtures of another file
from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_adapter_inspect import Maker, made  # noqa: F401 - a fixture
from trained import edit, on_own_base

import lora_kit
from lora_kit.adapter.attach import load_adapter
from lora_kit.adapter.files import open_adapter
from lora_kit.adapter.finished import FinishedRun
from lora_kit.adapter.load import end_tokens
from lora_kit.errors import UserError
from lora_kit.prove.show import complete

IDS = torch.arange(4, 60)[None]


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits.float()


@pytest.fixture
def run(sft_run: Path, work: Path) -> Path:
    """A copy, to be changed."""
    return Path(shutil.copytree(sft_run, work / "run"))


def test_load_gives_model_and_tokenizer_ready_to_answer(run: Path, base: Path) -> None:
    from peft import PeftModel

    model, tokenizer = lora_kit.load(run)
    assert isinstance(model, PeftModel) and not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert model.get_base_model().dtype == torch.float32
    assert tokenizer.chat_template and tokenizer.padding_side == "right"
    # The application's own generate stops where the template ends an answer, at <|im_end|>.
    assert model.generation_config.eos_token_id == end_tokens(model, tokenizer) == [0, 3]
    assert model.generation_config.pad_token_id == 1
    adapted = logits(model)
    with model.disable_adapter():
        plain = logits(model)
    assert (adapted - plain).abs().max() > 0.1
    # `base` is the base, and without it the adapter answers.
    assert complete(FinishedRun(run), "What is 3?", base=True, max_new_tokens=8) != complete(
        FinishedRun(run), "What is 3?", base=False, max_new_tokens=8
    )


def test_peft_alone_loads_the_adapter_and_finds_the_base(run: Path, base: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    model, _ = lora_kit.load(run)
    alone = AutoPeftModelForCausalLM.from_pretrained(run / "adapter", dtype=torch.float32).eval()
    assert torch.equal(logits(alone), logits(model))


@pytest.mark.parametrize(
    ("quantize", "dtype", "layer", "kind"),
    [
        (None, "bfloat16", "Linear", torch.bfloat16),
        ("nf4", None, "Linear4bit", torch.float32),
        ("int8", "bfloat16", "Linear8bitLt", torch.bfloat16),
        ("none", "float32", "Linear", torch.float32),
    ],
)
def test_type_and_quantization_can_be_others_than_the_runs(
    run: Path, quantize: str | None, dtype: str | None, layer: str, kind: torch.dtype
) -> None:
    model, _ = lora_kit.load(run, quantize=quantize, dtype=dtype)
    inner = model.get_base_model().model
    assert type(inner.layers[0].mlp.up_proj.base_layer).__name__ == layer
    assert inner.embed_tokens.weight.dtype == kind
    exact, _ = lora_kit.load(run)
    error = (logits(model) - logits(exact)).abs().max()
    assert error == 0 if (layer, kind) == ("Linear", torch.float32) else 0 < error < 0.5


@pytest.mark.parametrize("wrong", [{"quantize": "nf5"}, {"dtype": "float16"}, {"quantize": ""}])
def test_other_words_are_refused(run: Path, wrong: dict[str, str]) -> None:
    [(key, value)] = wrong.items()
    with pytest.raises(UserError, match=f"{key}: '{value}' is not usable: one of") as raised:
        lora_kit.load(run, **wrong)
    assert ("nf4" if key == "quantize" else "bfloat16") in str(raised.value)


def test_another_base_is_refused(run: Path, base: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    on_own_base(run, base, own)
    lora_kit.load(run)
    edit(own / "config.json", lambda c: c.update(rms_norm_eps=1e-2))
    with pytest.raises(UserError, match=r"another base .*: config\.json differs") as raised:
        lora_kit.load(run)
    assert str(run) in str(raised.value) and str(own) in str(raised.value)
    shutil.rmtree(own)
    with pytest.raises(
        UserError, match=r"run\.yaml: base\.model: .*no such folder.* --base FOLDER"
    ):
        lora_kit.load(run)


def test_a_broken_adapter_is_refused_and_no_pickle_is_read(run: Path, work: Path) -> None:
    weights = run / "adapter" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    config = run / "adapter" / "adapter_config.json"
    kept = config.read_bytes()

    weights.write_bytes(whole[:-100])
    with pytest.raises(UserError, match="was changed since the run saved it") as raised:
        lora_kit.load(run)
    assert str(weights) in str(raised.value)
    lock = (run / "run.lock.json").read_bytes()
    edit(run / "run.lock.json", lambda c: c.pop("adapter"))
    with pytest.raises(UserError, match="corrupt") as raised:
        lora_kit.load(run)
    assert str(weights.parent) in str(raised.value) and "\n" not in str(raised.value)
    (run / "run.lock.json").write_bytes(lock)

    weights.write_bytes(whole)
    edit(config, lambda c: c.update(r=7))
    with pytest.raises(UserError, match=r"adapter_config\.json: was changed since the run"):
        lora_kit.load(run)
    edit(run / "run.lock.json", lambda c: c.pop("adapter"))
    with pytest.raises(UserError, match="r is 7 and the scale"):
        lora_kit.load(run)
    config.write_bytes(kept)

    class Canary:
        def __reduce__(self) -> Any:
            return (Path.touch, (work / "canary",))

    weights.unlink()
    (run / "adapter" / "adapter_model.bin").write_bytes(pickle.dumps(Canary()))
    with pytest.raises(UserError, match=r"adapter_model\.bin can run code and is not read"):
        lora_kit.load(run)
    assert not (work / "canary").exists()

    shutil.rmtree(run / "adapter")
    with pytest.raises(UserError, match="this run has no adapter: it did not finish"):
        lora_kit.load(run)
    with pytest.raises(UserError, match="neither a run directory nor an adapter"):
        lora_kit.load(work / "nowhere")
    (run / "run.lock.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError):
        lora_kit.load(run)


def test_an_adapter_folder_alone_finds_its_base(run: Path, work: Path) -> None:
    """The folder inside a run, and a copy of it somewhere else, as PEFT would take it."""
    shutil.copytree(run / "adapter", work / "sent")
    ids = torch.arange(4, 30)[None]
    wanted = lora_kit.load(run)[0](input_ids=ids).logits
    for folder in (run / "adapter", work / "sent"):
        model, _ = lora_kit.load(folder, dtype="float32")
        assert torch.equal(model(input_ids=ids).logits, wanted)


def test_an_adapter_without_a_tokenizer_takes_its_bases(run: Path, base: Path, work: Path) -> None:
    """As PEFT alone saves one."""
    sent = work / "sent"
    shutil.copytree(
        run / "adapter", sent, ignore=shutil.ignore_patterns("*token*", "*.j*a", "run*")
    )
    assert {f.suffix for f in sent.iterdir()} == {".json", ".safetensors"}
    model, tokenizer = lora_kit.load(sent, dtype="float32")
    whole, own = lora_kit.load(run)
    assert torch.equal(logits(model), logits(whole))
    assert tokenizer.get_vocab() == own.get_vocab()
    answers = {
        complete(FinishedRun(sent), "What is 3?", base=plain, max_new_tokens=8)
        for plain in (True, False)
    }
    assert len(answers) == 2


def test_a_run_loads_where_its_data_are_not(run: Path, work: Path) -> None:
    shutil.copytree(run, work / "served")
    text = (work / "served" / "run.yaml").read_text(encoding="utf-8")
    (work / "served" / "run.yaml").write_text(text.replace("text.txt", "gone.txt"))
    assert lora_kit.load(work / "served")[1].eos_token == "<eos>"


def test_an_adapter_that_lacks_tensors_is_refused(run: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = run / "adapter" / "adapter_model.safetensors"
    tensors = load_file(weights)
    del tensors[min(tensors)]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match="was changed since the run saved it"):
        lora_kit.load(run)


@pytest.mark.parametrize(
    "config",
    [
        {"use_dora": True, "use_rslora": True},
        {"rank_pattern": {r"layers\.1\..*proj": 6}, "alpha_pattern": {"up_proj": 3}},
        {"target_modules": ["embed_tokens", "lm_head", "v_proj"]},
        {"target_modules": r".*layers\.1\..*(q|up)_proj"},
        {"exclude_modules": r".*layers\.0\..*"},
        {"layers_to_transform": [1]},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [3, 5], "lora_bias": True},
        {"init_lora_weights": "pissa"},  # changes the base when it is put on it
    ],
)
def test_an_adapter_does_what_it_does_in_peft(made: Maker, base: Path, config: Any) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    trained, folder = made(**config)
    bases = [AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32) for _ in "ab"]
    theirs = PeftModel.from_pretrained(bases[0], folder, is_trainable=True).eval()
    ours = load_adapter(bases[1], open_adapter(folder), trainable=True).eval()
    assert torch.equal(logits(ours), logits(theirs))
    assert torch.allclose(logits(ours), logits(trained.eval()), atol=1e-4)
    train = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (ours, theirs)]
    assert train[0] == train[1] and len(train[0]) >= 4
