"""A scan of files before an upload: tokens, passwords, local paths, e-mail addresses."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from lora_kit.errors import TOKENS, UserError, secret_values

# All patterns are bounded in length, or begin with a fixed text: a line may have a megabyte.
_KEYS = {kind: re.compile(pattern) for kind, pattern in TOKENS.items()}
_PATHS = {
    "a home folder": re.compile(
        r"(?:(?<![\w.~/-])|(?<=file://))(?:/var|/mnt/[a-z]|/[a-z])?/(?:home|Users)/[\w.-]+"
        r"|(?<![A-Za-z0-9])[A-Za-z]:\\{1,2}Users\\{1,2}[\w.-]+"
    )
}
_PROSE = {
    # RFC 2606 reserves example.com, .net, .org and .example; git@ is a login.
    "an e-mail address": re.compile(
        r"(?<![\w.%+-])(?!git@)[\w.%+-]{1,64}@"
        r"(?!(?:[A-Za-z0-9-]{1,63}\.){0,5}example(?:\.(?:com|net|org))?(?![\w-]|\.\w))"
        r"(?:[A-Za-z0-9-]{1,63}\.){1,5}[A-Za-z]{2,24}\b"
    ),
    "a password or key": re.compile(
        # In a chat template, `set` gives variables of such names ordinary words.
        r"""(?i)(?<![a-z])(?:(?<!set )|(?<=set )(?=[^%\n]{0,80}\d))"""
        r"""(?:passw(?:or)?d|passphrase|secret|api[_-]?key|access[_-]?key"""
        r"""|auth[_-]?token|client[_-]?secret)["']?\s{0,3}[:=]\s{0,3}["']?"""
        r"""(?!none\b|null\b|true\b|false\b)[^\s"',;{}<>()$*\[\]]{6,}"""
    ),
}
# Files without the patterns of _PROSE: vocabularies contain any word, and licences addresses.
_NO_PROSE = re.compile(
    r"vocab\.json|merges\.txt|vocab\.txt|(?:LICEN[CS]E|USE_POLICY|COPYING|NOTICE).*"
)
# The added tokens of a tokenizer.json; in it, only these are searched for _PROSE, since the other
# tokens may spell anything.
_ADDED = re.compile(r'"content": ?"(.{0,999}?)"')
_LONGEST_SHOWN = 8


def refuse_secrets(files: Mapping[str, bytes | Path], private: Iterable[str] = ()) -> None:
    """Scan files that are about to be uploaded: text, and the headers of safetensors.

    Args:
        files: {name: content, or the file with it}.
        private: texts that must not leave this machine, such as the paths of a run's data.

    Raises:
        UserError: something was found; the message has file, line and kind, but not the value.
    """
    from huggingface_hub import get_token

    known = {f"the value of {name}": value for name, value in secret_values().items()}
    known |= {"the token you are logged in with": get_token() or ""}
    known |= {f"a path of this machine ({len(text)} letters)": text for text in private}
    exact = {k: re.compile(re.escape(text)) for k, text in known.items() if len(text) >= 8}
    exact["your home folder"] = re.compile(rf"(?<![\w.~/-]){re.escape(str(Path.home()))}/")
    found = []
    for name, content in files.items():
        text = _text(name, content)
        patterns = exact | _KEYS | _PATHS | ({} if _NO_PROSE.fullmatch(name) else _PROSE)
        whole = prose = [(0, len(text))]
        if name == "tokenizer.json":
            prose = [token.span(1) for token in _ADDED.finditer(text)]
        for kind, pattern in patterns.items():
            hits = (pattern.search(text, *span) for span in (prose if kind in _PROSE else whole))
            if hit := next(filter(None, hits), None):
                line = text.count("\n", 0, hit.start()) + 1
                found.append(f"{name}:{line}: {kind}")
    if found:
        more = f", and {len(found) - _LONGEST_SHOWN} more" if len(found) > _LONGEST_SHOWN else ""
        raise UserError(
            f"nothing was uploaded: {'; '.join(found[:_LONGEST_SHOWN])}{more}: take it out of the "
            "file (its value is not printed), then push again"
        )


def _text(name: str, content: bytes | Path) -> str:
    """A file's text, or the header of safetensors; JSON with its escapes decoded."""
    if isinstance(content, bytes):
        text = content.decode("utf-8", "replace")
    else:
        with content.open("rb") as opened:
            weights = name.endswith(".safetensors")
            size = int.from_bytes(opened.read(8), "little") if weights else -1
            text = opened.read(size).decode("utf-8", "replace")
    if not name.endswith((".json", ".safetensors")):
        return text
    # A decoded control character would shift the line numbers.
    text = re.sub(r"\\u00[01][0-9a-fA-F]", " ", text)
    text = re.sub(r"\\u([0-9a-fA-F]{4})", lambda found: chr(int(found[1], 16)), text)
    return re.sub(r"\\(.)", lambda found: " " if found[1] in "nrt" else found[1], text)
