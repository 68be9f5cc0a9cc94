"""The page of `preview --html`: what it says, and that nothing in it runs or is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, browser
from classifiers import classify_file, make_body
from conftest import sentences
from prepared import prepared, put

from lora_kit import preview
from lora_kit.base.pin import pin
from lora_kit.errors import UserError, harmless
from lora_kit.run import load_run
from lora_kit.schema import Run
from lora_kit.tasks.causal import Conversations
from lora_kit.tasks.encode import Prepared, rows_of
from lora_kit.tasks.sequence import Classification

CHAT = Conversations()
# Whatever of these ran, or was taken for a tag, would change the title.
EVIL = (
    "<script>document.title='ran'</script>",
    "</script><script>document.title='ran'</script>",
    "</pre><img src=x onerror=\"document.title='ran'\">",
    "<img src='http://evil.invalid/x.png'><title>ran</title>",
    "{{ 7 * 7 }}{% raw %}",
    "\"'><b onmouseover=\"document.title='ran'\">",
    "\x1b[31mred\x07\u202eback\u2028",
)
NAME = "<img src=x onerror=\"document.title='ran'\">\u202e.jsonl"


def run_of(**values: Any) -> Run:
    known = {"recipe": "sft", "name": "test", "base": {"model": "nano"}, "data": {"train": "x"}}
    return Run.model_validate(known | values)


@pytest.fixture(scope="module")
def found(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Hostile rows to learn from, dropped and leaked ones among them, from a hostile file."""
    folder = tmp_path_factory.mktemp("data")
    rows: list[dict[str, Any]] = [
        {"prompt": f"{EVIL[n % len(EVIL)]} {s}", "completion": f"{EVIL[-1 - n % len(EVIL)]}\n{s}"}
        for n, s in enumerate(sentences(70))
    ]
    held_out = [{"prompt": s, "completion": s} for s in sentences(22, seed=1)]
    return prepared(
        tokenizer,
        check=False,
        train=put(folder / NAME, [*rows, {"prompt": None, "completion": "x"}]),
        eval=put(folder / "held.jsonl", [*held_out, rows[3]]),
        general=put(folder / "general.jsonl", [{"text": s} for s in sentences(25, seed=2)]),
    )


@pytest.fixture(scope="module")
def page(found: Prepared, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "preview.html"
    run = run_of()
    problems = found.census.problems(run.data.limits)
    assert len(problems) == 1 and "exact_leaks" in problems[0]
    preview.write_page(file, CHAT, run, found, tokenizer, problems)
    return file


@pytest.fixture(scope="module")
def open_browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture
def opened(open_browser: Browser, page: Path) -> Browser:
    open_browser.resize(1000)
    open_browser.open(page)
    return open_browser


def visible(selector: str) -> str:
    """JavaScript: the elements that are shown, as they read."""
    return (
        f"[...document.querySelectorAll({json.dumps(selector)})]"
        ".filter(e => e.checkVisibility()).map(e => e.textContent)"
    )


# --- What is written


def test_the_page_loads_nothing_and_escapes_what_comes_from_data(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.startswith(preview.MARK)
    tags: list[str] = []
    attributes: set[str] = set()

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            tags.append(tag)
            attributes.update(name for name, _ in attrs)

    Reader().feed(text)
    assert tags.count("script") == tags.count("style") == 1
    assert not {"img", "link", "iframe", "object", "a", "form"} & set(tags)
    assert not {n for n in attributes if n in ("src", "href", "style") or n.startswith("on")}
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u202e]", text)
    for part in ("default-src 'none'", "base-uri 'none'", "form-action 'none'"):
        assert part in text


def test_the_size_of_a_page_is_bounded(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": s, "completion": s * 40} for s in sentences(60)]
    found = prepared(tokenizer, train=put(tmp_path / "rows.jsonl", rows), max_length=4096)
    monkeypatch.setattr(preview, "SAMPLES_OF_A_PAGE", 3)
    monkeypatch.setattr(preview, "TOKENS_OF_A_PAGE", 100)
    text = preview.page(CHAT, run_of(), found, tokenizer, [])
    assert text.count("<article>") == 6 and text.count('title="token ') <= 600
    assert text.count("tokens not shown") == 6
    assert "Of a sample over 100 tokens the beginning and the end are shown." in text
    assert "a run would start" in text


@pytest.mark.parametrize("family", ["Bert", "Llama"])
def test_a_classifier_has_labels_and_no_supervised_tokens(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = Classification()
    run = load_run(
        classify_file(tmp_path, make_body(tmp_path / "base", family)), task_of=lambda _: task
    )
    processor, data = rows_of(task, run, pin(run.base))
    preview.write_page(tmp_path / "page.html", task, run, data, processor, [])
    preview.show(task, data, processor, "train", 2)
    text, shown = (tmp_path / "page.html").read_text(encoding="utf-8"), capsys.readouterr().out
    count = data.census.train
    assert f"<td>labels</td>\n<td>{count.samples}</td>" in text
    assert f"{count.tokens:,} tokens, one label per row; longest {count.longest}" in shown
    for words in ("supervised", "end-of-turn tokens", "trained on", "packing", "chat template"):
        assert words not in text.split("</style>")[1] and words not in shown, words
    assert "label: animals" in shown or "label: food" in shown or "label: time" in shown


def test_a_page_replaces_only_a_page(
    found: Prepared, tokenizer: Any, page: Path, work: Path
) -> None:
    (work / "mine.html").write_text("<!doctype html>\n<p>mine", encoding="utf-8")
    (work / "bytes.html").write_bytes(b"\xff\xfe")
    (work / "folder").mkdir()
    (work / "link.html").symlink_to("gone.html")
    before = sorted(work.iterdir())
    for name in ("mine.html", "bytes.html", "folder", "link.html"):
        with pytest.raises(UserError, match=f"--html {name}: exists and is not a preview page"):
            preview.write_page(Path(name), CHAT, run_of(), found, tokenizer, [])
    with pytest.raises(UserError, match="no such folder: nowhere"):
        preview.write_page(Path("nowhere/x.html"), CHAT, run_of(), found, tokenizer, [])
    with pytest.raises(UserError, match="cannot be written"):
        preview.write_page(Path("x" * 250), CHAT, run_of(), found, tokenizer, [])
    assert sorted(work.iterdir()) == before
    assert (work / "mine.html").read_text(encoding="utf-8") == "<!doctype html>\n<p>mine"

    (work / "old.html").write_text(preview.MARK + "old", encoding="utf-8")
    preview.write_page(Path("old.html"), CHAT, run_of(), found, tokenizer, ["why"])
    assert "<li>why</li>" in (work / "old.html").read_text(encoding="utf-8")
    assert sorted(work.iterdir()) == sorted([*before, work / "old.html"])


def test_a_page_that_fails_leaves_the_old_one(
    found: Prepared, tokenizer: Any, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    file = work / "old.html"
    file.write_text(preview.MARK + "old", encoding="utf-8")
    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
        preview.write_page(file, CHAT, run_of(), found, tokenizer, [])
    assert [f.read_text(encoding="utf-8") for f in work.iterdir()] == [preview.MARK + "old"]


# --- What a browser makes of it


def test_nothing_of_the_data_runs_and_nothing_is_asked_for(opened: Browser, page: Path) -> None:
    assert opened.value("document.title") == "test: preview"
    assert opened.asked == [page.as_uri()]
    assert opened.errors == []
    assert opened.value("document.scripts.length") == 1
    assert opened.value("document.images.length") == 0
    # Also a script that came into the page some other way would not run.
    opened.value(
        "document.body.append(Object.assign(document.createElement('script'), "
        "{textContent: 'document.title = 1'}))"
    )
    assert opened.value("document.title") == "test: preview"
    assert any("Content Security Policy" in error for error in opened.errors)


def test_figures_and_samples_are_those_of_the_census(
    opened: Browser, found: Prepared, tokenizer: Any
) -> None:
    rows = opened.value(
        "[...document.querySelector('table').rows].map(r => [...r.cells].map(c => c.innerText))"
    )
    table = {row[0]: row[1:] for row in rows}
    counts = (found.census.train, found.census.eval, found.census.general)
    assert table[""] == ["train", "eval", "general"]
    assert table["rows read"] == [str(c.rows_read) for c in counts] == ["71", "23", "25"]
    assert table["rows dropped"] == [str(sum(c.dropped.values())) for c in counts]
    assert table["rows dropped"][0] == "1"
    assert table["tokens"] == [f"{c.tokens:,}" for c in counts]
    assert [cell.split()[0] for cell in table["supervised tokens"]] == [
        f"{c.supervised_tokens:,}" for c in counts
    ]
    text = opened.value("document.body.innerText")
    assert "A run would stop here." in text and "raise data.limits.exact_leaks" in text
    assert "dropped: with a null `prompt`" in text and f"{harmless(NAME)}:71" in text
    bars = opened.value(
        "[...document.querySelectorAll('svg')].map(s => [...s.querySelectorAll('rect title')]"
        ".reduce((sum, t) => sum + parseInt(t.textContent), 0))"
    )
    assert bars == [c.samples for c in counts]
    samples = opened.value("[...document.querySelectorAll('section')].map(s => s.dataset.use)")
    assert samples == ["train", "eval", "general"]
    for use in samples:
        shown = preview.samples(CHAT, found, tokenizer, use, 50, 800)
        articles = f"[...document.querySelectorAll('section[data-use={use}] article')]"
        texts = opened.value(f"{articles}.map(a => a.querySelector('pre').textContent)")
        assert texts == ["".join(p.text for p in s.pieces).replace("\n", "↵\n") for s in shown]
        learned = opened.value(
            f"{articles}.map(a => [...a.querySelectorAll('b[title]')].map(b => b.title).join())"
        )
        assert learned == [
            ",".join("token " + ", ".join(map(str, p.ids)) for p in s.pieces if p.supervised)
            for s in shown
        ]


def test_buttons_keys_and_the_split_lead_through_the_samples(opened: Browser) -> None:
    def where() -> tuple[str, list[str]]:
        return opened.value("document.querySelector('output').value"), [
            text.split(",")[0] for text in opened.value(visible("article > p"))
        ]

    assert where() == ("1 of 50", ["train 1"])
    opened.press("ArrowRight")
    opened.click(".next")
    assert where() == ("3 of 50", ["train 4"])
    opened.click(".previous")
    opened.press("ArrowLeft")
    opened.press("ArrowLeft")
    assert where() == ("50 of 50", ["train 70"])
    opened.value(
        "(s => { s.value = 'eval'; s.dispatchEvent(new Event('change')); })"
        "(document.querySelector('select'))"
    )
    assert where() == ("1 of 22", ["eval 1"])
    opened.press("ArrowRight")
    assert where() == ("2 of 22", ["eval 2"])
    assert opened.errors == []


def test_without_scripts_all_samples_are_listed(open_browser: Browser, page: Path) -> None:
    open_browser.open(page, scripts=False)
    assert len(open_browser.value(visible("article"))) == 50 + 22 + 25
    assert open_browser.value(visible("nav")) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_narrow_screen_in_both_schemes(opened: Browser, scheme: str) -> None:
    opened.resize(360)
    opened.scheme(scheme)
    assert opened.value("document.documentElement.scrollWidth <= innerWidth")
    colours = opened.value(
        "['color', 'backgroundColor'].map(name => getComputedStyle("
        "document.querySelector(name === 'color' ? 'h1' : 'button'))[name])"
    )
    light, dark = ([255] * 3, [0] * 3)
    ink, ground = ([int(n) for n in re.findall(r"\d+", colour)[:3]] for colour in colours)
    assert (ink, ground > [127] * 3) == ((dark, True) if scheme == "light" else (light, False))
    underlined = "getComputedStyle(document.querySelector('pre b')).textDecorationLine"
    assert opened.value(underlined) == "underline"
