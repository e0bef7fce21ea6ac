"""What a task is: a context of an exact length, questions about it, and a score for each answer.

A sample of `length` tokens fits a model with that many positions, to the token: the context, plus the
longest of its questions with the tokens allowed for its answer, make exactly `length`. Texts are
therefore put together as token ids, for whatever tokenizer, and never as one string that is cut later.

Several questions share one context where that makes sense, because a context is compressed once and asked
often: a method that knows the question beforehand, or that keeps only what the first question needs, shows
there. The questions of one context are not independent observations (see `intervals`).
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol

from sparing.errors import InvalidInputError
from sparing.tasks.encoding import Encoder
from sparing.tasks.metrics import METRICS

# Tokens that an answer may take beyond the expected ones, for a space, a full stop or another wording.
ANSWER_SLACK = 8


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that tasks use."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of text."""

    def decode(self, token_ids: list[int]) -> str:
        """Return the text of token ids."""


@dataclass(frozen=True)
class Question:
    """One question about a context.

    Attributes:
        text: the question as asked, to be appended to the context.
        token_ids: its tokens; feed these, not a second encoding of `text`.
        answers: the expected answers, in the words that the output must hold. Empty when the answer is a
            continuation (`target_ids`) or is still to be taken from the full cache (`reference`).
        max_new_tokens: how many tokens the answer may take.
        target_ids: kind "likelihood" only: the tokens to be scored by teacher forcing after `token_ids`.
        evidence: [start, end) positions in the context ids of the pieces of text that hold the answer.
        reference: "answers", or "full" when the reference is what the model says with its full cache.
        metric: of this question alone, one of `metrics.METRICS`; "" for the task's.
        one_line: the answer ends with its first line; what follows is not to be judged.
    """

    text: str
    token_ids: tuple[int, ...]
    answers: tuple[str, ...]
    max_new_tokens: int
    target_ids: tuple[int, ...] = ()
    evidence: tuple[tuple[int, int], ...] = ()
    reference: str = "answers"
    metric: str = ""
    one_line: bool = True

    @property
    def num_tokens(self) -> int:
        """Tokens that the question and its answer take at most."""
        return len(self.token_ids) + self.max_new_tokens


@dataclass(frozen=True)
class Sample:
    """A context and the questions about it; `name` says which one ("copy/seed=0/index=3/length=1024")."""

    name: str
    context_ids: list[int]
    questions: tuple[Question, ...]

    @property
    def length(self) -> int:
        """Positions that a model needs for the context and any one of its questions with its answer."""
        return len(self.context_ids) + longest(self.questions)


class Task(ABC):
    """A family of samples and their score. Subclasses are frozen dataclasses whose fields are the options.

    Class attributes:
        name: what the task is called, in `sparing.tasks.get` and in reports.
        metric: the name of the score, one of `metrics.METRICS` or "1/perplexity".
        description: one line for people.
        kind: "generation" (the model answers, `score` judges its words) or "likelihood" (the model is
            given the answer token by token, `score_likelihood` judges its mean loss).
        num_samples: how many samples there are, or None when there is no end to them.
    """

    name: ClassVar[str]
    metric: str
    description: ClassVar[str]
    kind: ClassVar[str] = "generation"

    @property
    def num_samples(self) -> int | None:
        """How many samples there are; None for a generator, which never runs out."""
        return None

    @property
    @abstractmethod
    def questions_per_context(self) -> int:
        """How many questions are asked about each context (at most, for a user's own file)."""

    @property
    def label(self) -> str:
        """The name with the options that differ from their defaults; `sparing.tasks.get` accepts it."""
        options: Any = self
        given = [(field, getattr(self, field.name)) for field in fields(options)]
        return self.name + "".join(f":{f.name}={value}" for f, value in given if value != f.default)

    def sample(self, tokenizer: Tokenizer, length: int | None, seed: int = 0, index: int = 0) -> Sample:
        """Return sample number `index` of the series `seed`, exactly `length` tokens long.

        The same arguments give the same sample in every process. What is planted does not depend on
        the length, so results at two lengths are about the same facts.

        Raises:
            InvalidInputError: the length is too short to hold the task; the message gives the minimum.
        """
        if not isinstance(length, int) or isinstance(length, bool) or length < 1:
            raise InvalidInputError("length", length, f"a positive number of tokens for the task {self.name}")
        rng = random.Random(f"{self.label}/{seed}/{index}")
        context_ids, questions = self._draw(Encoder(tokenizer), length, rng)
        return Sample(f"{self.label}/seed={seed}/index={index}/length={length}", context_ids, questions)

    @abstractmethod
    def _draw(self, encoder: Encoder, length: int, rng: random.Random) -> tuple[list[int], tuple[Question, ...]]:
        """Return the context ids and the questions of a sample of exactly `length` tokens."""

    def score(self, question: Question, output: str) -> float:
        """Return how right the output is, from 0 to 1; an empty output is scored 0, never left out."""
        assert self.kind == "generation", f"{self.name} is scored by score_likelihood"
        return METRICS[question.metric or self.metric](output, question.answers)

    def score_likelihood(self, mean_loss: float) -> float:
        """Return 1 / perplexity = exp(-mean loss), the loss in nats per token of `target_ids`.

        Raises:
            InvalidInputError: the loss is not a number, or well below 0: the model's output is broken.
        """
        assert self.kind == "likelihood", f"{self.name} is scored by score"
        if not mean_loss > -1e-3:
            raise InvalidInputError("mean loss", mean_loss, "a number from 0 on")
        return math.exp(-max(mean_loss, 0.0))

    def room(self, encoder: Encoder, length: int, questions: Sequence[Question], needed: int) -> int:
        """Return how many tokens the context may take beside special tokens and questions.

        Raises:
            InvalidInputError: that is less than `needed`.
        """
        reserved = len(encoder.front) + longest(questions)
        if length - reserved < needed:
            raise self.too_short(length, reserved + needed)
        return length - reserved

    def too_short(self, length: int, least: int) -> InvalidInputError:
        """Return the error for a length that is less than this sample takes with this tokenizer."""
        allowed = f"at least {least} tokens for this sample of {self.label} with this tokenizer"
        return InvalidInputError("length", length, allowed, "ask for longer samples or for another task")


def ask(encoder: Encoder, text: str, answers: Iterable[str], expected: str) -> Question:
    """Return a question whose answer may take the tokens of the `expected` output and a few more."""
    limit = len(encoder(expected)) + ANSWER_SLACK
    return Question(text, tuple(encoder(text)), tuple(answers), limit)


def longest(questions: Iterable[Question]) -> int:
    """Return the most tokens that any of the questions takes with its answer."""
    return max(question.num_tokens for question in questions)


def check_choice(kind: str, value: str, known: Sequence[str]) -> None:
    """Raise InvalidInputError unless value is one of known."""
    if value not in known:
        raise InvalidInputError(kind, value, "one of " + ", ".join(known))


def check_count(what: str, value: int, least: int = 1, *, most: int) -> None:
    """Raise InvalidInputError unless value is a whole number from least to most."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise InvalidInputError(what, value, f"a whole number from {least} to {most}")
