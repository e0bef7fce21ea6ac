"""What a sparse prefill and a cascade share: which prompt is being read, its pads, and what of it was computed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function

from sparing.adapters.masks import LazyMask, check_left_pads
from sparing.core.cascade import Cascade
from sparing.core.prefill import SparsePrefill
from sparing.errors import UnsupportedModelError

if TYPE_CHECKING:
    from sparing.adapters.layers import EvictingLayer

M = TypeVar("M", SparsePrefill, Cascade)


@dataclass(frozen=True)
class PrefillReport:
    """What of a prompt's attention was computed.

    Attributes:
        method: the method's name.
        densities: [layer] → (Hq,) float64, the share of its (query, key) pairs that each head has computed, over all
            rows and calls so far; by the layers' numbers in the cache. Calls that were read densely because that was
            faster count as 1; later turns over a cache that has dropped tokens, which are always, do not count.
        dense_calls: (layer, call)s that dense attention was faster for.
        zeros: of the numbers that stand for keys, how many are zero, and how many there are; (0, 0) without them.
    """

    method: str
    densities: dict[int, Tensor]
    dense_calls: int = 0
    zeros: tuple[int, int] = (0, 0)

    @property
    def density(self) -> float:
        """The mean over layers and heads."""
        return float(torch.stack(list(self.densities.values())).mean()) if self.densities else 1.0

    def __str__(self) -> str:
        dense = f", {self.dense_calls} of the calls densely, which was faster" if self.dense_calls else ""
        zeros, numbers = self.zeros
        saved = f"; of the differences that stand for its keys, {zeros / numbers:.1%} are zero" if numbers else ""
        return f"prompt read by {self.method} at {self.density:.1%} of dense attention{dense}{saved}"


@dataclass
class PromptAttention(Generic[M]):
    """How one cache reads its prompts.

    Attributes:
        method: how. computed, there: [layer] → (Hq,) pairs computed, and pairs of dense attention.
        turn: (first, end) positions of the announced prompt that is being read, pads counted; None if there is none.
    """

    method: M
    computed: dict[int, Tensor] = field(default_factory=dict)
    there: dict[int, int] = field(default_factory=dict)
    turn: tuple[int, int] | None = None

    def begin_turn(self, first: int, end: int) -> None:
        """A prompt was announced."""
        self.turn = (first, end)

    def fresh(self) -> Self:
        """The same, before anything was read."""
        return type(self)(self.method)

    def copy(self) -> Self:
        """An independent copy, for a fork of the cache."""
        return replace(self, computed=dict(self.computed), there=dict(self.there))

    @property
    def report(self) -> PrefillReport:
        """What has been computed so far."""
        densities = {number: pairs / self.there[number] for number, pairs in self.computed.items()}
        return PrefillReport(self.method.label, densities)

    def _count(self, layer: EvictingLayer, computed: Tensor, there: int) -> None:
        """Note the (Hq,) pairs of a call, and those of dense attention."""
        number = layer.cache.structure.full_layers[layer.number]
        self.computed[number] = self.computed.get(number, torch.zeros_like(computed)) + computed
        self.there[number] = self.there.get(number, 0) + there


def left_pads(mask: Any, rows: int, layer: EvictingLayer) -> list[int]:
    """Left pads of every row of a call, by what the model was given as its mask.

    Raises:
        UnsupportedModelError: the mask is not causal. CacheStateError: pads are not on the left.
    """
    if mask is None:
        return [0] * rows
    if (
        not isinstance(mask, LazyMask)
        or mask.request.get("mask_function", causal_mask_function) is not causal_mask_function
    ):
        problem = "its mask is more than causal, which sparse prefill would not honour"
        raise UnsupportedModelError(layer.cache.structure.name, problem, "use a method that reads prompts densely")
    if mask.padding is None:
        return [0] * rows
    is_token = mask.padding[:, : layer.seen]
    check_left_pads(is_token)
    return [int(pad) for pad in (~is_token).sum(-1)]
