"""Attention that computes only what a pattern says: one plan of blocks and columns, several ways to run it."""

from __future__ import annotations

from torch import Tensor

from sparing.core.pattern import Partial, Pattern
from sparing.core.scorer import Softmax
from sparing.kernels.sparse.gather import attend_gathered


def attend_sparse(query: Tensor, keys: Tensor, values: Tensor, pattern: Pattern, softmax: Softmax) -> Partial:
    """Attention under a pattern, in the fastest way that there is for it.

    Args:
        query: (Hq, Q, D). keys, values: (H, N, D) and (H, N, Dv).

    Returns:
        out (Hq, Q, Dv) and lse (Hq, Q), sinks left out (see `partial.with_sinks`).
    """
    return attend_gathered(query, keys, values, pattern, softmax)
