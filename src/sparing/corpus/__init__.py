"""Scoring the texts of a corpus, and choosing among them."""

from __future__ import annotations

from sparing.corpus.reader import Record, read_records
from sparing.corpus.score import score_corpus
from sparing.corpus.select import Selection, select_top

__all__ = ["Record", "Selection", "read_records", "score_corpus", "select_top"]
