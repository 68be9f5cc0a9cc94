"""Pages made from Jinja templates: self-contained, all text escaped."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

from lora_kit.errors import harmless


def render(source: Path, /, **values: Any) -> str:
    """A page of a Jinja template. All text is escaped, and made harmless: not samples alone, names
    of files too."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: harmless(value) if type(value) is str else value,
    )
    environment.filters["csp"] = _csp
    return environment.from_string(source.read_text(encoding="utf-8")).render(values)


def _csp(content: str) -> str:
    """The one script, or style, that a Content-Security-Policy lets through."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
