"""Contexts with questions about them, in the very sentences of the library's tasks.

Each function makes one sample of at most `length` + 1 tokens (bos included), or None where the facts do not
fit. Training draws the parameters at random; evaluation fixes them.
"""

from __future__ import annotations

import random

import numpy as np

from sparing.models.recipe.encoding import Fact, draw_key, draw_keys, draw_value, join_keys
from sparing.models.recipe.samples import SYNTHETIC_WEIGHT, TEXT_WEIGHT, Sample, Source
from sparing.tasks import formats

# In this share of the training samples many keys have a word in common, so that both words must be matched.
NEAR = 0.33

# Room for a request to repeat a passage and its answer, in tokens.
_QUOTE_TOKENS = 64


def _needle(source: Source, rng: random.Random, key: str, kind: str) -> Fact:
    return source.encoder.fact(formats.NEEDLE, key, draw_value(rng, kind), kind=kind)


def needles(
    source: Source,
    rng: random.Random,
    length: int,
    count: int,
    asked: int,
    kind: str = "number",
    hay: str = "text",
    near: float = NEAR,
) -> Sample | None:
    """`count` needles in a haystack of "text", "noise" or (more) "needles", then questions about `asked` of them."""
    facts = [_needle(source, rng, key, kind) for key in draw_keys(rng, count, near)]
    chosen = rng.sample(range(count), asked)
    questions = [source.encoder.fill(formats.NEEDLE_QUESTION, kind=kind, key=facts[i].key) for i in chosen]
    spare = length - sum(map(len, facts)) - sum(map(len, questions))
    spare -= sum(len(facts[i].answer) + len(facts[i].after) for i in chosen)
    if spare < 0:
        return None
    if hay == "needles":
        spare = _fill_with_needles(source, rng, facts, kind, spare)
    sample, sources = source.haystack(rng, facts, spare, hay == "noise")
    for question, index in zip(questions, chosen, strict=True):
        sample.ask(question, facts[index], sources[index])
    return sample


def _fill_with_needles(source: Source, rng: random.Random, facts: list[Fact], kind: str, spare: int) -> int:
    """Append to facts as many distractors as fit into spare tokens; return the tokens left over."""
    keys = {fact.key for fact in facts}
    while True:
        fact = _needle(source, rng, draw_key(rng), kind)
        if len(fact) > spare:
            return spare
        if fact.key not in keys:
            keys.add(fact.key)
            facts.append(fact)
            spare -= len(fact)


def many_keys(
    source: Source, rng: random.Random, length: int, count: int, kind: str = "number", near: float = NEAR
) -> Sample | None:
    """`count` needles and one question for all of them; the answer repeats the needles in the order asked."""
    facts = [_needle(source, rng, key, kind) for key in draw_keys(rng, count, near)]
    question = source.encoder.fill(
        formats.NEEDLE_MANY_KEYS_QUESTION,
        kind=kind,
        keys=join_keys([fact.key for fact in facts]),
        first_key=facts[0].key,
    )
    answer = facts[0].answer + facts[0].after
    for fact in facts[1:]:
        answer = answer + fact.before + fact.answer + fact.after
    spare = length - len(question) - len(answer) - sum(map(len, facts))
    if spare < 0:
        return None
    sample, sources = source.haystack(rng, facts, spare, rng.random() < 0.1)
    sample.add(question, SYNTHETIC_WEIGHT)
    sample.answer(answer, sources[0])
    return sample


def all_values(
    source: Source, rng: random.Random, length: int, count: int, others: int, kind: str = "number"
) -> Sample | None:
    """One key with `count` values, `others` with one; the answer lists the values in the order of the text."""
    keys = draw_keys(rng, others + 1)
    facts = [_needle(source, rng, key, kind) for key in [keys[0]] * count + keys[1:]]
    question = source.encoder.fill(formats.NEEDLE_ALL_VALUES_QUESTION, kind=kind, key=keys[0])
    spare = length - len(question) - sum(map(len, facts)) - sum(len(f.answer) + 1 for f in facts[:count])
    if spare < 0:
        return None
    sample, sources = source.haystack(rng, facts, spare, rng.random() < 0.1)
    order = sorted(range(count), key=sources.__getitem__)
    answer: list[int] = []
    for index in order:
        answer = answer + facts[index].answer + source.encoder("." if index == order[-1] else ",")
    sample.add(question, SYNTHETIC_WEIGHT)
    sample.answer(answer, sources[order[0]])
    return sample


def lookups(
    source: Source,
    rng: random.Random,
    length: int,
    asked: int,
    kind: str = "number",
    digits: int = 5,
    near: float = NEAR,
) -> Sample:
    """A JSON object that fills the context, and lookups of `asked` of its keys (fewer if fewer fit)."""
    encoder = source.encoder
    facts: list[Fact] = []
    used = 1 + len(encoder(formats.JSON_CLOSE))
    for key in draw_keys(rng, max(2, length // 11), near):
        opening = formats.JSON_SEPARATOR if facts else formats.JSON_OPEN.replace("{", "{{")
        fact = encoder.fact(opening + formats.JSON_ENTRY, key, draw_value(rng, kind, digits))
        question_length = len(encoder.fill(formats.JSON_QUESTION, key=key)) + len(fact.answer) + 1
        if used + len(fact) + min(asked, len(facts) + 1) * (question_length + 1) > length + 1:
            break
        facts.append(fact)
        used += len(fact)
    sample = source.start()
    sources = [sample.plant(fact) for fact in facts]
    sample.add(encoder(formats.JSON_CLOSE), SYNTHETIC_WEIGHT)
    for index in rng.sample(range(len(facts)), min(asked, len(facts))):
        question = encoder.fill(formats.JSON_QUESTION, key=facts[index].key)
        if len(sample.ids) + len(question) + len(facts[index].answer) + 1 <= length + 1:
            sample.ask(question, facts[index], sources[index])
    return sample


def quotes(source: Source, rng: random.Random, length: int, asked: int, start: int = 8, answer: int = 12) -> Sample:
    """Text, and requests (as many of `asked` as fit) to repeat `answer` words that follow on `start` words."""
    lead = source.encoder.fill(formats.COPY_QUESTION, start="")
    hay = source.passage(rng, max(length // 2, length - _QUOTE_TOKENS * asked))
    begins = np.flatnonzero(source.encoder.starts_word[hay])
    sample = source.start()
    sample.add(hay, TEXT_WEIGHT)
    for _ in range(4 * asked):
        first = rng.randrange(len(begins) - start - answer)
        begin, middle, end = (int(begins[first + step]) for step in (0, start, start + answer))
        fits = len(sample.ids) + len(lead) + end - begin <= length + 1
        if fits and len(sample.answers) < asked:
            sample.add(lead + hay[begin:middle], SYNTHETIC_WEIGHT)
            sample.answer(hay[middle:end], middle + 1)
    return sample
