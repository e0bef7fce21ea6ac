"""Samples for rankers: documents in one prompt, a query behind them, and the same with a query that asks nothing.

The prompt's form is that of in-context re-ranking (`methods/rerank/icr.py`): heads are measured as they are used.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from sparing.core.ranking_prompt import NO_QUERY, OPENING, QUERY, numbered
from sparing.core.samples import RankingSample
from sparing.errors import InvalidInputError
from sparing.tasks import haystack
from sparing.tasks.encoding import Encoder
from sparing.tasks.formats import NEEDLE, NEEDLE_QUESTION


def ranking_samples(tokenizer: Any, count: int, length: int, seed: int = 0, documents: int = 4) -> list[RankingSample]:
    """Passages of the bundled novel that each hold one fact, and a question for one of the facts.

    Args:
        length: tokens of the prompt with its query, at most; documents share it equally.

    Raises:
        InvalidInputError: the length is too short for that many documents with a fact each.
    """
    encoder, samples = Encoder(tokenizer), []
    for index in range(count):
        rng = random.Random(f"ranking/{seed}/{index}")
        keys = haystack.draw_keys(rng, documents)
        facts = [
            encoder(NEEDLE.format(kind="number", key=key, value=haystack.draw_value(rng, "number"))) for key in keys
        ]
        gold = rng.randrange(documents)
        question = NEEDLE_QUESTION.format(kind="number", key=keys[gold])
        used = len(_opening(encoder)) + len(encoder(question)) + sum(map(len, facts)) + 8 * documents
        room = (length - used) // documents
        if room < 1:
            raise InvalidInputError("length", length, f"at least {used + documents} tokens for {documents} documents")
        text = haystack.text(rng)
        bodies = [_with_fact(encoder, rng, text, room, fact) for fact in facts]
        null = NEEDLE_QUESTION.format(kind="number", key=NO_QUERY)
        samples.append(_assemble(encoder, bodies, encoder(question), encoder(null), (gold,)))
    return samples


def ranking_sample(encoder: Encoder, query: str, documents: Sequence[str], gold: Sequence[int]) -> RankingSample:
    """A sample from texts.

    Raises:
        ValueError: no documents, no gold index, or one that is none of them.
    """
    if not gold or not all(isinstance(index, int) and 0 <= index < len(documents) for index in gold):
        raise ValueError(f"{len(documents)} documents, gold {list(gold)}: at least one document, gold among them")
    bodies = [list(encoder(" " + document)) for document in documents]
    real, null = (encoder(QUERY.format(query=text)) for text in (query, NO_QUERY))
    return _assemble(encoder, bodies, real, null, tuple(gold))


def _assemble(
    encoder: Encoder, bodies: list[list[int]], real: list[int], null: list[int], gold: tuple[int, ...]
) -> RankingSample:
    ids, spans = numbered(_opening(encoder), bodies, encoder)
    return RankingSample((*ids, *real), (*ids, *null), tuple(spans), len(ids), gold)


def _opening(encoder: Encoder) -> list[int]:
    return list(encoder.start(OPENING))


def _with_fact(encoder: Encoder, rng: random.Random, text: Any, room: int, fact: list[int]) -> list[int]:
    """Filler of exactly `room` tokens with the fact between two of its pieces."""
    pieces = haystack.fill(encoder, room, text)
    at = rng.randrange(len(pieces) + 1)
    return [
        token
        for part in ([p.ids for p in pieces[:at]], [fact], [p.ids for p in pieces[at:]])
        for p in part
        for token in p
    ]
