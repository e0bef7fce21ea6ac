"""The loss against the full cache and its interval: by hand, against another form of the formula, and by simulation."""

from __future__ import annotations

import math
import random

import pytest

from sparing.tasks import wilson
from sparing.tune.loss import mean_loss, paired_loss


def newcombe(a, b, c, d, z=1.959963984540054):
    """Newcombe's method 10 from the table of pairs: a both right, b only the first, c only the second, d both wrong."""
    n = a + b + c + d
    p1, p2 = (a + b) / n, (a + c) / n

    def bounds(p):
        centre, half = 2 * n * p + z * z, z * math.sqrt(z * z + 4 * n * p * (1 - p))
        return (centre - half) / (2 * (n + z * z)), (centre + half) / (2 * (n + z * z))

    (l1, u1), (l2, u2) = bounds(p1), bounds(p2)
    product = (a + b) * (c + d) * (a + c) * (b + d)
    phi = 0.0 if product == 0 else (a * d - b * c) / math.sqrt(product)
    low = p1 - p2 - math.sqrt((p1 - l1) ** 2 - 2 * phi * (p1 - l1) * (u2 - p2) + (u2 - p2) ** 2)
    high = p1 - p2 + math.sqrt((u1 - p1) ** 2 - 2 * phi * (u1 - p1) * (p2 - l2) + (p2 - l2) ** 2)
    return p1 - p2, low, high


@pytest.mark.parametrize("table", [(20, 5, 1, 4), (10, 0, 0, 5), (12, 3, 0, 0), (8, 0, 0, 0), (3, 9, 2, 6)])
def test_the_interval_is_newcombes(table):
    a, b, c, d = table
    full = [1.0] * (a + b) + [0.0] * (c + d)
    mine = [1.0] * a + [0.0] * b + [1.0] * c + [0.0] * d
    found, (difference, low, high) = paired_loss(full, mine), newcombe(*table)
    scale = sum(full) / len(full)
    assert (found.mean, found.n) == (pytest.approx(difference / scale), sum(table))
    # The square root makes a rounding error of 1e-16 in the two equal terms one of 1e-8.
    assert (found.low, found.high) == (pytest.approx(low / scale, abs=2e-8), pytest.approx(high / scale, abs=2e-8))


def test_nothing_lost_is_not_nothing_to_fear():
    """Twelve contexts without a loss: up to Wilson's bound may still be lost."""
    found = paired_loss([1.0] * 12, [1.0] * 12)
    assert found.mean == 0
    assert found.high == pytest.approx(1 - wilson([1.0] * 12).low)


def test_the_loss_is_a_share_of_what_the_full_cache_scores():
    assert paired_loss([0.5, 0.5], [0.25, 0.25]).mean == pytest.approx(0.5)
    assert paired_loss([0.5, 0.5], [0.75, 0.75]).mean == pytest.approx(-0.5), "a gain is a negative loss"
    assert paired_loss([0.0, 0.0], [0.0, 0.0]).mean == 1.0, "nothing can be kept of nothing"


def test_likelihoods_get_a_bootstrap():
    found = paired_loss([0.02, 0.04, 0.03], [0.01, 0.03, 0.03], likelihood=True)
    assert found.mean == pytest.approx((0.01 + 0.01 + 0.0) / 3 / 0.03)
    assert 0 <= found.low < found.mean < found.high <= 0.01 / 0.03 + 1e-12


def test_the_mean_over_cells_is_narrower_than_each():
    one = paired_loss([1.0] * 9 + [0.0], [1.0] * 7 + [0.0] * 3)
    both = mean_loss([one, one])
    assert both.mean == pytest.approx(one.mean)
    assert both.high - both.mean == pytest.approx((one.high - one.mean) / math.sqrt(2))


@pytest.mark.parametrize(
    ("n", "full", "keeps", "luck"), [(12, 0.95, 0.8, 0.2), (30, 0.7, 0.9, 0.1), (8, 1.0, 0.6, 0.0)]
)
def test_the_interval_covers_the_truth(n, full, keeps, luck):
    """At least 92 % of 2000 draws: 95 % are promised of binomials, and F is taken as known."""
    rng, covered = random.Random(1), 0
    mine = full * keeps + (1 - full) * luck
    for _ in range(2000):
        rights = [rng.random() < full for _ in range(n)]
        answers = [float(rng.random() < (keeps if right else luck)) for right in rights]
        found = paired_loss([float(right) for right in rights], answers)
        scale = max(sum(rights) / n, 1e-9)
        covered += found.low <= (full - mine) / scale <= found.high
    assert covered / 2000 > 0.92
