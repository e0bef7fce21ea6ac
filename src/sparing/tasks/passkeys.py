"""Passkeys in a book: sequences of random words, which the rest of the sample repeats one by one.

After the data that DuoAttention's gates learn on (Xiao et al. 2024, arXiv:2410.10819). What follows a question can
be told only by looking far back, so a head that may look only near does harm exactly there.

Deviations: 1. the haystack is the shipped novel, not BookSum; 2. a sample has exactly the wanted length, to the
token; 3. three passkeys of 8 words, so that 512 tokens hold them (the authors' code: ten of 32); 4. the wording.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from sparing.core.samples import PasskeySample
from sparing.errors import InvalidInputError, require
from sparing.tasks import haystack
from sparing.tasks.encoding import Encoder, Piece, join, total

_WORDS = """
alpha bravo charlie delta echo foxtrot golf hotel india juliett kilo lima mike november oscar papa quebec romeo sierra
tango uniform victor whiskey xray yankee zulu
"""

WORDS: tuple[str, ...] = tuple(_WORDS.split())
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")

OPEN, CLOSE = "This is a very long story book: <book>", " </book>."
NEEDLE = "\n\nRemember this sequence of words, it's the {ordinal} passkey to the vault:"
QUESTION = "\n\nBased on the content of the book, what is the {ordinal} passkey to the vault?\nPasskey:"
GAP = "\n\n"

# Depths of the needles are different points of a grid over the middle of the haystack.
DEPTHS = tuple(0.05 + 0.9 * point / 999 for point in range(1000))


def passkey_samples(
    tokenizer: Any, count: int, length: int, seed: int = 0, needles: int = 3, words: int = 8
) -> list[PasskeySample]:
    """Samples of exactly `length` tokens, questions and answers included; the same arguments give the same samples.

    Args:
        needles: passkeys in a sample, at most ten. words: in a passkey, at least two.

    Raises:
        InvalidInputError: a number is out of range, or the length is too short to hold the passkeys twice.
    """
    require(1 <= needles <= len(ORDINALS), "needles", needles, f"1 to {len(ORDINALS)}")
    require(words >= 2, "words", words, "a whole number >= 2")
    encoder = Encoder(tokenizer)
    return [
        _sample(encoder, random.Random(f"passkey/{seed}/{index}"), length, needles, words) for index in range(count)
    ]


def _sample(encoder: Encoder, rng: random.Random, length: int, needles: int, words: int) -> PasskeySample:
    keys = [encoder(key) for key in _draw(rng, needles, words)]
    intros = [encoder(NEEDLE.format(ordinal=ordinal)) for ordinal in ORDINALS[:needles]]
    gap = encoder(GAP)
    facts = [Piece([*intro, *key, *gap], mark) for mark, (intro, key) in enumerate(zip(intros, keys, strict=True))]
    opening, tail = [Piece(encoder(OPEN))], [Piece(encoder(CLOSE)), *_tail(encoder, keys)]
    least = len(encoder.front) + total(opening + facts + tail)
    if length < least:
        allowed = f"at least {least} tokens for {needles} passkeys of {words} words with this tokenizer"
        raise InvalidInputError("length", length, allowed, "ask for longer samples")
    hay = haystack.fill(encoder, length - least, haystack.text(rng))
    book = haystack.insert(hay, facts, sorted(rng.sample(DEPTHS, needles)))
    ids, spans = join(encoder.front, opening + book + tail)
    starts = [spans[mark][0] + len(intro) for mark, intro in enumerate(intros)]
    passkeys = tuple((start, start + len(key)) for start, key in zip(starts, keys, strict=True))
    return PasskeySample(tuple(ids), passkeys, tuple(spans[needles + mark] for mark in range(needles)))


def _tail(encoder: Encoder, keys: Sequence[list[int]]) -> list[Piece]:
    """All questions in order, each with its answer; answers are marked from `len(keys)` on."""
    pieces = []
    for number, key in enumerate(keys):
        pieces += [Piece(encoder(QUESTION.format(ordinal=ORDINALS[number]))), Piece(key, len(keys) + number)]
    return pieces


def _draw(rng: random.Random, needles: int, words: int) -> list[str]:
    """Different passkeys, each with a space in front."""
    keys: dict[str, None] = {}
    while len(keys) < needles:
        keys["".join(f" {word}" for word in rng.choices(WORDS, k=words))] = None
    return list(keys)
