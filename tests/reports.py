"""Reports made by hand, as large runs of each kind leave them, and the other files of a run."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np

from lora_kit.prove.report import write_report
from lora_kit.prove.scores import NO_LANGUAGE_MODEL, classes
from lora_kit.schema import Run
from lora_kit.tasks.task import Score

KINDS = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)


def measured(base: float, adapted: float, low: float, high: float) -> dict[str, Any]:
    """`low` and `high` as differences; all four in nats per token."""
    nats = {"base": base, "adapted": adapted, "difference": adapted - base, "ci95": [low, high]}
    bits = {k: [x * 0.4 for x in v] if isinstance(v, list) else v * 0.4 for k, v in nats.items()}
    return {"documents": 140, "loss": nats, "bits_per_byte": bits}


def scored(
    base: float, adapted: float, low: float, high: float, better: str = "higher"
) -> dict[str, Any]:
    """A score as `compared` returns it; `low` and `high` as differences."""
    return {
        **{"base": base, "adapted": adapted, "difference": round(adapted - base, 4)},
        **{"ci95": [low, high], "better": better, "changed": 90},
    }


def minimal(word: str = "better") -> dict[str, Any]:
    """What reports had before there was more than base against adapted."""
    sample = {"prompt": "Why?", "expected": "So.", "base": "Because", "adapted": "So"}
    return {
        "verdict": {"domain": word},
        "domain": measured(3.1, 2.4, -0.8, -0.6),
        "general": None,
        "samples": [sample],
        "training": {
            **{"steps": 300, "tokens": 1200000, "tokens_per_second": 11000.0, "seconds": 109.0},
            **{"trainable_parameters": 46240, "world_size": 1},
        },
        "memory": {"predicted_mib": None, "measured_mib": 870},
    }


def layers(count: int, r: int = 16) -> list[dict[str, Any]]:
    chooser = random.Random(0)
    return [
        {
            "module": f"model.layers.{layer}.{kind}",
            "r": r,
            "norm": round(0.4 + layer / count + n / 8 + chooser.random() / 3, 3),
            "effective_rank": round(3 + 9 * layer / count + chooser.random() * 3, 2),
        }
        for layer in range(count)
        for n, kind in enumerate(KINDS)
    ]


def full() -> dict[str, Any]:
    """A language model that learned its domain and forgot, in the form of commit 278a73b; with all
    that a report could have."""
    answer = "Use `copy.deepcopy(x)`: it copies the list and everything in it, also what is nested."
    sample = {
        "prompt": "How do I copy a nested list in Python without sharing the inner lists?",
        "expected": answer,
        "base": "You can copy a list with the copy function. The copy function is a function that "
        "copies a list. The list is copied by the copy function.",
        "adapted": answer[:60],
        "loss": {"base": 3.214, "adapted": 1.872},
    }
    worse = sample | {"adapted": answer[:4] * 8, "loss": {"base": 2.101, "adapted": 2.967}}
    chosen = ("first", "first", "largest gain", "largest loss")
    score = {"rows": 140, "base": 0.114, "few_shot": 0.257, "adapted": 0.471}
    return minimal() | {
        "verdict": {
            **{"domain": "better", "general": "forgot", "few_shot": "better"},
            **{"exact_match": "better", "rouge_l": "no different"},
        },
        "domain": measured(3.442, 2.951, -0.561, -0.43),
        "general": measured(3.114, 3.254, 0.121, 0.159),
        "few_shot": measured(3.102, 2.951, -0.21, -0.09) | {"shots": 3, "tokens": 214},
        "metrics": {
            "exact_match": score | {"difference": 0.357, "ci95": [0.271, 0.443]},
            "rouge_l": score | {"adapted": 0.125, "difference": 0.011, "ci95": [-0.02, 0.043]},
        },
        "harness": {
            "hellaswag/acc_norm": {
                **{"rows": 400, "base": 0.412, "adapted": 0.385, "difference": -0.027},
                **{"ci95": [-0.049, -0.006], "higher_is_better": True},
            },
            "wikitext/bits_per_byte": {
                **{"rows": 62, "base": 1.214, "adapted": 1.302, "difference": 0.088},
                **{"ci95": [0.051, 0.128], "higher_is_better": False},
            },
            "wikitext/word_perplexity": {
                **{"rows": 62, "base": 21.4, "adapted": 22.9, "difference": 1.5},
                **{"ci95": None, "higher_is_better": False},
            },
        },
        "audit": {
            "modules": {kind.split(".")[1]: 32 for kind in KINDS},
            "coverage": 0.8731,
            "not_covered": {"embed_tokens": 0.0635, "lm_head": 0.0634},
            "checks": [
                {
                    "name": "modules matched",
                    "passed": True,
                    "found": "224 modules, 87.3% of the weights",
                },
                {
                    "name": "gradient at every adapter by step 2",
                    "passed": True,
                    "found": "224 of 224",
                },
                {
                    "name": "every adapter moved",
                    "passed": False,
                    "found": "3 of 224 are as they began: layers 29 to 31, o_proj",
                },
                {
                    "name": "effect on the logits",
                    "passed": True,
                    "found": "largest difference 4.31",
                },
                {
                    "name": "nothing frozen moved",
                    "passed": None,
                    "found": "not checked: the base is sharded",
                },
            ],
            "problems": [
                {
                    "what": "3 of 224 adapters did not move: o_proj of the layers 29, 30, 31",
                    "cause": "a kernel of the attention that does not pass a gradient to o_proj",
                    "fix": "set base.attn_implementation: sdpa, and train again",
                }
            ],
        },
        "layers": layers(32),
        "overfitting": {
            "train_loss": {"base": 3.431, "adapted": 2.792},
            **{"gap": 0.148, "best_step": 200, "stopped_early": True},
        },
        "samples": [(worse if c == "largest loss" else sample) | {"chosen": c} for c in chosen],
        "gate": {"passed": False, "failed": ["general: forgot, asked for kept"]},
        "memory": {"predicted_mib": 18200, "measured_mib": 17650},
    }


def worse() -> dict[str, Any]:
    """Negative transfer, and nothing else known."""
    return minimal("worse") | {
        "domain": measured(2.4, 2.9, 0.41, 0.6),
        "verdict": {"domain": "worse", "few_shot": "worse"},
        "few_shot": measured(2.2, 2.9, 0.6, 0.8) | {"shots": 3, "tokens": 90},
        "samples": [],
    }


def language_model() -> dict[str, Any]:
    """`full` as it is written now: a rival, contenders, and the direction of each score."""
    report = full()
    for part, rival in (("domain", "base"), ("general", "base"), ("few_shot", "few_shot")):
        for name in ("loss", "bits_per_byte"):
            report[part][name] |= {"better": "lower", "changed": 140}
        report[part]["rival"] = rival
    report["contenders"] = {
        name: {"loss": loss, "bits_per_byte": loss * 0.4}
        for name, loss in (("adapted", 2.951), ("base", 3.442), ("few_shot", 3.102))
    }
    return report


def confusion(count: int) -> tuple[list[str], np.ndarray]:
    """Names and a confusion matrix of `count` classes, 10 rows each; classes 1 and 2 are mixed up,
    the last one never occurs."""
    chooser = random.Random(0)
    found = np.zeros((count, count), dtype=int)
    for true in range(count - 1):
        for _ in range(10):
            wrong = chooser.random() < 0.2
            found[true, chooser.randrange(count - 1) if wrong else true] += 1
    found[0, :2] = [3, 7]
    found[0, 2:] = 0
    return [f"card_payment_wrong_exchange_rate_{n}" for n in range(count)], found


def classifier(count: int = 77, word: str = "no different") -> dict[str, Any]:
    """A classifier that is no better than a linear probe on frozen features."""
    labels, matrix = confusion(count)
    about = {"labels": labels, "confusion": matrix}
    domain = {
        **{"documents": int(matrix.sum()), "rival": "linear_probe"},
        "accuracy": scored(0.801, 0.804, -0.021, 0.027),
        "macro_f1": scored(0.793, 0.799, -0.019, 0.03),
    }
    return minimal() | {
        "verdict": {"domain": word},
        "domain": domain,
        "contenders": {
            "adapted": {"accuracy": 0.804, "macro_f1": 0.799},
            "linear_probe": {"accuracy": 0.801, "macro_f1": 0.793},
            "zero_shot": {"accuracy": 0.591, "macro_f1": 0.571},
            "majority": {"accuracy": 0.013, "macro_f1": 0.0003},
        },
        "classes": classes([Score("accuracy", np.ones((1, 2)), about=about)]),
        "samples": [],
        "not_measured": [NO_LANGUAGE_MODEL],
        "overfitting": {
            "train_accuracy": {"base": 0.93, "adapted": 0.98},
            **{"gap": 0.047, "best_step": None, "stopped_early": False},
        },
    }


def preferences() -> dict[str, Any]:
    """Pairs learned perfectly at the cost of all else: no better model."""
    return minimal() | {
        "verdict": {"domain": "no different", "general": "forgot"},
        "domain": {
            **{"documents": 120, "rival": "reference"},
            "accuracy": scored(0.5, 1.0, 0.5, 0.5),
            "margin": scored(0.0, 14.31, 13.6, 15.1),
            "objection": "general text got worse (3.142 to 16.700 nats per token) and completions "
            "became 22 times shorter",
        },
        "general": {
            **{"documents": 60, "rival": "base"},
            "loss": scored(3.142, 16.7, 12.1, 15.0, "lower"),
            "bits_per_byte": scored(1.31, 6.96, 5.0, 6.25, "lower"),
        },
        "generation": {
            **{"prompts": 64, "chosen_length": 21.4, "room": 64},
            "length": scored(22.6, 1.0, -23.5, -19.8),
            "unfinished": scored(0.08, 0.0, -0.13, -0.03, "lower"),
            "kl": scored(0.0, 6.42, 5.8, 7.01, "lower"),
        },
        "contenders": {
            "adapted": {"accuracy": 1.0, "margin": 14.31},
            "reference": {"accuracy": 0.5, "margin": 0.0},
        },
        "samples": [],
        "not_measured": [],
        "overfitting": {
            "train_accuracy": {"base": 0.5, "adapted": 1.0},
            **{"gap": 0.0, "best_step": None, "stopped_early": False},
        },
    }


def similarity() -> dict[str, Any]:
    """A number for two sentences, by a recipe of a user's own: its names are not known here."""
    return minimal() | {
        "domain": {
            **{"documents": 40, "rival": "mean"},
            "squared_error": scored(0.255, 0.109, -0.182, -0.099, "lower"),
        },
        "contenders": {"adapted": {"squared_error": 0.109}, "mean": {"squared_error": 0.255}},
        "samples": [],
        "not_measured": [NO_LANGUAGE_MODEL],
        "overfitting": {
            "train_squared_error": {"base": 0.251, "adapted": 0.106},
            **{"gap": -0.001, "best_step": None, "stopped_early": False},
        },
    }


def metrics(steps: int = 300, every: int = 5) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl: a noisy loss that falls; held-out losses rise from step 200 on."""
    chooser = random.Random(0)
    rows: list[dict[str, Any]] = []
    for step in range(every, steps + 1, every):
        loss = 2.75 + 0.75 * math.exp(-step / 60) + chooser.gauss(0, 0.04)
        rate = 2e-4 * min(1.0, step / 20) * (1 + math.cos(math.pi * step / steps)) / 2
        rows.append({"step": step, "loss": loss, "learning_rate": rate, "tokens": step * 4000})
        if step % 50 == 0:
            held_out = 2.93 + 0.5 * math.exp(-step / 60) + max(0, step - 200) / 1500
            rows.append({"step": step, "eval_loss": held_out})
    return rows


def put_run(
    folder: Path, report: dict[str, Any], rows: list[dict[str, Any]] | None = None
) -> tuple[Path, Run]:
    """Write a finished run's directory with its page; `rows` are those of metrics.jsonl. A model
    without a language-model head has one label a row, and no general text."""
    folder.mkdir(parents=True, exist_ok=True)
    count = {
        **{"rows_read": 1300, "rows_kept": 1272, "unused": 0, "dropped": {"too long": 28}},
        **{"truncated": {}, "first": {"too long": "rows.jsonl:71"}, "samples": 1272},
        **{"tokens": 52225, "supervised_tokens": 18391, "samples_without_supervision": 0},
        **{"longest": 83},
    }
    census = dict.fromkeys(("train", "eval", "general"), count) | {
        "duplicates": {"exact": 3, "near": 29},
        **{"held_out": True, "notes": [], "leaks_by_source": {}},
    }
    if NO_LANGUAGE_MODEL in (report.get("not_measured") or []):
        labelled = {**count, "supervised_tokens": count["samples"]}
        nothing = dict.fromkeys(count, 0) | {"dropped": {}, "truncated": {}, "first": {}}
        census |= {"train": labelled, "eval": labelled, "general": nothing}
    lock = {
        "base": {
            **{"model": "nano", "revision": None, "licence": "apache-2.0"},
            "hashes": {"model.safetensors": "4b1f" * 16, "tokenizer.json": "c83a" * 16},
        },
        "data": {"rows.jsonl": "f3a9" * 16, "owner/name": "a0b7" * 16},
        **{"commits": {"owner/name": "7d3f" * 10}, "adapter": {"sha256": "09d4" * 16}},
        **{"batch": {"processes": 1, "rows_per_step": 16}, "seed": 0},
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
    }
    (folder / "run.lock.json").write_text(json.dumps(lock), encoding="utf-8")
    (folder / "census.json").write_text(json.dumps(census), encoding="utf-8")
    if rows is not None:
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
    values = {"recipe": "sft", "name": "python-docs", "base": {"model": "nano"}}
    run = Run.model_validate(values | {"data": {"train": "rows.jsonl"}})
    write_report(folder, run, report)
    return folder / "report.html", run
