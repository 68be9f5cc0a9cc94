"""Base against adapted, on held-out text of the domain and on general text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_kit.adapter.attach import adapter_folder
from lora_kit.adapter.load import load, open_run
from lora_kit.data.formats import Example
from lora_kit.data.labelled import Labelled
from lora_kit.data.prepare import Prepared, prepare
from lora_kit.data.splits import FEWEST_TO_JUDGE
from lora_kit.data.templates import prompt_text
from lora_kit.errors import UserError
from lora_kit.prove.measure import Losses, generate, measure
from lora_kit.run import read_lock

RESAMPLES = 10_000
FEWEST_UNITS = FEWEST_TO_JUDGE
SMALLEST_SHARE = 0.005  # a difference below half a percent is called no difference
_NATS_TO_BITS = 1 / np.log(2)


@dataclass(frozen=True)
class HeldOut:
    """What a run is judged on: labelled tokens, and the examples shown side by side."""

    domain: Labelled
    general: Labelled | None
    shown: list[Example]

    @classmethod
    def of(cls, prepared: Prepared) -> HeldOut:
        return cls(prepared.eval, prepared.general, prepared.shown)


def compare(run: str | Path, seed: int = 0) -> dict[str, Any]:
    """Measure a finished run: its base alone against its base with the adapter.

    Returns:
        What `report.json` holds: losses in nats per token and bits per byte, differences (adapted
        minus base) with 95% bootstrap intervals over documents, and a word for each, measured now;
        `training` and `memory` as the run recorded them.

    Raises:
        UserError: there is no finished run, or its data or base changed since it was trained.
    """
    opened = open_run(run)
    adapter_folder(run)
    model, tokenizer = load(run)
    # What the limits allow was decided when the run was trained.
    lock, length = read_lock(run), opened.train.max_length
    prepared = prepare(
        opened.data, lock.get("kind"), tokenizer, length, opened.seed, limits=False, lock=lock
    )
    _check_data(run, prepared)
    report = compare_model(model, tokenizer, HeldOut.of(prepared), seed)
    file = Path(run) / "report.json"
    recorded = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return report | {name: recorded.get(name) for name in ("training", "memory")}


def compare_model(
    model: Any, tokenizer: Any, judged: HeldOut, seed: int = 0, samples: bool = True
) -> dict[str, Any]:
    """`compare` for a PEFT model in memory; its adapter is switched off to measure the base."""
    pad = tokenizer.pad_token_id
    report: dict[str, Any] = {"verdict": {}, "domain": None, "general": None, "samples": []}
    for name, labelled in (("domain", judged.domain), ("general", judged.general)):
        if labelled is None:
            continue
        adapted = measure(model, labelled, pad)
        with model.disable_adapter():
            base = measure(model, labelled, pad)
        report[name] = statistics(base, adapted, seed)
    report["verdict"]["domain"] = verdict(report["domain"], "better", "worse", "no different")
    if report["general"]:
        report["verdict"]["general"] = verdict(report["general"], "kept", "forgot", "kept")
    if samples:
        report["samples"] = side_by_side(model, tokenizer, judged.shown)
    return report


def statistics(base: Losses, adapted: Losses, seed: int) -> dict[str, Any]:
    """Both measures of both models, the difference, and its 95% interval.

    A measure is a ratio of sums over the units (nats / tokens; nats / bytes, in bits). The interval
    is the percentile bootstrap over units, paired: both models are judged on the same resample
    (Efron and Tibshirani 1993, chapter 13).
    """
    units = len(base.nats)
    random = np.random.default_rng(seed)
    columns = np.stack([adapted.nats - base.nats, base.tokens, base.bytes], axis=1)
    # (resamples, 3): the sums over the units drawn, in pieces, because all draws of 10,000
    # documents at once would take 800 MB
    piece = max(1, 2**22 // units)
    sums = np.concatenate(
        [
            random.multinomial(units, np.full(units, 1 / units), min(piece, RESAMPLES - done))
            @ columns
            for done in range(0, RESAMPLES, piece)
        ]
    )
    result: dict[str, Any] = {"documents": units}
    for name, size, drawn, factor in (
        ("loss", base.tokens, sums[:, 1], 1.0),
        ("bits_per_byte", base.bytes, sums[:, 2], _NATS_TO_BITS),
    ):
        change = sums[drawn > 0, 0] / drawn[drawn > 0] * factor
        low, high = np.percentile(change, [2.5, 97.5])
        before = base.nats.sum() / size.sum() * factor
        after = adapted.nats.sum() / size.sum() * factor
        result[name] = {
            "base": round(float(before), 4),
            "adapted": round(float(after), 4),
            "difference": round(float(after - before), 4),
            "ci95": [round(float(low), 4), round(float(high), 4)],
        }
    return result


def verdict(measured: dict[str, Any], lower: str, higher: str, same: str) -> str:
    """A word for a comparison: the interval of the loss must exclude 0, over enough documents."""
    if measured["documents"] < FEWEST_UNITS:
        return "too little data"
    loss = measured["loss"]
    low, high = loss["ci95"]
    if abs(loss["difference"]) < SMALLEST_SHARE * abs(loss["base"]) or low <= 0 <= high:
        return same
    return lower if loss["difference"] < 0 else higher


def side_by_side(
    model: Any, tokenizer: Any, examples: list[Example], max_new_tokens: int = 48
) -> list[dict[str, str]]:
    """What base and adapted say to the first held-out examples, greedily."""
    prompts, shown, wanted = [], [], []
    chats = [example.text is None for example in examples]
    templated = all(chats) and bool(tokenizer.chat_template)
    for example in examples:
        if example.text is not None:
            start, rest = _cut(tokenizer, example.text, max_new_tokens)
            prompts.append(start)
            shown.append(start)
            wanted.append(rest)
        else:
            turns = list(example.messages[:-1])
            bare = turns[-1]["content"] + example.joiner
            prompt = prompt_text(tokenizer, turns, example.tools) if templated else bare
            prompts.append(prompt)
            shown.append(turns[-1]["content"])
            wanted.append(example.messages[-1]["content"])
    adapted = generate(model, tokenizer, prompts, max_new_tokens, templated)
    with model.disable_adapter():
        base = generate(model, tokenizer, prompts, max_new_tokens, templated)
    return [
        {"prompt": p, "expected": w, "base": b, "adapted": a}
        for p, w, b, a in zip(shown, wanted, base, adapted, strict=True)
    ]


def _cut(tokenizer: Any, text: str, tokens: int) -> tuple[str, str]:
    """The first half of a text, 32 tokens at most, and the tokens after it. Cut between characters,
    which a token may be only a part of."""
    offsets = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    ).offset_mapping
    count = min(32, (len(offsets) + 1) // 2)
    cut = offsets[count - 1][1] if offsets else 0
    end = offsets[min(count + tokens, len(offsets)) - 1][1] if offsets else 0
    return text[:cut], text[cut:end]


def _check_data(run: str | Path, prepared: Prepared) -> None:
    """The rows that are judged must be the ones that were held out."""
    recorded = read_lock(run).get("data", {}).values()
    # By content, not by name: a run and its data may have been moved.
    changed = [source for source, digest in prepared.hashes.items() if digest not in recorded]
    if changed and recorded:
        raise UserError(
            f"{', '.join(changed)} changed since {run} was trained: rows it learned from could be "
            "among the ones it is judged on; restore the data, or train again"
        )
