"""How right an output is, from 0 to 1, given the expected answers.

All of them ignore case and the width of white space. An empty output scores 0.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence


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
    said = Counter(re.findall(r"\w+", output.casefold()))
    return max((_f1(said, Counter(re.findall(r"\w+", answer.casefold()))) for answer in answers), default=0.0)


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
}
