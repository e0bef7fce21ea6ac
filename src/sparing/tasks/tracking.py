"""Variable tracking: chains of assignments to be followed from a value to all variables that hold it.

After RULER's `vt` (Hsieh et al. 2024, arXiv:2404.06654, section 3): a chain of `hops` + 1 variables, of which
each is given the one before. Deviations: 1. two chains by default instead of one, so that naming every
variable in sight is possible but not what is asked, and a question about each; 2. no worked example in front;
3. other wording. Scores are not comparable with RULER's published ones.
"""

from __future__ import annotations

import random
import string
from dataclasses import dataclass, replace

from sparing.tasks import haystack
from sparing.tasks.base import Question, Task, ask, check_choice, check_count
from sparing.tasks.encoding import Encoder, Piece, join, total
from sparing.tasks.registry import task

FIRST = " VAR {name} = {value}."
NEXT = " VAR {name} = VAR {previous}."
QUESTION = "\nWhich variables hold the value {value}? The variables that hold the value {value} are:"
_HAYSTACKS = ("noise", "text")


@dataclass(frozen=True)
class Chain:
    """A value and the variables that hold it, in the order of their assignment."""

    value: str
    names: tuple[str, ...]

    def sentences(self) -> list[str]:
        """Return the assignments."""
        later = zip(self.names, self.names[1:], strict=False)
        return [FIRST.format(name=self.names[0], value=self.value)] + [
            NEXT.format(name=name, previous=previous) for previous, name in later
        ]


@task("variable_tracking")
@dataclass(frozen=True)
class VariableTracking(Task):
    """Chains of assignments in a haystack; a question about each chain's value."""

    metric = "contains"
    description = "chains of variable assignments, asked which variables hold a value"
    haystack: str = "noise"
    chains: int = 2
    hops: int = 4

    def __post_init__(self) -> None:
        check_choice("haystack", self.haystack, _HAYSTACKS)
        check_count("chains", self.chains, most=16)
        check_count("hops", self.hops, most=16)

    @property
    def questions_per_context(self) -> int:
        """One question per chain."""
        return self.chains

    def _draw(self, encoder: Encoder, length: int, rng: random.Random) -> tuple[list[int], tuple[Question, ...]]:
        chains = self._chains(rng)
        sentences = [sentence for chain in chains for sentence in chain.sentences()]
        facts = [Piece(encoder(sentence), mark) for mark, sentence in enumerate(sentences)]
        depths = [depth for chain in chains for depth in sorted(rng.random() for _ in chain.names)]
        questions = [_question(encoder, chain) for chain in chains]
        room = self.room(encoder, length, questions, total(facts)) - total(facts)
        source = haystack.noise(rng) if self.haystack == "noise" else haystack.text(rng)
        pieces = haystack.insert(haystack.fill(encoder, room, source), facts, depths)
        context_ids, spans = join(encoder.front, pieces)
        size = self.hops + 1
        marks = [range(first * size, (first + 1) * size) for first in range(self.chains)]
        return context_ids, tuple(
            replace(question, evidence=tuple(spans[mark] for mark in own))
            for question, own in zip(questions, marks, strict=True)
        )

    def _chains(self, rng: random.Random) -> list[Chain]:
        size = self.hops + 1
        names: dict[str, None] = {}
        while len(names) < self.chains * size:
            names["".join(rng.choices(string.ascii_uppercase, k=5))] = None
        values = haystack.draw_values(rng, "number", self.chains)
        given = iter(names)
        return [Chain(value, tuple(next(given) for _ in range(size))) for value in values]


def _question(encoder: Encoder, chain: Chain) -> Question:
    expected = " " + ", ".join(chain.names) + "."
    return ask(encoder, QUESTION.format(value=chain.value), chain.names, expected)
