"""Dense or sparse: which is faster for a call, by what was measured on this machine.

Before a method's first call the cost of a (query, key) pair decides, measured once per shape on a small problem: sparse
is tried if the pairs that the budget allows are cheaper than all of them. After it, the time that the call took,
choosing what to read included, is set against what dense attention would have taken: a method that does not pay at a
length is not asked again there. What is lost against dense attention is at most one layer of a first prompt.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from sparing.core.pattern import Pattern, causal_pairs
from sparing.core.prefill import SparsePrefill
from sparing.core.scorer import Softmax
from sparing.kernels.sparse import attend_sparse

# The small problem: large enough that fixed costs do not decide, and solved in some hundredths of a second.
TOKENS, HEADS, DENSITY = 2048, 4, 0.25
# Methods with a threshold do not know beforehand how much they will read.
UNKNOWN_DENSITY = 0.25


@dataclass(frozen=True)
class Shape:
    """What the cost of a pair depends on. `threads`: of torch; 0 on other devices than the CPU."""

    device: str
    dtype: torch.dtype
    dim: int
    value_dim: int
    group: int
    block: int
    threads: int


@dataclass(frozen=True)
class Rates:
    """Seconds per (query, key) pair of one head: of dense causal attention, and of the sparse path."""

    dense: float
    sparse: float


Key = tuple[SparsePrefill, Shape, int]
_paid: dict[Key, float] = {}
"""(method, shape, length's power of two) → the best ratio so far of a call's time to that of dense attention."""


def is_worth(method: SparsePrefill, query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """True if reading a prompt of (..., N, D) keys by this method is expected to be faster than dense attention."""
    shape, tokens = _shape(method, query, keys, values), keys.shape[-2]
    if tokens <= 2 * method.block:  # all blocks are on
        return False
    known = _paid.get(_key(method, shape, tokens))
    if known is not None:
        return known < 1.0
    measured = rates(shape)
    share = method.budget.amount if method.budget.kind == "ratio" else min(method.budget.amount / tokens, 1.0)
    density = share if share < 1.0 else UNKNOWN_DENSITY
    return density * measured.sparse < measured.dense


def note(method: SparsePrefill, query: Tensor, keys: Tensor, values: Tensor, seconds: float) -> None:
    """Learn how long a call of (Hq, Q, D) queries took that was read sparsely."""
    shape, tokens, count = _shape(method, query, keys, values), keys.shape[-2], query.shape[-2]
    pairs = query.shape[-3] * causal_pairs(count, tokens)
    key = _key(method, shape, tokens)
    _paid[key] = min(_paid.get(key, float("inf")), seconds / (pairs * rates(shape).dense))


@functools.cache
def rates(shape: Shape) -> Rates:
    """Measure the cost of a pair. Takes some tenths of a second, once per shape and process."""
    generator = torch.Generator().manual_seed(0)
    size = max(TOKENS, 16 * shape.block)

    def random(heads: int, dim: int) -> Tensor:
        return torch.randn(heads, size, dim, generator=generator).to(shape.device, shape.dtype)

    heads = -(-HEADS // shape.group)
    query, keys, values = (
        random(heads * shape.group, shape.dim),
        random(heads, shape.dim),
        random(heads, shape.value_dim),
    )
    blocks = -(-size // shape.block)
    chosen = torch.rand(len(query), blocks, blocks, generator=generator) < DENSITY
    pattern = Pattern(size, 0, shape.block, chosen.to(shape.device))
    softmax = Softmax(shape.dim**-0.5)
    repeated = [x.repeat_interleave(shape.group, dim=0)[None] for x in (keys, values)]
    with torch.inference_mode():
        dense = _fastest(
            lambda: F.scaled_dot_product_attention(query[None], repeated[0], repeated[1], is_causal=True), shape.device
        )
        sparse = _fastest(lambda: attend_sparse(query, keys, values, pattern, softmax, needs_lse=False), shape.device)
    return Rates(dense / (len(query) * pattern.all_pairs()), sparse / int(pattern.pairs().sum()))


def _fastest(run: Callable[[], object], device: str) -> float:
    """Seconds of the fastest of three runs, after one that warms up."""
    run()
    return min(timed(run, device) for _ in range(3))


def timed(run: Callable[[], object], device: str) -> float:
    """Seconds of one run, finished on its device."""
    wait(device)
    began = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - began


def wait(device: str) -> None:
    """Until what was asked of a device is done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _key(method: SparsePrefill, shape: Shape, tokens: int) -> Key:
    """Without what shortens the prompt: its draft model must not stay alive in here."""
    return replace(method, prompt=None), shape, tokens.bit_length()


def _shape(method: SparsePrefill, query: Tensor, keys: Tensor, values: Tensor) -> Shape:
    device = str(query.device)
    threads = torch.get_num_threads() if device == "cpu" else 0
    group = query.shape[-3] // keys.shape[-3]
    return Shape(device, query.dtype, query.shape[-1], values.shape[-1], group, method.block, threads)
