"""Samples for scorers of heads, made offline for any tokenizer: text, needles, and pairs of prompts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from sparing.core.samples import NeedleSample, PairSample, Span, TextSample
from sparing.errors import InvalidInputError
from sparing.tasks import haystack
from sparing.tasks.base import Question, Task
from sparing.tasks.encoding import Encoder, join
from sparing.tasks.registry import get

# How often another value is drawn before a pair of prompts is given up: values must be equally many tokens.
_TRIES = 200


def text_samples(tokenizer: Any, count: int, length: int, seed: int = 0) -> list[TextSample]:
    """Passages of the bundled novel, `length` tokens each, special tokens in front included."""
    encoder, samples = Encoder(tokenizer), []
    for index in range(count):
        rng = random.Random(f"text/{seed}/{index}")
        pieces = haystack.fill(encoder, length - len(encoder.front), haystack.text(rng))
        samples.append(TextSample(tuple(join(encoder.front, pieces)[0])))
    return samples


def needle_samples(
    tokenizer: Any, count: int, length: int, seed: int = 0, task: Task | None = None
) -> list[NeedleSample]:
    """Questions about facts in a context, `length` tokens with the answer.

    Args:
        task: any task whose answers stand in its contexts word for word; a single needle by default. Of a generated
            task one question a context is taken, of a file (whose contexts have their own lengths) all of them.

    Raises:
        InvalidInputError: the length is too short, or an answer does not stand in its context.
    """
    task, encoder, samples = task or get("needle_single"), Encoder(tokenizer), []
    is_file = task.num_samples is not None
    for index in range(min(count, task.num_samples or count)):
        sample = task.sample(tokenizer, None if is_file else length, seed, index)
        some = sample.questions if is_file else [sample.questions[index % len(sample.questions)]]
        samples += [_needle(encoder, sample.context_ids, question) for question in some]
    return samples


def pair_samples(
    tokenizer: Any, count: int, length: int, seed: int = 0, values_are: str = "number"
) -> list[PairSample]:
    """Single needles twice: as they are, and with another value of as many tokens in the needle.

    Where both values begin with the same tokens, these are appended to both prompts, so that the next token tells.

    Raises:
        InvalidInputError: see `needle_samples`.
    """
    encoder, pairs = Encoder(tokenizer), []
    task = get("needle_single", values_are=values_are)
    for index, sample in enumerate(needle_samples(tokenizer, count, length, seed, task)):
        rng = random.Random(f"pair/{seed}/{index}")
        right = list(sample.ids[slice(*sample.value)])
        for _ in range(_TRIES):
            other = encoder(" " + haystack.draw_value(rng, values_are))
            if len(other) == len(right) and other != right:
                break
        else:
            raise InvalidInputError("tokenizer", f"values of {len(right)} tokens", "two values of equal length")
        shared = next(i for i, (a, b) in enumerate(zip(right, other, strict=True)) if a != b)
        start, end = sample.value
        corrupt = (*sample.ids[:start], *other, *sample.ids[end:])
        pairs.append(
            PairSample((*sample.ids, *right[:shared]), (*corrupt, *right[:shared]), right[shared], other[shared])
        )
    return pairs


def _needle(encoder: Encoder, context: Sequence[int], question: Question) -> NeedleSample:
    """The sample, with the answer's place in it."""
    needle = question.evidence[0] if question.evidence else (0, len(context))
    if not question.answers:
        raise InvalidInputError("data", question.text, "questions with an answer that stands in the context")
    for answer_ids in (encoder(" " + question.answers[0]), encoder(question.answers[0])):
        value = _find(context, answer_ids, needle)
        if value is not None:
            return NeedleSample(
                (*context, *question.token_ids), tuple(answer_ids), question.answers,
                needle if question.evidence else value, value, question.max_new_tokens,
            )  # fmt: skip
    allowed = "answers that stand in the context word for word"
    raise InvalidInputError("data", question.answers[0], allowed, "choose another task, or samples of your own")


def _find(ids: Sequence[int], part: Sequence[int], within: Span) -> Span | None:
    """[start, end) of the last place within the span where the part stands."""
    for start in range(within[1] - len(part), within[0] - 1, -1):
        if list(ids[start : start + len(part)]) == list(part):
            return (start, start + len(part))
    return None
