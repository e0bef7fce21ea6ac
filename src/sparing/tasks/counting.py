"""Aggregation: which words are the most common in a context. Every part of the context matters a little.

After RULER's `cwe` and `fwe` (Hsieh et al. 2024, arXiv:2404.06654, section 3). Deviations: 1. the words of
`common_words` are drawn from the novel of the haystack; 2. no worked example in front; 3. the counts of
`frequent_words` are the expected counts of its Zeta law, rounded down, instead of drawn ones, and its
three most frequent words always differ in count; 4. other wording. Scores are not comparable with RULER's
published ones. No piece of the context is evidence by itself, so these questions carry none.
"""

from __future__ import annotations

import bisect
import math
import random
import string
from collections.abc import Sequence
from dataclasses import dataclass

from sparing.tasks import haystack
from sparing.tasks.base import Question, Task, ask, check_count
from sparing.tasks.encoding import Encoder, Piece, join, total
from sparing.tasks.registry import task

COMMON_QUESTION = (
    "\nWhat are the {count} most common words in the list above? The {count} most common words in the list above are:"
)
FREQUENT_QUESTION = (
    "\nDots aside, what are the three most frequent words of the coded text above? "
    "The three most frequent words of the coded text above are:"
)
DOTS = " ..."

# RULER's parameter of the Zeta law, and how many tokens of context there are to a coded word.
_ZETA, _TOKENS_PER_WORD = 2.0, 50
_LEAST_VOCABULARY = 10

# From so many words on, the expected counts of ranks 4 and 5 differ by one or more, so they stay different
# when rounded down: 1 / ((1/16 - 1/25) / (pi^2 / 6)) = 73.1.
_LEAST_WORDS = 74

# How often a common and a rare word are listed: RULER's numbers for long and for short contexts. A context
# is long here when the common words fill less than half of it.
_LONG_COUNTS, _SHORT_COUNTS = (30, 3), (6, 1)


@task("common_words")
@dataclass(frozen=True)
class CommonWords(Task):
    """A numbered list in which a few words come ten (six) times as often as all others."""

    metric = "contains"
    description = "a shuffled word list, asked for the words that come most often"
    words: int = 10

    def __post_init__(self) -> None:
        check_count("words", self.words, most=100)

    @property
    def questions_per_context(self) -> int:
        """One question."""
        return 1

    def _draw(self, encoder: Encoder, length: int, rng: random.Random) -> tuple[list[int], tuple[Question, ...]]:
        words = rng.sample(haystack.vocabulary(), len(haystack.vocabulary()))
        common, rare = words[: self.words], words[self.words :]
        text = COMMON_QUESTION.format(count=self.words)
        question = ask(encoder, text, common, " " + ", ".join(common) + ".")
        room = self.room(encoder, length, [question], _list_length(encoder, common * _SHORT_COUNTS[0], 0))
        long = 2 * _list_length(encoder, common * _LONG_COUNTS[0], 0) <= room
        often, seldom = _LONG_COUNTS if long else _SHORT_COUNTS
        listed = common * often
        used = _list_length(encoder, listed, 0)
        for word in rare * (1 + room // len(rare)):
            used += _list_length(encoder, [word] * seldom, len(listed))
            if used > room:
                break
            listed += [word] * seldom
        rng.shuffle(listed)
        body = [Piece(encoder(f" {place}.") + encoder(f" {word}")) for place, word in enumerate(listed, 1)]
        front = haystack.fill(encoder, room - total(body), haystack.noise(rng))
        return join(encoder.front, front + body)[0], (question,)


def _list_length(encoder: Encoder, words: list[str], listed: int) -> int:
    """Return the tokens that these words take, with their numbers, behind `listed` other words."""
    numbers = range(listed + 1, listed + len(words) + 1)
    return sum(len(encoder(f" {n}.")) for n in numbers) + sum(len(encoder(f" {word}")) for word in words)


@task("frequent_words")
@dataclass(frozen=True)
class FrequentWords(Task):
    """A text of coded words whose counts fall with the square of their rank; the first rank is dots."""

    metric = "contains"
    description = "a text of coded words, asked for the three that come most often"

    @property
    def questions_per_context(self) -> int:
        """One question."""
        return 1

    def _draw(self, encoder: Encoder, length: int, rng: random.Random) -> tuple[list[int], tuple[Question, ...]]:
        words = _coded_words(rng, 3)
        question = ask(encoder, FREQUENT_QUESTION, words, " " + ", ".join(words) + ".")
        words = _coded_words(rng, max(length // _TOKENS_PER_WORD, _LEAST_VOCABULARY), words)
        sizes = [len(encoder(DOTS))] + [len(encoder(f" {word}")) for word in words]

        def needed(count: int, vocabulary: int) -> int:
            counts = zeta_counts(count, vocabulary)
            return sum(times * size for times, size in zip(counts, sizes, strict=False))

        room = self.room(encoder, length, [question], needed(_LEAST_WORDS, _LEAST_VOCABULARY))
        vocabulary = max(room // _TOKENS_PER_WORD, _LEAST_VOCABULARY)
        while needed(_LEAST_WORDS, vocabulary) > room:
            vocabulary -= 1
        most = bisect.bisect_right(range(room), room, key=lambda count: needed(count, vocabulary)) - 1
        counts = zeta_counts(most, vocabulary)
        kinds = [Piece(encoder(text)) for text in (DOTS, *(f" {word}" for word in words))]
        body = [piece for piece, times in zip(kinds, counts, strict=False) for _ in range(times)]
        rng.shuffle(body)
        front = haystack.fill(encoder, room - total(body), haystack.noise(rng))
        return join(encoder.front, front + body)[0], (question,)


def zeta_counts(count: int, vocabulary: int) -> list[int]:
    """Return how often each rank comes among about `count` words.

    That is floor(count · rank⁻² / Σ rank⁻²), the sum over all ranks up to `vocabulary`, and at least 1.
    """
    shares = [rank**-_ZETA for rank in range(1, vocabulary + 1)]
    scale = count / sum(shares)
    return [max(1, math.floor(share * scale)) for share in shares]


def _coded_words(rng: random.Random, count: int, first: Sequence[str] = ()) -> list[str]:
    """Return `first` and then as many new words of 6 random letters as make `count` words."""
    words = dict.fromkeys(first)
    while len(words) < count:
        words["".join(rng.choices(string.ascii_lowercase, k=6))] = None
    return list(words)
