"""The next token: the likeliest, or drawn."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_p: only the likeliest tokens that together reach this probability, at least one.
        seed: of this request's own random numbers; None for a new one.
    """

    temperature: float
    top_p: float
    seed: int | None


class Sampler:
    """Draws the tokens of one request, whatever else runs beside it."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._random = torch.Generator()
        if sampling.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(sampling.seed)

    def draw(self, logits: Tensor) -> int:
        """A token of (vocabulary,) logits."""
        if self._sampling.temperature == 0:
            return int(logits.argmax())
        scaled = logits.float().cpu()
        # The largest is taken off first: divided by a tiny temperature, the others become -inf and none inf. And a
        # temperature that is 0 in this precision would make it NaN.
        temperature = max(self._sampling.temperature, torch.finfo(scaled.dtype).tiny)
        probabilities = ((scaled - scaled.max()) / temperature).softmax(-1)
        if self._sampling.top_p < 1:
            probabilities = nucleus(probabilities, self._sampling.top_p)
        return int(torch.multinomial(probabilities, 1, generator=self._random))


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """The smallest set of likeliest tokens with a sum of at least `top_p` (Holtzman et al. 2019, arXiv:1904.09751).

    Args:
        probabilities: (vocabulary,).

    Returns:
        (vocabulary,) the same, 0 outside the set; not normalised.
    """
    ordered, order = probabilities.sort(descending=True)
    outside = ordered.cumsum(-1) - ordered >= top_p  # those before it reach the sum already
    outside[0] = False
    return probabilities.clone().index_fill_(0, order[outside], 0.0)
