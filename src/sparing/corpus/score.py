"""Scoring a corpus by AttentionInfluence: resumable, in this process or on a Ray cluster, with the same rows."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparing.compare.store import ResultStore, row_key
from sparing.core.edits import Head, chosen_heads
from sparing.core.scores import Scores
from sparing.corpus.reader import Record, find_shards, read_records
from sparing.errors import InvalidInputError, OutputError, require
from sparing.loading import ModelSpec
from sparing.scale.pool import Cluster, run_tasks

# Texts are grouped by length within windows of so many records, so that batches waste little on padding.
WINDOW = 256


@dataclass(frozen=True)
class Settings:
    """What the scores depend on; a run can only be gone on with under the same ones."""

    model: str
    dtype: str
    heads: tuple[Head, ...]
    fingerprint: str
    max_tokens: int
    batch_tokens: int


@dataclass(frozen=True)
class Batch:
    """Texts that are read together: (key, id, domain, text) each."""

    texts: tuple[tuple[str, str, str, str], ...]


def score_corpus(
    spec: ModelSpec,
    heads: Scores,
    inputs: Sequence[str | Path],
    out: str | Path,
    *,
    top: int | float = 0.05,
    domain: str | None = None,
    max_tokens: int = 4096,
    batch_tokens: int = 8192,
    cluster: Cluster | None = None,
    progress: Callable[[int, str], None] = lambda done, what: None,
) -> int:
    """Score every text of a corpus; what is there already is not scored again.

    Rows {"key", "id", "domain", "tokens", "base_loss", "reference_loss", "score"} are appended to out/results.jsonl as
    they come. Texts are cut after `max_tokens`; those of fewer than two tokens get the score 0.

    Args:
        spec: the model; loaded once per worker.
        heads: measured scores of heads; the `top` of them are made uniform.
        cluster: where it is done; by default in this process.
        progress: told how many texts have been scored.

    Returns:
        How many texts were scored now.

    Raises:
        OutputError: `out` holds rows of other settings, or cannot be written. InputFileError: see `read_records`.
        ScoresMismatchError: the heads were measured on a model of another shape.
    """
    require(max_tokens >= 2, "max_tokens", max_tokens, "a number of tokens >= 2")
    require(batch_tokens >= max_tokens, "batch_tokens", batch_tokens, f"at least max_tokens ({max_tokens})")
    chosen, source = chosen_heads(heads, top), heads.model.fingerprint
    settings = Settings(spec.name, spec.dtype, chosen, source, max_tokens, batch_tokens)
    make_worker = functools.partial(_make_worker, settings, heads, spec)
    shards = find_shards(inputs)
    with ResultStore(out) as store:
        done = store.done()
        mark = row_key({"settings": repr(settings)})
        _check_settings(store, mark)
        batches = _missing(_batches(read_records(shards, domain), max_tokens, batch_tokens), done)
        count = 0
        for batch, rows in run_tasks(make_worker, batches, cluster):
            for row in rows:
                if row["key"] not in done:
                    store.append(row | {"settings": mark})
                    count += 1
            progress(count, batch.texts[0][2])
    return count


def _check_settings(store: ResultStore, mark: str) -> None:
    for row in store.rows():
        if row.get("settings") != mark:
            fix = "name another folder, or go on with the same model, heads and lengths"
            raise OutputError(store.file, "holds scores made with other settings", fix)


def _batches(records: Iterable[Record], max_tokens: int, batch_tokens: int) -> Iterator[Batch]:
    """Batches that depend on the corpus only, not on what has been done: rows are the same in every run."""
    seen: set[str] = set()
    iterator = iter(records)
    while window := list(itertools.islice(iterator, WINDOW)):
        for record in window:
            if record.key in seen:
                allowed = "ids that differ within a domain"
                raise InvalidInputError("id", record.id, allowed, "leave ids out to name records by file and line")
            seen.add(record.key)
        batch: list[tuple[str, str, str, str]] = []
        longest = 0
        # A character is at most about one token; what counts is that texts of like length meet.
        for record in sorted(window, key=lambda r: (len(r.text), r.domain, r.id)):
            size = min(len(record.text) + 1, max_tokens)
            if batch and max(longest, size) * (len(batch) + 1) > batch_tokens:
                yield Batch(tuple(batch))
                batch, longest = [], 0
            batch.append((record.key, record.id, record.domain, record.text))
            longest = max(longest, size)
        yield Batch(tuple(batch))


def _missing(batches: Iterable[Batch], done: set[str]) -> Iterator[Batch]:
    return (batch for batch in batches if any(text[0] not in done for text in batch.texts))


def _make_worker(settings: Settings, heads: Scores, spec: ModelSpec) -> Callable[[Batch], list[dict[str, Any]]]:
    """Load the model, once per process."""
    from sparing.adapters.lens import ModelLens

    loaded = spec.load()
    lens = ModelLens(loaded.model, loaded.tokenizer)
    heads.check_model(lens.identity)
    return functools.partial(_score_batch, lens, settings)


def _score_batch(lens: Any, settings: Settings, batch: Batch) -> list[dict[str, Any]]:
    from sparing.methods.heads.attention_influence import Influence, influence

    ids = [lens.tokenizer.encode(text)[: settings.max_tokens] for *_, text in batch.texts]
    long = [i for i, tokens in enumerate(ids) if len(tokens) >= 2]
    found = {i: Influence(0.0, 0.0, len(tokens)) for i, tokens in enumerate(ids)}
    if long:
        found |= dict(zip(long, influence(lens, [ids[i] for i in long], settings.heads), strict=True))
    return [
        {
            "key": key, "id": name, "domain": domain, "tokens": found[i].tokens, "base_loss": found[i].base,
            "reference_loss": found[i].reference, "score": found[i].score,
        }
        for i, (key, name, domain, _) in enumerate(batch.texts)
    ]  # fmt: skip
