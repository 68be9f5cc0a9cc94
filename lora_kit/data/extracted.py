"""The text of HTML pages and PDFs, by the libraries of the extra `documents`."""

from __future__ import annotations

import codecs
import io
import logging
import re
from importlib import import_module
from pathlib import Path
from typing import Any

from lora_kit.data.json_rows import PIECE, open_bytes, text_pieces, why
from lora_kit.errors import UserError

SUFFIXES = {".html", ".htm", ".pdf"}
_DECLARED = re.compile(
    rb"""<meta[^>]{0,200}?charset\s*=\s*["']?\s*([\w.:-]+)|<\?xml[^>]{0,100}?encoding=["']([\w.:-]+)""",
    re.IGNORECASE,
)
_WHOLE_PAGE = re.compile(r"<(?:!doctype|html|head|body)\b", re.IGNORECASE)
_DECLARED_WITHIN = 4096  # bytes
# What browsers read where a page declares the other (the Encoding Standard's labels).
_AS_BROWSERS_DO = {
    **{"iso8859-1": "cp1252", "ascii": "cp1252", "iso8859-9": "cp1254", "utf-8": "utf-8-sig"},
    **{"gb2312": "gb18030", "gbk": "gb18030", "shift_jis": "cp932", "euc_kr": "cp949"},
}


def text_of(file: Path, suffix: str) -> str:
    """The text of a PDF, page after page, or the main text of an HTML page; empty where there is
    none, as of a scan.

    Raises:
        UserError: it is damaged, encrypted, or not in the encoding it declares; or the library is
            not installed.
    """
    try:
        library: Any = import_module("pypdf" if suffix == ".pdf" else "trafilatura")
    except ImportError as error:
        raise UserError(
            f"{file}: {error.name or why(error)} is missing to read it: pip install "
            "'lora-kit[documents]', or leave it out"
        ) from None
    # What they work around in a file is not the reader's concern.
    logging.getLogger(library.__name__).setLevel(logging.CRITICAL)
    try:
        with open_bytes(file) as opened:
            raw = opened.read()
        text = _of_pdf(library, file, raw) if suffix == ".pdf" else _of_html(library, file, raw)
    except UserError:
        raise
    except Exception as error:  # what a damaged file raises depends on the library
        raise UserError(f"{file}: no text can be read from it ({why(error)})") from None
    return text.replace("\0", "")


def _of_pdf(pypdf: Any, file: Path, raw: bytes) -> str:
    reader = pypdf.PdfReader(io.BytesIO(raw))
    if reader.is_encrypted and not reader.decrypt(""):
        raise UserError(f"{file}: encrypted: save it without a password, or leave it out")
    return "\n\n".join(page.extract_text() for page in reader.pages)


def _of_html(trafilatura: Any, file: Path, raw: bytes) -> str:
    """The main text of a page in the encoding it declares, or in UTF-8."""
    declared = _DECLARED.search(raw, 0, _DECLARED_WITHIN)
    known = codecs.lookup((declared[1] or declared[2]).decode() if declared else "utf-8").name
    encoding = _AS_BROWSERS_DO.get(known, known)
    page = "".join(piece for _, piece in text_pieces(file, PIECE, encoding))
    # A declaration would be taken for that of the text, which is decoded already.
    page = re.sub(r"^\s*<\?xml[^>]*\?>", "", page)
    if not _WHOLE_PAGE.search(page):  # a part of one is taken for a page without a body
        page = f"<html><body>{page}</body></html>"
    return trafilatura.extract(page, include_comments=False) or ""
