"""HTML pages from Jinja templates: self-contained, all text escaped."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

import jinja2

from lora_kit.errors import harmless

# It keeps what it compiled: the report's template takes 0.2 s.
_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    finalize=lambda value: harmless(value) if type(value) is str else value,
)


def render_page(template: str, /, **values: object) -> str:
    """Render a Jinja template, a path within this package. All text is escaped, without control
    characters, file names included."""
    return _TEMPLATES.get_template(template).render(values)


def _csp(content: str) -> str:
    """The hash source of an inline script or style for a Content-Security-Policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


_TEMPLATES.filters["csp"] = _csp
