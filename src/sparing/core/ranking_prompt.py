"""The prompt in which documents are ranked: documents first, and a query behind them that sees them all. No torch.

After in-context re-ranking (Chen et al. 2024, arXiv:2410.02642), in our own words. Heads that were measured in such
prompts (`tasks.ranking_probes`) rank in such prompts (`methods/rerank/icr.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from sparing.core.samples import Span

OPENING = "Here are some paragraphs:"
NUMBER = "\n\n[{number}]"
QUERY = "\n\nWhich of these paragraphs answer the following query?\n\nQuery: {query}"
# A query that asks nothing: what is attended to all the same says nothing about relevance.
NO_QUERY = "N/A"


class PromptText(Protocol):
    """Turns the pieces of a prompt into token ids; put together, they are the ids of one prompt.

    Attributes:
        before: ids in front of the user's words: special tokens, the head of a chat turn.
        after: ids behind them, up to where the model's answer begins.
    """

    before: list[int]
    after: list[int]

    def __call__(self, text: str) -> list[int]:
        """The ids of text that goes on from other text."""
        ...


def before_query(text: PromptText, documents: Iterable[str]) -> tuple[list[int], list[Span]]:
    """The prompt up to its last document; see `numbered`."""
    return numbered([*text.before, *text(OPENING)], (text(" " + document) for document in documents), text)


def from_query(text: PromptText, query: str) -> list[int]:
    """The rest of the prompt, up to where the answer begins."""
    return [*text(QUERY.format(query=query)), *text.after]


def numbered(
    opening: Sequence[int], bodies: Iterable[Sequence[int]], encode: Callable[[str], list[int]]
) -> tuple[list[int], list[Span]]:
    """The prompt up to its last document, each behind its number, and [start, end) of each document's body in it."""
    ids, spans = list(opening), []
    for number, body in enumerate(bodies, 1):
        ids += encode(NUMBER.format(number=number))
        spans.append((len(ids), len(ids) + len(body)))
        ids += body
    return ids, spans
