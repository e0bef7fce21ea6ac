"""Needles in a haystack: facts planted in text, noise or other facts, and questions about them.

After RULER (Hsieh et al. 2024, arXiv:2404.06654, table 1), which names these tasks single, multi-keys,
multi-values and multi-queries. Deviations: 1. shorter sentences (`formats`); 2. keys of two words and
numbers of 5 digits; 3. a novel instead of essays; 4. one needle's depth does not limit another's;
5. several questions about one multikey context; 6. no worked example in front. Scores are not comparable with
RULER's published ones.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from sparing.tasks import haystack
from sparing.tasks.base import Question, Task, ask, check_choice, check_count
from sparing.tasks.encoding import Encoder, Piece, join, total
from sparing.tasks.formats import (
    NEEDLE,
    NEEDLE_ALL_VALUES_QUESTION,
    NEEDLE_MANY_KEYS_QUESTION,
    NEEDLE_QUESTION,
)
from sparing.tasks.registry import task

MAX_NEEDLES = 64


@dataclass(frozen=True)
class Fact:
    """A key and its value."""

    key: str
    value: str

    def sentence(self, kind: str) -> str:
        """Return the needle that states the fact."""
        return NEEDLE.format(kind=kind, key=self.key, value=self.value)


@dataclass(frozen=True)
class NeedleTask(Task):
    """What the four needle tasks share.

    Options: the haystack, and the kind of value ("number" or "word"). `in_order` says that the needles
    stand in the text in the order of the facts, not in a random one.
    """

    metric = "contains"
    in_order: ClassVar[bool] = False
    haystack: str = "text"
    values_are: str = "number"

    def __post_init__(self) -> None:
        check_choice("haystack", self.haystack, haystack.KINDS)
        check_choice("values_are", self.values_are, haystack.VALUE_KINDS)

    @property
    def questions_per_context(self) -> int:
        """One question, unless a subclass asks more."""
        return 1

    def facts(self, rng: random.Random) -> list[Fact]:
        """Draw the facts to be planted."""
        raise NotImplementedError

    def questions(self, encoder: Encoder, facts: list[Fact]) -> list[tuple[Question, list[Fact]]]:
        """Return the questions, each with the facts that hold its answer."""
        raise NotImplementedError

    def _draw(self, encoder: Encoder, length: int, rng: random.Random) -> tuple[list[int], tuple[Question, ...]]:
        facts = self.facts(rng)
        depths = [rng.random() for _ in facts]
        depths = sorted(depths) if self.in_order else depths
        needles = [Piece(encoder(fact.sentence(self.values_are)), mark) for mark, fact in enumerate(facts)]
        asked = self.questions(encoder, facts)
        room = self.room(encoder, length, [question for question, _ in asked], total(needles))
        hay = haystack.fill(encoder, room - total(needles), self._source(rng, facts))
        context_ids, spans = join(encoder.front, haystack.insert(hay, needles, depths))
        return context_ids, tuple(
            replace(question, evidence=tuple(spans[facts.index(fact)] for fact in about)) for question, about in asked
        )

    def _source(self, rng: random.Random, facts: list[Fact]) -> Iterator[str]:
        if self.haystack == "needles":
            return haystack.needles(rng, self.values_are, {fact.key for fact in facts})
        return haystack.text(rng) if self.haystack == "text" else haystack.noise(rng)

    def _one_key(self, encoder: Encoder, fact: Fact) -> tuple[Question, list[Fact]]:
        text = NEEDLE_QUESTION.format(kind=self.values_are, key=fact.key)
        return ask(encoder, text, [fact.value], f" {fact.value}."), [fact]

    def _pairs(self, rng: random.Random, count: int) -> list[Fact]:
        keys = haystack.draw_keys(rng, count)
        values = haystack.draw_values(rng, self.values_are, count)
        return [Fact(key, value) for key, value in zip(keys, values, strict=True)]


@task("needle_single")
@dataclass(frozen=True)
class NeedleSingle(NeedleTask):
    """One needle, one question."""

    description = "one fact in a haystack"

    def facts(self, rng: random.Random) -> list[Fact]:
        """Draw one fact."""
        return self._pairs(rng, 1)

    def questions(self, encoder: Encoder, facts: list[Fact]) -> list[tuple[Question, list[Fact]]]:
        """Ask for its value."""
        return [self._one_key(encoder, facts[0])]


@task("needle_multikey")
@dataclass(frozen=True)
class NeedleMultikey(NeedleTask):
    """Several needles with different keys; a question about each, on the same context."""

    description = "several facts in a haystack, a question about each"
    keys: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("keys", self.keys, most=MAX_NEEDLES)

    @property
    def questions_per_context(self) -> int:
        """One question per key."""
        return self.keys

    def facts(self, rng: random.Random) -> list[Fact]:
        """Draw facts with different keys and different values."""
        return self._pairs(rng, self.keys)

    def questions(self, encoder: Encoder, facts: list[Fact]) -> list[tuple[Question, list[Fact]]]:
        """Ask for the value of each key."""
        return [self._one_key(encoder, fact) for fact in facts]


@task("needle_multivalue")
@dataclass(frozen=True)
class NeedleMultivalue(NeedleTask):
    """Several needles with one key; one question asks for all its values."""

    description = "one key with several values in a haystack, asked for all of them"
    in_order = True
    values: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("values", self.values, most=MAX_NEEDLES)

    def facts(self, rng: random.Random) -> list[Fact]:
        """Draw facts with one key and different values."""
        (key,) = haystack.draw_keys(rng, 1)
        return [Fact(key, value) for value in haystack.draw_values(rng, self.values_are, self.values)]

    def questions(self, encoder: Encoder, facts: list[Fact]) -> list[tuple[Question, list[Fact]]]:
        """Ask for all values."""
        text = NEEDLE_ALL_VALUES_QUESTION.format(kind=self.values_are, key=facts[0].key)
        values = [fact.value for fact in facts]
        return [(ask(encoder, text, values, " " + ", ".join(values) + "."), facts)]


@task("needle_multiquery")
@dataclass(frozen=True)
class NeedleMultiquery(NeedleTask):
    """Several needles with different keys; one question asks for all of them."""

    description = "several facts in a haystack, all asked for in one question"
    keys: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("keys", self.keys, least=2, most=MAX_NEEDLES)

    def facts(self, rng: random.Random) -> list[Fact]:
        """Draw facts with different keys and different values."""
        return self._pairs(rng, self.keys)

    def questions(self, encoder: Encoder, facts: list[Fact]) -> list[tuple[Question, list[Fact]]]:
        """Ask for the values of all keys; the first key's value comes first."""
        keys = [fact.key for fact in facts]
        text = NEEDLE_MANY_KEYS_QUESTION.format(kind=self.values_are, keys=join_keys(keys), first_key=keys[0])
        expected = f" {facts[0].value}." + "".join(fact.sentence(self.values_are) for fact in facts[1:])
        return [(ask(encoder, text, [fact.value for fact in facts], expected), facts)]


def join_keys(keys: list[str]) -> str:
    """Return "a b, c d and e f"."""
    return ", ".join(keys[:-1]) + " and " + keys[-1]
