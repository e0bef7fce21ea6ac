"""Attention under a pattern by the native kernel: only the pairs of the pattern are computed, tile by tile.

The kernel reads the pattern's blocks as they are; columns become lists of positions, one per head and group of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparing.core.pattern import Partial, Pattern
from sparing.core.scorer import Softmax
from sparing.errors import require
from sparing.kernels import native
from sparing.kernels.sparse.partial import needs_gradients

_TYPES = (torch.float32, torch.bfloat16)
# Head dimensions and block sizes are whole registers of the widest instruction set.
_REGISTER, _LARGEST_DIM, _SIZES = 16, 256, (16, 512)


def offers(query: Tensor, keys: Tensor, values: Tensor, pattern: Pattern) -> bool:
    """True if the kernel computes this: on the CPU, float32 or bfloat16, no gradients, usual sizes, causal, no rule."""
    tensors = (query, keys, values)
    return (
        native.is_built()
        and all(x.device.type == "cpu" and x.dtype == query.dtype for x in tensors)
        and pattern.blocks.device.type == "cpu"
        and query.dtype in _TYPES
        and not needs_gradients(*tensors)
        and all(dim % _REGISTER == 0 and 0 < dim <= _LARGEST_DIM for dim in (query.shape[-1], values.shape[-1]))
        and pattern.size % _REGISTER == 0
        and _SIZES[0] <= pattern.size <= _SIZES[1]
        and pattern.is_causal
        and pattern.rule is None
    )


def attend_native(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    pattern: Pattern,
    softmax: Softmax,
    instruction_set: str | None = None,
) -> Partial:
    """Attention under a pattern; see `offers`. Computed in float32 on `torch.get_num_threads()` threads.

    Args:
        query: (Hq, Q, D). keys, values: (H, N, D) and (H, N, Dv), all tokens; query head h reads KV head h // (Hq / H).
        softmax: sinks are left out.
        instruction_set: one of native.INSTRUCTION_SETS; by default the best of this machine.

    Returns:
        out (Hq, Q, Dv) in the query's dtype, lse (Hq, Q) float32.
    """
    _check(query, keys, values, pattern)
    query, keys, values, blocks = (x.contiguous() for x in (query, keys, values, pattern.blocks))
    out = query.new_empty(*query.shape[:-1], values.shape[-1])
    lse = torch.empty(query.shape[:-1])
    columns = None if pattern.columns is None else _lists(pattern.columns)
    job = native.PrefillJob(
        queries=query.data_ptr(), keys=keys.data_ptr(), values=values.data_ptr(), blocks=blocks.data_ptr(),
        columns=None if columns is None else columns[0].data_ptr(),
        column_starts=None if columns is None else columns[1].data_ptr(),
        out=out.data_ptr(), lse=lse.data_ptr(),
        query_heads=query.shape[0], heads=keys.shape[0], tokens=pattern.tokens, start=pattern.start,
        dim=query.shape[-1], value_dim=values.shape[-1], size=pattern.size,
        groups=1 if pattern.columns is None else pattern.columns.shape[1],
        blocks_per_group=pattern.blocks_per_group or pattern.num_key_blocks,
        scale=softmax.scaling, softcap=softmax.softcap or 0.0,
    )  # fmt: skip
    native.sparse_prefill(job, query.dtype, instruction_set)
    return Partial(out, lse)


def _check(query: Tensor, keys: Tensor, values: Tensor, pattern: Pattern) -> None:
    """The kernel trusts sizes: what disagrees would be read beyond its end."""
    require(offers(query, keys, values, pattern), "query", query.shape, "what native_prefill.offers")
    heads, tokens = pattern.heads, pattern.tokens
    require(query.shape[:2] == (heads, pattern.rows), "query", query.shape, f"({heads}, {pattern.rows}, D)")
    fits = keys.shape[:2] == values.shape[:2] and keys.shape[1] == tokens and heads % keys.shape[0] == 0
    require(fits, "keys", keys.shape, f"as many values, {tokens} tokens, a divisor of {heads} heads")
    require(keys.shape[-1] == query.shape[-1], "keys", keys.shape, f"dimension {query.shape[-1]}, as the queries")


def _lists(columns: Tensor) -> tuple[Tensor, Tensor]:
    """The positions that are on in (Hq, G, N): int32, list after list, and (Hq * G + 1,) int64 where each begins."""
    flat = columns.flatten(0, 1)
    counts = torch.cat([flat.new_zeros(1, dtype=torch.int64), flat.sum(-1)])
    return flat.nonzero()[:, 1].int(), counts.cumsum(0)
