"""S2-Attention: shards by the equation, coverage, blocks that are never read again, budgets, chunks."""

import math
from fractions import Fraction

import pytest
import torch

from methods.prefill.sparse_calls import (
    assert_batch_is_rows,
    assert_faithful,
    mask_of,
    part_of,
    random_call,
    said,
    tokens,
)
from sparing.errors import InvalidInputError, MethodRefusedError
from sparing.methods.prefill.s2_attention import S2Attention


def read_by_hand(head, kv_heads, blocks, size, keep, stride, local):
    """[row block] → set of blocks, from the module's text: budgets as fractions, blocks one at a time."""
    step, most, rows = max(1, stride // kv_heads), Fraction(0), []
    before = 0
    for i in range(blocks):
        end = (i + 1) * size
        until = Fraction(keep) * end * (end + 1) / 2
        always = (i + 1) * Fraction(
            size * (size + 1), 2
        ) + i * size * size  # its own block, and the first from row 1 on
        most = max(most, (until - always) / size**2)
        count = math.floor(most + Fraction(head, kv_heads)) - before
        before += count
        shard = [b for b in range(i - 1, 0, -1) if (b + head * step) % stride == 0]
        near = [b for b in range(i - 1, 0, -1) if b not in shard and (local is None or i - b < local)]
        rows.append({0, i, *(shard + near)[:count]})
    return rows


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("keep", "stride", "local"), [(0.5, None, None), (0.25, 3, None), (0.75, 4, 3), (0.125, 2, 2)])
def test_reads_what_the_equation_says(kv_heads, keep, stride, local):
    call = random_call(330, heads=4, kv_heads=kv_heads)
    method = S2Attention(keep, block=16, stride=stride, local=local)
    pattern = method.pattern(call)
    for head in range(4):
        wanted = read_by_hand(head // call.group, kv_heads, 21, 16, keep, stride or math.ceil(2 / keep), local)
        assert [set(row.nonzero()[:, 0].tolist()) for row in pattern.blocks[head]] == wanted


def test_heads_together_read_everything():
    """Stride 4 of four KV heads: each block is in one shard; a head alone reads a quarter of what is far."""
    pattern = S2Attention(0.9, block=16, stride=4, local=2).pattern(random_call(512, heads=4, kv_heads=4))
    assert torch.equal(pattern.blocks.any(0), torch.ones(32, 32).tril().bool())
    assert [int(row.sum()) for row in pattern.blocks[:, -1]] == [10, 10, 10, 11]  # 0, 30, 31, and 7 or 8 of 1..29
    far = pattern.blocks[1, -1].nonzero()[:, 0].tolist()
    assert far == [0, 3, 7, 11, 15, 19, 23, 27, 30, 31]  # (b + 1) mod 4 = 0


def test_the_sink_is_read_by_all_heads_and_unread_blocks_stay_unread():
    pattern = S2Attention(0.9, block=16, stride=4, local=3).pattern(random_call(512, heads=4, kv_heads=4))
    assert bool(pattern.blocks[:, :, 0].all())
    for head in pattern.blocks:
        for block in range(29):
            later = head[block + 3 :, block]
            assert bool(later.all()) or not bool(later.any())


def test_stride_one_is_dense_and_a_limit_is_not():
    call = random_call(200)
    assert S2Attention(1.0, block=16).reads_all
    limited = S2Attention(1.0, block=16, stride=50, local=2)
    assert not limited.reads_all
    assert float(limited.pattern(call).density().mean()) < 0.5
    assert bool(S2Attention(1.0, block=16, stride=1, local=1).pattern(call).blocks.equal(
        torch.ones(13, 13).tril().bool().expand(4, -1, -1)
    ))  # fmt: skip


@pytest.mark.parametrize("keep", [0.2, 0.25, 0.5, 0.9, 100])
@pytest.mark.parametrize(("count", "start"), [(512, 0), (411, 0), (411, 160)])
def test_the_budget_is_honoured_and_used(keep, count, start):
    call = random_call(count, start)
    method = S2Attention(keep, block=16)
    pattern = method.pattern(call)
    spent, allowed = int(pattern.pairs().sum()), method.pairs(call) * 4
    assert spent == int(mask_of(pattern).sum())
    late = call.group * 256 * (start > 0)  # the one block that calls before left
    assert spent <= allowed + late
    if not start:  # later calls pay for what rows before them took too much of
        assert allowed - spent < 3 * 4 * 256  # of a row: what the last, shorter block leaves
    assert_faithful(method, call)


@pytest.mark.parametrize("sizes", [[64, 80], [37, 60, 47]])
def test_chunks_read_what_the_whole_reads(sizes):
    method, ids = S2Attention(0.4, block=16), tokens(144)
    torch.testing.assert_close(said(method, ids, sizes), said(method, ids, [144]), rtol=0, atol=2e-4)
    call = random_call(144)
    whole, start = method.pattern(call), 0
    for size in sizes:
        part = method.pattern(part_of(call, start, start + size))
        assert torch.equal(mask_of(part), mask_of(whole)[:, start : start + size, : start + size])
        start += size
    assert_batch_is_rows(method)


def test_what_is_refused():
    for bad in ({"stride": 0}, {"local": 0}):
        with pytest.raises(InvalidInputError, match=next(iter(bad))):
            S2Attention(**bad)
    with pytest.raises(MethodRefusedError, match="s2attention"):
        S2Attention().block_parts()
    assert torch.equal(S2Attention(0.25).shards(torch.arange(9), 1)[0].nonzero()[:, 0], torch.tensor([0, 8]))
