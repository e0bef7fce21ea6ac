"""Cascades: tokens leave the residual stream while the prompt is read, layer by layer.

What a layer has no row for it computes and stores nothing for, and neither does any layer after it. A method says how
much its tokens matter after each layer, and how many may enter the next; the adapters take rows out and put the length
back after the last layer.

Shape legend: B rows (sequences), k tokens in the residual stream, N tokens that the layer holds (those k last).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparing.core.budget import round_to_total
from sparing.core.prompt_method import PromptMethod
from sparing.core.scorer import KeyValues, Queries
from sparing.errors import require


@dataclass(frozen=True)
class Cascade(PromptMethod):
    """Base of all methods that take tokens out of the residual stream.

    Attributes:
        keep: how many of a prompt's tokens a layer has, on average over the plain full-attention layers: a ratio, a
            number of tokens, or bytes. Front layers have all and every layer has the last token, so that there is less
            for the others, and a budget below that is exceeded. Every later turn is a prompt of its own.
        front: share of these layers, in [0, 1), that come first and have all tokens; at least one does.
        slope: of the others, the first has (1 + slope) times their mean as far as all tokens allow, and the last as
            much less; those between lie on a line. In [0, 1].

    Raises:
        InvalidInputError: a value that is not allowed. MethodRefusedError: a combination that is not defined.
    """

    front: float = 0.15
    slope: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.front < 1, "front", self.front, "a share of layers in [0, 1)")
        require(0 <= self.slope <= 1, "slope", self.slope, "in [0, 1]")
        problem = "drops tokens while the prompt is read, layer by layer"
        self._refuse("bits", "prefill", "prompt", problem=problem, fix="use it alone")

    def importance(self, queries: Queries, stored: KeyValues) -> Tensor:
        """(B, N) float32: what one layer adds to the importance of its tokens; higher = keep.

        Args:
            queries: (B, Hq, k, D) of the tokens in the stream; those that are pads or behind the prompt are not valid.
            stored: what the layer holds; slots and rows count from 0 here, as the mask does.
        """
        raise NotImplementedError

    def attend(self, queries: Queries, stored: KeyValues, spared: Tensor) -> Tensor | None:
        """Attention (B, Hq, k, Dv) of a layer, of methods that compute another one; None for the model's own.

        Args:
            spared: (B,) bool, prompts that are too short to lose anything.
        """
        return None

    def head_importance(self, out: Tensor, counts: Tensor) -> Tensor:
        """(B, Hq) float32: what one layer adds to the importance of its heads, for methods that limit them.

        Args:
            out: (B, k, Hq, Dv) the heads' outputs. counts: (B, k) bool, the tokens of the prompt.
        """
        raise NotImplementedError

    def heads(self, heads: int, layers: int) -> list[int] | None:
        """How many of its query heads each layer may use; None for all."""
        return None

    def tokens(self, seen: int, layers: int, bytes_per_token: int) -> list[int]:
        """How many of a prompt's `seen` tokens each layer has; never more than the layer before."""
        if self.spares(seen):
            return [seen] * layers
        total = self.budget.tokens_per_head(seen, bytes_per_token) * layers
        return falling(total, seen, layers, whole_layers(self.front, layers), self.slope)

    def spares(self, seen: int) -> bool:
        """True if a prompt of `seen` tokens is too short to lose anything."""
        return self.budget.kind == "ratio" and seen < self.min_prompt

    @property
    def reads_all(self) -> bool:
        """True if the prompt is read as the model reads it."""
        return self.budget.keeps_all

    @property
    def reading(self) -> Cascade | None:
        """This."""
        return None if self.reads_all else self


def whole_layers(front: float, layers: int) -> int:
    """How many layers are in a share of them that comes first."""
    return max(math.ceil(front * layers - 1e-9), 1)


def falling(total: int, most: int, layers: int, whole: int, slope: float) -> list[int]:
    """Whole numbers, one per layer, that never rise, lie in [1, most], and sum to `total` if they can.

    Args:
        whole: layers in front that have `most`. slope: see `Cascade`.
    """
    behind = layers - whole
    if behind == 0:
        return [most] * layers
    rest = min(max(total - whole * most, behind), behind * most)
    mean = rest / (behind * most)
    first = min((1 + slope) * mean, 1.0)
    shares = torch.linspace(first, 2 * mean - first, behind, dtype=torch.float64)
    return [most] * whole + round_to_total(shares.clamp_min(0), rest, low=1, high=most).tolist()
