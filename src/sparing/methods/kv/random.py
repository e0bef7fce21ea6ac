"""Random eviction: the baseline that every score has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from sparing.core.allocate import Uniform
from sparing.core.method import Method, Parts, register
from sparing.core.scorer import KeyValues, Scorer
from sparing.measures.draws import uniform


@dataclass(frozen=True)
class RandomScore(Scorer):
    """s[h, j] ~ U(0, 1), independent per layer, head and position.

    The number belongs to the token's position in its own sequence, so a row of a batch, or the same prompt in
    chunks, draws the same numbers.

    Attributes:
        seed: of the generator.
    """

    seed: int = 0
    state_outlives_eviction: ClassVar[bool] = True

    def score(self, state: Any, stored: KeyValues) -> Tensor:
        """See `Scorer.score`."""
        return uniform(stored, self.seed)


@register("random", paper="-", summary="tokens drawn at random, the baseline that every score has to beat")
@dataclass(frozen=True)
class Random(Method):
    """Keep tokens drawn at random. `seed`: of the draw."""

    seed: int = 0

    def parts(self) -> Parts:
        """See `Method.parts`."""
        return Parts(RandomScore(self.seed), Uniform())
