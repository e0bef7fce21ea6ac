"""Training data: retrieval drills, the tasks' own questions with random parameters, and natural text.

A sample of length T is T + 1 token ids, T weights (one per predicted token, aligned with ids[1:]) and the
spans of ids that are answers. The loss counts most on the answers: weight 5 there, 1 on natural text and 0.1
on the rest of the synthetic sentences, which no model could predict. One context carries several questions.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

import numpy as np

from sparing.models.recipe import questions
from sparing.models.recipe.encoding import Fact, draw_keys, draw_value
from sparing.models.recipe.samples import TEXT_WEIGHT, Sample, Source
from sparing.tasks import formats
from sparing.tasks.words import NOUNS

# A fact in the fewest tokens, for the first stage: same last words as a needle.
SHORT_FACT = " {key} is: {value}."

Task = Callable[[Source, random.Random, int], Sample]


def text(source: Source, rng: random.Random, length: int) -> Sample:
    """Natural text only."""
    sample = source.start()
    sample.add(source.passage(rng, length), TEXT_WEIGHT)
    return sample


def copy(source: Source, rng: random.Random, length: int) -> Sample:
    """A segment (random tokens, or text) that comes twice: the exercise from which induction grows."""
    count = rng.randint(8, min(length // 2 - 2, 96))
    segment = source.passage(rng, count)
    if rng.random() < 0.6:
        segment = [rng.randint(3, source.encoder.vocabulary - 1) for _ in range(count)]
    spare = length - 2 * count
    first = rng.randint(0, spare)
    second = rng.randint(0, spare - first)
    sample = source.start()
    sample.add(source.passage(rng, first), TEXT_WEIGHT)
    begin = len(sample.ids)
    sample.add(segment, 0.0)
    sample.add(source.passage(rng, second), TEXT_WEIGHT)
    sample.add(segment[:2], 0.0)
    sample.answer(segment[2:], begin + 2, weight=2.0)
    sample.add(source.passage(rng, spare - first - second), TEXT_WEIGHT)
    return sample


def pairs(source: Source, rng: random.Random, length: int) -> Sample:
    """Short facts with one-word or two-word keys, then most of the same facts again in another order."""
    single, digits = rng.random() < 0.5, rng.randint(1, 4)
    kind = rng.choice(("number", "number", "word"))
    facts: list[Fact] = []
    room = length
    for key in rng.sample(NOUNS, 60) if single else draw_keys(rng, 60, questions.NEAR):
        value = rng.choice(NOUNS) if kind == "word" else draw_value(rng, kind, digits)
        fact = source.encoder.fact(SHORT_FACT, key, value)
        if 2 * len(fact) > room:
            break
        facts.append(fact)
        room -= 2 * len(fact)
    sample = source.start()
    sources = [sample.plant(fact) for fact in facts]
    asked = rng.sample(range(len(facts)), len(facts) - rng.randint(0, len(facts) // 3))
    rest = length + 1 - len(sample.ids) - sum(len(facts[index]) for index in asked)
    sample.add(source.passage(rng, rest), TEXT_WEIGHT)
    for index in asked:
        sample.ask(facts[index].before, facts[index], sources[index])
    return sample


def recall(source: Source, rng: random.Random, length: int) -> Sample:
    """Statements one after the other: new facts, or facts said before, whose values are then the answers."""
    kind = rng.choice(("number", "number", "number", "word"))
    template = rng.choice((SHORT_FACT, formats.NEEDLE, formats.JSON_SEPARATOR + formats.JSON_ENTRY))
    fields = {"kind": kind} if "{kind}" in template else {}
    keys = draw_keys(rng, rng.choice((2, 4, 8, 16, 32, 64)), questions.NEAR)
    repeats, filler = rng.choice((0.4, 0.6, 0.8)), rng.choice((0.0, 0.0, 0.2, 0.4))
    sample = source.start()
    known: list[tuple[Fact, int]] = []
    while True:
        if rng.random() < filler:
            room = length + 1 - len(sample.ids)
            sample.add(source.passage(rng, min(rng.randint(4, 48), room)), TEXT_WEIGHT)
        again = not keys or (len(known) > 1 and rng.random() < repeats)
        if again:
            fact, begin = rng.choice(known)
        else:
            fact = source.encoder.fact(template, keys[-1], draw_value(rng, kind), **fields)
        if len(sample.ids) + len(fact) > length + 1:
            break
        if again:
            sample.ask(fact.before, fact, begin)
        else:
            keys.pop()
            known.append((fact, sample.plant(fact)))
    return sample


def needle(source: Source, rng: random.Random, length: int) -> Sample:
    """Needles in a haystack of text, noise or other needles, and questions about some of them."""
    kind = rng.choice(("number", "number", "number", "word"))
    hay = rng.choices(("text", "noise", "needles"), (0.75, 0.1, 0.15))[0]
    for count in range(rng.choice((1, 2, 3, 4, 4, 6, 8, 12)), 0, -1):
        asked = rng.randint(1, count)
        sample = questions.needles(source, rng, length, count, asked, kind, hay)
        if sample:
            return sample
    return pairs(source, rng, length)


def json(source: Source, rng: random.Random, length: int) -> Sample:
    """A JSON object that fills the context, and lookups of some of its keys."""
    kind = rng.choice(("number", "number", "number", "word"))
    asked = rng.randint(2, 4 + length // 128)
    return questions.lookups(source, rng, length, asked, kind, rng.choice((0, 5)))


def quote(source: Source, rng: random.Random, length: int) -> Sample:
    """Text, and requests to repeat passages of it from their first words on."""
    if length < 256:
        return copy(source, rng, length)
    asked = rng.randint(1, 1 + length // 128)
    return questions.quotes(source, rng, length, asked, rng.randint(5, 10), rng.randint(8, 16))


def many(source: Source, rng: random.Random, length: int) -> Sample:
    """Several keys in one question, or all the values of one key."""
    kind = rng.choice(("number", "number", "number", "word"))
    count = rng.choice((2, 3, 4))
    if rng.random() < 0.5:
        sample = questions.many_keys(source, rng, length, count, kind)
    else:
        sample = questions.all_values(source, rng, length, count, rng.randint(0, count), kind)
    return sample or needle(source, rng, length)


TASKS: Mapping[str, Task] = {
    "text": text,
    "copy": copy,
    "pairs": pairs,
    "recall": recall,
    "needle": needle,
    "json": json,
    "quote": quote,
    "many": many,
}


def batch(
    source: Source, rng: random.Random, size: int, length: int, mix: Mapping[str, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Return ids (size, length + 1) and weights (size, length) of samples drawn by the shares in mix.

    Samples that end early are filled up with text of weight 0.
    """
    ids = np.zeros((size, length + 1), np.int64)
    weights = np.zeros((size, length), np.float32)
    for row, name in enumerate(rng.choices(list(mix), list(mix.values()), k=size)):
        sample = TASKS[name](source, rng, length)
        sample.add(source.passage(rng, length + 1 - len(sample.ids)), 0.0)
        ids[row], weights[row] = sample.ids, sample.weights[1:]
    return ids, weights
