"""PyramidKV: SnapKV with more room for early layers (Cai et al. 2024, arXiv:2406.02069).

Ranks: kv_token, with SnapKV's score; the layers' budgets fall linearly with depth:

    layer l keeps W + max - l (max - min) / (L - 1),   min = (C - W) / β,   max = 2 (C - W) - min
    where max > n - W, the n tokens of the prompt set it: max = n - W, min = 2 (C - W) - max
    window ↔ W = 32 as SnapKV's, beta ↔ β = 20, C ↔ the average budget per head

Cost: as SnapKV. Deviation: the budgets are rounded so that their sum is exactly L · C; the authors' code floors each
one, and the sum drifts.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparing.core.allocate import Pyramid
from sparing.core.method import Method, Parts, register
from sparing.methods.kv.snapkv import WindowAttention


@register("pyramidkv", paper="2406.02069", summary="SnapKV's choice, with fewer tokens for deeper layers")
@dataclass(frozen=True)
class PyramidKV(Method):
    """SnapKV's votes, budgets that fall with depth.

    Attributes:
        window: rows that vote, always kept themselves (32).
        kernel_size: odd width of the average over neighbours (5).
        beta: how steep the pyramid is, >= 1 (20).
    """

    window: int = 32
    kernel_size: int = 5
    beta: float = 20.0

    def parts(self) -> Parts:
        """See `Method.parts`."""
        return Parts(WindowAttention(self.window, self.kernel_size), Pyramid(self.beta, self.window))
