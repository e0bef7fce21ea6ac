"""Budgets as users write them, and the one routine that rounds."""

import math
import random

import pytest
import torch

from sparing.core.budget import Budget, parse_keep, round_to_total, share_of
from sparing.errors import InvalidInputError, SparingError


@pytest.mark.parametrize(
    ("keep", "kind", "amount"),
    [
        (0.25, "ratio", 0.25),
        (1.0, "ratio", 1.0),
        (1, "ratio", 1.0),
        (1e-9, "ratio", 1e-9),
        (2, "count", 2),
        (512, "count", 512),
        ("64MiB", "bytes", 64 * 2**20),
        ("1.5 GB", "bytes", 1.5e9),
        ("10kb", "bytes", 10_000),
        ("7B", "bytes", 7),
        (" 2 KiB ", "bytes", 2048),
    ],
)
def test_what_a_budget_may_be(keep, kind, amount):
    assert Budget.parse(keep) == Budget(kind, amount)


BAD = [
    0,
    -3,
    0.0,
    -0.5,
    1.5,
    math.nan,
    math.inf,
    -math.inf,
    True,
    None,
    [0.5],
    "",
    "64",
    "0MiB",
    "-1MiB",
    "MiB",
    "1TiB",
]


@pytest.mark.parametrize("keep", BAD, ids=repr)
def test_what_it_may_not_be(keep):
    with pytest.raises(InvalidInputError, match=r"keep: got .* allowed is a ratio") as error:
        Budget.parse(keep)
    assert repr(keep) in str(error.value)
    assert isinstance(error.value, ValueError)
    assert isinstance(error.value, SparingError)


@pytest.mark.parametrize(
    ("text", "keep"), [("0.25", 0.25), ("512", 512), (" 64MiB ", "64MiB"), ("1", 1), ("1e-1", 0.1)]
)
def test_typed_on_a_command_line(text, keep):
    parsed = parse_keep(text)
    assert parsed == keep
    assert type(parsed) is type(keep)


@pytest.mark.parametrize("text", ["", "half", "nan", "inf", "2.5", "-4", "0", "25%"])
def test_typed_wrongly(text):
    with pytest.raises(InvalidInputError, match="keep"):
        parse_keep(text)


@pytest.mark.parametrize(
    ("keep", "seen", "tokens"),
    [
        (0.5, 7, 4),  # half rounds up
        (0.5, 8, 4),
        (1.0, 7, 7),
        (1e-9, 7, 1),  # never nothing
        (0.5, 0, 0),  # unless there is nothing
        (512, 100, 100),
        (512, 1000, 512),
        ("1000B", 50, 10),  # 100 bytes a token
        ("1099B", 50, 10),  # not one byte more than was given
        ("1B", 50, 1),
        ("1GB", 50, 50),
    ],
)
def test_tokens_per_head(keep, seen, tokens):
    assert Budget.parse(keep).tokens_per_head(seen, bytes_per_token=100) == tokens


def test_keeps_all_is_the_ratio_one_only():
    assert Budget.parse(1.0).keeps_all
    assert Budget.parse(1).keeps_all
    assert not Budget.parse(10**9).keeps_all
    assert not Budget.parse(0.999).keeps_all


@pytest.mark.parametrize(
    ("share", "tokens", "whole"), [(0.3, 10, 3), (0.29, 100, 29), (0.5, 7, 3), (0, 9, 0), (1, 9, 9)]
)
def test_share_of(share, tokens, whole):
    assert share_of(share, tokens) == whole


def rounded(shares, total, low=0, high=None) -> list[int]:
    def bound(value):
        return torch.tensor(value) if isinstance(value, list) else value

    counts = round_to_total(torch.tensor(shares, dtype=torch.float64), total, bound(low), bound(high))
    assert counts.dtype == torch.int64
    return counts.tolist()


@pytest.mark.parametrize(
    ("shares", "total", "low", "high", "counts"),
    [
        ([1, 1, 1], 10, 0, None, [4, 3, 3]),  # ties go to the lower index
        ([1, 1, 1], 11, 0, None, [4, 4, 3]),
        ([3, 2, 1], 6, 0, None, [3, 2, 1]),
        ([0.5, 0.3, 0.2], 9, 0, None, [4, 3, 2]),  # 4.5, 2.7, 1.8: the larger remainders first
        ([0, 0, 0], 7, 0, None, [3, 2, 2]),  # no shares: equal ones
        ([1, 0, 0], 5, 0, None, [5, 0, 0]),
        ([1, 0, 0], 5, 0, 3, [3, 1, 1]),  # a ceiling makes the others take what it cuts off
        ([100, 1, 1], 12, [0, 3, 0], None, [9, 3, 0]),  # 9 left for 100 : 1 is 8.91 and 0.09
        ([100, 1, 1], 12, 0, [6, 100, 100], [6, 3, 3]),
        ([0.2, 0.3, 0.6, 0.1], 6, 0, None, [1, 2, 3, 0]),  # 1, 1.5, 3, 0.5: a tie, though not in floats
        ([2, 1], 0, 0, None, [0, 0]),
        ([5], 3, 0, 3, [3]),
        ([1, 1], 4, 2, 2, [2, 2]),
        ([], 0, 0, None, []),
    ],
)
def test_rounding_by_hand(shares, total, low, high, counts):
    assert rounded(shares, total, low, high) == counts


def draw(seed):
    rng = random.Random(seed)
    groups = rng.randint(1, 40)
    shares = [rng.choice([0.0, rng.random(), rng.random() ** 8, 1e6 * rng.random()]) for _ in range(groups)]
    low = [rng.choice([0, 0, rng.randint(0, 20)]) for _ in range(groups)]
    high = [n + rng.choice([0, rng.randint(0, 5), rng.randint(0, 200)]) for n in low]
    return rng, shares, low, high


@pytest.mark.parametrize("seed", range(60))
def test_any_shares_sum_exactly_within_bounds(seed):
    rng, shares, low, high = draw(seed)
    total = rng.randint(sum(low), sum(high))
    counts = rounded(shares, total, low, high)
    assert sum(counts) == total
    assert all(a <= count <= b for a, count, b in zip(low, counts, high, strict=True))


@pytest.mark.parametrize("seed", range(30))
def test_a_larger_share_never_gets_less(seed):
    rng = random.Random(seed)
    shares = [rng.choice([0.001, 0.03, 1.0]) * (1 + rng.random()) for _ in range(rng.randint(2, 40))]
    low, high = rng.randint(0, 5), rng.randint(5, 50)
    counts = rounded(shares, rng.randint(low * len(shares), high * len(shares)), low, high)
    by_share = [count for _, count in sorted(zip(shares, counts, strict=True))]
    assert by_share == sorted(by_share)


@pytest.mark.parametrize("seed", range(20))
def test_without_bounds_it_is_the_largest_remainder(seed):
    """Hamilton's method by its definition, in exact fractions."""
    from fractions import Fraction

    rng = random.Random(seed)
    shares, total = [rng.randint(1, 1000) for _ in range(rng.randint(1, 20))], rng.randint(0, 500)
    exact = [Fraction(total * share, sum(shares)) for share in shares]
    counts = [math.floor(x) for x in exact]
    order = sorted(range(len(shares)), key=lambda i: (counts[i] - exact[i], i))
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    assert rounded(shares, total) == counts


@pytest.mark.parametrize(
    ("total", "low", "high", "message"),
    [
        (5, 3, None, "total: got 5, allowed is between 6 and"),
        (7, 0, 3, "total: got 7, allowed is between 0 and 6"),
        (-1, 0, None, "total: got -1"),
        (4, [3, 0], [2, 9], "bounds: got .3, 2., allowed is low <= high"),
    ],
)
def test_what_cannot_be_is_refused(total, low, high, message):
    with pytest.raises(InvalidInputError, match=message):
        rounded([1, 1], total, low, high)


@pytest.mark.parametrize("share", [math.nan, math.inf, -1.0])
def test_shares_that_are_none_are_refused(share):
    with pytest.raises(InvalidInputError, match=r"shares: got .* finite numbers >= 0"):
        rounded([1.0, share], 3)
