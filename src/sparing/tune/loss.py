"""How much less than the full cache a method scores on the same contexts, and how sure that is.

The loss on a cell is (F - S) / F with F and S the mean scores of the full cache and of the method; the loss of a method
is its mean over cells. F in the denominator is taken as known.

The interval of F - S is that of Newcombe (1998, "Improved confidence intervals for the difference between binomial
proportions based on paired data"): Wilson's intervals [l, u] of both means are put together with the correlation r of
the paired scores,

    low  = d - sqrt((F - l_F)² - 2 r (F - l_F)(u_S - S) + (u_S - S)²)
    high = d + sqrt((u_F - F)² - 2 r (u_F - F)(S - l_S) + (S - l_S)²),     d = F - S.

Deviations: (1) r is the sample correlation of the contexts' mean scores, which may be shares; where one of the two does
not vary it is 0. (2) Scores that are no shares of right answers (1/perplexity) get a bootstrap over contexts instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from sparing.tasks import Interval, bootstrap, wilson


def paired_loss(full: Sequence[float], mine: Sequence[float], likelihood: bool = False) -> Interval:
    """The loss on one cell.

    Args:
        full, mine: mean score of each context, of the full cache and of the method, in the same order.
        likelihood: the scores are 1/perplexity.

    Returns:
        The loss as a share of the full cache's score. All of it, with no doubt, where that is 0.
    """
    scale = math.fsum(full) / len(full)
    if scale == 0:
        return Interval(1.0, 1.0, 1.0, len(full))
    if likelihood:
        return bootstrap([(f - m) / scale for f, m in zip(full, mine, strict=True)])
    f, m, r = wilson(full), wilson(mine), _correlation(full, mine)
    below = _together(f.mean - f.low, m.high - m.mean, r)
    above = _together(f.high - f.mean, m.mean - m.low, r)
    difference = f.mean - m.mean
    return Interval(difference / scale, (difference - below) / scale, (difference + above) / scale, len(full))


def mean_loss(parts: Sequence[Interval]) -> Interval:
    """The mean of the losses on cells, which are taken as independent: each side's width adds in squares."""
    count = len(parts)
    mean = math.fsum(part.mean for part in parts) / count
    below = math.hypot(*(part.mean - part.low for part in parts)) / count
    above = math.hypot(*(part.high - part.mean for part in parts)) / count
    return Interval(mean, mean - below, mean + above, min(part.n for part in parts))


def _together(first: float, second: float, r: float) -> float:
    return math.sqrt(max(first * first - 2 * r * first * second + second * second, 0.0))


def _correlation(a: Sequence[float], b: Sequence[float]) -> float:
    mean_a, mean_b = math.fsum(a) / len(a), math.fsum(b) / len(b)
    spread = math.sqrt(math.fsum((x - mean_a) ** 2 for x in a) * math.fsum((y - mean_b) ** 2 for y in b))
    if spread == 0:
        return 0.0
    return math.fsum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True)) / spread
