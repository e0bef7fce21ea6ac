"""Key-value retrieval: one JSON object fills the context, and some of its keys are looked up.

After Liu et al. 2023, "Lost in the Middle" (arXiv:2307.03172, section 3). Deviations: 1. keys of two words
and values of 5 digits instead of UUIDs, which cost tens of tokens each; 2. several questions about one
context; 3. the tokens that no whole entry fits into are natural text in front of the object, and all that
is left once every key (some 15,000) has been used.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from sparing.tasks import haystack
from sparing.tasks.base import Question, Task, ask, check_choice, check_count
from sparing.tasks.encoding import Encoder, Piece, join, total
from sparing.tasks.formats import JSON_CLOSE, JSON_ENTRY, JSON_OPEN, JSON_QUESTION, JSON_SEPARATOR
from sparing.tasks.metrics import exact
from sparing.tasks.registry import task
from sparing.tasks.words import shuffled_keys


@dataclass(frozen=True, order=True)
class Entry:
    """An entry of the object; entries are ordered by `place`, a number from 0 to 1."""

    place: float
    key: str
    value: str


@task("kv_retrieval")
@dataclass(frozen=True)
class KeyValueRetrieval(Task):
    """A JSON object of as many entries as fit; asked for some of its values, at any place alike."""

    metric = "exact"
    description = "a JSON object that fills the context, asked for some of its values"
    questions: int = 4
    values_are: str = "word"

    def __post_init__(self) -> None:
        check_count("questions", self.questions, most=64)
        check_choice("values_are", self.values_are, haystack.VALUE_KINDS)

    @property
    def questions_per_context(self) -> int:
        """As many as the option `questions` says."""
        return self.questions

    def score(self, question: Question, output: str) -> float:
        """Return 1 if the output up to the closing quotation mark is the value, else 0."""
        return exact(output.partition('"')[0], question.answers)

    def _draw(self, encoder: Encoder, length: int, rng: random.Random) -> tuple[list[int], tuple[Question, ...]]:
        others = self._entries(rng)
        asked = list(itertools.islice(others, self.questions))
        questions = [
            ask(encoder, JSON_QUESTION.format(key=entry.key), [entry.value], entry.value + '"') for entry in asked
        ]
        room = self.room(encoder, length, questions, total(_object(encoder, asked)))
        body = _fit(encoder, asked, others, room)
        front = haystack.fill(encoder, room - total(body), haystack.text(rng))
        context_ids, spans = join(encoder.front, front + body)
        return context_ids, tuple(replace(question, evidence=(spans[mark],)) for mark, question in enumerate(questions))

    def _entries(self, rng: random.Random) -> Iterator[Entry]:
        """Draw entries until every key has been used."""
        for key in shuffled_keys(rng):
            yield Entry(rng.random(), key, haystack.draw_value(rng, self.values_are))


def _fit(encoder: Encoder, asked: list[Entry], others: Iterator[Entry], room: int) -> list[Piece]:
    """Return an object of the asked entries and as many of the others, in their order, as fit into room."""
    entries, used = list(asked), total(_object(encoder, asked))
    while used <= room and (entry := next(others, None)):
        entries.append(entry)
        used += len(encoder(_between(entry)))
    body = _object(encoder, entries)
    while total(body) > room:
        entries.pop()
        body = _object(encoder, entries)
    return body


def _object(encoder: Encoder, entries: list[Entry]) -> list[Piece]:
    """Return the object as a piece per entry, in order of place; entry number i of the list has mark i."""
    marks = sorted(range(len(entries)), key=lambda i: entries[i])
    texts = [_between(entries[mark]) for mark in marks]
    texts[0] = JSON_OPEN + texts[0].removeprefix(_AFTER_SEPARATOR)
    texts[-1] = texts[-1].removesuffix(_SEPARATOR) + JSON_CLOSE
    return [Piece(encoder(text), mark) for text, mark in zip(texts, marks, strict=True)]


def _between(entry: Entry) -> str:
    """Return an entry as it stands between two others."""
    return _AFTER_SEPARATOR + JSON_ENTRY.format(key=entry.key, value=entry.value) + _SEPARATOR


# The separator is cut before its space: a piece starts with a space, as tokenizers cut.
_SEPARATOR = JSON_SEPARATOR.rstrip(" ")
_AFTER_SEPARATOR = JSON_SEPARATOR[len(_SEPARATOR) :]
