"""A page as one HTML file without a single reference to anything outside it.

A content security policy in the page forbids every request and runs no script but the one below it, whose
hash it names; so a string of the user's that slipped through the escaping still could not run.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable
from html import escape
from importlib.resources import files
from typing import Any


def document(title: str, body: str, data: dict[str, Any] | None = None, script: str = "", skip: str = "") -> str:
    """The whole page.

    Args:
        title: plain text. body: HTML of `<main>`. data: what the script reads, as JSON in the page.
        script: JavaScript of this kind of page; runs after the shared one. skip: words of the link past the header.
    """
    code = f"{_resource('points.js')}{script}"
    digest = base64.b64encode(hashlib.sha256(code.encode("utf-8")).digest()).decode("ascii")
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    text = json.dumps(data or {}, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_resource('style.css')}</style>\n</head>\n<body>\n"
        f'<a class="skip" href="#main">{escape(skip or "Skip to the content")}</a>\n'
        f'<main id="main">\n{body}\n</main>\n<div id="tip" role="status" aria-live="polite" hidden></div>\n'
        f'<script type="application/json" id="data">{text}</script>\n'
        f"<script>{code}</script>\n</body>\n</html>\n"
    )


def facts(items: Iterable[tuple[str, str, bool]]) -> str:
    """A definition list of (name, value, whether the value is code), plain text each."""
    parts = []
    for name, value, is_code in items:
        text = escape(value)
        parts.append(f"<dt>{escape(name)}</dt><dd>{f'<code>{text}</code>' if is_code else text}</dd>")
    return f'<dl class="facts">{"".join(parts)}</dl>'


def _resource(name: str) -> str:
    return files("sparing.compare.html").joinpath(name).read_text(encoding="utf-8")
