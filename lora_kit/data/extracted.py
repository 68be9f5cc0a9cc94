"""The text of HTML pages and PDFs, extracted with the libraries of the extra `documents`."""

from __future__ import annotations

import codecs
import io
import logging
import re
from pathlib import Path

from lora_kit.data.json_rows import (
    LONGEST_ROW,
    PIECE,
    error_text,
    open_bytes,
    text_pieces,
    too_long,
)
from lora_kit.errors import UserError
from lora_kit.trust import bounded

SUFFIXES = {".html", ".htm", ".pdf"}
_DECLARED = re.compile(
    rb"""<meta[^>]{0,200}?charset\s*=\s*["']?\s*([\w.:-]+)|<\?xml[^>]{0,100}?encoding=["']([\w.:-]+)""",
    re.IGNORECASE,
)
_WHOLE_PAGE = re.compile(r"<(?:!doctype|html|head|body)\b", re.IGNORECASE)
_DECLARED_WITHIN = 4096  # bytes
_SECONDS, _SECONDS_PER_MIB = 4.0, 60.0  # a page of text takes 0.1 s
# Encodings that browsers use instead of the declared one (the Encoding Standard's labels).
_BROWSER_ENCODINGS = {
    "ascii": "cp1252",
    "euc_kr": "cp949",
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "iso8859-1": "cp1252",
    "iso8859-9": "cp1254",
    "shift_jis": "cp932",
    "utf-8": "utf-8-sig",
}


def text_of(file: Path, suffix: str) -> str:
    """The text of a PDF, or the main text of an HTML page; empty if there is none, as in a
    scanned PDF.

    Raises:
        UserError: the file is corrupt, encrypted, or not in the encoding it declares; or the
            library is not installed.
    """
    try:
        seconds = _SECONDS + _SECONDS_PER_MIB * file.stat().st_size / 2**20
        late = f"{file}: extracting its text takes too much time or memory: remove it"
        with bounded(seconds, late, mib=450):
            text = _of_pdf(file) if suffix == ".pdf" else _of_html(file)
    except UserError:
        raise
    except ImportError as error:
        raise UserError(
            f"{file}: reading it needs {error.name or error_text(error)}: pip install "
            "'lora-kit[documents]', or remove the file"
        ) from None
    except Exception as error:  # the libraries raise anything on a corrupt file
        raise UserError(f"{file}: cannot extract text ({error_text(error)})") from None
    return text.replace("\0", "")


def _of_pdf(file: Path) -> str:
    import pypdf

    # Warnings about a file's defects are no use to the user.
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)
    with open_bytes(file) as opened:
        reader = pypdf.PdfReader(io.BytesIO(opened.read()))
    if reader.is_encrypted and not reader.decrypt(""):
        raise UserError(f"{file}: encrypted: save it without a password, or remove it")
    return "\n\n".join(page.extract_text() for page in reader.pages)


def _of_html(file: Path) -> str:
    """The main text of a page in the encoding it declares, or in UTF-8."""
    import trafilatura

    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)
    with open_bytes(file) as opened:
        declared = _DECLARED.search(opened.read(_DECLARED_WITHIN))
    known = codecs.lookup((declared[1] or declared[2]).decode() if declared else "utf-8").name
    encoding = _BROWSER_ENCODINGS.get(known, known)
    page = "".join(piece for _, piece in text_pieces(file, PIECE, encoding))
    if len(page) > LONGEST_ROW:
        raise too_long(f"{file}:1")
    # The text is decoded already; trafilatura would apply the declaration again.
    page = re.sub(r"^\s*<\?xml[^>]*\?>", "", page)
    if not _WHOLE_PAGE.search(page):  # else a fragment is parsed as a page without a body
        page = f"<html><body>{page}</body></html>"
    return trafilatura.extract(page, include_comments=False) or ""
