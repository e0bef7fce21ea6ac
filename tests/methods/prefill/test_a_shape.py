"""A-shape and tri-shape: widths worked out by hand, budgets that are met, chunks that are the whole."""

from dataclasses import replace

import pytest
import torch

from methods.prefill.sparse_calls import (
    assert_batch_is_rows,
    assert_budget,
    assert_faithful,
    logits,
    mask_of,
    part_of,
    random_call,
    said,
    tokens,
)
from sparing.errors import InvalidInputError, MethodRefusedError
from sparing.methods.prefill.a_shape import AShape, TriShape


def bands(sinks, window):
    """Blocks that each row reads with so many first ones and so many before its own."""
    return [
        {*range(first), *range(own - width, own + 1)}
        for own, (first, width) in enumerate(zip(sinks, window, strict=True))
    ]


def blocks_of(pattern):
    assert torch.equal(pattern.blocks, pattern.blocks[:1].expand_as(pattern.blocks)), "heads are alike"
    return [set(row.nonzero()[:, 0].tolist()) for row in pattern.blocks[0]]


def counts_by_hand(method, blocks):
    """Whole blocks that each row may take, one after another; what is left goes on to the next."""
    size, room, found = method.block, 0.0, []
    for block in range(blocks):
        for row in range(block * size, (block + 1) * size):
            seen = row + 1
            room += method.keep * seen if isinstance(method.keep, float) else min(method.keep, seen)
            room -= row - block * size + 1  # its own block
        found.append(max(int(room // size**2), 0))
        room -= found[-1] * size**2
    return found


@pytest.mark.parametrize("keep", [0.1, 0.25, 0.5, 0.85, 40, 100])
@pytest.mark.parametrize("sinks", [0, 20, 100])
def test_rows_read_sinks_and_window(keep, sinks):
    method = AShape(keep, 16, sinks=sinks)
    counts = counts_by_hand(method, 19)
    first = [min(-(-sinks // 16), (count + 1) // 2) for count in counts]
    window = [count - some for count, some in zip(counts, first, strict=True)]
    assert blocks_of(method.pattern(random_call(300))) == bands(first, window)
    assert sum(counts) >= 5


def test_a_window_by_hand():
    """48 keys, no sinks: the own block and two more are 33 to 48; what rows leave gives a third now and then.

    Rows 48 to 63 may read 48 each, 768, of which their own block takes 136; 632 make 2 blocks of 256 and leave 120.
    Before them blocks 0, 1 and 2 read all (0, 1, 2 before their own), which leaves nothing. Then 120 + 632 = 752 make 2
    and leave 240, and 240 + 632 = 872 make 3.
    """
    found = blocks_of(AShape(48, 16, sinks=0).pattern(random_call(112)))
    assert found == bands([0] * 7, (0, 1, 2, 2, 2, 3, 2))


@pytest.mark.parametrize("method", [AShape, TriShape])
@pytest.mark.parametrize("keep", [0.1, 0.25, 0.5, 0.9, 60])
@pytest.mark.parametrize("count", [256, 250, 301])
def test_the_budget_is_honoured_and_used(method, keep, count):
    call = random_call(count, size=2.0)
    recipe = method(keep, 16)
    # Heads alike leave a block each; tri-shape another, and the rows of the last block what their part of it leaves.
    assert_budget(recipe, call, unused=4 * 16 * 16 * (1 if method is AShape else 3))
    assert_faithful(recipe, call)


@pytest.mark.parametrize("keep", [0.1, 0.5, 60])
@pytest.mark.parametrize("start", [77, 160, 299])
def test_later_rows_are_at_most_a_block_of_every_head_above_their_share(keep, start):
    call = random_call(301, start)
    shape, tri = AShape(keep, 16), TriShape(keep, 16)
    spent = int(shape.pattern(call).pairs().sum())
    always = int(call.grid(16).pairs().sum())
    assert spent <= max(4 * shape.pairs(call), always) + 4 * 16 * 16
    assert int(tri.pattern(call).pairs().sum()) <= max(4 * tri.pairs(call), always)
    assert_faithful(shape, call)
    assert_faithful(tri, call)


@pytest.mark.parametrize(("start", "end"), [(0, 64), (64, 200), (37, 150), (199, 200)])
@pytest.mark.parametrize("keep", [0.2, 0.5, 50])
def test_any_part_reads_what_the_whole_reads(keep, start, end):
    call, method = random_call(200), AShape(keep, 16)
    whole = mask_of(method.pattern(call))
    assert torch.equal(mask_of(method.pattern(part_of(call, start, end))), whole[:, start:end, :end])


@pytest.mark.parametrize("sizes", [[100], [7, 40, 53], [32, 68]])
def test_chunks_are_the_whole(sizes):
    ids, method = tokens(100), AShape(0.5, 16)
    whole = said(method, ids, [100])
    assert float((whole - said(AShape(1.0), ids, [100])).abs().max()) > 0.01
    torch.testing.assert_close(said(method, ids, sizes), whole, rtol=0, atol=2e-4)


def test_tri_shape_needs_the_last_rows():
    with pytest.raises(MethodRefusedError, match="read the prompt at once"):
        said(TriShape(0.5, 16), tokens(100), [32, 68])


def test_last_rows_read_everything_as_far_as_half_the_budget_goes():
    call = random_call(640)
    causal = logits(call) > -torch.inf
    mask = mask_of(TriShape(0.7, 16, dense_last=100).pattern(call))
    assert torch.equal(mask[:, 528:], causal[:, 528:])  # row 540 is in the block that begins at 528
    assert not bool((mask[:, 512:528] == causal[:, 512:528]).all())
    assert torch.equal(mask_of(TriShape(0.5, 16, dense_last=0).pattern(call)), mask_of(AShape(0.5, 16).pattern(call)))
    tight = TriShape(0.1, 16, dense_last=100)
    dense = (mask_of(tight.pattern(call))[0] == causal[0]).all(-1).nonzero()[:, 0].tolist()
    rows = [row for row in dense if row >= 320]
    assert rows == list(range(rows[0], 640))
    assert 0 < sum(row + 1 for row in rows) <= tight.pairs(call) / 2 < sum(row + 1 for row in range(rows[0] - 16, 640))


def test_everything_is_read_at_one():
    for start in (0, 37):
        call = random_call(150, start)
        for method in (AShape(1.0, 16), TriShape(1.0, 16)):
            assert method.reads_all
            assert torch.equal(mask_of(method.pattern(call)), logits(call) > -torch.inf)


def test_a_padded_batch_is_its_rows():
    assert_batch_is_rows(AShape(0.5, 16))
    assert_batch_is_rows(TriShape(0.5, 16, dense_last=20))


def test_the_papers_numbers_and_what_is_refused():
    assert (AShape().sinks, AShape().chunks, TriShape().dense_last, TriShape().chunks) == (100, "any", 100, "none")
    for bad in ({"sinks": -1}, {"dense_last": -1}, {"block": 20}):
        with pytest.raises(InvalidInputError, match=next(iter(bad))):
            replace(TriShape(), **bad)
