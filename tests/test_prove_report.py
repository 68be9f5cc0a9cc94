"""One page and one object with what a run came to, for every task and whatever the data hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conftest import RunMaker, sentences
from reports import (
    classifier,
    full,
    language_model,
    measured,
    metrics,
    minimal,
    preferences,
    put_run,
    scored,
    similarity,
    worse,
)
from trained import finish

from lora_kit.prove.report import findings, in_lines, in_words, write_report
from lora_kit.prove.show import comparison, printable, side_by_side

EVIL = (
    "<script>alert('\"1\"')</script><img src=http://evil.invalid/x.png> & {{ 7 * 7 }} \x1b[31mred"
)
VOID = {"meta", "br", "img", "link"}
WORDS = ("better", "worse", "no different", "too little data")


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that tags are closed in their order."""

    def __init__(self, file: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(file.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open and self.open.pop() == tag, (tag, self.open)
        if tag in ("td", "th"):
            self.words.append(" ")

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


def no_constant(name: str) -> Any:
    raise AssertionError(f"{name} is not JSON")


def page_of(folder: Path, report: dict[str, Any], rows: Any = None) -> Page:
    return Page(put_run(folder, report, rows)[0])


def test_the_verdict_comes_first_and_nothing_bad_is_left_out(tmp_path: Path) -> None:
    page = page_of(tmp_path, full(), metrics())
    headline = page.text.index("python-docs: better than its base on held-out data")
    but = page.text.index(
        "But it forgets general text, the gate failed, a check of the training failed and "
        "it is worse on hellaswag/acc_norm and wikitext/bits_per_byte."
    )
    first = page.text.index("Base against adapted")
    for words in (
        "3.442 → 2.951 nats per token (−14.3%, 95% −16.3% to −12.5%)",
        "general text got worse: the adapter forgets",
        "better than the base with examples in its prompt",
        "0.114 → 0.471 (+0.357, 95% +0.271 to +0.443)",
        "it is no mean over rows, so it has no interval",
        "general: forgot, asked for kept",
        "3 of 224 adapters did not move",
        "Likely cause: a kernel of the attention",
        "What to do: set base.attn_implementation",
    ):
        assert headline < but < page.text.index(words) < first, words
    for words in (
        "14.3% better (12.5 to 16.3)",
        "1.1 points better (2.0 worse to 4.3 better)",
        "a gap of 0.148, so 23% of the gain does not carry over",
        "best, step 200",
        "stopped early, step 300",
        "Where the adapter lost most",
        "87.3% of the base",
        "nothing frozen moved: not checked",
        "28 rows dropped, too long (first: rows.jsonl:71)",
        "17.2 GiB (-3%)",
        "7d3f" * 10,
        "lora-kit train runs/python-docs/run.yaml name=python-docs-again",
    ):
        assert page.text.index(words) > first, words


@pytest.mark.parametrize("word", WORDS)
def test_a_report_without_the_newer_parts_has_a_page(tmp_path: Path, word: str) -> None:
    report = minimal(word)
    page = page_of(tmp_path, report)
    assert in_words(word) in page.text and "polyline" not in page.tags
    assert "There is no curve to draw" in page.text
    assert "Not measured: set data.general to text that must not be forgotten" in page.text
    assert "no training that came to its end was checked" in page.text
    assert "The adapter by layer" not in page.text
    # And without the other files of the run.
    run = put_run(tmp_path, report)[1]
    for name in ("run.lock.json", "census.json"):
        (tmp_path / name).unlink()
    write_report(tmp_path, run, {name: report[name] for name in ("verdict", "domain")})
    page = Page(tmp_path / "report.html")
    assert in_words(word) in page.text and "Side by side" not in page.text
    assert not list(tmp_path.glob("*.partial"))


def test_every_part_may_be_null(tmp_path: Path) -> None:
    report = full()
    for name in report.keys() - {"verdict", "domain"}:
        page_of(tmp_path, report | {name: None}, metrics())
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))


def test_lines_say_what_the_page_says() -> None:
    lines = in_lines(full())
    assert lines[0] == (
        "domain: 3.442 -> 2.951 nats per token (-14.3%, 95% -16.3% to -12.5%): "
        "better than the base on held-out data"
    )
    assert [line.split(":")[0] for line in lines] == [
        *("domain", "general", "few_shot", "exact_match", "rouge_l"),
        *("hellaswag/acc_norm", "wikitext/bits_per_byte", "wikitext/word_perplexity"),
        *("gate", "audit"),
    ]
    assert lines[-2] == "gate: failed; general: forgot, asked for kept"
    assert "did not move" in lines[-1] and "attn_implementation" in lines[-1]
    assert in_lines(minimal())[1].startswith("general: not measured: set data.general to text")
    assert in_lines(worse())[2].endswith("worse than the base with examples in its prompt")


def test_kept_is_said_with_a_but_where_much_is_possible() -> None:
    report = minimal() | {"general": measured(3.0, 3.1, -0.01, 0.6)}
    report["verdict"]["general"] = "kept"
    [said] = [found.sentence for found in findings(report) if found.part == "general"]
    assert said == "no forgetting was shown, but up to +20.0% is possible"
    report["general"] = measured(3.0, 3.0, -0.01, 0.01)
    [said] = [found.sentence for found in findings(report) if found.part == "general"]
    assert said == in_words("kept")


def test_answers_that_do_not_use_their_prompts_are_told_from_nothing_gained() -> None:
    report = minimal("no different")
    report["domain"] = measured(3.0, 2.0, -1.1, -0.9)
    report["prompt_use"] = {"rows": 40, "base": 0.2, "adapted": 0.0, "ci95": [0, 0], "blind": True}
    assert "hardly depend on their prompts" in findings(report)[0].sentence
    report["domain"] = measured(3.0, 3.0, -0.1, 0.1)
    assert findings(report)[0].sentence == in_words("no different")


def test_a_task_of_the_harness_is_evaluated_by_its_direction_and_rows() -> None:
    task = {"rows": 60, "base": 0.5, "adapted": 0.6, "difference": 0.1, "ci95": [0.05, 0.2]}
    for change, word in (
        ({}, "better"),
        ({"higher_is_better": False}, "worse"),
        ({"ci95": [-0.1, 0.2]}, "no different"),
        ({"rows": 19}, "too little data"),
        ({"ci95": None}, "not evaluated"),
    ):
        assert findings(minimal() | {"harness": {"a/b": task | change}})[2].word == word


def test_the_present_form_reads_like_the_old_one() -> None:
    assert in_lines(language_model()) == in_lines(full())


def test_a_rival_that_does_as_well_is_named(tmp_path: Path) -> None:
    lines = in_lines(classifier())
    assert lines[:2] == [
        "domain: accuracy 0.801 -> 0.804 (+0.003, 95% -0.021 to +0.027): "
        "no different from a linear probe on frozen features: no gain was shown",
        "macro_f1: 0.793 -> 0.799 (+0.006, 95% -0.019 to +0.030): "
        "no different from a linear probe on frozen features",
    ]
    assert [line.split(":")[0] for line in lines] == ["domain", "macro_f1", "audit"]
    page = page_of(tmp_path, classifier())
    for words in (
        "python-docs: no different from a linear probe on frozen features",
        "A linear probe on frozen features against adapted",
        "linear_probe (the rival) 0.801 0.793",
        "majority 0.013 0.000",
        "the best contender without an adapter, chosen on training rows",
        "760 held-out rows",
        "on training rows the accuracy rose by 0.050 (0.930 to 0.980)",
    ):
        assert words in page.text, words
    assert "data.general" not in page.text
    assert "its base" not in page.text
    for word, sentence in (
        ("better", "better than a linear probe on frozen features on held-out data"),
        (
            "worse",
            "worse than a linear probe on frozen features: the adapter is not worth shipping",
        ),
    ):
        assert sentence in in_lines(classifier(word=word))[0]


def test_a_reference_was_not_chosen(tmp_path: Path) -> None:
    """Only where the base has a new head, and is no contender, a rival is chosen."""
    report = preferences()
    report["contenders"]["base"] = {"accuracy": 0.4, "margin": -0.1}
    page = page_of(tmp_path, report)
    assert "The rival is what the verdict compares with: the reference model." in page.text
    assert "chosen on training rows" not in page.text


def test_a_metric_that_decides_is_the_headline(tmp_path: Path) -> None:
    report = language_model()
    none = {**scored(0.0, 0.0, 0.0, 0.0), "rows": 140, "few_shot": 0.5, "changed": 0}
    report["metrics"] = {"accuracy": none}
    report["domain"]["decided_by"] = "accuracy"
    report["few_shot"]["accuracy"] = {**scored(0.5, 0.0, -0.6, -0.4), "rows": 140}
    report["verdict"] = {
        **{"domain": "no different", "accuracy": "no different"},
        **{"few_shot": "worse", "general": "kept"},
    }
    lines = in_lines(report)
    assert lines[0].startswith("domain: accuracy 0.000 -> 0.000")
    assert lines[1].startswith("loss: 3.442 -> 2.951") and lines[1].endswith("better than the base")
    page = page_of(tmp_path, report)
    assert "no different from its base" in page.text
    assert "it is worse than the base with examples in its prompt" in page.text


def test_a_contender_that_scored_better_is_not_hidden(tmp_path: Path) -> None:
    """The rival was chosen on training rows; on held-out ones another was better."""
    report = classifier(word="better")
    report["domain"]["accuracy"] |= {"difference": 0.05, "ci95": [0.02, 0.08]}
    report["contenders"]["zero_shot"]["accuracy"] = 0.9
    page = page_of(tmp_path, report)
    assert "But zero-shot classification by label names scored better (0.900)." in page.text


@pytest.mark.parametrize("count", [2, 12, 13, 77])
def test_classes_can_be_read_however_many_there_are(tmp_path: Path, count: int) -> None:
    report = classifier(count)
    page = page_of(tmp_path, report)
    assert ("Confusion matrix" in page.text) == (count <= 12)
    assert ("The most frequent mistakes" in page.text) == (count > 12)
    assert f"All {count} classes" in page.text or count <= 12
    confusion = report["classes"]["confusion"]
    wrong = sum(map(sum, confusion)) - sum(confusion[n][n] for n in range(count))
    assert f"{wrong} of {sum(map(sum, confusion))} held-out rows were given another" in page.text
    name = "card_payment_wrong_exchange_rate"
    if count > 12:
        assert f"{name}_0 {name}_1 7 10 (70%)" in page.text
    # Rows, precision, recall and F1; the last class never occurs.
    figures = report["classes"]["per_class"][f"{name}_0"]
    assert figures["support"] == 10 and figures["recall"] == 0.3
    row = " ".join(f"{figures[key]:.3f}" for key in ("precision", "recall", "f1"))
    assert f"10 {row}" in page.text
    assert f"{name}_{count - 1} 0 not in the held-out rows" in page.text


def test_perfect_pairs_with_broken_text_are_not_called_better(tmp_path: Path) -> None:
    lines = in_lines(preferences())
    assert lines[0].startswith("domain: accuracy 0.500 -> 1.000 (+0.500, 95% +0.500 to +0.500): ")
    assert "scored better, but general text got worse" in lines[0]
    assert lines[0].endswith("completions became 22 times shorter")
    assert "margin: 0.000 -> 14.310" in lines[1]
    assert (
        "generation: length 22.6 -> 1 tokens; unfinished 0.08 -> 0; kl 0 -> 6.42 nats per token"
        in lines
    )
    page = page_of(tmp_path, preferences())
    for words in (
        "python-docs: not better than the reference model",
        "General text got worse (3.142 to 16.700 nats per token) and completions became 22 times "
        "shorter.",
        "length, tokens 64 22.600 1.000 −21.600 −23.500 to −19.800",
        "KL divergence, nats per token 64 0.000 6.420",
        "Forgot. On 60 documents of general text",
    ):
        assert words in page.text, words
    assert "it forgets general text" not in page.text  # the objection has that already
    assert "Forgot. On" in page.text and "50.0 points better" in page.text


def test_a_metric_may_decide(tmp_path: Path) -> None:
    """`prove.metrics`: the first of them decides; the loss is a further score."""
    report = language_model()
    report["domain"]["decided_by"] = "exact_match"
    lines = in_lines(report)
    assert lines[0].startswith("domain: exact_match 0.114 -> 0.471 (+0.357")
    assert lines[1].startswith("loss: 3.442 -> 2.951 nats per token (-14.3%")
    assert [line.split(":")[0] for line in lines].count("exact_match") == 0
    page_of(tmp_path, report)


@pytest.mark.parametrize("made", [full, language_model, classifier, preferences, similarity])
def test_a_page_has_no_section_that_does_not_apply(
    tmp_path: Path, made: Callable[[], dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    report = made()
    text = page_of(tmp_path, report, metrics()).text
    language = "loss" in report["domain"]
    forgets = language or made is preferences
    comparison(report)
    shown = " ".join([capsys.readouterr().out, *in_lines(report)])
    for words in ("General text", "Forgetting", "general text", "supervised tokens"):
        assert (words in text) == forgets, words
    assert ("general" in shown) == forgets
    assert ("Side by side" in text) == bool(report["samples"])
    assert ("labels 1,272 1,272" in text) == (not forgets)
    assert "data.replay" not in text or language  # only language models read it
    for whole in (text, shown):
        assert ("nats per token" in whole) == forgets
    assert ("in loss, nats per token" in text) == forgets
    assert ("that are shares of 1" in text) == (made is not similarity)


def test_scores_of_a_users_recipe_are_named_and_directed_by_it(tmp_path: Path) -> None:
    page = page_of(tmp_path, similarity())
    for words in (
        "python-docs: better than the contender mean on held-out data",
        "The contender mean against adapted",
        "in percent of the value that they are compared with",
        "57.3% better (38.8 to 71.4)",
        "squared_error (lower is better) 40 0.255 0.109",
        "on training rows the squared_error fell by 0.145 (0.251 to 0.106), on held-out rows by "
        "0.146: a gap of −0.001",
    ):
        assert words in page.text, words
    assert "percent of the base" not in page.text


def test_a_score_that_got_worse_on_training_rows_did_not_rise(tmp_path: Path) -> None:
    report = classifier()
    report["overfitting"] |= {"train_accuracy": {"base": 0.984, "adapted": 0.891}, "gap": -0.1}
    assert (
        "on training rows the accuracy fell by 0.093 (0.984 to 0.891), on held-out rows it changed "
        "by +0.007: a gap of −0.100"
    ) in page_of(tmp_path, report).text


def test_what_trained_alone_is_named(tmp_path: Path) -> None:
    _, run = put_run(tmp_path, classifier())
    train = run.train.model_copy(update={"trainable": "head"})
    write_report(tmp_path, run.model_copy(update={"train": train}), classifier())
    text = Page(tmp_path / "report.html").text
    assert "the head alone; 300 steps" in text and "LoRA" not in text.split("All contenders")[0]


def test_text_of_the_data_is_cut_and_kept_as_text(tmp_path: Path) -> None:
    evil = "<script>x</script></pre></svg><img src=x onerror=y> {{ 7 * 7 }} \x1b[31m\u202e"
    report = full()
    for sample in report["samples"]:
        sample |= {"prompt": evil, "expected": "", "adapted": "w" * 9000}
    report["audit"]["problems"][0]["what"] = report["gate"]["failed"][0] = evil
    report["metrics"] = {evil: report["metrics"]["rouge_l"]}
    report["layers"][0]["module"] = report["layers"][1]["module"] = f"model.layers.0.{evil}"
    page = page_of(tmp_path, report, metrics())
    shown = "<script>x</script></pre></svg><img src=x onerror=y> {{ 7 * 7 }} ⟨U+001B⟩[31m⟨U+202E⟩"
    assert page.text.count(shown) >= 9 and "(nothing)" in page.text
    assert "… 7,000 more characters are not shown" in page.text and "w" * 2001 not in page.text
    assert not {"script", "img", "link", "a", "iframe"} & set(page.tags)
    assert not {n for n, _ in page.attributes if n in ("src", "href") or n.startswith("on")}
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "url(" not in text and "@import" not in text
    assert not [c for c in text if not c.isprintable() and c != "\n"]
    assert "default-src 'none'" in text


def test_the_terminal_is_not_steered(capsys: pytest.CaptureFixture[str]) -> None:
    report = full()
    steer = "\x1b]0;title\x07\x9b31m\r\u202egnp.\u2066 [bold]x[/bold]" * 50
    report["samples"][0]["adapted"] = report["audit"]["problems"][0]["what"] = steer
    comparison(report, "[red]Title[/red]")
    side_by_side(report)
    shown = capsys.readouterr().out
    assert not [c for c in shown if not c.isprintable() and c != "\n"]
    assert in_words("better") in shown and "[bold]x[/bold]" in shown
    assert "general, bits per byte" in shown
    assert "base with 3 examples" in shown and "140" in shown
    assert printable("a\n b\t\x00c") == "a b ⟨U+0000⟩c" and len(printable("x" * 500)) == 160


def test_the_terminal_shows_every_kind(capsys: pytest.CaptureFixture[str]) -> None:
    comparison(classifier())
    shown = capsys.readouterr().out
    assert "linear_probe against adapted" in shown and "linear_probe (rival)" in shown
    # The contenders, best first.
    names = ("\nadapted", "\nlinear_probe (rival)", "\nzero_shot", "\nmajority")
    assert [shown.index(name) for name in names] == sorted(map(shown.index, names))
    assert "most frequent mistakes: card_payment" in shown and "(7 of 10)" in shown
    assert "no different from a linear probe on frozen features: no gain" in " ".join(shown.split())
    comparison(preferences())
    shown = capsys.readouterr().out
    assert "generated, kl" in shown and "domain, margin" in shown
    comparison(language_model())
    shown = capsys.readouterr().out
    assert "domain, nats per token" in shown and "-14.3%" in shown


# --- A real run


@pytest.fixture
def run(run_file: RunMaker, work: Path) -> Path:
    rows = [
        {"prompt": f"{EVIL} {n}", "completion": f"{EVIL} {s}"} for n, s in enumerate(sentences(30))
    ]
    (work / "evil<b>&.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (work / "general.txt").write_text("<|endoftext|>".join(sentences(25, seed=5)), encoding="utf-8")
    changes = {"data.train": "evil<b>&.jsonl", "data.general": "general.txt", "data.eval": 0.7}
    return finish(run_file, "sft", **changes, **{"train.max_length": 256})


def test_a_run_leaves_the_object_and_its_page(run: Path) -> None:
    report = json.loads(
        (run / "report.json").read_text(encoding="utf-8"), parse_constant=no_constant
    )
    assert set(full()) - set(report) <= {"scratch"}
    assert {"domain", "general"} <= set(report["verdict"])
    for part in ("domain", "general"):
        scored = {"documents", "rival", "loss", "bits_per_byte"}
        assert set(report[part]) - {"objection"} == scored
        assert report[part]["rival"] == "base"
        for measure in ("loss", "bits_per_byte"):
            found = report[part][measure]
            assert set(found) == {
                *("base", "adapted", "difference", "ci95", "better", "changed"),
            }
            assert found["ci95"][0] <= found["difference"] <= found["ci95"][1]
            assert found["adapted"] - found["base"] == pytest.approx(found["difference"], abs=2e-4)
    training = report["training"]
    assert (training["steps"], training["world_size"]) == (8, 1)
    assert training["trainable_parameters"] == 8192 and training["tokens"] > 0
    assert training["tokens_per_second"] > 0 and training["seconds"] > 0
    assert report["memory"]["measured_mib"] > 100 and "predicted_mib" in report["memory"]
    assert all({"prompt", "expected", "base", "adapted"} <= set(s) for s in report["samples"])
    page = Page(run / "report.html")
    shown = EVIL.replace("\x1b", "⟨U+001B⟩")
    assert page.text.count(shown) >= 6 and "evil<b>&.jsonl" in page.text
    assert f"{report['domain']['loss']['base']:.3f}" in page.text and "polyline" in page.tags
    assert not {"script", "img", "link"} & set(page.tags)
