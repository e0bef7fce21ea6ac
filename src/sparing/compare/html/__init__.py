"""What all pages share: one self-contained file, one look, points that mouse and keyboard can reach."""

from __future__ import annotations

from sparing.compare.html.document import document, facts

__all__ = ["document", "facts"]
