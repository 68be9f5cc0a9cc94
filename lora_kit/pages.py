"""HTML pages from Jinja templates: self-contained, all text escaped."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from lora_kit.errors import harmless


def render_page(source: Path, /, **values: object) -> str:
    """Render a Jinja template. All text is escaped, without control characters, file names
    included."""
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
    """The hash source of an inline script or style for a Content-Security-Policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
