"""FlexPrefill: the test of heads and top-p by loops, one gamma for a layer, and the traps of the authors' code."""

import math
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
from sparing.core.scorer import Softmax
from sparing.errors import InvalidInputError, MethodRefusedError
from sparing.measures.blocks import last_means
from sparing.methods.prefill.flexprefill import FlexPrefill, pooled_distance

SIZE = 16


def xlogy(x, y):
    return x * math.log(y) if x > 0 else 0.0


def distances(call, counted=True):
    """sqrt(JS) of every head, a number at a time."""
    attention = logits(call).softmax(-1)[:, -SIZE:]
    rows = attention.shape[1]
    edges = range(0, call.tokens, SIZE)
    found = []
    for head in range(call.heads):
        query, keys = call.query[head, -SIZE:].double().mean(0), call.keys[head // call.group].double()
        weights = []
        for edge in edges:
            logit = float(query @ keys[edge : edge + SIZE].mean(0)) * call.softmax.scaling
            if call.softmax.softcap is not None:
                logit = call.softmax.softcap * math.tanh(logit / call.softmax.softcap)
            seen = [min(max(i + 1 - edge, 0), SIZE) for i in range(call.tokens - rows, call.tokens)]
            weights.append(math.exp(logit) * (sum(seen) / rows if counted else 1))
        guess = [w / sum(weights) for w in weights]
        true = [float(attention[head, :, edge : edge + SIZE].sum()) / rows for edge in edges]
        both = [(p, q, (p + q) / 2) for p, q in zip(guess, true, strict=True)]
        divergence = sum(xlogy(p, p) - xlogy(p, m) + xlogy(q, q) - xlogy(q, m) for p, q, m in both) / 2
        found.append(math.sqrt(max(divergence, 0.0)))
    return torch.tensor(found, dtype=torch.float64)


def top_p(mass, first, gamma):
    """Items of `first`, then by falling mass, until they hold gamma; the crossing one is taken."""
    order = sorted(range(len(mass)), key=lambda i: (i not in first, -mass[i]))
    chosen, held = set(first), sum(mass[i] for i in first)
    for item in order[len(first) :]:
        if held >= gamma:
            break
        chosen.add(item)
        held += mass[item]
    return chosen


def by_loops(call, gamma, is_block):
    """(Hq, Q, N) bool with all of it allowed."""
    attention = logits(call).softmax(-1)[:, -SIZE:]
    count, rows = call.tokens, attention.shape[1]
    blocks = -(-count // SIZE)
    result = torch.zeros(call.heads, call.rows, count, dtype=torch.bool)
    for head in range(call.heads):
        own = {(b, b) for b in range(blocks)}
        columns = set()
        if is_block:
            on = own | set()
            for b in range(call.start // SIZE, blocks):
                edges = range(max(b * SIZE, call.start), min((b + 1) * SIZE, count))
                query = call.query[head, [i - call.start for i in edges]].double().mean(0)
                keys = call.keys[head // call.group].double()
                means = torch.stack([keys[j * SIZE : (j + 1) * SIZE].mean(0) for j in range(b + 1)])
                mass = (means @ query * call.softmax.scaling).softmax(-1).tolist()
                on |= {(b, j) for j in top_p(mass, {0, b}, gamma)}
        else:
            slash = [0.0] * count
            for row in range(rows):
                for key in range(count - rows + row + 1):
                    slash[count - rows + row - key] += float(attention[head, row, key]) / rows
            columns = top_p(attention[head].mean(0).tolist(), set(range(min(SIZE, count))), gamma)
            near = {d for o in top_p(slash, {0}, gamma) for d in (o // SIZE, -(-o // SIZE))}
            on = own | {(b, b - d) for b in range(blocks) for d in near}
        for i in range(call.start, count):
            for j in range(i + 1):
                result[head, i - call.start, j] = (i // SIZE, j // SIZE) in on or j in columns
    return result


@pytest.mark.parametrize(("count", "start"), [(96, 0), (101, 0), (101, 37), (90, 85)])
@pytest.mark.parametrize("size", [0.0, 1.0, 60.0])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_distance_is_the_equation(count, start, size, softcap):
    call = replace(random_call(count, start, size=size), softmax=Softmax(0.25, softcap=softcap))
    vertical, _ = last_means(call, SIZE)
    found = pooled_distance(call, vertical, SIZE)
    # Near 0 the square root turns what float32 loses of a probability, 1e-7 or so, into 1e-3.
    torch.testing.assert_close(found.square(), distances(call).square(), rtol=1e-4, atol=1e-6)


def test_blocks_without_any_mass_do_not_make_a_head_vertical_slash():
    """The trap: true mass underflows to 0, 0 * log(0) is nan, and nan < tau is false. Here pooling is right: 0.

    All keys of block 1 are e0, all others e1; queries are 2000 e0, so that blocks but the second have a mass of 0.
    """
    query, keys = torch.zeros(1, 80, 16), torch.zeros(1, 80, 16)
    query[..., 0], keys[..., 1] = 2000.0, 1.0
    keys[0, 16:32] = torch.eye(16)[0]
    call = replace(random_call(80, heads=1, kv_heads=1), query=query, keys=keys)
    vertical, _ = last_means(call, SIZE)
    assert float(vertical[0, 40]) == 0.0
    p = vertical.view(5, 16).sum(-1)
    assert bool((p * (p / p).log()).sum().isnan()), "the plain formula is nan here"
    assert float(pooled_distance(call, vertical, SIZE)) < 1e-3
    blocks = FlexPrefill(1.0, SIZE, gamma=0.9).pattern(call)
    assert blocks.columns is not None
    assert not bool(blocks.columns.any())


def test_a_last_block_of_few_tokens_is_not_taken_for_a_whole_one():
    """Uniform rows are told by pooling, also where the last block holds one token of 97 instead of a seventh of all."""
    call = replace(random_call(97), query=torch.zeros(4, 97, 16))
    vertical, _ = last_means(call, SIZE)
    assert float(pooled_distance(call, vertical, SIZE).max()) < 0.02
    assert float(distances(call, counted=False).min()) > 0.1


@pytest.mark.parametrize(("count", "start"), [(96, 0), (101, 0), (101, 37)])
@pytest.mark.parametrize("gamma", [0.3, 0.7, 0.95])
@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_heads_read_the_least_that_holds_gamma(count, start, gamma, tau):
    """Of columns and diagonals (tau 0: no head is read by blocks), or of the blocks of every row (tau 1: all are)."""
    call = random_call(count, start, size=4.0)
    wanted = by_loops(call, gamma, is_block=tau > 0)
    assert torch.equal(mask_of(FlexPrefill(1.0, SIZE, gamma=gamma, tau=tau).pattern(call)), wanted)


def test_some_heads_by_blocks_and_some_not():
    call = random_call(96, size=4.0)
    query = call.query.clone()
    query[1] = 0.0
    call = replace(call, query=query)
    mask = mask_of(FlexPrefill(1.0, SIZE, gamma=0.63).pattern(call))
    is_block = distances(call) < 0.1
    assert is_block.tolist() == [True, True, False, True]
    wanted = torch.where(is_block[:, None, None], by_loops(call, 0.63, True), by_loops(call, 0.63, False))
    assert torch.equal(mask, wanted)


@pytest.mark.parametrize("gamma", [0.3, 0.5])
def test_the_last_rows_keep_gamma(gamma):
    call = random_call(201, size=5.0)
    mask = mask_of(FlexPrefill(1.0, SIZE, gamma=gamma, tau=0.0).pattern(call))
    kept = (logits(call).softmax(-1) * mask)[:, -SIZE:].sum(-1).mean(-1)
    assert bool((kept >= gamma - 1e-5).all())
    assert float(mask.sum()) < 0.9 * 4 * 201 * 101


@pytest.mark.parametrize("keep", [0.15, 0.3, 0.5, 0.9, 60])
@pytest.mark.parametrize(("count", "start"), [(256, 0), (250, 0), (301, 77)])
@pytest.mark.parametrize("tau", [0.0, 0.1, 1.0])
def test_the_budget_is_honoured_and_used(keep, count, start, tau):
    call = random_call(count, start, size=2.0)
    method = FlexPrefill(keep, SIZE, tau=tau)
    assert_budget(method, call, unused=max(call.rows, SIZE**2))  # a column or a block
    assert_faithful(method, call)


def test_without_a_gamma_all_heads_have_the_same():
    """Whatever their temperature: the columns that are read hold less before them than any that is not read."""
    call = random_call(256)
    call = replace(call, query=call.query * torch.tensor([1.0, 2.0, 4.0, 8.0])[:, None, None])
    pattern = FlexPrefill(0.4, SIZE, tau=0.0).pattern(call)
    vertical, _ = last_means(call, SIZE)
    low, high = [], []
    for head in range(4):
        mass = vertical[head].double().tolist()
        held = sum(mass[:SIZE])
        for column in sorted(range(SIZE, 256), key=lambda c: -mass[c]):
            (low if pattern.columns[head, 0, column] else high).append(held)
            held += mass[column]
    assert low
    assert max(low) <= min(high) + 1e-9
    density = pattern.density()
    assert float(density[0]) > 1.2 * float(density[3])


def test_a_planted_column_and_diagonal_are_found():
    """Key 37 and the key 53 before have the logit 40; the line is in the third and fourth block before a row's own."""
    count = 144
    query, keys = torch.zeros(1, count, count), torch.eye(count)[None] * 8.0
    for row in range(count):
        for key in (37, row - 53):
            if 0 <= key <= row:
                query[0, row, key] = 5.0
    call = random_call(count, heads=1, kv_heads=1, dim=count)
    call = replace(call, query=query, keys=keys, softmax=Softmax(1.0))
    pattern = FlexPrefill(0.6, SIZE).pattern(call)
    mask = mask_of(pattern)[0]
    assert all(bool(mask[row, key]) for row, key in query[0].nonzero().tolist())


def test_everything_is_read_at_one():
    for tau in (0.0, 1.0):
        for gamma in (None, 1.0):
            method, sharp = FlexPrefill(1.0, SIZE, gamma=gamma, tau=tau), random_call(150, 20, size=40.0)
            assert method.reads_all
            assert torch.equal(mask_of(method.pattern(sharp)), logits(sharp) > -torch.inf)
    assert not FlexPrefill(1.0, gamma=0.9).reads_all


def test_keep_is_the_most_that_gamma_takes():
    call = random_call(256)
    tight = FlexPrefill(0.4, SIZE, gamma=0.99)
    assert float(tight.pattern(call).density().mean()) <= 0.4
    assert float(replace(tight, keep=1.0).pattern(call).density().mean()) > 0.5


def test_chunks_are_refused():
    method, ids = FlexPrefill(0.5, SIZE), tokens(100)
    assert float((said(method, ids, [100]) - said(FlexPrefill(1.0), ids, [100])).abs().max()) > 0.01
    with pytest.raises(MethodRefusedError, match="read the prompt at once"):
        said(method, ids, [32, 68])


def test_a_padded_batch_is_its_rows():
    assert_batch_is_rows(FlexPrefill(0.5, SIZE))
    assert_batch_is_rows(FlexPrefill(1.0, SIZE, gamma=0.6))


def test_the_papers_numbers_text_and_what_is_refused():
    assert (FlexPrefill().block, FlexPrefill().tau, FlexPrefill().gamma) == (128, 0.1, None)
    assert parse_method("flexprefill(gamma=0.9,block=32)", 0.5) == FlexPrefill(0.5, 32, gamma=0.9)
    for bad in ({"gamma": 0.0}, {"gamma": 1.5}, {"tau": -0.1}, {"block": 20}):
        with pytest.raises(InvalidInputError, match=next(iter(bad))):
            FlexPrefill(**bad)
