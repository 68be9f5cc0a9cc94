"""The base as it is, the base with examples in its prompt, and the adapter, on held-out text."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_kit.adapter.files import adapter_folder
from lora_kit.adapter.inspect import figures
from lora_kit.adapter.load import load, load_run_tokenizer, open_run
from lora_kit.data.prepare import Prepared, prepare
from lora_kit.errors import UserError
from lora_kit.prove.bootstrap import scores, statistics, verdict, verdict_of_scores
from lora_kit.prove.gate import held
from lora_kit.prove.harness import check_tasks, run_harness
from lora_kit.prove.report import write_report
from lora_kit.prove.scratch import against_scratch
from lora_kit.run import read_json, read_lock
from lora_kit.schema import Gate, Prove, Run
from lora_kit.tasks import few_shot, metrics
from lora_kit.tasks.batches import IGNORED, Labelled
from lora_kit.tasks.measure import Losses, generate, measure, positions
from lora_kit.tasks.pairing import prompt_use

_SHOWN_EACH = 2  # samples of a kind: the first, the largest gain, the largest loss
_SHOWN_TOKENS = 48
_LONGEST_ANSWER = 512  # tokens
_LONGER_ANSWER = 8  # tokens more than the longest one expected
_LEARNED_ROWS = 64  # training rows that are measured for the gap, at most
_PAIRED_ROWS = 128  # held-out rows whose answers are put after another prompt, at most


@dataclass(frozen=True)
class HeldOut:
    """What a run is judged on, and the rows it learned from."""

    kind: str  # `text`, or `chat`: prompts and answers
    domain: Labelled
    general: Labelled | None
    train: Labelled

    @classmethod
    def of(cls, prepared: Prepared) -> HeldOut:
        return cls(prepared.kind, prepared.eval, prepared.general, prepared.rows("train"))

    def __str__(self) -> str:
        general = f" and {len(self.general.unit_bytes)} general ones" if self.general else ""
        return f"{len(self.domain.unit_bytes)} held-out documents{general}"

    def question(self, row: int) -> tuple[list[int], list[int]]:
        """Tokens of a row: the prompt and the answer that was held out; of a text the first half,
        32 tokens at most, and what follows."""
        held_out = self.domain[row]
        ids = held_out["input_ids"].tolist()
        learned = np.flatnonzero(held_out["labels"] != IGNORED)
        # The last run of labels: an answer after others, in a longer conversation.
        first = learned[np.r_[True, np.diff(learned) > 1]][-1] if len(learned) else 0
        if self.kind == "chat" and first > 0:
            return ids[:first], ids[first : learned[-1] + 1]
        cut = min(32, (len(ids) + 1) // 2)
        return ids[:cut], ids[cut : cut + _SHOWN_TOKENS]


def check_prove(prove: Prove, judged: HeldOut, tokenizer: Any, supervise: str) -> None:
    """What `prove:` asks for can be measured on these rows; asked before anything trains.

    Raises:
        UserError: nothing can be judged; or a metric or task is not there, or fits no answers of
            this kind.
    """
    if not judged.domain.supervised_tokens:
        raise UserError("data.eval: no row has two tokens: nothing can be predicted")
    problems = []
    rows = _answered(judged, prove.answers, 0) if prove.metrics else []
    wanted = [_text(tokenizer, judged.question(row)[1]) for row in rows]
    for check in (
        lambda: metrics.check_names(prove.metrics, judged.kind),
        lambda: metrics.check_fit(prove.metrics, wanted),
        lambda: check_tasks(prove.harness) if prove.harness else None,
    ):
        try:
            check()
        except UserError as error:
            problems.append(str(error))
    if prove.metrics and supervise == "all":
        problems.append("prove.metrics: data.supervise: all leaves no answer apart to score")
    if unknown := sorted((prove.gate.metrics if prove.gate else {}).keys() - set(prove.metrics)):
        problems.append(f"prove.gate.metrics: {', '.join(unknown)}: not in prove.metrics")
    if problems:
        raise UserError("\n".join(problems))


def compare(
    run: str | Path, overrides: Sequence[str] = (), *, gate: bool = False, scratch: bool = False
) -> dict[str, Any]:
    """Measure a finished run again, and write its report.json and report.html anew, unless they
    hold something that was not measured this time.

    Args:
        run: the run directory.
        overrides: `prove.KEY=VALUE`, to measure more or something else than the run did.
        gate: hold the run to the default bounds of `prove.gate` if it names none.
        scratch: train a model of the base's shape from scratch, on the same budget, beside it.

    Returns:
        What report.json holds.

    Raises:
        UserError: there is no finished run, or its data or base changed since it was trained.
    """
    if strange := [item for item in overrides if not item.startswith("prove.")]:
        raise UserError(f"{', '.join(strange)}: a finished run takes other prove.* keys only")
    opened = open_run(run, overrides)
    before = read_json(Path(run) / "report.json")
    tokenizer = load_run_tokenizer(run)
    lock, prepared = read_lock(run), prepared_again(run, opened, tokenizer)
    judged, prove = HeldOut.of(prepared), opened.prove
    check_prove(prove, judged, tokenizer, opened.data.supervise)
    model, tokenizer = load(run)
    report = compare_model(model, tokenizer, judged, prove, opened.seed)
    del report["adapter_effect"]  # of a training's audit
    if prove.harness:
        measure_tasks(report, model, tokenizer, prove)
    report["layers"] = figures(adapter_folder(run))
    if scratch:
        steps = (before.get("training") or {}).get("steps")
        found = against_scratch(opened, model, tokenizer, prepared, lock["batch"], steps)
        report["scratch"], report["verdict"]["scratch"] = found, verdict(found)
    # What only a training knows.
    report |= {name: before.get(name) for name in ("training", "memory", "audit")}
    chosen = {"best_step": None, "stopped_early": False} | (before.get("overfitting") or {})
    report["overfitting"] = chosen | report["overfitting"]
    asked = prove.gate or (Gate() if gate else None)
    report["gate"] = held(report, asked) if asked else None
    if lost := _lost(before, report):
        print(
            f"report.json and report.html stay as they are: they hold {', '.join(lost)}, which was "
            "not measured now",
            file=sys.stderr,
        )
    else:
        write_report(Path(run), opened, report)
    return report


def prepared_again(run: str | Path, opened: Run, tokenizer: Any) -> Prepared:
    """What a finished run learned from and is judged on. Raises UserError if it changed since."""
    # What the limits allow was decided when the run was trained.
    lock, length = read_lock(run), opened.train.max_length
    prepared = prepare(
        opened.data, lock.get("kind"), tokenizer, length, opened.seed, limits=False, lock=lock
    )
    # By content, not by name: a run and its data may have been moved.
    recorded = lock.get("data", {}).values()
    changed = [source for source, digest in prepared.hashes.items() if digest not in recorded]
    if changed and recorded:
        raise UserError(
            f"{', '.join(changed)} changed since {run} was trained: rows it learned from could be "
            "among the ones it is judged on; restore the data, or train again"
        )
    return prepared


def compare_model(
    model: Any, tokenizer: Any, judged: HeldOut, prove: Prove, seed: int = 0, samples: bool = True
) -> dict[str, Any]:
    """`compare` for a PEFT model in memory; its adapter is switched off to measure the base.

    Args:
        samples: let the model speak: side by side, and for `prove.metrics`.
    """
    pad = tokenizer.pad_token_id
    word: dict[str, str] = {}
    absent = dict.fromkeys(("general", "few_shot", "scratch", "prompt_use", "metrics", "harness"))
    report: dict[str, Any] = {"verdict": word, **absent, "not_measured": []}

    def both(rows: Labelled, chosen: np.ndarray | None = None) -> tuple[Losses, Losses]:
        adapted = measure(model, rows, pad, rows=chosen)
        with model.disable_adapter():
            return measure(model, rows, pad, rows=chosen), adapted

    base, adapted = both(judged.domain)
    report["domain"] = statistics(base, adapted, seed)
    word["domain"] = verdict(report["domain"])
    if judged.kind == "chat":
        drawn = np.random.default_rng(seed).permutation(len(judged.domain))[:_PAIRED_ROWS]
        # Where all is learned from, the prompt too, there is no answer apart.
        rows = [row for row in drawn.tolist() if judged.domain[row]["labels"][0] == IGNORED]
        questions = [judged.question(row) for row in rows]
        report["prompt_use"] = prompt_use(model, pad, questions, seed) if rows else None
    # Which answers occur is a gain in loss, and no answer to a prompt.
    blind = bool(report["prompt_use"] and report["prompt_use"]["blind"])
    if blind and word["domain"] == "better":
        word["domain"] = "no different"
    if judged.general is not None:
        report["general"] = statistics(*both(judged.general), seed)
        word["general"] = verdict(report["general"], "kept", "forgot", "kept")
    longest = int(judged.domain.lengths.max()) + (_LONGER_ANSWER if prove.metrics else 0)
    examples = few_shot.choose(
        judged.train, longest, positions(model), prove.shots, judged.kind == "chat", seed
    )
    if examples:
        opening = few_shot.opening(tokenizer) if judged.kind == "chat" else []
        longer = few_shot.after_examples(judged.domain, examples, opening)
        with model.disable_adapter():
            prompted = measure(model, longer, pad, rows_at_once=2)
        tokens = int(longer.lengths[0] - judged.domain.lengths[0])
        against = statistics(prompted, adapted, seed)
        report["few_shot"] = {"shots": len(examples), "tokens": tokens, **against}
        word["few_shot"] = verdict(against, "no different" if blind else "better")
    elif prove.shots:
        report["not_measured"].append("few_shot: the base has no room for examples beside the rows")
    learned = np.random.default_rng(seed).permutation(len(judged.train))
    learned = learned[: min(len(judged.domain), _LEARNED_ROWS)]
    before, after = (
        round(float(x.nats.sum() / x.tokens.sum()), 4) for x in both(judged.train, learned)
    )
    report["overfitting"] = {
        "train_loss": {"base": before, "adapted": after},
        # How much more the adapter gained on rows it learned from.
        "gap": round(report["domain"]["loss"]["difference"] - (after - before), 4),
    }
    if samples and prove.metrics:
        try:
            report["metrics"] = _scores(model, tokenizer, judged, prove, examples, seed)
        except UserError as error:  # of a script that takes some answers and not others
            report["not_measured"].append(f"prove.metrics: {error}")
        for name, scored in (report["metrics"] or {}).items():
            word[name] = verdict_of_scores(scored, scored["rows"])
    report["samples"] = _side_by_side(model, tokenizer, judged, base, adapted) if samples else []
    return report | {"adapter_effect": float(np.abs(adapted.nats - base.nats).max())}


def measure_tasks(report: dict[str, Any], model: Any, tokenizer: Any, prove: Prove) -> None:
    """Add the harness's figures to a report, or why there are none."""
    try:
        report["harness"] = run_harness(model, tokenizer, prove.harness)
    except UserError as error:
        report["not_measured"].append(str(error))


def _lost(before: dict[str, Any], report: dict[str, Any]) -> list[str]:
    """What an earlier report holds and this one does not."""
    lost = [name for name in ("few_shot", "scratch") if before.get(name) and not report[name]]
    for part in ("metrics", "harness"):
        lost += (before.get(part) or {}).keys() - (report[part] or {}).keys()
    return sorted(lost)


def _answered(judged: HeldOut, most: int, seed: int) -> list[int]:
    """The rows that are answered for the metrics, drawn with the seed."""
    rows = np.random.default_rng(seed).permutation(len(judged.domain))[:most]
    return sorted(rows.tolist())


def _scores(
    model: Any, tokenizer: Any, judged: HeldOut, prove: Prove, examples: list[list[int]], seed: int
) -> dict[str, dict[str, Any]]:
    """Each metric's mean score of the base, of the base with examples, and of the adapter."""
    asked = [judged.question(n) for n in _answered(judged, prove.answers, seed)]
    prompts = [prompt for prompt, _ in asked]
    wanted = [_text(tokenizer, answer) for _, answer in asked]
    # An answer that is longer than every right one is not made right by its rest.
    length = min(_LONGEST_ANSWER, max(len(a) for _, a in asked) + _LONGER_ANSWER)
    said = {"adapted": generate(model, tokenizer, prompts, length)}
    with model.disable_adapter():
        said["base"] = generate(model, tokenizer, prompts, length)
        if examples:
            opening = few_shot.opening(tokenizer)
            longer = [few_shot.joined([*examples, prompt], opening) for prompt in prompts]
            said["few_shot"] = generate(model, tokenizer, longer, length)
    found = {}
    for name in prove.metrics:
        each = {who: metrics.score(name, answers, wanted) for who, answers in said.items()}
        few = round(float(each["few_shot"].mean()), 4) if examples else None
        found[name] = {
            "rows": len(wanted),
            "few_shot": few,
            **scores(each["base"], each["adapted"], seed),
        }
    return found


def _side_by_side(
    model: Any, tokenizer: Any, judged: HeldOut, base: Losses, adapted: Losses
) -> list[dict[str, Any]]:
    """What base and adapted say to held-out rows, greedily: to the first ones, and to those on
    which the adapter gained and lost most."""
    with np.errstate(invalid="ignore"):  # of a unit without tokens there is no mean
        before, after = base.nats / base.tokens, adapted.nats / adapted.tokens
    units = np.flatnonzero(base.tokens > 0)
    by_gain = units[np.argsort((after - before)[units], kind="stable")].tolist()
    ways = {"first": units.tolist(), "largest gain": by_gain, "largest loss": by_gain[::-1]}
    chosen: dict[int, str] = {}
    for why, ordered in ways.items():
        fresh = [unit for unit in ordered if unit not in chosen]
        chosen |= dict.fromkeys(fresh[:_SHOWN_EACH], why)
    rows = judged.domain
    first_row = {int(unit): row for row, unit in reversed(list(enumerate(rows.units)))}
    asked = [judged.question(first_row[unit]) for unit in chosen]
    prompts = [prompt for prompt, _ in asked]
    said = generate(model, tokenizer, prompts, _SHOWN_TOKENS)
    with model.disable_adapter():
        said_before = generate(model, tokenizer, prompts, _SHOWN_TOKENS)
    return [
        {
            "chosen": chosen[unit],
            "prompt": _text(tokenizer, asked[n][0]),
            "expected": _text(tokenizer, asked[n][1]),
            "base": said_before[n],
            "adapted": said[n],
            "loss": {
                name: round(float(loss[unit]), 4)
                for name, loss in (("base", before), ("adapted", after))
            },
        }
        for n, unit in enumerate(chosen)
    ]


def _text(tokenizer: Any, ids: list[int]) -> str:
    """What tokens spell; a character that was cut apart at an end is left out."""
    return tokenizer.decode(ids, skip_special_tokens=True).strip("\N{REPLACEMENT CHARACTER}")
