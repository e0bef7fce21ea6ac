"""What surrounds the facts: natural text, noise, or more facts of the same form.

A haystack is a list of pieces, one a sentence, that together have exactly the wanted number of tokens. What
is too much is cut off the front of the first sentence, as when a book is opened somewhere; so facts always
stand between whole sentences and the question follows a whole sentence.

The text is a novel that the bundled model has not been trained on: Jane Austen, Emma (1815), Project
Gutenberg number 158, with its line breaks turned to spaces and its headings left out. A haystack longer than
the novel (about 200,000 tokens for a tokenizer of a large vocabulary) goes on with its beginning.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterable, Iterator
from functools import cache
from importlib import resources

from sparing.tasks.encoding import Encoder, Piece
from sparing.tasks.formats import NEEDLE, NOISE
from sparing.tasks.words import ADJECTIVES, NOUNS, shuffled_keys

KINDS = ("text", "noise", "needles")
VALUE_KINDS = ("number", "word")

# A blank after the end of a sentence and its closing quotation mark, but not after an abbreviation.
_SENTENCE_END = re.compile(r"""(?:(?<=[.!?])|(?<=[.!?]["')]))(?<!Mr\.)(?<!Mrs\.)(?<!Dr\.)(?<!St\.)\s+""")
_DIGITS = 5


def text(rng: random.Random) -> Iterator[str]:
    """Yield the sentences of the novel from a random one on, each with a space in front, without end."""
    start = rng.randrange(len(sentences()))
    return itertools.islice(itertools.cycle(sentences()), start, None)


def noise(rng: random.Random) -> Iterator[str]:
    """Yield the sentences of `formats.NOISE` from a random one on, without end."""
    parts = [" " + part for part in _SENTENCE_END.split(NOISE.strip())]
    return itertools.islice(itertools.cycle(parts), rng.randrange(len(parts)), None)


def needles(rng: random.Random, kind: str, taken: Iterable[str]) -> Iterator[str]:
    """Yield needles with any keys but those taken, without end; no key twice until all have been used."""
    keys = [key for key in shuffled_keys(rng) if key not in set(taken)]
    for key in itertools.cycle(keys):
        yield NEEDLE.format(kind=kind, key=key, value=draw_value(rng, kind))


def fill(encoder: Encoder, room: int, source: Iterator[str]) -> list[Piece]:
    """Return pieces from source with exactly `room` tokens in all; the first one is cut at its front."""
    pieces: list[Piece] = []
    excess = -room
    while excess < 0:
        pieces.append(Piece(encoder(next(source))))
        excess += len(pieces[-1].ids)
    dropped = 0
    while excess > 0 and excess >= len(pieces[dropped].ids):
        excess -= len(pieces[dropped].ids)
        dropped += 1
    pieces = pieces[dropped:]
    if excess:
        pieces[0] = Piece(pieces[0].ids[excess:])
    return pieces


def insert(hay: list[Piece], facts: list[Piece], depths: list[float]) -> list[Piece]:
    """Return hay with each fact at the sentence end nearest to its depth (0 the front, 1 the end).

    Facts that meet at one place keep the order in which they are given.
    """
    ends = list(itertools.accumulate(len(piece.ids) for piece in hay)) or [0]
    places = [min(range(len(ends)), key=lambda i: abs(ends[i] - depth * ends[-1])) for depth in depths]
    pieces: list[Piece] = []
    for place in range(len(ends)):
        pieces += hay[place : place + 1]
        pieces += [fact for fact, wanted in zip(facts, places, strict=True) if wanted == place]
    return pieces


@cache
def sentences() -> tuple[str, ...]:
    """Return the sentences of the novel, each with a space in front."""
    book = resources.files("sparing.tasks").joinpath("data", "emma.txt").read_text(encoding="utf-8")
    lines = (" ".join(line.split()) for line in book.splitlines())
    flow = " ".join(line for line in lines if line.endswith((".", "!", "?", '"')))
    return tuple(" " + sentence for sentence in _SENTENCE_END.split(flow))


@cache
def vocabulary() -> tuple[str, ...]:
    """Return the different words of 4 to 10 small letters in the novel, in alphabetical order."""
    found = re.findall(r"\b[a-z]{4,10}\b", " ".join(sentences()))
    return tuple(sorted(set(found)))


@cache
def all_keys() -> tuple[str, ...]:
    """Return every key: an adjective and a noun."""
    return tuple(f"{adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS)


def draw_keys(rng: random.Random, count: int) -> list[str]:
    """Draw different keys, such as "amber river", that share no word (see `words.shuffled_keys`)."""
    return list(itertools.islice(shuffled_keys(rng), count))


def draw_value(rng: random.Random, kind: str) -> str:
    """Draw a value of the kind: a number of 5 digits, or two words."""
    if kind == "word":
        return rng.choice(all_keys())
    return str(rng.randrange(10 ** (_DIGITS - 1), 10**_DIGITS))


def draw_values(rng: random.Random, kind: str, count: int) -> list[str]:
    """Draw different values."""
    values: dict[str, None] = {}
    while len(values) < count:
        values[draw_value(rng, kind)] = None
    return list(values)
