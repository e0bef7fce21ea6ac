"""Vertical-slash: chosen as a plain loop chooses, lines that are found, budgets that are met."""

from dataclasses import replace

import pytest
import torch

from methods.prefill.sparse_calls import (
    assert_batch_is_rows,
    assert_budget,
    assert_faithful,
    logits,
    mask_of,
    random_call,
    said,
    tokens,
)
from sparing.core.parsing import parse_method
from sparing.core.pattern import Pattern
from sparing.core.scorer import Softmax
from sparing.errors import InvalidInputError, MethodRefusedError
from sparing.methods.prefill.a_shape import AShape
from sparing.methods.prefill.vertical_slash import VerticalSlash

SIZE = 16


def in_order(scores, costs, first, room):
    """The first `first`, as far as they fit into half of the room, then by falling score, until one does not fit."""
    half = [sum(costs[: i + 1]) * 2 <= room for i in range(first)]
    order = sorted(
        range(len(scores)), key=lambda i: (not (i < first and half[i]), -scores[i] if i >= first or not half[i] else i)
    )
    chosen = []
    for item in order:
        if sum(costs[i] for i in chosen) + costs[item] > room:
            break
        chosen.append(item)
    return chosen


def by_loops(method, call):
    """(Hq, Q, N) bool: the paper's choice, pair by pair."""
    attention = logits(call).softmax(-1)[:, -method.rows :]
    rows, positions = attention.shape[1], range(call.start, call.tokens)
    result = torch.zeros(call.heads, call.rows, call.tokens, dtype=torch.bool)
    for head in range(call.heads):
        on = result[head]
        for i in positions:
            on[i - call.start, i // SIZE * SIZE : i + 1] = True
        room = method.pairs(call) - int(on.sum())
        slash = [0.0] * call.tokens
        for row in range(rows):
            at = call.tokens - rows + row
            for key in range(at + 1):
                slash[at - key] += float(attention[head, row, key]) / rows
        blocks = -(-call.tokens // SIZE)
        touched = [{-(-o // SIZE), o // SIZE} for o in range(call.tokens)]
        scores = [max(s for o, s in enumerate(slash) if d in touched[o]) for d in range(blocks)]
        pairs = [[(i, j) for i in positions for j in range(i) if i // SIZE - j // SIZE == d > 0] for d in range(blocks)]
        near = max(max(touched[o]) for o in range(method.local)) + 1 if method.local else 1
        for d in in_order(scores, [len(p) for p in pairs], near, int(room * (1 - method.vertical_share))):
            for i, j in pairs[d]:
                on[i - call.start, j] = True
        room = method.pairs(call) - int(on.sum())
        free = [
            [i for i in positions if j < i // SIZE * SIZE and not on[i - call.start, j]] for j in range(call.tokens)
        ]
        for j in in_order(attention[head].mean(0).tolist(), [len(f) for f in free], method.sinks, room):
            for i in free[j]:
                on[i - call.start, j] = True
    return result


@pytest.mark.parametrize(("count", "start"), [(150, 0), (160, 64), (141, 37)])
@pytest.mark.parametrize(
    "method",
    [
        VerticalSlash(0.4, SIZE, rows=20, sinks=5, local=20),
        VerticalSlash(0.6, SIZE, vertical_share=0.2, sinks=0, local=0),
        VerticalSlash(0.25, SIZE, rows=3, vertical_share=0.9, sinks=100),
        VerticalSlash(50, SIZE, rows=10, vertical_share=0.0, local=33),
    ],
    ids=str,
)
def test_reads_what_a_plain_loop_reads(method, count, start):
    call = random_call(count, start, size=3.0)
    wanted = by_loops(method, call)
    assert torch.equal(mask_of(method.pattern(call)), wanted)
    assert not torch.equal(wanted[0], wanted[1])


def lines(count=144, column=37, offset=53):
    """A column and a diagonal with the logit 40 each, where all else is 0."""
    query, keys = torch.zeros(1, count, count), torch.eye(count)[None] * 8.0
    for row in range(count):
        for key in (column, row - offset):
            if 0 <= key <= row:
                query[0, row, key] = 5.0
    call = random_call(count, heads=1, kv_heads=1, dim=count)
    return replace(call, query=query, keys=keys, softmax=Softmax(1.0))


def test_a_planted_column_and_a_planted_diagonal_are_found():
    """Offset 53 = 3 * 16 + 5 lies in the third and fourth block before a row's own: 6 and 5 blocks of the 36.

    Of 10440 pairs own blocks are 9 * 136 = 1224; the diagonals 11 * 256 = 2816; the column a few rows: 0.4 is 4176.
    """
    call = lines()
    method = VerticalSlash(0.4, SIZE, vertical_share=0.02, sinks=0, local=0)
    pattern = method.pattern(call)
    mask = mask_of(pattern)[0]
    assert all(bool(mask[row, key]) for row, key in call.query[0].nonzero().tolist())
    off = pattern.blocks[0].clone()
    numbers = torch.arange(9)
    assert not bool(off[(numbers[:, None] - numbers)[..., None].eq(torch.tensor([1, 2])).any(-1)].any())
    mass = logits(call).softmax(-1)[0]
    kept = (mass * mask).sum(-1)
    local = (mass * mask_of(AShape(0.4, SIZE).pattern(call))[0]).sum(-1)
    assert float(kept[64:].min()) > 0.99
    assert float(local[64:].mean()) < 0.9


def test_a_diagonal_that_crosses_blocks_is_read_whole():
    """Offset 1, the token before: all but the first row of a block have it in their own, which no sum would show."""
    call = lines(offset=1)
    mask = mask_of(VerticalSlash(0.4, SIZE, vertical_share=0.2, sinks=0, local=0).pattern(call))[0]
    assert all(bool(mask[row, row - 1]) for row in range(1, 144))


@pytest.mark.parametrize("keep", [0.15, 0.3, 0.5, 0.9, 60])
@pytest.mark.parametrize(("count", "start"), [(256, 0), (250, 0), (301, 77)])
def test_every_head_honours_and_uses_the_budget(keep, count, start):
    call = random_call(count, start, size=2.0)
    method = VerticalSlash(keep, SIZE)
    pattern = assert_budget(method, call, unused=4 * call.rows)  # a column of every head
    assert bool((pattern.pairs() <= method.pairs(call)).all())
    assert_faithful(method, call)


def test_small_budgets_leave_room_for_what_is_looked_for():
    """The far column and diagonal are found, though sinks and local diagonals alone would take all of the budget.

    Of 93528 pairs 28058 may be read, 3672 of them in own blocks; 21947 of the rest are for diagonals. The first two
    take 6656 and 6400, so that only one fits into half of it; the planted line's take 6144 and 5888, and fit behind it.
    """
    call = lines(count=432)
    method = VerticalSlash(0.3, SIZE, vertical_share=0.1, sinks=400, local=400)
    mask = mask_of(method.pattern(call))[0]
    assert all(bool(mask[row, key]) for row, key in call.query[0].nonzero().tolist())


def test_shares_of_columns():
    call = random_call(300, size=2.0)
    own = call.grid(SIZE).blocks
    columns_only = VerticalSlash(0.4, SIZE, vertical_share=1.0).pattern(call)
    assert torch.equal(columns_only.blocks, own)
    slashes = VerticalSlash(0.4, SIZE, vertical_share=0.0).pattern(call)
    alone = Pattern(300, 0, SIZE, slashes.blocks)
    assert float(alone.density().mean()) > 0.3
    assert torch.equal(slashes.blocks[:, 1:, 1:], slashes.blocks[:, :-1, :-1])  # whole diagonals


def test_everything_is_read_at_one():
    for share in (0.0, 0.5, 1.0):
        call, method = random_call(150, 20), VerticalSlash(1.0, SIZE, vertical_share=share)
        assert method.reads_all
        assert torch.equal(mask_of(method.pattern(call)), logits(call) > -torch.inf)


def test_chunks_are_refused():
    method, ids = VerticalSlash(0.5, SIZE), tokens(100)
    assert float((said(method, ids, [100]) - said(VerticalSlash(1.0), ids, [100])).abs().max()) > 0.01
    with pytest.raises(MethodRefusedError, match="read the prompt at once"):
        said(method, ids, [32, 68])


def test_a_padded_batch_is_its_rows():
    assert_batch_is_rows(VerticalSlash(0.5, SIZE))


def test_the_papers_numbers_text_and_what_is_refused():
    default = VerticalSlash()
    assert (default.block, default.rows, default.sinks, default.local) == (64, 64, 30, 100)
    text = "vertical_slash(vertical_share=0.1,block=32)"
    assert parse_method(text, 0.5) == VerticalSlash(0.5, 32, vertical_share=0.1)
    for bad in ({"rows": 0}, {"vertical_share": 1.1}, {"vertical_share": -0.1}, {"sinks": -1}, {"local": -1}):
        with pytest.raises(InvalidInputError, match=next(iter(bad))):
            VerticalSlash(**bad)
