"""Attention of one new token over ragged lanes on a GPU: a kernel in Triton, in two steps and two launches.

A lane of n tokens is cut into pieces of equal length; every piece is attended by a program of its own, with a running
softmax, and the pieces of a lane are then merged by their log-sum-exps. How many pieces there may be follows from the
number of lanes and the size of the GPU, how long they are from `lengths`, which only the GPU reads: nothing waits for
it, and no length is compiled in. The queries of a group are rows of one matrix, padded to 16 for the tensor cores.

Checked against float64 in Triton's interpreter, and compiled for GPUs; it has not run on one, and no size below has
been tuned. Imported only where tensors are on a GPU and triton is installed.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

TYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_DIM, MAX_GROUP = 256, 32
MAX_SPLITS = 64
# Programs per multiprocessor that splitting aims at: several, since lanes are uneven.
PROGRAMS = 4
# A piece has at least so many tokens; what is shorter does not pay for its merging.
SHORTEST = 256
# Bytes of the keys that a program reads at a time, so that keys and values fit into shared memory twice.
TILE = 2**14


def can_decode(query: Tensor, keys: Tensor, values: Tensor, group: int) -> bool:
    """True if the kernel serves these tensors: one of TYPES, heads of up to 256 channels, groups of up to 32."""
    return (
        query.dtype == keys.dtype == values.dtype
        and keys.dtype in TYPES
        and max(keys.shape[-1], values.shape[-1]) <= MAX_DIM
        and group <= MAX_GROUP
    )


def ragged_decode(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    lengths: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """out[l, g] = Σ_t softmax_t(scaling · q[l, g] · k_t + bias_t) v_t over the tokens t of lane l.

    Args:
        queries: (lanes, G, D). keys: (capacity, D), values: (capacity, Dv), contiguous; see `can_decode`.
        starts, lengths: (lanes,) int64; every lane holds at least one token.
        bias: (capacity,) float32, added to the logits of each stored token.
        splits: the most pieces of a lane, a power of two; by default as many as fill the GPU.

    Returns:
        (lanes, G, Dv) in the queries' dtype, and (lanes, G) float32 log-sum-exps. Logits and sums are float32; weights
        are rounded to the values' dtype before they meet them, as in fused attention.
    """
    queries = queries.contiguous()
    lanes, group, dim = queries.shape
    width = values.shape[-1]
    splits = splits or _splits(lanes, queries.device)
    block = _block(max(dim, width) * keys.element_size())
    parts, part_lse = (queries.new_empty(lanes, splits, group, *n, dtype=torch.float32) for n in ((width,), ()))
    out, lse = queries.new_empty(lanes, group, width), queries.new_empty(lanes, group, dtype=torch.float32)
    with torch.cuda.device_of(queries):
        _attend_pieces[(lanes, splits)](
            queries, keys, values, bias, starts, lengths, scaling, parts, part_lse,
            GROUP=group, DIM=dim, WIDTH=width, ROWS=_padded(group), DIM_PAD=_padded(dim), WIDTH_PAD=_padded(width),
            BLOCK=block, SHORTEST=SHORTEST, num_warps=4, num_stages=2, enable_fp_fusion=True,
        )  # fmt: skip
        _merge_pieces[(lanes, group)](
            parts, part_lse, lengths, out, lse,
            SPLITS=splits, GROUP=group, WIDTH=width, WIDTH_PAD=_padded(width), BLOCK=block, SHORTEST=SHORTEST,
            enable_fp_fusion=True,
        )  # fmt: skip
    return out, lse


def _padded(size: int) -> int:
    """The side of a matrix product's tile."""
    return max(16, 1 << (size - 1).bit_length())


def _block(token: int) -> int:
    """Tokens that are read at a time, if a key has so many bytes."""
    return min(max(TILE // _padded(token), 16), 128)


def _splits(lanes: int, device: torch.device) -> int:
    wanted = -(-PROGRAMS * _multiprocessors(device) // lanes)
    return min(1 << (wanted - 1).bit_length(), MAX_SPLITS)


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":  # the interpreter
        return 1
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


@triton.jit
def _piece_size(length, splits, BLOCK: tl.constexpr, SHORTEST: tl.constexpr):
    """Tokens per piece of a lane: whole blocks."""
    return tl.maximum(tl.cdiv(tl.cdiv(length, splits), BLOCK) * BLOCK, SHORTEST)


@triton.jit
def _attend_pieces(
    queries, keys, values, bias, starts, lengths, scaling, parts, part_lse,
    GROUP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, DIM_PAD: tl.constexpr, WIDTH_PAD: tl.constexpr, BLOCK: tl.constexpr, SHORTEST: tl.constexpr,
):  # fmt: skip
    """One piece of one lane: its attention, and the log-sum-exp of its logits."""
    lane, piece, splits = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    start, length = tl.load(starts + lane), tl.load(lengths + lane).to(tl.int32)
    size = _piece_size(length, splits, BLOCK, SHORTEST)
    first, last = piece * size, tl.minimum((piece + 1) * size, length)
    if first >= length:
        return
    row, dim, width, slot = tl.arange(0, ROWS), tl.arange(0, DIM_PAD), tl.arange(0, WIDTH_PAD), tl.arange(0, BLOCK)
    rows = (row < GROUP)[:, None]
    query = tl.load(
        queries + (lane * GROUP + row[:, None]) * DIM + dim[None, :], mask=rows & (dim < DIM)[None, :], other=0.0
    )
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mean = tl.zeros([ROWS, WIDTH_PAD], tl.float32)
    for begin in range(first, last, BLOCK):
        held = begin + slot < last
        token = start + begin + slot
        key = tl.load(keys + token[None, :] * DIM + dim[:, None], mask=held[None, :] & (dim < DIM)[:, None], other=0.0)
        logits = tl.dot(query, key, input_precision="ieee") * scaling
        if bias is not None:
            logits += tl.load(bias + token, mask=held, other=0.0)[None, :]
        logits = tl.where(held[None, :], logits, float("-inf"))
        highest = tl.maximum(top, tl.max(logits, 1))
        # A bias of -inf on all tokens so far must not make -inf - -inf.
        zero = tl.where(highest == float("-inf"), 0.0, highest)
        weights, older = tl.exp(logits - zero[:, None]), tl.exp(top - zero)
        value = tl.load(
            values + token[:, None] * WIDTH + width[None, :], mask=held[:, None] & (width < WIDTH)[None, :], other=0.0
        )
        total = total * older + tl.sum(weights, 1)
        mean = mean * older[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        top = highest
    at = (lane * splits + piece) * GROUP + row
    total_or_one = tl.where(total == 0.0, 1.0, total)
    tl.store(
        parts + at[:, None] * WIDTH + width[None, :], mean / total_or_one[:, None], mask=rows & (width < WIDTH)[None, :]
    )
    tl.store(part_lse + at, top + tl.log(total_or_one), mask=row < GROUP)


@triton.jit
def _merge_pieces(
    parts, part_lse, lengths, out, lse,
    SPLITS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr,
    BLOCK: tl.constexpr, SHORTEST: tl.constexpr,
):  # fmt: skip
    """One query: the mean of its pieces, weighted by their sums of exponentials. Pieces without tokens are not read."""
    lane, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = tl.load(lengths + lane).to(tl.int32)
    piece, width = tl.arange(0, SPLITS), tl.arange(0, WIDTH_PAD)
    held = piece < tl.cdiv(length, _piece_size(length, SPLITS, BLOCK, SHORTEST))
    at = (lane * SPLITS + piece) * GROUP + group
    sums = tl.load(part_lse + at, mask=held, other=float("-inf"))
    top = tl.max(sums, 0)
    weights = tl.exp(sums - top)
    total = tl.sum(weights, 0)
    part = tl.load(
        parts + at[:, None] * WIDTH + width[None, :], mask=held[:, None] & (width < WIDTH)[None, :], other=0.0
    )
    mean = tl.sum(part * weights[:, None], 0) / total
    tl.store(out + (lane * GROUP + group) * WIDTH + width, mean.to(out.dtype.element_ty), mask=width < WIDTH)
    tl.store(lse + lane * GROUP + group, top + tl.log(total))
