"""How sure a mean score is.

The unit of observation is the context: the questions about one context share its needles, its noise and its
compressed cache, so their mean is one observation, and n is the number of contexts.

The interval is Wilson's (1927, "Probable inference, the law of succession, and statistical inference"),
made for n results that are each 0 or 1. Scores between 0 and 1 vary at most as much as such results with
the same mean (the variance of a variable in [0, 1] with mean p is at most p (1 - p)), so for them the
interval is wider than it need be, not narrower: conservative. Its coverage is tested by simulation.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from sparing.errors import InvalidInputError


@dataclass(frozen=True)
class Interval:
    """A mean of n observations and the bounds that hold the true mean with the wanted confidence."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}] (n = {self.n})"


def wilson(scores: Sequence[float], confidence: float = 0.95) -> Interval:
    """Return the mean of scores in [0, 1], one per context, with its Wilson interval.

    With z the normal quantile, p the mean: (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n).

    Raises:
        InvalidInputError: no scores, a score outside [0, 1] or not a number, a confidence outside (0, 1).
    """
    if not len(scores):
        raise InvalidInputError("scores", list(scores), "at least one score")
    for score in scores:
        if not 0 <= score <= 1:
            raise InvalidInputError("score", score, "a number from 0 to 1")
    if not 0 < confidence < 1:
        raise InvalidInputError("confidence", confidence, "a number between 0 and 1")
    n, mean = len(scores), math.fsum(scores) / len(scores)
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    scale = 1 + z * z / n
    centre = (mean + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    return Interval(mean, max(0.0, min(mean, centre - half)), min(1.0, max(mean, centre + half)), n)


def bootstrap(scores: Sequence[float], confidence: float = 0.95, resamples: int = 2000) -> Interval:
    """Return the mean of scores of any size with its percentile bootstrap interval, contexts drawn with replacement.

    For scores that are no shares of right answers, such as 1/perplexity, about which Wilson's bound says nothing.
    The draws are seeded. Few scores give too narrow an interval, and one score none.

    Raises:
        InvalidInputError: no scores.
    """
    if not len(scores):
        raise InvalidInputError("scores", list(scores), "at least one score")
    rng, n = random.Random(0), len(scores)
    means = sorted(math.fsum(rng.choices(scores, k=n)) / n for _ in range(resamples))
    cut = round((1 - confidence) / 2 * resamples)
    return Interval(math.fsum(scores) / n, means[cut], means[-cut - 1], n)


def context_means(scores: Sequence[Sequence[float]]) -> list[float]:
    """Return the mean score of each context from the scores of its questions."""
    return [math.fsum(questions) / len(questions) for questions in scores]
