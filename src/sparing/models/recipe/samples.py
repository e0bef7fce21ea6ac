"""Samples, and the haystacks (book text or noise) in which facts are planted."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from sparing.models.recipe.encoding import Encoder, Fact

TEXT_WEIGHT, ANSWER_WEIGHT, SYNTHETIC_WEIGHT, NOISE_WEIGHT = 1.0, 5.0, 0.1, 0.02


@dataclass
class Answer:
    """A span `[start, end)` of a sample's ids; `source` is where its first token stands in the context."""

    start: int
    end: int
    source: int


@dataclass
class Sample:
    """Token ids, the weight of each in the loss (the first is never used), and the answers among them."""

    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)

    def add(self, ids: list[int], weight: float) -> None:
        """Append tokens of one weight."""
        self.ids += ids
        self.weights += [weight] * len(ids)

    def answer(self, ids: list[int], source: int, weight: float = ANSWER_WEIGHT) -> None:
        """Append tokens that count as an answer."""
        self.answers.append(Answer(len(self.ids), len(self.ids) + len(ids), source))
        self.add(ids, weight)

    def plant(self, fact: Fact) -> int:
        """Append a fact and return where its value starts."""
        self.add(fact.before, SYNTHETIC_WEIGHT)
        self.add(fact.answer + fact.after, SYNTHETIC_WEIGHT)
        return len(self.ids) - len(fact.answer) - len(fact.after)

    def ask(self, question: list[int], fact: Fact, source: int) -> None:
        """Append a question and, as its answer, the value of a fact with the mark behind it."""
        self.add(question, SYNTHETIC_WEIGHT)
        self.answer(fact.answer + fact.after, source)


class Source:
    """What samples are made of: an encoder and a corpus of token ids."""

    def __init__(self, encoder: Encoder, corpus: np.ndarray) -> None:
        self.encoder, self.corpus = encoder, corpus

    def start(self) -> Sample:
        """Return a sample that holds only the token of the beginning."""
        return Sample([self.encoder.bos], [0.0])

    def passage(self, rng: random.Random, length: int) -> list[int]:
        """Return a random stretch of the corpus."""
        start = rng.randint(0, len(self.corpus) - length - 1)
        return self.corpus[start : start + length].tolist()

    def noise(self, rng: random.Random, length: int) -> list[int]:
        """Return a stretch of the "noise" haystack."""
        noise = self.encoder.noise
        start = rng.randrange(len(noise))
        return (noise * (length // len(noise) + 2))[start : start + length]

    def haystack(self, rng: random.Random, facts: Sequence[Fact], spare: int, noise: bool) -> tuple[Sample, list[int]]:
        """Plant facts in any order among `spare` tokens, mostly between sentences.

        Returns the sample and where the value of each fact starts.
        """
        hay = self.noise(rng, spare) if noise else self.passage(rng, spare)
        weight = NOISE_WEIGHT if noise else TEXT_WEIGHT
        places = sorted(self._between_sentences(hay, rng.randint(0, spare)) for _ in facts)
        order = rng.sample(range(len(facts)), len(facts))
        sample, sources, done = self.start(), [0] * len(facts), 0
        for place, index in zip(places, order, strict=True):
            sample.add(hay[done:place], weight)
            done = place
            sources[index] = sample.plant(facts[index])
        sample.add(hay[done:], weight)
        return sample, sources

    def _between_sentences(self, hay: list[int], place: int) -> int:
        """Move a place to the next end of a sentence, if there is one within 40 tokens."""
        for later in range(place, min(place + 40, len(hay))):
            if later and hay[later - 1] == self.encoder.period:
                return later
        return place
