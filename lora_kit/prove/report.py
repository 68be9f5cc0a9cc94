"""report.json and report.html: the result of a run, in figures and as a page.

Everything shown is read from report.json, for every task; a report of an older version lacks some
of its entries.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from lora_kit.errors import UserError
from lora_kit.folders import write_whole
from lora_kit.pages import render_page
from lora_kit.prove.charts import confused, curves, forest, heat
from lora_kit.prove.into import in_words as in_words_of_bases
from lora_kit.prove.scores import (
    NO_LANGUAGE_MODEL,
    better,
    compared_scores,
    decided_by,
    deciding_in,
    not_measured,
    other_verdicts,
)
from lora_kit.run import read_json, read_lock
from lora_kit.schema import Json, Run
from lora_kit.train.callbacks import read_metrics
from lora_kit.train.directory import write_json

# The parts of a report that `scores.against` returned, with their titles.
PARTS = {
    "domain": "Domain",
    "general": "General text",
    "few_shot": "Against examples in the prompt",
    "scratch": "Against training from scratch",
}
# Contenders in words.
_CONTENDERS = {
    "base": "the base",
    "few_shot": "the base with examples in its prompt",
    "scratch": "a randomly initialised model trained on the same rows",
    "majority": "always predicting the most frequent class",
    "linear_probe": "a linear probe on frozen features",
    "zero_shot": "zero-shot classification by label names",
    "reference": "the reference model",
}
# Units of scores that are not a share of 1; "": no unit.
UNITS = {
    "loss": "nats per token",
    "bits_per_byte": "bits per byte",
    "margin": "",
    "length": "tokens",
    "kl": "nats per token",
}
_WORDS = {
    "better": "better than {} on held-out data",
    "worse": "worse than {}: the adapter is not worth shipping",
    "no different": "no different from {}: no gain was shown",
    "too little data": "not evaluated: fewer than 20 held-out documents or rows",
    "kept": "general text is predicted as well as by the base",
    "forgot": "general text got worse: the adapter forgets",
}
_BLIND = (
    "{}, but the completions hardly depend on their prompts: the adapter was trained on "
    "which completions occur, not on which of them belongs to a prompt. Look for shuffled labels"
)
LARGEST_UNSEEN = 2.0  # percent of loss that may be lost before `kept` is qualified
# How a word is shown: the colour and shape of its icon.
MOODS = {
    "better": "good",
    "kept": "good",
    "passed": "good",
    "worse": "bad",
    "forgot": "bad",
    "failed": "bad",
    "no different": "flat",
}
# What the headline adds after "But": part and word of a finding.
_BUTS = {
    ("general", "forgot"): "it forgets general text",
    ("few_shot", "worse"): "it is worse than the base with examples in its prompt",
    ("few_shot", "no different"): "it is no better than the base with examples in its prompt",
    ("scratch", "worse"): "it is worse than a randomly initialised model trained on the same rows",
    ("gate", "failed"): "the gate failed",
    ("audit", "failed"): "a check of the training failed",
}


class Finding(NamedTuple):
    """One result; `part` is its key in the report. `gain` is how much better the adapted model is
    and its 95% interval, in `unit`: percent of the base, or points of 100; "": not drawn."""

    part: str
    title: str
    word: str
    sentence: str
    figures: str = ""
    unit: str = ""
    gain: tuple[float, float, float] = (0.0, 0.0, 0.0)


def write_report(directory: Path, run: Run, report: Json) -> None:
    """Write both files of a finished run; all text from data is escaped.

    Raises:
        UserError: the run directory cannot be written to.
    """
    page = _page(directory, run, report)
    try:
        write_json(directory / "report.json", report)
        write_whole(directory / "report.html", page)
    except OSError as error:
        raise UserError(f"{directory}: the report cannot be written ({error.strerror})") from None


def in_words(word: str, part: str = "domain", rival: str = "base") -> str:
    """One sentence for a verdict's word.

    Args:
        part: what was compared: a key of PARTS, or the name of a further score.
        rival: the contender that the adapted model was compared with.
    """
    if part in ("few_shot", "scratch"):
        rival = part
    if part == "domain" or word in ("kept", "forgot", "too little data"):
        return _WORDS[word].format(contender(rival))
    joined = {"better": "better than", "worse": "worse than", "no different": "no different from"}
    return f"{joined[word]} {contender(rival)}"


def contender(name: str) -> str:
    """A contender in words."""
    return _CONTENDERS.get(name, f"the contender {name}")


def in_lines(report: Json) -> list[str]:
    """A line for each result, as `train` ends with: figures, interval, verdict."""
    return [
        ": ".join(filter(None, (found.part, found.figures, found.sentence)))
        for found in findings(report)
    ]


def findings(report: Json) -> list[Finding]:
    """The results, the most important first; something not measured is a result as well, unless it
    does not apply to the task."""
    report = _filled(report)
    found = [_domain(report)]
    rival, others = report["domain"].get("rival", "base"), other_verdicts(report)
    for name, score in compared_scores(report["domain"]).items():
        if name in others:
            found.append(_other_score(name, score, others[name], rival))
    if report["general"] or NO_LANGUAGE_MODEL not in (report["not_measured"] or []):
        found.append(_general(report))
    for part in ("few_shot", "scratch"):
        if report[part]:
            name, score = deciding_in(report[part], decided_by(report)[0])
            word = report["verdict"][part]
            found.append(_finding(part, name, score, word, in_words(word, part)))
    for name, score in (report["metrics"] or {}).items():
        if name in others:
            found.append(_other_score(name, score, others[name], rival))
    for name, score in (report["harness"] or {}).items():
        found.append(_other_score(name, score, others[name], "base"))
    evaluated = report["evaluated"]
    if evaluated and was_drawn(evaluated):
        text = evaluated_text(evaluated, units_of(report))
        found.append(Finding("evaluated", "Evaluated rows", "", text))
    if report["generation"]:
        found.append(_generation(report["generation"]))
    if report["into"]:
        found.append(Finding("into", "Base to merge into", "", in_words_of_bases(report["into"])))
    if gate := report["gate"]:
        word = "passed" if gate["passed"] else "failed"
        found.append(Finding("gate", "Gate", word, "; ".join([word, *gate["failed"]])))
    found.append(_audit(report["audit"]))
    for line in report["not_measured"] or []:
        if not line.startswith("general: "):
            found.append(Finding("not measured", "Not measured", "not measured", line))
    return found


def was_drawn(evaluated: Json) -> bool:
    """Whether not all held-out rows were evaluated. evaluated: of report.json."""
    uses = (evaluated.get("domain"), evaluated.get("general"))
    return any(found["units"] < found["of"] for found in uses if found)


def evaluated_text(evaluated: Json, counted: str) -> str:
    """`140 of 900 held-out documents and 20 general ones, drawn at random (...)`."""
    texts = []
    for use, what in (("domain", f"held-out {counted}"), ("general", "general ones")):
        if found := evaluated.get(use):
            of = f" of {found['of']:,}" if found["units"] < found["of"] else ""
            texts.append(f"{found['units']:,}{of} {what}")
    text = " and ".join(texts)
    if not was_drawn(evaluated):
        return text
    return f"{text}, drawn at random (prove.budget: {evaluated['budget']:g}; null: all)"


def _domain(report: Json) -> Finding:
    name, score = decided_by(report)
    word = report["verdict"]["domain"]
    sentence = in_words(word, "domain", report["domain"].get("rival", "base"))
    found = _finding("domain", name, score, word, sentence)
    if not _withheld(report):
        return found
    if (report["prompt_use"] or {}).get("blind"):
        fell = "the loss fell" if name == "loss" else "scored better"
        return found._replace(sentence=_BLIND.format(fell))
    return found._replace(sentence=f"scored better, but {report['domain']['objection']}")


def _withheld(report: Json) -> bool:
    """Whether the score is better but the verdict is not, because of a control or an objection."""
    name, score = decided_by(report)
    blind = (report["prompt_use"] or {}).get("blind")
    if report["verdict"]["domain"] != "no different" or not score["ci95"]:
        return False
    if not (blind or report["domain"].get("objection")):
        return False
    return _gain(name, score, "")[1] > 0


def _general(report: Json) -> Finding:
    if not report["general"]:
        why = f"not measured: {not_measured(report, 'general')}"
        return Finding("general", PARTS["general"], "not measured", why)
    name, score = next(iter(compared_scores(report["general"]).items()))
    word = report["verdict"]["general"]
    found = _finding("general", name, score, word, in_words(word, "general"))
    if word == "kept" and -found.gain[1] > LARGEST_UNSEEN:
        sentence = f"no forgetting was shown, but up to {-found.gain[1]:+.1f}% is possible"
        return found._replace(sentence=sentence)
    return found


def _finding(part: str, name: str, score: Json, word: str, sentence: str) -> Finding:
    """A result by one score; `part` is one of PARTS, or the score itself."""
    title, figures, unit = part, _figures(name, score), _unit(name, score)
    if part in PARTS:
        title = PARTS[part]
        if name != "loss":
            title, figures = f"{title}: {name}", f"{name} {figures}"
    return Finding(part, title, word, sentence, figures, unit, _gain(name, score, unit))


def _other_score(name: str, score: Json, word: str, rival: str) -> Finding:
    """A score that does not decide."""
    if score["ci95"] is None:
        why = "not evaluated: it is no mean over rows, so it has no interval"
        return Finding(name, name, word, why, _figures(name, score))
    return _finding(name, name, score, word, in_words(word, name, rival))


def _generation(part: Json) -> Finding:
    """How generated text changed: without a verdict of its own; an objection may follow from it."""
    changes = []
    for name, score in compared_scores(part).items():
        unit = f" {UNITS[name]}" if UNITS.get(name) else ""
        changes.append(f"{name} {score['base']:.3g} -> {score['adapted']:.3g}{unit}")
    return Finding("generation", "Generated text", "", "; ".join(changes))


def _audit(audit: Json | None) -> Finding:
    if not audit:
        why = "not checked: no training that came to its end was checked"
        return Finding("audit", "Did it train", "not checked", why)
    problems = [f"{p['what']}. {p['cause']}. {p['fix']}" for p in audit["problems"]]
    failed = [check["found"] for check in audit["checks"] if check["passed"] is False]
    word = "failed" if problems or failed else "passed"
    skipped = [check["name"] for check in audit["checks"] if check["passed"] is None]
    fine = "every check passed"
    if skipped:
        fine += f" but {', '.join(skipped)}: not checked"
    why = "; ".join(problems or failed or [fine])
    return Finding("audit", "Did it train", word, why)


def _unit(name: str, score: Json) -> str:
    """The unit of a gain: points of 100 where the score is a share of 1, else percent of the base's
    value; "" where that is 0."""
    share = better(name, score) == "higher" and name not in UNITS
    if share and 0 <= score["base"] <= 1 and 0 <= score["adapted"] <= 1:
        return " points"
    return "%" if score["base"] else ""


def _gain(name: str, score: Json, unit: str) -> tuple[float, float, float]:
    """A difference and its interval, positive where the adapted model is better."""
    factor = 1.0 if better(name, score) == "higher" else -1.0
    if unit:
        factor *= 100 / (abs(score["base"]) if unit == "%" else 1)
    low, high = sorted(factor * bound for bound in score["ci95"])
    return factor * score["difference"], low, high


def _figures(name: str, score: Json) -> str:
    """`3.442 -> 2.951 nats per token (-14.3%, 95% -16.3% to -12.5%)`: a loss in percent of the
    base's; other scores as they are."""
    percent = name == "loss" and score["base"]
    factor, form = (100 / score["base"], "+.1f") if percent else (1.0, "+.3f")
    mark = "%" if percent else ""
    change = f"{factor * score['difference']:{form}}{mark}"
    if score["ci95"] is not None:
        low, high = (f"{factor * bound:{form}}{mark}" for bound in score["ci95"])
        change += f", 95% {low} to {high}"
    unit = f" {UNITS[name]}" if UNITS.get(name) else ""
    return f"{score['base']:.3f} -> {score['adapted']:.3f}{unit} ({change})"


def ahead(report: Json) -> tuple[str, float] | None:
    """The contender with the best deciding score, if that is better than the adapted model's: its
    name in words and the score, of which no interval is known. The base, the rival and contenders
    with a verdict of their own (few_shot, scratch) are skipped."""
    name, score = decided_by(report)
    rival = report["domain"].get("rival", "base")
    sign = 1 if better(name, score) == "higher" else -1
    best, found = score["adapted"], None
    for other, values in (report.get("contenders") or {}).items():
        if other in ("adapted", "base", rival, *report["verdict"]) or name not in values:
            continue
        if sign * (values[name] - best) > 0:
            best, found = values[name], (contender(other), values[name])
    return found


def contender_rows(report: Json) -> tuple[list[str], list[tuple[str, list[float | None]]]]:
    """The table of all contenders: the scores' names, and (name, a value or None for each score),
    the adapted model last; no rows where there is nothing but the rival to compare with."""
    contenders = dict(report.get("contenders") or {})
    names = list(dict.fromkeys(name for values in contenders.values() for name in values))
    measured = {**(report.get("metrics") or {}), **compared_scores(report["domain"])}
    contenders.pop("adapted", None)
    if len(contenders) < 2:
        return names, []
    contenders["adapted"] = {name: score["adapted"] for name, score in measured.items()}
    rows = [(who, [values.get(name) for name in names]) for who, values in contenders.items()]
    return names, rows


def units_of(report: Json) -> str:
    """What `documents` counts, for people."""
    return "documents" if "loss" in report["domain"] else "rows"


def _headline(report: Json) -> str:
    word, rival = report["verdict"]["domain"], report["domain"].get("rival", "base")
    name = "its base" if rival == "base" else contender(rival)
    if _withheld(report):
        return f"not better than {name}"
    return {
        "better": f"better than {name} on held-out data",
        "worse": f"worse than {name}, do not ship it",
        "no different": f"no different from {name}",
        "too little data": f"not evaluated, there are too few held-out {units_of(report)}",
    }[word]


def _buts(report: Json, found: list[Finding]) -> list[str]:
    """What the headline adds after "But", besides the objection."""
    buts = [_BUTS[one.part, one.word] for one in found if (one.part, one.word) in _BUTS]
    if "general text" in report["domain"].get("objection", "").lower():
        buts = [but for but in buts if but != _BUTS["general", "forgot"]]
    above = ahead(report)
    if above and not _withheld(report):  # for that reason
        buts.append(f"{above[0]} scored better ({above[1]:.3f})")
    if worse := [one.part for one in found if one.word == "worse" and one.part not in PARTS]:
        buts.append(f"it is worse on {' and '.join(worse)}")
    return buts


def _filled(report: Json) -> Json:
    """The report with null for entries that it lacks, as one of an older version does."""
    return defaultdict(lambda: None, report)


def _page(directory: Path, run: Run, report: Json) -> str:
    report, found = _filled(report), findings(report)
    over = report["overfitting"] or {}
    fitted = next((name for name in over if name.startswith("train_")), "")
    plots = {unit: [f for f in found if f.unit == unit] for unit in ("%", " points")}
    names, rows = contender_rows(report)
    word = report["verdict"]["domain"]
    mood = MOODS.get(word, "unknown")
    if any(MOODS.get(one.word) == "bad" for one in found):
        mood = "warn" if word == "better" else "bad"
    return render_page(
        "prove/report.html.jinja",
        run=run,
        report=report,
        findings=found,
        moods=MOODS,
        mood=mood,
        headline=_headline(report),
        objection=report["domain"].get("objection"),
        buts=_buts(report, found),
        parts=PARTS,
        rival=report["domain"].get("rival", "base"),
        contender=contender,
        contenders={"names": names, "rows": rows},
        scores_of=compared_scores,
        better=better,
        units=UNITS,
        counted=units_of(report),
        fitted={"name": fitted.removeprefix("train_"), "score": over[fitted]} if fitted else None,
        drawn=next((one.sentence for one in found if one.part == "evaluated"), ""),
        can_forget=any(one.part == "general" for one in found),
        why_no_general=not_measured(report, "general"),
        classes=confused(report["classes"]) if report["classes"] else None,
        plots=[(u, some, forest([f.gain for f in some])) for u, some in plots.items() if some],
        curves=curves(read_metrics(directory / "metrics.jsonl"), over.get("best_step")),
        heat=heat(report["layers"]) if report["layers"] else None,
        lock=read_lock(directory),
        census=read_json(directory / "census.json") or None,
        settings=json.dumps(run.model_dump(mode="json"), indent=1, ensure_ascii=False),
    )
