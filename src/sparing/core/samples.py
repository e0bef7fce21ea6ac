"""What scorers of heads measure on: token ids and where in them something is. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# Which of the classes below a scorer needs: TextSample, NeedleSample, PairSample, RankingSample, PasskeySample;
# "none" if it makes its own (random tokens).
DataKind = Literal["text", "needle", "pair", "ranking", "passkey", "none"]

Span = tuple[int, int]


@dataclass(frozen=True)
class TextSample:
    """Plain text. `response` is where the part to be studied starts (0: all of it)."""

    ids: tuple[int, ...]
    response: int = 0


@dataclass(frozen=True)
class NeedleSample:
    """A question about a fact in a context.

    Attributes:
        ids: context and question. answer_ids: the expected continuation. answers: what counts as right, in words.
        needle: [start, end) of the fact's sentence in ids. value: [start, end) of the answer within it.
        max_new_tokens: how many tokens the answer may take.
    """

    ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    answers: tuple[str, ...]
    needle: Span
    value: Span
    max_new_tokens: int


@dataclass(frozen=True)
class PairSample:
    """Two prompts of one length that differ in what the answer is.

    Attributes:
        clean, corrupt: token ids, equally many. answer: the token that continues clean. wrong: that continues
            corrupt. changed: positions where they differ.
    """

    clean: tuple[int, ...]
    corrupt: tuple[int, ...]
    answer: int
    wrong: int

    @property
    def changed(self) -> tuple[int, ...]:
        """Positions where the two differ."""
        return tuple(i for i, (a, b) in enumerate(zip(self.clean, self.corrupt, strict=True)) if a != b)


@dataclass(frozen=True)
class RankingSample:
    """A query about documents that stand in one prompt.

    Attributes:
        ids: the prompt with the real query. null_ids: the same documents with a content-free query ("N/A").
        documents: [start, end) of each document, the same in both. query_start: where the instruction and the
            query begin; everything from there on asks. gold: indices of the documents that hold the answer.
    """

    ids: tuple[int, ...]
    null_ids: tuple[int, ...]
    documents: tuple[Span, ...]
    query_start: int
    gold: tuple[int, ...]


@dataclass(frozen=True)
class PasskeySample:
    """Sequences of random words in a long text, and behind it all of them again, each after a question for it.

    Attributes:
        ids: text, questions and answers.
        passkeys: [start, end) of each sequence in the text, in the order of the text. answers: [start, end) of each
            again, in the same order; ids[answers[i]] == ids[passkeys[i]].
    """

    ids: tuple[int, ...]
    passkeys: tuple[Span, ...]
    answers: tuple[Span, ...]
