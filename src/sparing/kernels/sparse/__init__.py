"""Attention that computes only what a pattern says: one plan of blocks and columns, several ways to run it."""

from __future__ import annotations

from torch import Tensor

from sparing.core.pattern import Partial, Pattern
from sparing.core.prefill import PromptCall
from sparing.core.scorer import Softmax
from sparing.kernels.sparse import flexible, native_prefill
from sparing.kernels.sparse.gather import attend_gathered


def attend_sparse(
    query: Tensor, keys: Tensor, values: Tensor, pattern: Pattern, softmax: Softmax, *, needs_lse: bool = True
) -> Partial:
    """Attention under a pattern, in the fastest way that there is for it.

    Args:
        query: (Hq, Q, D). keys, values: (H, N, D) and (H, N, Dv).
        needs_lse: False if the log-sum-exp is not used, which may then be left out.

    Returns:
        out (Hq, Q, Dv) and lse (Hq, Q), sinks left out (see `partial.with_sinks`).
    """
    if flexible.offers(query, pattern, softmax, needs_lse=needs_lse):
        return flexible.attend_flex(query, keys, values, pattern, softmax, needs_lse=needs_lse)
    if native_prefill.offers(query, keys, values, pattern):
        return native_prefill.attend_native(query, keys, values, pattern, softmax)
    return attend_gathered(query, keys, values, pattern, softmax)


def attend_call(call: PromptCall, pattern: Pattern, *, needs_lse: bool = True) -> Partial:
    """`attend_sparse` for a prompt's attention call: what it is to `run`."""
    return attend_sparse(call.query, call.keys, call.values, pattern, call.softmax, needs_lse=needs_lse)
