"""Documents to be ranked, from a file: JSON lines, one document a line.

    {"id": "d7", "text": "...", "title": "...", "relevance": 2}

The title may be left out. So may the relevance, a number from 0 on that says how well the document answers the query; a
file in which some lines have one is judged, and its other documents count as not relevant. Other fields are ignored.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparing.errors import InputFileError
from sparing.tasks.encoding import is_encodable
from sparing.tasks.rows import json_objects, read_text

FIX = 'write {"id": ..., "text": ...} on each line'


@dataclass(frozen=True)
class GivenDocument:
    """A line of the file; `id` as it is there, a string or a whole number."""

    id: str | int
    text: str
    title: str | None = None
    relevance: float | None = None

    @property
    def content(self) -> str:
        """Title and text, as a ranker reads them."""
        return self.text if self.title is None else f"{self.title}\n{self.text}"

    @property
    def row(self) -> dict[str, Any]:
        """The fields that were given."""
        return {name: value for name, value in vars(self).items() if value is not None}


def load_documents(path: Path) -> list[GivenDocument]:
    """The documents of a file, in its order.

    Raises:
        InputFileError: missing, empty or malformed (with the line), or an id is there twice.
    """
    found: list[GivenDocument] = []
    lines: dict[str | int, int] = {}
    for number, row in json_objects(path, read_text(path, "it should hold JSON lines"), FIX):
        document = _document(path, number, row)
        if document.id in lines:
            raise InputFileError(path, f"lines {lines[document.id]} and {number} have the same id {document.id!r}")
        lines[document.id] = number
        found.append(document)
    return found


def _document(path: Path, number: int, row: dict[str, Any]) -> GivenDocument:
    def refused(problem: str) -> InputFileError:
        return InputFileError(path, f"line {number} {problem}", FIX)

    id_, text, title, relevance = (row.get(name) for name in ("id", "text", "title", "relevance"))
    if isinstance(id_, bool) or not isinstance(id_, str | int) or id_ == "":
        raise refused(f"has the id {id_!r}, not a string or a whole number")
    if not isinstance(text, str) or not text.strip():
        raise refused(f"has the text {text!r:.40}, not a string with words in it")
    if title is not None and not isinstance(title, str):
        raise refused(f"has the title {title!r:.40}, not a string")
    if relevance is not None and not _is_grade(relevance):
        raise refused(f"has the relevance {relevance!r:.40}, not a number from 0 on")
    if not all(is_encodable(part) for part in (id_, text, title) if isinstance(part, str)):
        raise refused("holds half a character (a surrogate)")
    return GivenDocument(id_, text, title or None, relevance)


def _is_grade(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 <= value <= sys.float_info.max  # whole numbers can be larger than floats
