"""Sentences of the tasks as token ids: encoded piece by piece, with a cache, and split at the value."""

from __future__ import annotations

import itertools
import random
import string
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from sparing.tasks import formats
from sparing.tasks.words import ADJECTIVES, NOUNS, shuffled_keys


@dataclass
class Fact:
    """One planted value: the ids up to the value, of the value, and after it."""

    key: str
    value: str
    before: list[int]
    answer: list[int]
    after: list[int]

    def __len__(self) -> int:
        return len(self.before) + len(self.answer) + len(self.after)


class Encoder:
    """Encodes sentences piece by piece, with a cache; see `tokenization` for why pieces may be joined."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._cache: dict[str, list[int]] = {}
        self._parsed: dict[str, list[tuple[str, str | None]]] = {}
        self.bos: int = tokenizer.encode("").ids[0]
        self.period = self(".")[0]
        self.vocabulary: int = tokenizer.get_vocab_size()
        spaced = [token for text, token in tokenizer.get_vocab().items() if text.startswith("Ġ")]
        self.starts_word = np.zeros(self.vocabulary, bool)
        self.starts_word[spaced] = True
        self.noise = self(formats.NOISE)

    def __call__(self, text: str) -> list[int]:
        """Return the ids of text, without special tokens."""
        digits = text.lstrip(" ")
        if len(digits) > 1 and digits.isdigit():
            ids = self(text[: len(text) - len(digits) + 1])
            return ids + [self(digit)[0] for digit in digits[1:]]
        if text not in self._cache:
            self._cache[text] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return self._cache[text]

    def fill(self, template: str, **fields: str) -> list[int]:
        """Return the ids of `template.format(**fields)`; a space before a field goes with the field."""
        ids: list[int] = []
        if template not in self._parsed:
            self._parsed[template] = [part[:2] for part in string.Formatter().parse(template)]
        for literal, name in self._parsed[template]:
            value = fields[name] if name else ""
            if name and literal.endswith(" "):
                literal, value = literal[:-1], " " + value
            ids = ids + self(literal) + self(value)
        return ids

    def fact(self, template: str, key: str, value: str, **fields: str) -> Fact:
        """Split `template.format(key=..., value=...)` at the value and return the parts."""
        before, after = template.split("{value}")
        space = " " if before.endswith(" ") else ""
        ids = self.fill(before.rstrip(" "), key=key, **fields)
        return Fact(key, value, ids, self(space + value), self(after))


def draw_key(rng: random.Random) -> str:
    """Draw a key of two words, such as "amber river"."""
    return f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"


def draw_keys(rng: random.Random, count: int, near: float = 0.0) -> list[str]:
    """Draw different keys that share no word while the words last, as the tasks do.

    In a share `near` of the sets, words are drawn at random instead and half of the keys have a word from another.
    """
    if rng.random() >= near:
        return list(itertools.islice(shuffled_keys(rng), count))
    keys: dict[str, None] = {}
    first = draw_key(rng)
    while len(keys) < count:
        adjective, noun = draw_key(rng).split(" ")
        if rng.random() < 0.5:
            old = rng.choice(list(keys) or [first]).split(" ")
            adjective, noun = (old[0], noun) if rng.random() < 0.5 else (adjective, old[1])
        keys[f"{adjective} {noun}"] = None
    return rng.sample(list(keys), count)


def draw_value(rng: random.Random, kind: str, digits: int = 0) -> str:
    """Draw a number of `digits` digits (4 to 7, mostly 5, if 0), or two words for the kind "word"."""
    if kind == "word":
        return draw_key(rng)
    digits = digits or rng.choice((4, 5, 5, 5, 6, 7))
    return str(rng.randint(10 ** (digits - 1), 10**digits - 1))


def join_keys(keys: list[str]) -> str:
    """Return "a b, c d and e f"."""
    return ", ".join(keys[:-1]) + " and " + keys[-1]
