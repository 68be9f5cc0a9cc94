"""One page and one object that say what a run came to, whatever the data say."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conftest import RunMaker, sentences
from trained import finish

from lora_kit.prove.report import _WORDS, _curve, in_words, write_report
from lora_kit.prove.show import comparison, printable, side_by_side
from lora_kit.run import load_run

EVIL = (
    "<script>alert('\"1\"')</script><img src=http://evil.example/x.png> & {{ 7 * 7 }} \x1b[31mred"
)
VOID = {"meta", "br", "img", "path", "polyline", "link"}


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that tags are closed in their order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        while self.open and self.open[-1] == "p" and tag != "p":  # </p> may be left out
            self.open.pop()
        assert self.open and self.open[-1] == tag, (tag, self.open)
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)


def no_constants(name: str) -> Any:
    raise AssertionError(f"{name} is not JSON")


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"), parse_constant=no_constants)


@pytest.fixture
def run(run_file: RunMaker, work: Path) -> Path:
    rows = [
        {"prompt": f"{EVIL} {n}", "completion": f"{EVIL} {s}"} for n, s in enumerate(sentences(30))
    ]
    (work / "evil<b>&.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (work / "general.txt").write_text("<|endoftext|>".join(sentences(25, seed=5)), encoding="utf-8")
    changes = {"data.train": "evil<b>&.jsonl", "data.general": "general.txt", "data.eval": 0.7}
    return finish(run_file, "sft", **changes, **{"train.max_length": 256})


def test_the_page_is_one_file_and_shows_data_as_text(run: Path) -> None:
    text = (run / "report.html").read_text(encoding="utf-8")
    page, report = Page(text), read(run / "report.json")
    assert "script" not in page.tags and "img" not in page.tags and "link" not in page.tags
    assert not [v for n, v in page.attributes if n in ("src", "href") or "://" in v]
    assert not [n for n, _ in page.attributes if n.startswith("on")]
    assert "url(" not in text and "@import" not in text
    # The data stand there, letter by letter, as text.
    assert (
        page.text.count(EVIL) >= 6 and "{{ 7 * 7 }}" in page.text and "evil<b>&.jsonl" in page.text
    )
    assert in_words(report["verdict"]["domain"]) in page.text
    assert in_words(report["verdict"]["general"]) in page.text
    assert f"{report['domain']['loss']['base']:.3f}" in page.text
    assert "polyline" in page.tags


def test_the_object_has_the_keys_that_scripts_rely_on(run: Path) -> None:
    report = read(run / "report.json")
    assert set(report) == {"verdict", "domain", "general", "training", "memory", "samples"}
    assert set(report["verdict"]) == {"domain", "general"}
    for part in ("domain", "general"):
        assert set(report[part]) == {"documents", "loss", "bits_per_byte"}
        for measure in ("loss", "bits_per_byte"):
            found = report[part][measure]
            assert set(found) == {"base", "adapted", "difference", "ci95"}
            assert found["ci95"][0] <= found["difference"] <= found["ci95"][1]
            assert found["adapted"] - found["base"] == pytest.approx(found["difference"], abs=2e-4)
    assert report["training"]["steps"] == 8 and report["training"]["world_size"] == 1
    assert report["training"]["trainable_parameters"] == 8192
    assert report["training"]["tokens"] > 0 and report["training"]["seconds"] > 0
    assert report["training"]["tokens_per_second"] > 0
    assert report["memory"]["measured_mib"] > 100 and "predicted_mib" in report["memory"]
    assert [set(s) for s in report["samples"]] == [{"prompt", "expected", "base", "adapted"}] * 3
    assert all(s["prompt"].startswith(EVIL) for s in report["samples"])


def test_the_terminal_is_not_steered(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = read(run / "report.json")
    report["samples"][0]["adapted"] = (
        "\x1b]0;title\x07\x9b31m\r\u202egnp.\u2066 [bold]x[/bold]" * 50
    )
    comparison(report, "[red]Title[/red]")
    side_by_side(report)
    shown = capsys.readouterr().out
    assert not [c for c in shown if not c.isprintable() and c != "\n"]
    assert in_words(report["verdict"]["domain"]) in shown and "[bold]x[/bold]" in shown
    assert "general, bits per byte" in shown
    assert printable("a\n b\t\x00c") == "a b  c" and len(printable("x" * 500)) == 160


def test_every_word_has_a_sentence_and_the_page_takes_it(run: Path) -> None:
    report, opened = read(run / "report.json"), load_run(run / "run.yaml")
    for word in ("better", "worse", "no different", "too little data"):
        # Without general text, samples or a curve.
        few = {**report, "verdict": {"domain": word}, "general": None, "samples": []}
        (run / "metrics.jsonl").unlink(missing_ok=True)
        write_report(run, opened, few)
        page = Page((run / "report.html").read_text(encoding="utf-8"))
        assert _WORDS[word] in page.text and "polyline" not in page.tags
        assert "data.general names no text" in page.text
        assert "No samples were generated" in page.text
        assert read(run / "report.json")["verdict"] == {"domain": word}
    for word in ("kept", "forgot", "too little data"):
        write_report(run, opened, {**report, "verdict": {"domain": "better", "general": word}})
        assert in_words(word) in Page((run / "report.html").read_text(encoding="utf-8")).text
    assert not list(run.glob("*.partial"))


def test_the_curve_stays_in_its_box() -> None:
    curve = _curve([(1, 3.0), (5, 2.0), (9, 2.5)], width=100, height=10)
    assert curve["line"] == "0.0,0.0 50.0,10.0 100.0,5.0"
    assert (curve["first"], curve["last"], curve["low"], curve["high"]) == (1, 9, "2.00", "3.00")
    assert _curve([(1, 3.0), (2, 3.0)])["line"] == "0.0,0.0 640.0,0.0"
    assert _curve([]) == _curve([(1, 3.0)]) == _curve([(4, 3.0), (4, 2.0)]) == {}
