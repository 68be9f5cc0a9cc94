"""Preference tuning: pairs, the loss against TRL's, the reference, what counts as better."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CHATML, make_base, sentences

from lora_kit.adapter.attach import attach
from lora_kit.base.load import load_base
from lora_kit.base.pin import pin
from lora_kit.data.formats import Example
from lora_kit.data.rows import Rows
from lora_kit.run import run_class
from lora_kit.schema import Adapter, Base
from lora_kit.speed.fast import documents_loss, make_fast
from lora_kit.tasks.batches import collator, in_one_row
from lora_kit.tasks.preference import Preference, log_probabilities
from lora_kit.tasks.task import Dropped

TASK = Preference()


def run_of(**changes: Any) -> Any:
    values: dict[str, Any] = {
        "recipe": "dpo",
        "name": "test",
        "base": {"model": "nano"},
        "data": {"train": "pairs.jsonl"},
        "train": {"max_length": 128},
    }
    for key, value in changes.items():
        section, name = key.split(".")
        values.setdefault(section, {})[name] = value
    return run_class(TASK).model_validate(values)


def pair(prompt: str, chosen: str, rejected: str) -> Example:
    asked = {"role": "user", "content": prompt}
    sides = [(asked, {"role": "assistant", "content": answer}) for answer in (chosen, rejected)]
    return Example("pairs.jsonl:1", messages=sides[0], rejected=sides[1])


def pairs(count: int = 6) -> list[Example]:
    words = sentences(2 * count, seed=4)
    return [
        pair(f"Question {n}:", f" {words[2 * n]}"[: 20 + 9 * n], f" {words[2 * n + 1]}"[:30])
        for n in range(count)
    ]


def rows_of(tokenizer: Any, examples: list[Example], **changes: Any) -> Rows:
    rows = []
    for number, found in enumerate(TASK.encode(examples, tokenizer, {}, run_of(**changes))):
        assert not isinstance(found, Dropped), found
        rows.append({**found[0], "unit": number})
    return Rows.of(rows)


def adapted(folder: Path, loud: bool = True) -> Any:
    """A PEFT model of a base's folder; `loud`: with a B that is not zero."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    base.requires_grad_(False)
    torch.manual_seed(0)
    fields = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **fields))
    if loud:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.05)
    return model.train()


def quick(model: Any) -> None:
    assert make_fast(model, documents_loss(model, collator(0), in_one_row)) == {}


def step(model: Any, batches: list[Any], items: int, run: Any) -> tuple[float, torch.Tensor]:
    """The loss of a step in several passes, and the gradients of the adapter."""
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = TASK.loss(model, batch, items, run.train)
        loss.backward()
        total += float(loss.detach())
    grads = [p.grad.reshape(-1) for p in model.parameters() if p.grad is not None]
    return total, torch.cat(grads)


def tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


# ---------------------------------------------------------------------- pairs


def test_loss_is_on_the_last_turn_of_each_side(base: Path) -> None:
    tokenizer = tokenizer_of(base)
    turns = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "first"},
        {"role": "user", "content": "Two?"},
    ]
    sides = [(*turns, {"role": "assistant", "content": text}) for text in ("yes", "no, never")]
    rows = rows_of(tokenizer, [Example("a:1", messages=sides[0], rejected=sides[1])])
    assert rows.columns == [
        *("end_markers", "chosen_input_ids", "chosen_labels"),
        *("rejected_input_ids", "rejected_labels", "unit"),
    ]
    shown = TASK.show(rows[0], tokenizer, {})
    trained = [
        tokenizer.decode([t for t, on in zip(side.ids, side.trained, strict=True) if on])
        for side in shown
    ]
    assert [side.name for side in shown] == ["chosen", "rejected"]
    assert trained == ["yes<|im_end|>", "no, never<|im_end|>"]
    both = [rows[0][f"{side}_input_ids"] for side in ("chosen", "rejected")]
    assert TASK.tokens(rows).tolist() == [sum(map(len, both))]
    assert TASK.supervised(rows) == sum(sum(side.trained) for side in shown)


ODD: dict[str, tuple[Example, str]] = {
    "equal": (pair("a?", "yes", "yes"), "are equal"),
    "equal once the template strips them": (pair("a?", "yes", "yes "), "as tokens"),
    "prompts": (
        dataclasses.replace(pair("a?", "yes", "no"), rejected=pair("b?", "no", "x").messages),
        "different prompts",
    ),
    "chosen too long": (pair("a?", "word " * 200, "no"), "longer than train.max_length (128 tok"),
    "rejected too long": (pair("a?", "no", "word " * 200), "longer than train.max_length (128 tok"),
    "not trained on": (
        Example(
            "a:1",
            messages=(
                {"role": "user", "content": "a?"},
                {"role": "assistant", "content": "b", "weight": 0},
            ),
            rejected=pair("a?", "b", "c").rejected,
        ),
        "without supervised tokens",
    ),
}


@pytest.mark.parametrize(("example", "why"), ODD.values(), ids=ODD)
def test_a_pair_that_cannot_be_compared_is_dropped_with_a_reason(
    example: Example, why: str, tmp_path: Path
) -> None:
    template = CHATML.replace("m['content']", "m['content'] | trim")
    tokenizer = tokenizer_of(make_base(tmp_path / "base", template))
    good = pair("a?", "yes", "no")
    first, odd, last = TASK.encode([good, example, good], tokenizer, {}, run_of())
    assert isinstance(odd, Dropped) and why in odd.reason
    assert not isinstance(first, Dropped) and not isinstance(last, Dropped)
    assert np.array_equal(first[0]["chosen_input_ids"], last[0]["chosen_input_ids"])


def test_pairs_of_a_prompt_stay_together_and_both_sides_make_a_pair() -> None:
    one, other = pair("Why?", "a", "b"), pair("why ", "a", "c")
    assert TASK.group(one) == TASK.group(other) != TASK.group(pair("How?", "a", "b"))
    assert len({TASK.key(one), TASK.key(other), TASK.key(pair("Why?", "b", "a"))}) == 3
    assert TASK.group(dataclasses.replace(one, group="g")) == "g"


# ---------------------------------------------------------------------- loss


@pytest.fixture(scope="module")
def trl_step(plain_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Loss and gradients of TRL's DPOTrainer, its reference precomputed or not, and its rows."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    def compute(precomputed: bool) -> Any:
        rows = [
            {
                "prompt": "<eos>" + example.messages[0]["content"],  # ours begin with it
                "chosen": example.messages[1]["content"],
                "rejected": example.rejected[1]["content"],
            }
            for example in pairs()
        ]
        arguments = DPOConfig(
            str(tmp_path_factory.mktemp("trl")),
            per_device_train_batch_size=len(rows),
            precompute_ref_log_probs=precomputed,
            beta=0.1,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
        )
        model = AutoModelForCausalLM.from_pretrained(plain_base, dtype=torch.float32)
        fields = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
        trainer = DPOTrainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer_of(plain_base),
            peft_config=LoraConfig(task_type="CAUSAL_LM", **fields),
        )
        if precomputed:
            trainer.get_train_dataloader()  # computes the reference, before the adapter is changed
        other = adapted(plain_base).state_dict()
        trainer.model.load_state_dict(other)
        trainer.model.zero_grad()
        rows = [trainer.train_dataset[n] for n in range(len(rows))]
        loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
        loss.backward()
        grads = [p.grad.reshape(-1) for p in trainer.model.parameters() if p.grad is not None]
        return float(loss.detach()), torch.cat(grads), rows

    return compute


@pytest.mark.parametrize("precomputed", [False, True])
@pytest.mark.parametrize("path", ["padded", "quick, padded", "quick, flat"])
def test_loss_and_gradients_are_those_of_trl(
    path: str, precomputed: bool, plain_base: Path, trl_step: Any
) -> None:
    expected, gradient, trl_rows = trl_step(precomputed)
    tokenizer, run, model = tokenizer_of(plain_base), run_of(), adapted(plain_base)
    rows = rows_of(tokenizer, pairs())
    for row, other in zip(rows, trl_rows, strict=True):
        assert row["chosen_input_ids"].tolist() == other["prompt_ids"] + other["chosen_ids"]
        assert row["rejected_input_ids"].tolist() == other["prompt_ids"] + other["rejected_ids"]
    if "quick" in path:
        quick(model)
    with model.disable_adapter():
        rows = TASK.annotate(rows, model, tokenizer, run)
    batch = TASK.collate(tokenizer, flat="flat" in path)(list(rows))
    assert TASK.items(batch) == 6
    loss, found = step(model, [batch], 6, run)
    assert abs(expected - math.log(2)) > 0.01
    assert loss == pytest.approx(expected, abs=1e-5)
    assert float((found - gradient).norm() / gradient.norm()) < 1e-5


@pytest.mark.parametrize("flat", [False, True])
def test_a_step_does_not_depend_on_how_it_is_cut(flat: bool, base: Path) -> None:
    tokenizer, run, model = tokenizer_of(base), run_of(), adapted(base)
    if flat:
        quick(model)
    with model.disable_adapter():
        rows = TASK.annotate(rows_of(tokenizer, pairs(5)), model, tokenizer, run)
    collate = TASK.collate(tokenizer, flat)
    whole = collate(list(rows))
    loss, gradient = step(model, [whole], 5, run)
    one_by_one = [collate([row]) for row in rows]
    halves = [part for part, factor in TASK.halve(whole) if factor == 1]
    quarters = [part for half in halves for part, _ in TASK.halve(half)]
    assert sum(map(TASK.items, halves)) == sum(map(TASK.items, quarters)) == 5
    assert TASK.halve(one_by_one[0]) == []
    for batches in (one_by_one, halves, quarters):
        found, other = step(model, batches, 5, run)
        assert found == pytest.approx(loss, abs=1e-6)
        assert float((other - gradient).norm() / gradient.norm()) < 1e-5


def test_half_a_padded_batch_is_as_wide_as_its_longest_side(base: Path) -> None:
    tokenizer = tokenizer_of(base)
    rows = [pair("a?", "b", "c"), pair("a?", "word " * 12, "b"), pair("a?", "c", "d " * 5)]
    batch = TASK.collate(tokenizer)(list(rows_of(tokenizer, rows)))
    (long, _), (short, _) = TASK.halve(batch)
    assert len(long["input_ids"]) == 2 and len(short["input_ids"]) == 4
    assert short["input_ids"].shape[1] < batch["input_ids"].shape[1] == long["labels"].shape[1]
    assert int(short["attention_mask"].sum(1).max()) == short["input_ids"].shape[1]


# ---------------------------------------------------------------------- reference


KINDS = {
    "float32": (("float32", "none"), 1e-6),
    "bf16": (("bfloat16", "none"), 2e-3),
    "nf4": (("bfloat16", "nf4"), 2e-3),
}


@pytest.mark.parametrize(("kind", "within"), KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("fast", [True, False])
def test_the_loss_begins_at_log_2(
    kind: tuple[Any, Any], within: float, fast: bool, base: Path
) -> None:
    """Whichever pairs are in a batch, the reference was computed by the same arithmetic."""
    wanted = Base(model=str(base), dtype=kind[0], quantize=kind[1])
    model = attach(load_base(wanted, pin(wanted)), Adapter(r=4), (), seed=0)
    tokenizer, run = tokenizer_of(base), run_of()
    if fast:
        quick(model)
    rows = TASK.annotate(rows_of(tokenizer, pairs(16)), model, tokenizer, run)
    batch = TASK.collate(tokenizer, fast)([rows[n] for n in (7, 2, 13, 4)])
    loss, gradient = step(model, [batch], 4, run)
    assert abs(loss - math.log(2)) < within
    assert float(gradient.norm()) > 0


def test_the_reference_is_computed_once_and_not_again_for_another_beta(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_KIT_CACHE", str(tmp_path / "cache"))
    tokenizer, model = tokenizer_of(base), adapted(base, loud=False)
    rows = rows_of(tokenizer, pairs())
    calls: list[int] = []
    model.base_model.model.register_forward_pre_hook(lambda *_: calls.append(1))

    def computes(model: Any, rows: Rows, run: Any) -> bool:
        calls.clear()
        assert TASK.annotate(rows, model, tokenizer, run)[0]["reference"].shape == (2,)
        return bool(calls)

    assert computes(model, rows, run_of())
    assert not computes(model, rows, run_of(**{"train.beta": 0.3}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:  # a fresh adapter of another seed
                parameter.normal_()
    assert not computes(model, rows, run_of())
    assert computes(model, rows.select([1, 0]), run_of())
    with torch.no_grad():
        model.get_input_embeddings().weight[7] += 1e-3
    assert computes(model, rows, run_of())


def test_the_reference_of_a_started_run_is_the_adapter_that_it_started_from(
    base: Path, tmp_path: Path
) -> None:
    tokenizer, model = tokenizer_of(base), adapted(base)
    model.save_pretrained(tmp_path / "sft")
    rows, run = rows_of(tokenizer, pairs()), run_of(**{"adapter.start": str(tmp_path / "sft")})
    annotated = TASK.annotate(rows, model, tokenizer, run)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.02)
    expected = TASK.score(model, annotated, tokenizer, {}, run)
    found = TASK.score(model, rows, tokenizer, {}, run)
    assert np.allclose(found[1].sums, expected[1].sums, atol=1e-5)
    assert abs(found[1].sums[:, 0]).max() > 1e-3
    nothing: Any = None
    rivals = TASK.rivals(model, nothing, tokenizer, {}, run)
    assert [rival.name for rival in rivals] == ["reference", "base"]
    with model.disable_adapter():  # the base is not the reference here
        base_margins = TASK.score(model, rows, tokenizer, {}, run)[1]
        assert abs(base_margins.sums[:, 0]).max() > 1e-3
        assert np.allclose(
            base_margins.sums, TASK.score(model, annotated, tokenizer, {}, run)[1].sums, atol=1e-5
        )


# ---------------------------------------------------------------------- evaluation


def test_accuracy_and_margin_against_the_reference(base: Path) -> None:
    tokenizer, run, model = tokenizer_of(base), run_of(**{"train.beta": 0.5}), adapted(base)
    rows = rows_of(tokenizer, pairs())
    accuracy, margin = TASK.score(model, rows, tokenizer, {}, run)
    batch = TASK.collate(tokenizer)(list(rows))
    with torch.no_grad():
        after = log_probabilities(model.eval(), batch)
        with model.disable_adapter():
            ratios = after - log_probabilities(model, batch)
    expected = 0.5 * (ratios[:, 0] - ratios[:, 1]).numpy()
    assert np.allclose(margin.sums[:, 0], expected, atol=1e-5)
    assert accuracy.figure == pytest.approx((expected > 0).mean())
    assert (accuracy.name, margin.name) == ("accuracy", "margin")
    assert accuracy.units is not None and accuracy.units.tolist() == list(range(6))
    # The reference itself, and the base that it is here: ties, which count half.
    nothing: Any = None
    (rival,) = TASK.rivals(model, nothing, tokenizer, {}, run)
    assert rival.name == "base"
    with rival.enter() as reference:
        scores = TASK.score(reference, rows, tokenizer, {}, run)
    with model.disable_adapter():
        base_scores = TASK.score(model, rows, tokenizer, {}, run)
    for found in (scores, base_scores):
        assert [score.figure for score in found] == [0.5, 0.0]


def test_generations_are_measured_against_the_reference(base: Path) -> None:
    tokenizer, run, model = tokenizer_of(base), run_of(), adapted(base)
    rows = rows_of(tokenizer, [*pairs(), *pairs()])
    data: Any = SimpleNamespace(eval=rows)
    found = TASK.examine(model, data, {}, tokenizer, {}, run)["generation"]
    assert found["prompts"] == 6  # each once
    assert 0 < found["length"]["adapted"] <= found["room"]
    assert found["kl"]["base"] == 0 and found["kl"]["adapted"] > 0
    assert found["kl"]["ci95"][0] > 0
    directions = {"length": "higher", "unfinished": "lower", "kl": "lower"}
    for name, better in directions.items():
        assert found[name]["better"] == better
        assert found[name]["ci95"] == [round(bound, 4) for bound in found[name]["ci95"]]
    assert found["kl"]["changed"] == 6
    few = run_of(**{"prove.answers": 2})
    assert TASK.examine(model, data, {}, tokenizer, {}, few)["generation"]["prompts"] == 2
    fresh = adapted(base, loud=False)
    same = TASK.examine(fresh, data, {}, tokenizer, {}, run)["generation"]
    for name in ("length", "unfinished", "kl"):
        assert same[name]["difference"] == 0, name


def report(general: str = "kept", **generation: tuple[float, float]) -> dict[str, Any]:
    values = {"length": (20.0, 20.0), "unfinished": (0.1, 0.1), **generation}
    figures = {
        name: {
            "base": before,
            "adapted": after,
            "difference": after - before,
            "ci95": [0.9 * (after - before), 1.1 * (after - before)],
        }
        for name, (before, after) in values.items()
    }
    return {
        "verdict": {"domain": "better", "general": general},
        "generation": {"chosen_length": 12.0, **figures},
    }


def test_a_model_that_forgot_or_only_stops_or_never_stops_is_not_better() -> None:
    assert TASK.objection(report()) is None
    assert TASK.objection(report(length=(22.6, 15.4))) is None  # shorter was asked for
    assert "forgotten" in str(TASK.objection(report("forgot")))
    assert "1.0 tokens" in str(TASK.objection(report(length=(22.6, 1.0))))
    assert "72% of its generations are unfinished" in str(
        TASK.objection(report(unfinished=(0.08, 0.72)))
    )
    assert TASK.objection({"verdict": {"general": "kept"}}) is None  # nothing was generated
