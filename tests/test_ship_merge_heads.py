"""A merged classifier is base + adapter to the last digits, loadable by transformers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from classifiers import FAMILIES, make_body
from safetensors.torch import load_file, save_file
from trained import edit
from typer.testing import CliRunner

import lora_kit
from lora_kit.adapter import inspect
from lora_kit.adapter.attach import NO_MODULE, attach
from lora_kit.adapter.finished import FinishedRun
from lora_kit.base.head import SEQUENCE, Head, load_with_head
from lora_kit.base.pin import Pinned
from lora_kit.base.pooled import read_folder
from lora_kit.cli import app
from lora_kit.errors import UserError
from lora_kit.schema import Adapter, Base
from lora_kit.ship.hub import make_plan
from lora_kit.ship.merge import merge
from lora_kit.ship.targets import TARGETS

LABELS = ("card", "cash", "rate")


def adapted(folder: Path, base: Path, pooling: str | None = None, **adapter: Any) -> Path:
    """The folder of an adapter on a base, with other values in all that trains; as `train` writes
    it, without its run."""
    settings = Base(model=str(base), dtype="float32")
    head = Head(SEQUENCE, LABELS, pooling)
    model, fresh = load_with_head(settings, Pinned("x", str(base)), head, seed=0)
    model = attach(model, Adapter(r=4, **adapter), fresh, 0)
    torch.manual_seed(7)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.05
    model.save_pretrained(folder)
    edit(folder / "adapter_config.json", lambda c: c.update(base_model_name_or_path=str(base)))
    edit(folder / "adapter_config.json", lambda c: c.update(auto_mapping=None))
    head.write(folder)
    return folder


def batch(rows: int = 4) -> dict[str, torch.Tensor]:
    """Texts of 5 to 5 + rows tokens."""
    ids = torch.arange(rows * (5 + rows)).reshape(rows, -1) % 350 + 10
    mask = (torch.arange(5 + rows)[None] < torch.arange(5, 5 + rows)[:, None]).long()
    return {"input_ids": torch.where(mask == 1, ids, 1), "attention_mask": mask}


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(**batch()).logits.float()


def alone(folder: Path) -> Any:
    """A merged classifier as a stranger loads it: transformers, nothing else."""
    from transformers import AutoModelForSequenceClassification

    loaded: Any = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    model, info = loaded
    assert not any(info.values()), info  # no weight is missing, unexpected, or of another shape
    return model.eval()


QUICK = [
    ("Bert", "ForMaskedLM", None),  # a prefix, a head to be dropped, and no pooling layer
    ("Llama", "ForCausalLM", None),
]
SLOW = [
    *((family, "Model", None) for family in FAMILIES),
    ("Roberta", "ForMaskedLM", None),
    ("ModernBert", "Model", "mean"),
]
CASES = [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "kind", "pooling"), CASES)
def test_merged_is_base_plus_adapter_with_its_head(
    family: str, kind: str, pooling: str | None, tmp_path: Path
) -> None:
    base = make_body(tmp_path / "base", family, kind)
    run = adapted(tmp_path / "adapter", base, pooling)
    merged = merge(FinishedRun(run), tmp_path / "merged", dtype="float32", verify="logits")
    assert merged.max_logit_difference is not None and merged.adapter_effect is not None
    assert merged.max_logit_difference <= 1e-5 < 0.01 < merged.adapter_effect
    model, tokenizer = lora_kit.load(run, dtype="float32")
    again = alone(merged.out)
    assert type(again).__name__ == f"{family}ForSequenceClassification"
    assert (logits(model) - logits(again)).abs().max() <= 1e-5
    assert again.config.id2label == dict(enumerate(LABELS)) and again.config.num_labels == 3
    assert again.config.problem_type == "single_label_classification"
    config = json.loads((merged.out / "config.json").read_text())
    assert config["architectures"] == [type(again).__name__]
    assert config["label2id"] == {"card": 0, "cash": 1, "rate": 2}
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(merged.out).get_vocab() == tokenizer.get_vocab()
    assert not (merged.out / "generation_config.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Bert", "Llama", "GPT2"])
@pytest.mark.parametrize("kind", ["Model", "head"])
def test_an_own_pooling_becomes_a_folder_of_sentence_transformers(
    family: str, kind: str, tmp_path: Path
) -> None:
    from transformers import AutoModel, AutoModelForSequenceClassification

    kinds = {"Bert": "ForMaskedLM", "Llama": "ForCausalLM", "GPT2": "LMHeadModel"}
    base = make_body(tmp_path / "base", family, kinds[family] if kind == "head" else kind)
    run = adapted(tmp_path / "adapter", base, "mean")
    merged = merge(FinishedRun(run), tmp_path / "merged", dtype="float32", verify="logits")
    assert merged.max_logit_difference is not None and merged.max_logit_difference <= 1e-5
    model, _ = lora_kit.load(run, dtype="float32")
    assert (logits(model) - logits(read_folder(merged.out))).abs().max() <= 1e-5
    config = json.loads((merged.out / "config.json").read_text())
    assert config["id2label"] == {"0": "card", "1": "cash", "2": "rate"}
    # transformers alone has the body, and fails rather than to make up a head.
    loaded: Any = AutoModel.from_pretrained(merged.out, output_loading_info=True)
    assert {name.rpartition(".")[0] for name in loaded[1]["missing_keys"]} <= {"pooler.dense"}
    with pytest.raises(RuntimeError, match=r"size|mismatch"):
        AutoModelForSequenceClassification.from_pretrained(merged.out)


def test_a_head_for_other_labels_is_replaced_in_a_base_of_several_shards(tmp_path: Path) -> None:
    base = make_body(tmp_path / "base", "Roberta", "ForSequenceClassification")  # of 2 labels
    whole = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for number, (name, tensor) in enumerate(whole.items()):
        shards.setdefault(f"model-{number % 3}.safetensors", {})[name] = tensor
    for file, tensors in shards.items():
        save_file(tensors, base / file, metadata={"format": "pt"})
    where = {name: file for file, tensors in shards.items() for name in tensors}
    index = {"metadata": {}, "weight_map": where}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    run = adapted(tmp_path / "adapter", base)
    merged = merge(FinishedRun(run), tmp_path / "merged", dtype="float32")
    model, _ = lora_kit.load(run, dtype="float32")
    assert (logits(model) - logits(alone(merged.out))).abs().max() <= 1e-5
    assert sorted(file.name for file in merged.out.glob("*.safetensors")) == sorted(shards)


def test_a_part_of_the_files_that_is_not_merged_is_compared_all_the_same(tmp_path: Path) -> None:
    from lora_kit.hashes import file_hash

    base = make_body(tmp_path / "base", "Bert", "ForMaskedLM")
    run = adapted(tmp_path / "adapter", base)
    names = [file for file in base.iterdir() if file.suffix in (".json", ".safetensors")]
    lock = {
        "base": {"model": str(base), "hashes": {f.name: file_hash(f) for f in names}},
        **{"auto": SEQUENCE, "facts": {"labels": list(LABELS)}, "fresh": ["classifier"]},
    }
    hashed = lock["base"]["hashes"]  # type: ignore[index]
    hashed.pop("generation_config.json", None)
    (run / "run.lock.json").write_text(json.dumps(lock))
    merge(FinishedRun(run), tmp_path / "merged")
    tensors = load_file(base / "model.safetensors")
    tensors["cls.predictions.bias"] += 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"another base .*: model\.safetensors differs"):
        merge(FinishedRun(run), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_an_adapter_that_lacks_its_head_is_refused(tmp_path: Path) -> None:
    base = make_body(tmp_path / "base")
    run = adapted(tmp_path / "adapter", base)
    file = run / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors["base_model.model.classifier.bias"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"classifier\.bias is neither in the adapter nor in the"):
        merge(FinishedRun(run), tmp_path / "merged")
    with pytest.raises(UserError, match=r"does not fit the base: .*classifier\.bias"):
        lora_kit.load(run)


@pytest.mark.parametrize("pooling", [None, "mean"])
def test_a_head_alone_is_loaded_inspected_and_merged(
    pooling: str | None, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `train.trainable: head` leaves one."""
    base = make_body(work / "base")
    run = adapted(work / "adapter", base, pooling, target_modules=NO_MODULE)
    merged = merge(FinishedRun(run), work / "merged", dtype="float32", verify="logits")
    assert merged.max_logit_difference is not None and merged.adapter_effect is not None
    assert merged.max_logit_difference <= 1e-5 < 0.01 < merged.adapter_effect
    inspect.show(inspect.inspect(FinishedRun(run)))
    shown = capsys.readouterr().out
    assert "modules_to_save" in shown and "labels: card, cash, rate\n" in shown
    assert f"task: {SEQUENCE}, " in shown


@pytest.mark.parametrize("pooling", [None, "mean"])
def test_nf4_classifiers_merge_into_what_they_were_trained_on(
    pooling: str | None, tmp_path: Path
) -> None:
    base = make_body(tmp_path / "base", "Llama")
    run = adapted(tmp_path / "adapter", base, pooling)
    (run / "run.lock.json").write_text(
        json.dumps({"base": {"model": str(base), "dtype": "float32", "quantize": "nf4"}})
    )
    merged = merge(FinishedRun(run), tmp_path / "merged", into="dequantized", verify="logits")
    assert merged.max_logit_difference is not None and merged.adapter_effect is not None
    assert merged.max_logit_difference <= 1e-4 * max(1, merged.adapter_effect)


@pytest.mark.parametrize("pooling", [None, "mean"])
def test_a_classifier_is_pushed_with_a_card_that_loads_it(
    pooling: str | None, tmp_path: Path
) -> None:
    base = make_body(tmp_path / "base")
    run = FinishedRun(adapted(tmp_path / "adapter", base, pooling))
    lock = {"auto": SEQUENCE, "facts": {"labels": list(LABELS)}, "recipe": {"name": "classify"}}
    (run.folder / "run.lock.json").write_text(json.dumps({**lock, "pooling": pooling}))
    run = FinishedRun(run.folder)
    plan = make_plan(run, "me/test")
    assert {"adapter_model.safetensors", "head.json", "run.lock.json"} <= plan.files.keys()
    assert "pipeline_tag: text-classification" in plan.card.text
    assert "recipe: classify" in plan.card.text
    assert "labels: card, cash, rate" in plan.card.text
    assert 'lora_kit.load("test", base="FOLDER")' in plan.card.text
    assert "lora-kit generate" not in plan.card.text

    merge(run, tmp_path / "merged")
    plan = make_plan(run, "me/test", merged=tmp_path / "merged")
    own = {"modules.json", "1_Pooling/config.json", "2_Dense/config.json"}
    own |= {"2_Dense/model.safetensors", "sentence_bert_config.json"}
    assert own & plan.files.keys() == (own if pooling else set())
    loads = "AutoModel.from_pretr" if pooling else "AutoModelForSequenceClassification.from_pretr"
    assert f"{loads}" in plan.card.text and "CausalLM" not in plan.card.text
    for name, content in plan.files.items():
        if isinstance(content, Path) and name != "README.md":
            assert content.read_bytes() == (tmp_path / "merged" / name).read_bytes()


VERBS = [
    ["export", "RUN", "--to", "portable", "--out", "out"],
    ["export", "RUN", "--to", "merged", "--out", "out"],
    ["export", "RUN", "--to", "gguf", "--out", "out"],
    ["export", "RUN", "--to", "mlx", "--out", "out"],
    *(["check", "RUN", "--target", target] for target in TARGETS),
    ["serve", "RUN", "--port", "0"],
    ["generate", "RUN", "Hello"],
]


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_verbs_of_language_models_do_not_apply(verb: list[str], work: Path) -> None:
    base = make_body(work / "base")
    run = adapted(work / "adapter", base)
    done = CliRunner().invoke(app, [str(run) if word == "RUN" else word for word in verb])
    assert isinstance(done.exception, UserError)
    said = str(done.exception)
    assert "needs a language model" in said and str(run) in said and "\n" not in said
    assert not (work / "out").exists()
