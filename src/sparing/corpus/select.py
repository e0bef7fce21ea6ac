"""Choosing the best-scored texts of every domain."""

from __future__ import annotations

import itertools
import json
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparing.compare.store import read_rows
from sparing.core.scores import count_of
from sparing.corpus.reader import read_records
from sparing.errors import InputFileError, OutputError, require

LENGTH_BINS = 10


@dataclass(frozen=True)
class Selection:
    """What was chosen of one domain.

    Attributes:
        domain: its name. texts, chosen: how many there are, and were chosen.
        score, chosen_score: mean scores of all, and of the chosen ones. tokens, chosen_tokens: mean lengths: the
            method is known to prefer long texts.
    """

    domain: str
    texts: int
    chosen: int
    score: float
    chosen_score: float
    tokens: float
    chosen_tokens: float


def select_top(
    inputs: Sequence[str | Path],
    scored: str | Path,
    *,
    share: float = 0.2,
    length_matched: bool = False,
    domain: str | None = None,
) -> list[Selection]:
    """Write the best `share` of every domain to `selected.jsonl` in the folder `scored`: the records, with their score.

    Args:
        scored: the folder that `score_corpus` wrote.
        length_matched: choose the same share among texts of like length (ten bins per domain), so that the chosen
            ones are as long as all are.

    Raises:
        InputFileError: a text has no score yet. OutputError: the file cannot be written.
    """
    require(0 < share <= 1, "share", share, "a share in (0, 1]")
    rows = read_rows(scored)
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["domain"]].append(row)
    chosen = {row["key"]: row["score"] for group in groups.values() for row in _best(group, share, length_matched)}
    known = {row["key"] for row in rows}
    target = Path(scored) / "selected.jsonl"
    scratch = target.with_suffix(f".{os.getpid()}.part")
    try:
        with scratch.open("w", encoding="utf-8") as out:
            for record in read_records(inputs, domain):
                if record.key not in known:
                    raise InputFileError(scored, f"holds no score for {record.id}", "score the corpus to its end first")
                if record.key in chosen:
                    out.write(json.dumps(record.row | {"influence": chosen[record.key]}, ensure_ascii=False) + "\n")
        os.replace(scratch, target)
    except OSError as error:
        raise OutputError(target, str(error)) from error
    finally:
        scratch.unlink(missing_ok=True)
    return [_summary(name, group, chosen) for name, group in sorted(groups.items())]


def _best(rows: list[dict[str, Any]], share: float, length_matched: bool) -> list[dict[str, Any]]:
    """The best share of one domain's rows; ties go to the lower key, so that every run chooses alike."""
    if not length_matched:
        ranked = sorted(rows, key=lambda row: (-row["score"], row["key"]))
        return ranked[: count_of(share, len(rows))]
    by_length = sorted(rows, key=lambda row: (row["tokens"], row["key"]))
    bins = min(LENGTH_BINS, len(rows))
    edges = [len(rows) * i // bins for i in range(bins + 1)]
    parts = (by_length[start:end] for start, end in itertools.pairwise(edges))
    return [row for part in parts for row in _best(part, share, False)]


def _summary(name: str, rows: list[dict[str, Any]], chosen: dict[str, float]) -> Selection:
    mine = [row for row in rows if row["key"] in chosen]

    def mean(some: list[dict[str, Any]], field: str) -> float:
        return sum(row[field] for row in some) / len(some) if some else 0.0

    return Selection(name, len(rows), len(mine), mean(rows, "score"), mean(mine, "score"), mean(rows, "tokens"),
                     mean(mine, "tokens"))  # fmt: skip
