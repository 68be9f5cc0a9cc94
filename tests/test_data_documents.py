"""Text of HTML pages and PDFs: the main text, rightly decoded, or a line that says why not."""

from __future__ import annotations

import gzip
import io
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import RunMaker, make_tokenizer, sentences
from prepared import prepared, said

from lora_kit.data.readers import FEWEST_DOCUMENTS
from lora_kit.data.sources import open_sources
from lora_kit.errors import UserError
from lora_kit.run import load_run

STORY = [f"{line[:-1]}, and that is the {n}th thing." for n, line in enumerate(sentences(12))]


def page(paragraphs: list[str], head: str = "", begin: str = "<!doctype html>") -> str:
    """A page with what stands around a text: navigation, scripts, a footer."""
    links = "".join(f'<li><a href="/{n}">Navigation {n}</a></li>' for n in range(9))
    body = "".join(f"<p>{text}</p>\n" for text in paragraphs)
    return (
        f"{begin}<html><head>{head}<title>Bread</title><style>p {{color: red}}</style>"
        f"<script>var hidden = 'scripted';</script></head><body><nav><ul>{links}</ul></nav>"
        f"<main><article><h1>Bread</h1>{body}</article></main>"
        "<script>document.write('scripted')</script><footer><p>All rights reserved</p></footer>"
        "</body></html>"
    )


def pdf(*pages: str, cut: bytes = b"") -> bytes:
    """A PDF by hand: a line of text on each page, or none."""
    contents = [f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET" if text else "" for text in pages]
    kids = " ".join(f"{4 + 2 * n} 0 R" for n in range(len(pages)))
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for n, content in enumerate(contents):
        objects += [
            "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] "
            f"/Resources << /Font << /F1 3 0 R >> >> /Contents {5 + 2 * n} 0 R >>",
            f"<< /Length {len(content)} >>\nstream\n{content}\nendstream",
        ]
    out, offsets = b"%PDF-1.4\n", []
    for number, text in enumerate(objects, 1):
        offsets.append(len(out))
        out += f"{number} 0 obj\n{text}\nendobj\n".encode("latin-1")
    table = "".join(f"{offset:010d} 00000 n \n" for offset in offsets)
    count, start = len(objects) + 1, len(out)
    out += f"xref\n0 {count}\n0000000000 65535 f \n{table}".encode()
    return out + f"trailer\n<< /Size {count} /Root 1 0 R >>\nstartxref\n{start}\n%%EOF".encode()


def encrypted(password: str) -> bytes:
    import pypdf

    writer = pypdf.PdfWriter(clone_from=pypdf.PdfReader(io.BytesIO(pdf("A secret."))))
    writer.encrypt(password, "owner", algorithm="RC4-128")
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


def put(folder: Path, name: str, content: str | bytes) -> str:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(file)


def rows(source: str) -> list[tuple[str, str]]:
    """(place, text) of every row of a source."""
    (opened,) = open_sources(source)
    found = [row for batch in opened.batches() for row in batch.parsed()]
    return [(row.place, row.columns["text"]) for row in found]


def refused(source: str) -> str:
    with pytest.raises(UserError) as caught:
        rows(source)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    return str(caught.value)


def test_the_main_text_of_a_page_and_nothing_around_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.html", "b.HTM", "c.html.gz"):
        content = page(STORY).encode()
        file = put(tmp_path, name, gzip.compress(content) if name.endswith(".gz") else content)
        [(place, text)] = rows(file)
        assert place == f"{file}:1"
        assert [line for line in text.splitlines() if line in STORY] == STORY
        assert not any(word in text for word in ("Navigation", "scripted", "color", "rights"))
    # A short page is one as well.
    [(_, text)] = rows(put(tmp_path, "short.html", "<p>Bread rises slowly.</p>"))
    assert text.strip() == "Bread rises slowly."
    # A page that is not what HTML should be is read as browsers do, without a word about it.
    [(_, text)] = rows(put(tmp_path, "odd.html", page(STORY).replace("</p>", "")[:-40]))
    assert all(line in text for line in STORY)
    assert capfd.readouterr() == ("", "")


WORDS = {
    "iso-8859-1": "Überall “gebräunte” Brötchen für fünf Gäste.",
    "windows-1251": "Хлеб поднимается медленно, и корочка хрустит.",
    "shift_jis": "パンはゆっくりと膨らみます。①番のパンです。",
    "gb2312": "面包在石炉里慢慢地烤熟，香味四溢。",
    "utf-8": "Überall жареный パン 面包.",
}


@pytest.mark.parametrize("declared", WORDS)
@pytest.mark.parametrize(
    "head",
    [
        '<meta charset="{}">',
        '<META http-equiv=Content-Type content="text/html; charset={}">',
        '<?xml version="1.0" encoding="{}"?>',
    ],
)
def test_the_encoding_is_the_one_that_a_page_declares(
    tmp_path: Path, declared: str, head: str
) -> None:
    written = {"iso-8859-1": "cp1252", "shift_jis": "cp932"}.get(declared, declared)
    says = head.format(declared)
    begin = says if says.startswith("<?") else "<!doctype html>"
    content = page([WORDS[declared], *STORY], "" if says == begin else says, begin)
    [(_, text)] = rows(put(tmp_path, "a.html", content.encode(written)))
    assert WORDS[declared] in text and STORY[-1] in text


def test_an_encoding_that_is_not_the_one_declared_is_refused(tmp_path: Path) -> None:
    wrong = "\n" + page(["Brötchen"]).replace("<html>", "<html>\n")
    assert "a.html:3: not UTF-8: convert it" in refused(
        put(tmp_path, "a.html", wrong.encode("latin-1"))
    )
    declared = page(["Brötchen"], '<meta charset="utf-8">').encode("latin-1")
    assert "a.html:1: not UTF-8: convert it" in refused(put(tmp_path, "a.html", declared))
    unknown = page(STORY, '<meta charset="x-none">')
    assert "a.html: cannot extract text (unknown encoding: x-none" in refused(
        put(tmp_path, "a.html", unknown)
    )
    no_text = page(STORY, '<meta charset="hex">')
    assert "a.html: cannot extract text (" in refused(put(tmp_path, "a.html", no_text))
    assert "a.html:1: not UTF-8" in refused(put(tmp_path, "a.html", page(STORY).encode("utf-16")))
    assert "a.html:2: contains a NUL byte" in refused(put(tmp_path, "a.html", "<p>a\n\0</p>"))
    [(_, text)] = rows(put(tmp_path, "a.html", page(["Brötchen", *STORY]).encode("utf-8-sig")))
    assert "Brötchen" in text


def test_a_pdf_page_after_page(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    content = pdf("Bread rises slowly.", "", "It is baked \\(hot\\).")
    for name, written in (("a.pdf", content), ("b.PDF.gz", gzip.compress(content))):
        file = put(tmp_path, name, written)
        [(place, text)] = rows(file)
        assert place == f"{file}:1"
        assert text.split() == ["Bread", "rises", "slowly.", "It", "is", "baked", "(hot)."]
    # A table of contents that points elsewhere is worked around, as every viewer does.
    [(_, text)] = rows(put(tmp_path, "c.pdf", content.replace(b"startxref\n", b"startxref\n9")))
    assert text.startswith("Bread rises slowly.")
    # Nobody needs a password to read it, only to change it.
    [(_, text)] = rows(put(tmp_path, "d.pdf", encrypted("")))
    assert text == "A secret."
    assert capfd.readouterr() == ("", "")


def test_what_cannot_be_read_is_said_in_one_line(tmp_path: Path) -> None:
    locked = refused(put(tmp_path, "locked.pdf", encrypted("password")))
    assert locked.endswith("locked.pdf: encrypted: save it without a password, or remove it")
    for content in (b"%PDF-1.4\n", b"no pdf at all", pdf("A")[:60]):
        assert "a.pdf: cannot extract text (" in refused(put(tmp_path, "a.pdf", content))
    cut = put(tmp_path, "a.html.gz", gzip.compress(page(STORY).encode())[:-20])
    assert "a.html.gz: cannot extract text (" in refused(cut)


@pytest.mark.parametrize(("name", "library"), [("a.html", "trafilatura"), ("a.pdf", "pypdf")])
def test_a_missing_library_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, library: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    put(tmp_path, "docs/b.md", "Bread rises slowly.")
    file = put(tmp_path, f"docs/{name}", page(STORY))
    line = refused(str(tmp_path / "docs"))
    assert line.startswith(f"{file}: reading it needs {library}: pip install 'lora-kit[docum")
    # Only who names such files needs it.
    assert rows(str(tmp_path / "docs" / "*.md")) == [
        (f"{tmp_path}/docs/b.md:1", "Bread rises slowly.")
    ]


@pytest.mark.parametrize("documents", [3, FEWEST_DOCUMENTS])
def test_files_without_text_are_dropped_and_counted(tmp_path: Path, documents: int) -> None:
    for number in range(documents):
        put(tmp_path, f"docs/b{number}.md", "\n".join(sentences(40, seed=number)))
    scan = put(tmp_path, "docs/a.pdf", pdf("", ""))
    bare = put(tmp_path, "docs/c.html", "<html><body><script>draw()</script></body></html>")
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    docs = str(tmp_path / "docs")
    found = prepared(tokenizer, "text", train=docs, eval=0.3, max_length=64, check=False)
    [(reason, lost)] = found.census.to_json()["train"]["dropped"].items()
    assert (reason, lost["rows"] if isinstance(lost, dict) else lost) == ("empty", 2)
    assert scan in str(found.census.lines()) and bare not in str(found.census.lines())


def test_a_page_is_what_a_run_learns_from(run_file: RunMaker, work: Path) -> None:
    put(work, "site/bread.html", page([" ".join(sentences(9, seed=n)) for n in range(40)]))
    put(work, "site/oven.pdf", pdf("A stone oven."))
    run = load_run(run_file("cpt", **{"data.train": "site", "data.eval": 0.2}))
    tokenizer: Any = make_tokenizer(work / "tokenizer")
    train = run.data.train
    found = prepared(tokenizer, "text", train=train, eval=0.2, max_length=128, seed=run.seed)
    learned, judged = ("".join(said(found, use, tokenizer)) for use in ("train", "eval"))
    assert "wizards" in learned and "wizards" in judged
    assert "stone oven" in learned + judged
    assert "Navigation" not in learned + judged and "scripted" not in learned + judged
    assert found.census.to_json()["train"]["dropped"] == {}
