"""LongHeads while the prompt is read: what stands for a chunk, by the equation; planted chunks; budgets."""

import math
from dataclasses import replace

import pytest
import torch
from oracles import EPS, PlainRotary

from methods.prefill.sparse_calls import assert_batch_is_rows, assert_faithful, random_call, said, tokens
from sparing.core.parsing import parse_method
from sparing.errors import MethodRefusedError
from sparing.methods.prefill.longheads import ChunkKeys, LongHeadsPrefill, represented

DIM, SIZE = 16, 16
ROTARY = PlainRotary(DIM)


def attend(query, keys, values, scale):
    weights = [math.exp(scale * float(query @ key)) for key in keys]
    return sum(w / sum(weights) * value for w, value in zip(weights, values, strict=True))


def chunk_by_hand(call, head, number, size):
    """c of one chunk in float64, from queries and keys turned to the chunk's own positions."""
    kv, scale, places = head // call.group, call.softmax.scaling, range(number * size, (number + 1) * size)
    back = [ROTARY.matrix(size * number).T for _ in places]
    keys = [t @ call.keys[kv, j].double() for t, j in zip(back, places, strict=True)]
    values = [call.values[kv, j].double() for j in places]
    if number * size < call.start:  # its queries are gone
        mean = sum(values) / size
    else:
        queries = [t @ call.query[head, i - call.start].double() for t, i in zip(back, places, strict=True)]
        mean = sum(attend(query, keys, values, scale) for query in queries) / size
    return attend(mean, keys, keys, scale)


@pytest.mark.parametrize("start", [0, 16, 37])
def test_scores_are_those_of_the_equation(start):
    call = replace(random_call(75, start, seed=2), rotary=ROTARY)
    scores = ChunkKeys().score(call, SIZE)
    # Rotations, two softmaxes and sums of 16 numbers of size < 5.
    tolerance = 2**11 * EPS
    for head in range(4):
        for row in range(start // SIZE, 5):
            places = range(max(row * SIZE, start), min(row * SIZE + SIZE, 75))
            mean = sum(ROTARY.matrix(i).T @ call.query[head, i - start].double() for i in places) / len(places)
            for number in range(4):
                wanted = float(mean @ chunk_by_hand(call, head, number, SIZE))
                assert float(scores[head, row - start // SIZE, number]) == pytest.approx(wanted, abs=tolerance)
    assert bool((scores[..., 4] == 0).all())  # the unfinished chunk stands for nothing


def test_tiles_change_nothing(monkeypatch):
    call = replace(random_call(150, 20), rotary=ROTARY)
    whole = represented(call, SIZE)
    monkeypatch.setattr("sparing.methods.prefill.longheads.HELD", 4 * SIZE**2)
    torch.testing.assert_close(represented(call, SIZE), whole)


def test_planted_chunk_is_read():
    """The keys of chunk 3 answer the rows of the last chunk in a channel that turns slowly; all others are zero."""
    call = replace(random_call(160, heads=1, kv_heads=1), rotary=ROTARY)
    plain = torch.zeros(1, 1, 160, DIM)
    plain[..., 48:64, 7] = 5.0
    queries = torch.zeros(1, 1, 160, DIM)
    queries[..., 7] = 1.0
    keys, query = (ROTARY.rotate(x, torch.arange(160)[None])[0] for x in (plain, queries))
    values = keys  # so that a chunk's mean output lies along its keys
    method = LongHeadsPrefill(0.5, block=16)
    blocks = method.pattern(replace(call, query=query, keys=keys, values=values)).blocks[0, -1]
    assert {0, 3, 8, 9} <= set(blocks.nonzero()[:, 0].tolist())
    assert int(blocks.sum()) <= 5  # equal scores would have taken chunks 1 and 2


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.8, 120])
@pytest.mark.parametrize(("count", "start"), [(400, 0), (333, 0), (333, 160), (333, 150)])
def test_the_budget_is_honoured_and_used(keep, count, start):
    call = replace(random_call(count, start), rotary=ROTARY)
    method = LongHeadsPrefill(keep, block=16)
    spent, allowed = int(assert_faithful(method, call).sum()), method.pairs(call) * 4
    assert spent <= allowed + 4 * 16**2 * (start > 0)  # a block that calls before left
    assert allowed - spent < 4 * 16 * call.rows  # less than a block of every row


def test_it_combines_and_is_dense_with_everything():
    assert LongHeadsPrefill(1.0).reads_all
    assert LongHeadsPrefill().block == 256
    parts = parse_method("longheads_prefill(block=32)+layer", 0.3)
    assert parts.scorer == ChunkKeys()
    assert parts.block == 32


def test_chunks_are_refused_and_batches_are_rows():
    method = LongHeadsPrefill(0.5, block=16)
    with pytest.raises(MethodRefusedError, match="longheads_prefill"):
        said(method, tokens(128), [64, 64])
    assert_batch_is_rows(method)


def test_values_of_another_size_leave_their_place_to_keys():
    call = replace(random_call(75), rotary=ROTARY)
    odd, like = replace(call, values=call.values[..., :8]), replace(call, values=turned_to_chunks(call.keys))
    torch.testing.assert_close(represented(odd, SIZE), represented(like, SIZE), atol=1e-5, rtol=0)


def turned_to_chunks(keys):
    """Keys at the positions of their own chunks, where values are compared with them."""
    positions = torch.arange(keys.shape[1])[None]
    return ROTARY.rotate(ROTARY.unrotate(keys[None], positions), positions % SIZE)[0]
