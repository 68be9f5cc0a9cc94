"""report.html in a browser: nothing runs, nothing is requested, it fits every width."""

from __future__ import annotations

import base64
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, browser
from reports import (
    classifier,
    full,
    language_model,
    layers,
    metrics,
    minimal,
    preferences,
    put_run,
    worse,
)

# Whatever of these ran, or was taken for a tag, would change the title.
EVIL = (
    "<script>document.title='ran'</script>",
    "</pre></svg></style><img src=x onerror=\"document.title='ran'\">",
    "\"'><svg onload=\"document.title='ran'\"><a href=\"javascript:document.title='ran'\">",
    "<img src='http://evil.invalid/x.png'><title>ran</title>{{ 7 * 7 }}{% raw %}",
    "\x1b]0;ran\x07\x1b[31mred\u202eback\u2066\u2028\x00",
)


def hostile() -> dict[str, Any]:
    """Data and names of all kinds that would like to be more than text, and very long words."""
    report = full()
    long = "".join(EVIL) + "w" * 3000
    for n, sample in enumerate(report["samples"]):
        sample |= dict.fromkeys(("prompt", "base", "adapted", "expected"), EVIL[n] + long)
    report["metrics"] = {EVIL[1] + "m" * 80: report["metrics"]["exact_match"]}
    report["audit"]["problems"][0] |= dict.fromkeys(("what", "cause", "fix"), long[:400])
    report["audit"]["modules"][EVIL[2]] = 1
    report["audit"]["checks"][0]["found"] = report["gate"]["failed"][0] = EVIL[4] + "x" * 200
    for module in report["layers"][:3]:
        module["module"] += EVIL[1]
    classes = classifier(13)["classes"]
    names = [EVIL[n % len(EVIL)] + f"{'c' * 40}{n}" for n in range(13)]
    figures = dict(zip(names, classes["per_class"].values(), strict=True))
    report["classes"] = classes | {"labels": names, "per_class": figures}
    report["domain"]["objection"] = EVIL[0] + long[:300]
    return report


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    reports = {
        **{"full": full(), "worse": worse(), "minimal": minimal(), "hostile": hostile()},
        "long": minimal("no different") | {"layers": layers(80)},
        **{"now": language_model(), "classes": classifier(), "two": classifier(2)},
        "pairs": preferences(),
    }
    rows = {"full": metrics(), "hostile": metrics(), "long": metrics(3000)}
    return {name: put_run(folder / name, r, rows.get(name))[0] for name, r in reports.items()}


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("browser")) as page:
        yield page


def test_nothing_runs_and_nothing_is_asked_for(opened: Browser, pages: dict[str, Path]) -> None:
    for name, page in pages.items():
        opened.open(page)
        assert opened.value("document.title") == f"python-docs: {words(name)}"
        assert opened.asked == [page.as_uri()] and opened.errors == []
        found = opened.value(
            "[...document.querySelectorAll('script, img, a, link, iframe')].length"
        )
        assert found == 0
    # Also a script, or a picture, that came into the page some other way would be stopped.
    opened.value(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: "
        "'document.title = 1'}), Object.assign(new Image(), {src: 'http://evil.invalid/'}))"
    )
    assert opened.value("document.title").startswith("python-docs")
    assert len(opened.errors) == 2 and all("Content Security" in e for e in opened.errors)


def words(name: str) -> str:
    same = ("long", "classes", "two", "pairs")
    return "worse" if name == "worse" else "no different" if name in same else "better"


def test_hostile_text_is_read_as_it_is(opened: Browser, pages: dict[str, Path]) -> None:
    opened.open(pages["hostile"])
    texts = opened.value("[...document.querySelectorAll('article pre')].map(e => e.textContent)")
    assert len(texts) == 16
    for n, text in enumerate(texts):
        spelled = EVIL[n // 4] + "".join(EVIL)
        for code in ("1b", "07", "202e", "2066", "2028", "00"):
            spelled = spelled.replace(chr(int(code, 16)), f"⟨U+{code.upper():0>4}⟩")
        assert text.startswith(spelled) and "more characters are not shown" in text
    assert EVIL[1] in opened.value("document.body.innerText")


def test_without_scripts_it_reads_the_same(opened: Browser, pages: dict[str, Path]) -> None:
    opened.open(pages["full"])
    before = opened.value("document.body.innerText")
    opened.open(pages["full"], scripts=False)
    assert opened.value("document.body.innerText") == before
    opened.open(pages["full"])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_telephone_in_both_schemes(
    opened: Browser, pages: dict[str, Path], scheme: str
) -> None:
    opened.resize(360)
    opened.scheme(scheme)
    for name, page in pages.items():
        opened.open(page)
        assert opened.value("document.documentElement.scrollWidth <= innerWidth"), name
        # Contrast of everything that is read: WCAG's 4.5 to 1.
        for selector in ("body", "h1", ".soft", ".but", "figcaption", "svg text", "thead th"):
            ink = opened.value(
                f"(e => e && getComputedStyle(e)[e.tagName === 'text' ? 'fill' : 'color'])"
                f"(document.querySelector({selector!r}))"
            )
            for ground in ("body", ".verdict"):
                under = f"getComputedStyle(document.querySelector({ground!r})).backgroundColor"
                assert not ink or contrast(ink, opened.value(under)) >= 4.5, (selector, ink)
        assert (luminance(opened.value("getComputedStyle(document.body).color")) < 0.2) == (
            scheme == "light"
        )
    opened.resize(1000)
    opened.scheme("light")


def luminance(colour: str) -> float:
    """Relative luminance of `rgb(r, g, b)` (WCAG 2.2)."""
    parts = [int(n) / 255 for n in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(ink: str, ground: str) -> float:
    low, high = sorted((luminance(ink), luminance(ground)))
    return (high + 0.05) / (low + 0.05)


def test_charts_are_drawn_inside_their_boxes_and_named(
    opened: Browser, pages: dict[str, Path]
) -> None:
    for width, name in itertools.product((360, 1000), ("pairs", "classes", "full")):
        opened.resize(width)
        opened.open(pages[name])
        # Marks, intervals, cells and squares lie within the page.
        outside = opened.value(
            "[...document.querySelectorAll('figure svg *')].map(e => e.getBoundingClientRect())"
            ".filter(b => b.left < -1 || b.right > innerWidth + 1).length"
        )
        assert outside == 0
        named = opened.value(
            "[...document.querySelectorAll('svg:not(svg svg)')].every(s => s.ariaHidden === 'true'"
            " || s.ariaLabel || s.closest('[role=img][aria-label], [aria-hidden=true]'))"
        )
        assert named
    count = "document.querySelectorAll({!r}).length".format
    assert opened.value(count(".forest .row circle.good, .forest .row path.bad")) == 6
    assert opened.value(count(".heat rect")) == 2 * 7 * 32
    assert opened.value(count(".plot rect")) == 6
    assert opened.value(count("th:not([scope])")) == 0
    zero, mark = opened.value(
        "['.zero', 'circle.good'].map(s => document.querySelector(`.forest ${s}`)"
        ".getBoundingClientRect().left)"
    )
    assert mark > zero  # better is on the right


def test_it_prints_on_light_paper_with_all_that_is_folded(
    opened: Browser, pages: dict[str, Path]
) -> None:
    features = [{"name": "prefers-color-scheme", "value": "dark"}]
    opened.call("Emulation.setEmulatedMedia", media="print", features=features)
    opened.open(pages["full"])
    assert luminance(opened.value("getComputedStyle(document.body).backgroundColor")) == 1
    assert opened.value(
        "[...document.querySelectorAll('details pre, details dl')]"
        ".every(e => e.getBoundingClientRect().height > 50)"
    )
    opened.call("Emulation.setEmulatedMedia", media="", features=features)
    sheets = base64.b64decode(opened.call("Page.printToPDF")["data"])
    assert sheets.startswith(b"%PDF") and 3 <= len(re.findall(rb"/Type\s*/Page\b", sheets)) <= 12
    opened.scheme("light")
