"""Scores and intervals, worked by hand."""

from __future__ import annotations

import math
import random
import time
from functools import cache
from statistics import mean

import pytest

from sparing.errors import InvalidInputError, UnknownNameError
from sparing.tasks import bootstrap, context_means, metrics, wilson
from sparing.tasks.metrics import (
    METRICS,
    contains,
    contains_any,
    exact,
    longest_common,
    metric_name,
    prefix_words,
    regex,
    rouge_l,
    word_f1,
)


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("Paris", 1),
        ("  pARIS  ", 1),
        ("\n\nParis\nLondon", 1),
        ("Paris London", 0),
        ("London\nParis", 0),
        ("", 0),
        ("\n", 0),
    ],
)
def test_exact(output, expected):
    assert exact(output, ("Rome", "Paris")) == expected


def test_exact_ignores_the_width_of_white_space_only():
    assert exact("New \t York", ("new york",)) == 1
    assert exact("Newyork", ("new york",)) == 0


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (" 12345, 67890.", 1.0),
        (" 67890", 0.5),
        ("112345 678901", 0.0),
        ("12345\n\n(67890)", 1.0),
        ("", 0.0),
    ],
)
def test_contains(output, expected):
    assert contains(output, ("12345", "67890")) == expected


def test_contains_matches_whole_words_of_any_kind():
    assert contains("It is C++.", ("c++",)) == 1
    assert contains("a party", ("art",)) == 0
    assert contains("He said: golden\n bridge!", ("Golden Bridge",)) == 1
    assert contains("anything", ()) == 0 == contains("anything", ("",))


def test_contains_any():
    assert contains_any("the UK", ("United Kingdom", "UK")) == 1
    assert contains_any("the US", ("United Kingdom", "UK")) == 0


@pytest.mark.parametrize(
    ("output", "expected"),
    [("a b c d", 1.0), ("A b c d e f", 1.0), ("a b", 0.5), ("a x c d", 0.75), ("b c d a", 0.0), ("", 0.0)],
)
def test_prefix_words(output, expected):
    assert prefix_words(output, ("a b c d",)) == expected
    assert prefix_words(output, ("a b c d", "x y z")) == expected


def test_word_f1():
    # 2 common words of 3 said and 4 wanted: 2 * 2 / (3 + 4).
    assert word_f1("The cat sat", ("the cat, it slept",)) == pytest.approx(4 / 7)
    assert word_f1("to to to", ("to be",)) == pytest.approx(2 / 5)
    assert word_f1("It slept, the CAT!", ("the cat, it slept",)) == 1
    assert word_f1("", ("x",)) == 0 == word_f1("x", ("",))


def lcs(first, second):
    """The longest common subsequence as it is defined, by recursion on the last words."""

    @cache
    def length(i, j):
        if i == 0 or j == 0:
            return 0
        if first[i - 1] == second[j - 1]:
            return length(i - 1, j - 1) + 1
        return max(length(i - 1, j), length(i, j - 1))

    return length(len(first), len(second))


def pairs_of_texts(count, words, longest):
    rng = random.Random(count)
    for _ in range(count):
        yield tuple(" ".join(rng.choices(words, k=rng.randrange(longest))) for _ in range(2))


def test_longest_common_subsequence():
    for first, second in pairs_of_texts(400, "abcde", 40):
        assert longest_common(first.split(), second.split()) == lcs(tuple(first.split()), tuple(second.split()))
    # Words that repeat, and a first text longer than a machine word.
    assert longest_common(["a"] * 200, ["a", "b"] * 70) == 70
    assert longest_common([], ["a"]) == 0 == longest_common(["a"], [])


def test_rouge_l():
    # "the cat ... it" of 4 and 5 words: 2 * 3 / (4 + 5).
    assert rouge_l("The cat, it sat.", ("it: the cat and it",)) == pytest.approx(6 / 9)
    assert rouge_l("b a", ("a b",)) == 0.5 != word_f1("b a", ("a b",))
    assert rouge_l("x y", ("a b", "x y")) == 1
    assert rouge_l("", ("x",)) == 0 == rouge_l("x", ("",)) == rouge_l("x", ())


def test_rouge_l_is_what_the_reference_package_says():
    scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="needs the package rouge-score").RougeScorer(
        ["rougeL"]
    )
    for output, answer in pairs_of_texts(200, ["a", "B", "c3", "it's", "the", "dog."], 30):
        assert rouge_l(output, (answer,)) == pytest.approx(scorer.score(answer, output)["rougeL"].fmeasure, abs=1e-12)


def test_rouge_l_of_long_texts_takes_no_time():
    rng = random.Random(0)
    first, second = (" ".join(str(rng.randrange(2000)) for _ in range(10_000)) for _ in range(2))
    began = time.process_time()
    assert 0 < rouge_l(first, (second,)) < 1
    assert time.process_time() - began < 2  # a table of 10,000 by 10,000 takes a minute


def test_regex():
    assert regex("on 3 May", (r"\b\d+ May\b", "June")) == 0.5
    assert regex("On 3 may", (r"may",)) == 1 == regex("On 3 MAY", ("(?i)may",))
    assert regex("On 3 MAY", ("may",)) == 0
    assert regex("a\nb", ("^b$",)) == 0 < regex("a\nb", ("(?m)^b$",))
    assert regex(" \n", (".*",)) == 0 == regex("x", ())
    with pytest.raises(InvalidInputError, match="regular expression"):
        regex("x", ("(",))


def test_a_pattern_that_takes_too_long_is_given_up(monkeypatch):
    monkeypatch.setattr(metrics, "PATTERN_SECONDS", 0.05)
    began = time.process_time()
    with pytest.raises(InvalidInputError, match=r"within 0.05 s in 4001 characters"):
        regex("a" * 4000 + "c", ("(a+)+b",))
    assert time.process_time() - began < 1


def test_metric_names():
    assert metric_name("f1") == "word_f1"
    assert [metric_name(name) for name in METRICS] == list(METRICS)
    with pytest.raises(UnknownNameError, match="did you mean rouge_l"):
        metric_name("rouge-l")


def test_all_metrics_stay_in_range():
    rng = random.Random(0)
    words = ["a", "b", "12", "A", "", "\n", '"', "é"]
    for _ in range(300):
        output, answer = (" ".join(rng.choices(words, k=rng.randrange(6))) for _ in range(2))
        for metric in METRICS.values():
            assert 0 <= metric(output, (answer,)) <= 1
            assert metric("", (answer,)) == 0


@pytest.mark.parametrize(
    ("scores", "low", "high"),
    [
        # z = 1.959964, z² = 3.841459; all right: low = n / (n + z²).
        ([1] * 10, 10 / 13.841459, 1.0),
        ([0] * 10, 0.0, 3.841459 / 13.841459),
        # Half right of 10: 0.5 ± 1.959964 / 1.3841459 * sqrt(0.025 + 0.00960365) = 0.5 ± 0.263407.
        ([0, 1] * 5, 0.236593, 0.763407),
        # One score of one half: 0.5 ± 1.959964 / 4.841459 * sqrt(0.25 + 0.960365) = 0.5 ± 0.445380.
        ([0.5], 0.054620, 0.945380),
    ],
)
def test_wilson_by_hand(scores, low, high):
    interval = wilson(scores)
    assert interval.mean == mean(scores)
    assert interval.n == len(scores)
    assert interval.low == pytest.approx(low, abs=2e-6)
    assert interval.high == pytest.approx(high, abs=2e-6)


def test_wilson_of_another_confidence():
    assert wilson([1] * 10, 0.99).low == pytest.approx(10 / (10 + 2.575829**2), abs=1e-6)
    assert wilson([1] * 10, 0.5).low > wilson([1] * 10).low


def coverage(n, p, covers):
    """Return the probability that the interval from n results of probability p holds p."""
    weights = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
    return sum(w for k, w in enumerate(weights) if covers(wilson([1.0] * k + [0.0] * (n - k)), p))


def test_wilson_covers_what_it_says_for_right_or_wrong():
    covers = lambda interval, p: interval.low <= p <= interval.high  # noqa: E731
    for n in (8, 20, 50):
        shares = [coverage(n, p / 100, covers) for p in range(3, 98)]
        assert 0.94 < mean(shares) < 0.97
        assert min(shares) > 0.83


@pytest.mark.parametrize("p", [0.3, 0.5, 0.8])
def test_wilson_covers_fractions_at_least_as_often(p):
    """Contexts of 4 questions: whether these fall together or apart, 20 context means cover at least 95 %."""
    rng, apart, together, pretended = random.Random(1), 0, 0, 0
    for _ in range(800):
        fractions = [sum(rng.random() < p for _ in range(4)) / 4 for _ in range(20)]
        same = [float(rng.random() < p) for _ in range(20)]
        apart += wilson(fractions).low <= p <= wilson(fractions).high
        together += wilson(same).low <= p <= wilson(same).high
        as_if_free = wilson([score for score in same for _ in range(4)])
        pretended += as_if_free.low <= p <= as_if_free.high
    assert apart / 800 > 0.99
    assert together / 800 > 0.93
    assert pretended / 800 < 0.8


@pytest.mark.parametrize("scores", [[], [1.1], [-0.1], [math.nan], [0.5, math.inf]])
def test_wilson_refuses_what_is_no_score(scores):
    with pytest.raises(InvalidInputError):
        wilson(scores)


@pytest.mark.parametrize("confidence", [0, 1, 95])
def test_wilson_refuses_what_is_no_confidence(confidence):
    with pytest.raises(InvalidInputError, match="confidence"):
        wilson([1.0], confidence)


def test_context_means():
    assert context_means([[1.0, 0.0, 0.5], [1.0]]) == [0.5, 1.0]
    assert str(wilson([0, 1] * 5)) == "0.500 [0.237, 0.763] (n = 10)"


def test_bootstrap_holds_the_mean_and_narrows_with_n():
    few, many = [0.02, 0.03, 0.04], [0.02, 0.03, 0.04] * 30
    small, large = bootstrap(few), bootstrap(many)
    assert small.mean == pytest.approx(0.03)
    assert 0.02 <= small.low < 0.03 < small.high <= 0.04
    assert large.high - large.low < (small.high - small.low) / 3
    # the standard error of 90 such scores is 0.0086 / sqrt(90); the interval is about 3.92 of them wide
    assert large.high - large.low == pytest.approx(3.92 * 0.008165 / 90**0.5, rel=0.15)
    assert bootstrap(few) == small
