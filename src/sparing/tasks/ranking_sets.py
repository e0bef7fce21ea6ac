"""Documents, queries and how relevant each document is to each query: made offline, to measure rankers with.

Two kinds. In `fact_set` the words of the query stand in the documents that answer it, and in no other: what ranks by
shared words does well. In `pairing_set` every document has the same words, and says different things with them: what
ranks by shared words cannot tell the documents apart.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

from sparing.errors import require
from sparing.tasks import haystack
from sparing.tasks.base import check_count
from sparing.tasks.formats import NEEDLE, NEEDLE_QUESTION
from sparing.tasks.words import ADJECTIVES, NOUNS

MOST_DOCUMENTS = 100
MOST_PAIRS = 40


@dataclass(frozen=True)
class RankingSet:
    """Some documents and queries about them.

    Attributes:
        documents: texts; the relevant ones may stand anywhere. queries: questions.
        grades: of each query, how relevant each document is; 0 for not at all.
    """

    documents: tuple[str, ...]
    queries: tuple[str, ...]
    grades: tuple[tuple[int, ...], ...]


def fact_set(seed: int = 0, documents: int = 20, queries: int = 5, words: int = 20) -> RankingSet:
    """Passages of a novel with a fact in each, two documents a key: one tells its magic number, one its magic word.

    A query asks for the number of a key. The document that tells it is relevant by 2, the one that tells the same
    key's word by 1.

    Args:
        documents: an even number. words: of the novel in each document, at least; whole sentences.

    Raises:
        InvalidInputError: a number is out of range.
    """
    check_count("documents", documents, 2, most=MOST_DOCUMENTS)
    require(documents % 2 == 0, "documents", documents, "an even number")
    check_count("queries", queries, 1, most=documents // 2)
    rng = random.Random(f"ranking facts/{seed}")
    keys = haystack.draw_keys(rng, documents // 2)
    told = [(key, kind) for key in keys for kind in ("number", "word")]
    rng.shuffle(told)
    text = haystack.text(rng)
    texts = [_passage(rng, text, words, NEEDLE.format(kind=kind, key=key, value=haystack.draw_value(rng, kind)))
             for key, kind in told]  # fmt: skip
    asked = rng.sample(keys, queries)
    grades = tuple(tuple((about == key) * (1 + (kind == "number")) for about, kind in told) for key in asked)
    return RankingSet(tuple(texts), tuple(map(_question, asked)), grades)


def pairing_set(seed: int = 0, documents: int = 8, queries: int = 5) -> RankingSet:
    """As many facts in each document as there are documents; all have the same adjectives and nouns, paired otherwise.

    Document i tells a number for each key "adjective j, noun (j + i) mod n". A query asks for one key's number, which
    one document tells (relevant by 1). All documents have equally many words, and each word of the query equally often.

    Raises:
        InvalidInputError: a number is out of range.
    """
    check_count("documents", documents, 2, most=MOST_PAIRS)
    check_count("queries", queries, 1, most=documents**2)
    rng = random.Random(f"ranking pairs/{seed}")
    adjectives, nouns = rng.sample(ADJECTIVES, documents), rng.sample(NOUNS, documents)
    texts = []
    for shift in range(documents):
        keys = [f"{adjective} {nouns[(place + shift) % documents]}" for place, adjective in enumerate(adjectives)]
        rng.shuffle(keys)
        values = haystack.draw_values(rng, "number", documents)
        facts = (NEEDLE.format(kind="number", key=key, value=value) for key, value in zip(keys, values, strict=True))
        texts.append("".join(facts).strip())
    asked = rng.sample([f"{adjective} {noun}" for adjective in adjectives for noun in nouns], queries)
    grades = tuple(tuple(int(f" {key} is" in text) for text in texts) for key in asked)
    return RankingSet(tuple(texts), tuple(map(_question, asked)), grades)


def _question(key: str) -> str:
    return NEEDLE_QUESTION.format(kind="number", key=key).strip()


def _passage(rng: random.Random, text: Iterator[str], words: int, fact: str) -> str:
    """Whole sentences of so many words at least, with the fact before, between or behind them."""
    sentences: list[str] = []
    while sum(len(sentence.split()) for sentence in sentences) < words:
        sentences.append(next(text))
    at = rng.randrange(len(sentences) + 1)
    return "".join(itertools.chain(sentences[:at], [fact], sentences[at:])).strip()
