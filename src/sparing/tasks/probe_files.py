"""Samples of the user's own for scorers of heads, from a file.

| kind | file |
|---|---|
| text | any text file (one sample), or JSON lines `{"text": ..., "response": ...}`, where the response is optional |
| needle | contexts, questions and answers as for `sparing compare` (see `user_files`); answers stand in the context |
| pair | JSON lines `{"clean": ..., "corrupt": ..., "answer": ..., "wrong": ...}`: prompts of equally many tokens |
| ranking | JSON lines `{"query": ..., "documents": [...], "gold": [0, ...]}` |
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparing.core.samples import PairSample, TextSample
from sparing.errors import InputFileError
from sparing.tasks.encoding import Encoder
from sparing.tasks.probes import needle_samples
from sparing.tasks.ranking_probes import ranking_sample
from sparing.tasks.rows import json_objects, read_text
from sparing.tasks.user_files import JSON_SUFFIXES, load_user_task

_FIX = "see `sparing.tasks.probe_files` for the fields"


def load_samples(kind: str, path: Path, tokenizer: Any) -> list[Any]:
    """Samples of a kind from a file.

    Args:
        kind: what the scorer needs, see `core.samples.DataKind`.

    Raises:
        InputFileError: missing, empty or malformed (with the line), or the scorer takes no data.
        InvalidInputError: an answer that does not stand in its context.
    """
    if kind == "needle":
        task = load_user_task(path)
        return list(needle_samples(tokenizer, task.num_samples or 0, 0, task=task))
    makers: dict[str, Callable[[Encoder, dict[str, Any]], Any]] = {"text": _text, "pair": _pair, "ranking": _ranking}
    if kind not in makers:
        raise InputFileError(path, "this scorer makes its own data", "leave --data out")
    encoder = Encoder(tokenizer)
    if kind == "text" and path.suffix.lower() not in JSON_SUFFIXES:
        return [_text(encoder, {"text": read_text(path, "it should hold the text to measure on")})]
    samples = []
    for number, row in json_objects(path, read_text(path, "it should hold JSON lines"), _FIX):
        try:
            samples.append(makers[kind](encoder, row))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            problem = f"line {number} is no {kind} sample ({type(error).__name__}: {error})"
            raise InputFileError(path, problem, _FIX) from error
    if not samples:
        raise InputFileError(path, "holds no samples")
    return samples


def _text(encoder: Encoder, row: dict[str, Any]) -> TextSample:
    ids = encoder.start(_filled(row, "text"))
    response = encoder(row["response"]) if row.get("response") else []
    return TextSample((*ids, *response), len(ids) if response else 0)


def _pair(encoder: Encoder, row: dict[str, Any]) -> PairSample:
    clean, corrupt = encoder.start(row["clean"]), encoder.start(row["corrupt"])
    if len(clean) != len(corrupt):
        raise ValueError(f"clean has {len(clean)} tokens, corrupt {len(corrupt)}: they must have equally many")
    answer, wrong = (encoder(_filled(row, field))[0] for field in ("answer", "wrong"))
    if answer == wrong:
        raise ValueError("answer and wrong begin with the same token")
    return PairSample(tuple(clean), tuple(corrupt), answer, wrong)


def _ranking(encoder: Encoder, row: dict[str, Any]) -> Any:
    if not isinstance(row["documents"], list):
        raise TypeError("documents is no list")
    return ranking_sample(encoder, row["query"], row["documents"], row["gold"])


def _filled(row: dict[str, Any], field: str) -> str:
    """A field's text, which may be a line break but not nothing."""
    text: str = row[field]
    if not text:
        raise ValueError(f"{field} is empty")
    return text
