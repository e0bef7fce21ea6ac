"""Reading a corpus: JSON lines in one file or many.

    {"text": "...", "id": "optional", "domain": "optional", ...}

A record without an id is called `file:line`; one without a domain belongs to that of its file's name (`web-003.jsonl`
→ "web-003"), unless all records are put into one by `domain`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sparing.compare.store import row_key
from sparing.errors import InputFileError


@dataclass(frozen=True)
class Record:
    """One text. `row` is the line as it was read."""

    id: str
    text: str
    domain: str
    row: dict[str, Any]

    @cached_property
    def key(self) -> str:
        """Of its row of scores."""
        return row_key({"domain": self.domain, "id": self.id})


def find_shards(inputs: Sequence[str | Path]) -> list[Path]:
    """Files as given, and every .jsonl of folders, sorted.

    Raises:
        InputFileError: nothing there.
    """
    shards: list[Path] = []
    for given in map(Path, inputs):
        found = sorted(given.glob("*.jsonl")) if given.is_dir() else [given]
        if not found or not all(path.is_file() for path in found):
            raise InputFileError(given, "no such file, or a folder without .jsonl files")
        shards += found
    return shards


def read_records(inputs: Sequence[str | Path], domain: str | None = None) -> Iterator[Record]:
    """All records of all shards, in order, one line at a time.

    Raises:
        InputFileError: a line that is no such object; it names the file and the line.
    """
    for shard in find_shards(inputs):
        with shard.open(encoding="utf-8", errors="strict") as lines:
            try:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield _record(shard, number, line, domain)
            except UnicodeDecodeError as error:
                raise InputFileError(shard, f"is no UTF-8 text ({error})") from error


def _record(shard: Path, number: int, line: str, domain: str | None) -> Record:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputFileError(shard, f"line {number} is no JSON ({error})") from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise InputFileError(shard, f"line {number} has no text", 'each line is {"text": "...", ...}')
    name = row.get("id")
    place = f"{shard.name}:{number}"
    return Record(place if name is None else str(name), row["text"], domain or str(row.get("domain", shard.stem)), row)
