"""How right an output is, from 0 to 1, given the expected answers.

All but `regex` ignore case and the width of white space. An empty output scores 0.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import regex as patterns  # type: ignore[import-untyped]  # unlike `re` it can give up; transformers brings it

from sparing.errors import InvalidInputError, UnknownNameError

# Seconds of computing after which a pattern is given up. One that is not catastrophic takes microseconds.
PATTERN_SECONDS = 1.0


def normalize(text: str) -> str:
    """Return text in small letters with single spaces and none at its ends."""
    return " ".join(text.casefold().split())


def first_line(text: str) -> str:
    """Return the first line that holds anything but white space, or nothing."""
    return next((line for line in text.splitlines() if line.strip()), "")


def exact(output: str, answers: Sequence[str]) -> float:
    """Return 1 if the first line of the output is one of the answers, else 0."""
    said = normalize(first_line(output))
    return float(bool(said) and said in {normalize(answer) for answer in answers})


def contains(output: str, answers: Sequence[str]) -> float:
    """Return the share of the answers that occur in the output as whole words.

    RULER's `string_match_all` (Hsieh et al. 2024, arXiv:2404.06654), with one deviation: there "art" is
    found in "party" and 123 in 71234, here not.
    """
    return sum(_occurs(answer, output) for answer in answers) / len(answers) if answers else 0.0


def contains_any(output: str, answers: Sequence[str]) -> float:
    """Return 1 if any of the answers occurs in the output as whole words, else 0: for synonyms."""
    return float(any(_occurs(answer, output) for answer in answers))


def prefix_words(output: str, answers: Sequence[str]) -> float:
    """Return the share of the answer's words that the output has at the same place, the best answer's."""
    said = normalize(output).split()
    return max((_in_place(said, normalize(answer).split()) for answer in answers), default=0.0)


def word_f1(output: str, answers: Sequence[str]) -> float:
    """Return the harmonic mean of precision and recall of the output's words, in any order.

    The best answer counts. For free wording, such as the full cache's own answer; the measure of SQuAD
    (Rajpurkar et al. 2016, arXiv:1606.05250) without its removal of articles.
    """
    said = Counter(_words(output))
    return max((_f1(said, Counter(_words(answer))) for answer in answers), default=0.0)


def rouge_l(output: str, answers: Sequence[str]) -> float:
    """Return 2 LCS / (m + n), with LCS the words in common in the same order, m and n the words of either text.

    The best answer counts. ROUGE-L (Lin 2004, "ROUGE: a package for automatic evaluation of summaries", section 3.1)
    with beta = 1: the harmonic mean of LCS / m and LCS / n. Words are as in `word_f1`, neither stemmed nor left out.
    """
    said = _words(output)
    return max((_longest_f1(said, _words(answer)) for answer in answers), default=0.0)


def regex(output: str, answers: Sequence[str]) -> float:
    """Return the share of the answers that are found in the output, each a pattern as for Python's `re.search`.

    Case counts unless a pattern begins with `(?i)`. An output of white space alone scores 0.

    Raises:
        InvalidInputError: an answer is no pattern, or one that takes longer than `PATTERN_SECONDS`.
    """
    if not output.strip() or not answers:
        return 0.0
    return sum(_found(answer, output) for answer in answers) / len(answers)


@lru_cache(maxsize=1024)
def pattern(text: str) -> Any:
    """Return a compiled pattern.

    Raises:
        InvalidInputError: the text is none.
    """
    try:
        return patterns.compile(text)
    except patterns.error as error:
        raise InvalidInputError("pattern", text, f"a regular expression ({error})") from None


def longest_common(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the length of the longest common subsequence of two lists of words.

    Bit-parallel (Hyyrö 2004, "Bit-parallel LCS-length computation revisited"): bit i of `row` is 0 where the common
    part grows at word i of `first`. m n / 64 steps of machine words, m bits per different word.
    """
    places: dict[str, int] = {}
    for i, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << i
    every = row = (1 << len(first)) - 1
    for word in second:
        hits = row & places.get(word, 0)
        row = (row + hits | row - hits) & every
    return len(first) - row.bit_count()


def metric_name(name: str) -> str:
    """Return the name under which a metric stands in `METRICS`: "word_f1" for "f1".

    Raises:
        UnknownNameError: there is no such metric.
    """
    name = _ALIASES.get(name, name)
    if name not in METRICS:
        raise UnknownNameError("metric", name, (*METRICS, *_ALIASES))
    return name


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _longest_f1(said: list[str], wanted: list[str]) -> float:
    common = longest_common(said, wanted)
    return 2 * common / (len(said) + len(wanted)) if common else 0.0


def _found(text: str, output: str) -> bool:
    try:
        return pattern(text).search(output, timeout=PATTERN_SECONDS) is not None
    except TimeoutError:
        allowed = f"one that is found or not found within {PATTERN_SECONDS:g} s in {len(output)} characters"
        raise InvalidInputError("pattern", text, allowed, "avoid repetitions within repetitions, as in (a+)+") from None


def _occurs(answer: str, output: str) -> bool:
    wanted = normalize(answer)
    return bool(wanted) and bool(re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", normalize(output)))


def _in_place(said: list[str], wanted: list[str]) -> float:
    if not wanted:
        return 0.0
    return sum(a == b for a, b in zip(said, wanted, strict=False)) / len(wanted)


def _f1(said: Counter[str], wanted: Counter[str]) -> float:
    common = (said & wanted).total()
    return 2 * common / (said.total() + wanted.total()) if common else 0.0


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact": exact,
    "contains": contains,
    "contains_any": contains_any,
    "prefix_words": prefix_words,
    "word_f1": word_f1,
    "rouge_l": rouge_l,
    "regex": regex,
}
_ALIASES = {"f1": "word_f1"}
