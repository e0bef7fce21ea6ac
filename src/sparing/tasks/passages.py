"""Natural text: repeating a passage of it word for word, and predicting how it goes on.

`copy` needs every word of a passage and `perplexity` needs the gist, so they see what facts with keys do not:
a method may keep all needles, which look odd in a novel, and lose the novel.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sparing.errors import InvalidInputError
from sparing.tasks import haystack
from sparing.tasks.base import Question, Task, ask, check_count, longest
from sparing.tasks.encoding import Encoder
from sparing.tasks.formats import COPY_QUESTION
from sparing.tasks.registry import task

START_WORDS, ANSWER_WORDS = 8, 12
CONTINUATION = 128

# Sentences that are read for each question of `copy`, so that there is always something to ask about.
_SENTENCES_PER_QUESTION = 12
_LEAST_PERPLEXITY_LENGTH = 32


class Text:
    """The sentences before a random place of the novel, `least` tokens or more, and where each one starts."""

    def __init__(self, encoder: Encoder, rng: random.Random, least: int, least_sentences: int = 1) -> None:
        sentences, end = haystack.sentences(), rng.randrange(len(haystack.sentences()))
        count, size = 0, 0
        while size < least or count < least_sentences:
            size += len(encoder(sentences[(end - count) % len(sentences)]))
            count += 1
        self.sentences = [sentences[(end - back) % len(sentences)] for back in reversed(range(count))]
        self.ids = [token for sentence in self.sentences for token in encoder(sentence)]
        lengths = (len(encoder(sentence)) for sentence in self.sentences)
        self.starts = list(itertools.accumulate(lengths, initial=0))
        self._flow = "".join(self.sentences)

    def passage(self, first: int) -> Passage | None:
        """Return the passage from a sentence on; None if the text is too short or its start comes twice."""
        words: list[str] = []
        end = first
        while len(words) < START_WORDS + ANSWER_WORDS and end < len(self.sentences):
            words += self.sentences[end].split()
            end += 1
        if len(words) < START_WORDS + ANSWER_WORDS:
            return None
        given = " " + " ".join(words[:START_WORDS])
        if self._flow.count(given) != 1:
            return None
        wanted = " ".join(words[START_WORDS : START_WORDS + ANSWER_WORDS])
        return Passage(self.starts[first], self.starts[end], given, wanted)


@dataclass(frozen=True)
class Passage:
    """A passage: [start, end) of its sentences in the text's tokens, its given and its wanted words."""

    start: int
    end: int
    given: str
    wanted: str


@task("copy")
@dataclass(frozen=True)
class Copy(Task):
    """The context is a novel's text; given 8 words that begin a sentence, the next 12 are asked for."""

    metric = "prefix_words"
    description = "a novel's text, asked to repeat passages of it"
    questions: int = 4

    def __post_init__(self) -> None:
        check_count("questions", self.questions, most=64)

    @property
    def questions_per_context(self) -> int:
        """As many as the option `questions` says."""
        return self.questions

    def _draw(self, encoder: Encoder, length: int, rng: random.Random) -> tuple[list[int], tuple[Question, ...]]:
        text = Text(encoder, rng, length, self.questions * _SENTENCES_PER_QUESTION)
        passages = self._anywhere(encoder, length, rng, text) or self._at_the_end(text)
        asked = [_ask(encoder, passage) for passage in passages]
        needed = len(text.ids) - min(passage.start for passage in passages)
        cut = len(text.ids) - self.room(encoder, length, asked, needed)
        shift = len(encoder.front) - cut
        return encoder.front + text.ids[cut:], tuple(
            replace(question, evidence=((passage.start + shift, passage.end + shift),))
            for question, passage in zip(asked, passages, strict=True)
        )

    def _anywhere(self, encoder: Encoder, length: int, rng: random.Random, text: Text) -> list[Passage] | None:
        """Draw passages that lie in the context which they and their answers leave room for."""
        chosen: list[Passage] = []
        for first in rng.sample(range(len(text.sentences)), len(text.sentences)):
            passage = text.passage(first)
            chosen += [passage] if passage else []
            if len(chosen) < self.questions:
                continue
            reserved = len(encoder.front) + longest(_ask(encoder, passage) for passage in chosen)
            chosen = [passage for passage in chosen if passage.start >= len(text.ids) - (length - reserved)]
            if len(chosen) == self.questions:
                return chosen
        return None

    def _at_the_end(self, text: Text) -> list[Passage]:
        """Return the last passages, which need the shortest context."""
        found = (text.passage(first) for first in reversed(range(len(text.sentences))))
        passages = list(itertools.islice(filter(None, found), self.questions))
        if len(passages) < self.questions:
            raise InvalidInputError("length", len(text.ids), "a text that does not repeat itself")
        return passages


def _ask(encoder: Encoder, passage: Passage) -> Question:
    text = COPY_QUESTION.format(start=passage.given)
    return ask(encoder, text, [passage.wanted], " " + passage.wanted)


@task("perplexity")
@dataclass(frozen=True)
class Perplexity(Task):
    """How well the model predicts the continuation of a novel's text, the same one at every length from 512 on.

    The question is the continuation's first token, so that every scored token is predicted from the
    compressed cache, also the first of them. 128 tokens are scored, or a quarter of a short sample.
    """

    metric = "1/perplexity"
    description = "a novel's text, scored by the probability of how it goes on"
    kind = "likelihood"

    @property
    def questions_per_context(self) -> int:
        """One continuation."""
        return 1

    def _draw(self, encoder: Encoder, length: int, rng: random.Random) -> tuple[list[int], tuple[Question, ...]]:
        if length < _LEAST_PERPLEXITY_LENGTH + len(encoder.front):
            raise self.too_short(length, _LEAST_PERPLEXITY_LENGTH + len(encoder.front))
        count = min(CONTINUATION, length // 4)
        text = Text(encoder, rng, length).ids
        context, cue, target = _split(text, length - len(encoder.front), count)
        question = Question("", (cue,), (), count, target_ids=tuple(target))
        return encoder.front + context, (question,)


def _split(ids: Sequence[int], length: int, count: int) -> tuple[list[int], int, list[int]]:
    """Return the last `length` ids as a context, one id, and the `count` ids to be scored."""
    last = list(ids[-length:])
    return last[: -count - 1], last[-count - 1], last[-count:]
