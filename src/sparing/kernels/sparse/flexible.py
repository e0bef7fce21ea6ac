"""Attention under a pattern by FlexAttention, compiled once for all lengths. The path for GPUs.

The block table says which blocks are computed, and the mask function says the same again, token by token: an eager
fallback, which ignores the table, is slow then but never wrong.

On a CPU it is offered if `SPARING_FLEX=1`, for whole prompts by blocks: compiling takes a quarter of a minute, gives no
log-sum-exps there (so it serves methods whose attention is one part, on models without sinks), and what torch 2.13
generates for a second model in the same process does not compile: the gathered path takes over then.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._inductor.exc import InductorError
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from sparing.core.pattern import Partial, Pattern
from sparing.core.scorer import Softmax
from sparing.kernels.sparse.gather import attend_gathered

_failed = False  # compiling failed in this process


def offers(query: Tensor, pattern: Pattern, softmax: Softmax, *, needs_lse: bool) -> bool:
    """True if this path is to be used for a call."""
    if pattern.rule is not None or query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    if _failed:
        return False
    wanted = os.environ.get("SPARING_FLEX")
    if query.device.type == "cpu":
        is_simple = pattern.start == 0 and pattern.columns is None and softmax.softcap is None
        return wanted == "1" and not needs_lse and is_simple
    return query.device.type == "cuda" and wanted != "0"


def attend_flex(
    query: Tensor, keys: Tensor, values: Tensor, pattern: Pattern, softmax: Softmax, *, needs_lse: bool
) -> Partial:
    """Attention under a pattern.

    Args:
        query: (Hq, Q, D). keys, values: (H, N, D) and (H, N, Dv).
        needs_lse: False if the result is not merged with others: the log-sum-exp is left out then (0).
    """
    front = pattern.start - pattern.first_block * pattern.size
    states = F.pad(query, (0, 0, front, 0)) if front else query
    try:
        found: Any = _compiled()(
            states[None], keys[None], values[None], block_mask=_table(pattern), score_mod=_capped(softmax.softcap),
            scale=softmax.scaling, enable_gqa=query.shape[0] != keys.shape[0], return_lse=needs_lse,
        )  # fmt: skip
    except InductorError as error:
        global _failed
        _failed = True
        reason = str(error).splitlines()[0]
        warnings.warn(f"FlexAttention could not be compiled ({reason}); blocks are gathered instead", stacklevel=2)
        return attend_gathered(query, keys, values, pattern, softmax)
    out, lse = found if needs_lse else (found, torch.zeros(found.shape[:3], device=found.device))
    return Partial(out[0, :, front:], lse[0, :, front:])


@functools.cache
def _compiled() -> Callable[..., Any]:
    # After a few recompilations dynamo runs eagerly, fifty times slower; few are needed with dynamic shapes.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=True)
    return compiled


def _table(pattern: Pattern) -> BlockMask:
    """The blocks that are computed, as FlexAttention takes them, and what is read of those that are not whole."""
    size, first = pattern.size, pattern.first_block
    numbers = torch.arange(pattern.num_key_blocks, device=pattern.blocks.device)
    own = numbers == numbers[first:, None]
    whole = pattern.blocks if not pattern.is_causal else pattern.blocks & ~own
    parts = torch.zeros_like(whole) if not pattern.is_causal else (own & pattern.blocks)
    extra = pattern.extra_columns()
    if extra is not None:
        parts = parts | (extra > 0)
    lengths = (pattern.tokens - first * size, pattern.tokens)
    return BlockMask.from_kv_blocks(
        *_listed(parts), *_listed(whole), BLOCK_SIZE=size, mask_mod=_reads(pattern), seq_lengths=lengths
    )


def _reads(pattern: Pattern) -> Callable[..., Tensor]:
    """What a row reads, written with as few terms as the pattern needs: compilers choke on more."""
    size, shift = pattern.size, pattern.first_block * pattern.size
    blocks, columns, is_causal = pattern.blocks, pattern.columns, pattern.is_causal
    groups = pattern.group_of_block()

    def reads(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        allowed = blocks[head, row // size, key // size]
        if columns is not None:
            before = key < row // size * size + shift
            allowed = allowed | (columns[head, groups[row // size], key] & before)
        if not is_causal:
            return allowed
        return allowed & (key <= (row + shift if shift else row))

    return reads


def _listed(on: Tensor) -> tuple[Tensor, Tensor]:
    """(1, H, nq) how many blocks of every row are on, and (1, H, nq, nk) their numbers, followed by the others."""
    order = on.int().argsort(dim=-1, descending=True, stable=True)
    return on.sum(-1).int()[None], order.int()[None]


def _capped(softcap: float | None) -> Callable[..., Tensor] | None:
    if softcap is None:
        return None

    def cap(logit: Tensor, batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(logit / softcap)

    return cap
