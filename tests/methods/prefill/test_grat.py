"""GRAT: groups on grids by the definition, the order and back, text, budgets; and its form for prompts."""

import itertools

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
from sparing import sparse_attention
from sparing.core.grids import Grid
from sparing.errors import InvalidInputError, MethodRefusedError
from sparing.methods.prefill.block_top_k import BlockTopK
from sparing.methods.prefill.grat import GRAT


def groups_of(shape, group):
    """[token] → the place of its group, counted in groups."""
    return [tuple(x // g for x, g in zip(at, group, strict=True)) for at in itertools.product(*map(range, shape))]


def by_definition(shape, group, text, region, radius):
    """(tokens, tokens) bool, in the order of the tokens."""
    places = groups_of(shape, group)
    total = len(places) + text
    read = torch.ones(total, total, dtype=torch.bool)
    for (i, a), (j, b) in itertools.product(enumerate(places), repeat=2):
        apart = [abs(x - y) for x, y in zip(a, b, strict=True)]
        near = max(apart) <= radius if region == "surrounding" else min(apart) <= radius
        read[i, j] = i == j or a == b or near
    return read


def grid_states(count, seed=0, batch=2, dim=8):
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, 4, count, dim, generator=g)
    key, value = (torch.randn(batch, 2, count, dim, generator=g) for _ in range(2))
    return query, key, value


def masked(states, read, scaling=None):
    """Attention in float64 under a (tokens, tokens) mask."""
    query, key, value = (x.double() for x in states)
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    logits = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    return (logits.masked_fill(~read, -torch.inf).softmax(-1) @ value).float()


def read_by(layout):
    """(tokens, tokens) bool of a layout, back in the order of the tokens."""
    count = layout.pattern.tokens
    read = torch.empty(count, count, dtype=torch.bool)
    read[layout.order[:, None], layout.order] = layout.pattern.may_read(0, torch.arange(count))
    return read


CASES = [
    ((8, 12), (4, 4), 0),
    ((4, 8, 6), (2, 4, 3), 0),
    ((8, 12), (2, 6), 7),
    ((4, 4, 8), (2, 2, 4), 21),
    ((60,), (12,), 5),
]


@pytest.mark.parametrize("radius", [0, 1])
@pytest.mark.parametrize("region", ["surrounding", "criss_cross"])
@pytest.mark.parametrize(("shape", "group", "text"), CASES)
def test_a_radius_reads_what_the_definition_says(shape, group, text, region, radius):
    method = GRAT(1.0, region=region, radius=radius, group=group)
    wanted = by_definition(shape, group, text, region, radius)
    assert torch.equal(read_by(method.lay_out(Grid(shape, text))), wanted)
    states = grid_states(len(wanted))
    out = sparse_attention(*states, method, grid=shape, text_tokens=text)
    torch.testing.assert_close(out, masked(states, wanted), rtol=0, atol=2e-6)


@pytest.mark.parametrize("region", ["surrounding", "criss_cross"])
@pytest.mark.parametrize("keep", [0.2, 0.5, 0.8, 40])
def test_a_budget_is_honoured_used_and_symmetric(region, keep):
    method, grid = GRAT(keep, region=region, group=(2, 4, 4)), Grid((8, 8, 8), 9)
    pattern, read = method.lay_out(grid).pattern, read_by(method.lay_out(grid))
    spent, allowed = int(read.sum()), method.grid_pairs(grid)
    assert spent == int(pattern.pairs()[0])
    always = 9 * (521 + 512) + 512 * 32  # text, and each group itself
    assert allowed - 2 * 32**2 < spent <= max(allowed, always)
    assert torch.equal(read, read.T)
    assert bool(read[-9:].all())
    states = grid_states(521)
    out = sparse_attention(*states, method, grid=grid.shape, text_tokens=9)
    torch.testing.assert_close(out, masked(states, read), rtol=0, atol=2e-6)


def test_the_nearest_come_first_by_hand():
    """Nine groups in a square, room for 12 of 36 pairs: the 12 neighbours by a side, before those at a corner."""
    method = GRAT((9 + 2 * 12) / 81, group=(4, 4))
    blocks = method.lay_out(Grid((12, 12))).pattern.blocks[0]
    assert blocks[4].nonzero()[:, 0].tolist() == [1, 3, 4, 5, 7]
    assert blocks[0].nonzero()[:, 0].tolist() == [0, 1, 3]
    # Criss-cross: 18 pairs share a row or a column; those next to each other, 12, come first.
    crossed = GRAT((9 + 2 * 18) / 81, group=(4, 4), region="criss_cross").lay_out(Grid((12, 12))).pattern.blocks[0]
    assert crossed[0].nonzero()[:, 0].tolist() == [0, 1, 2, 3, 6]


def test_the_order_is_group_by_group_and_comes_back():
    grid = Grid((2, 4), 2)
    assert grid.order((2, 2)).tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9]
    order = Grid((4, 6, 6), 3).order((2, 3, 2))
    assert torch.equal(order[order.argsort()], torch.arange(147))
    places = groups_of((4, 6, 6), (2, 3, 2))
    for at in range(0, 144, 12):
        assert len({places[token] for token in order[at : at + 12].tolist()}) == 1
    assert torch.equal(torch.tensor([places[t] for t in order[:144:12].tolist()]), Grid((4, 6, 6)).places((2, 3, 2)))


def test_default_groups_are_compact_and_divide():
    assert Grid((32, 48, 80)).tile(None, 256) == (4, 8, 8)  # the authors'
    assert Grid((64, 64)).tile(None, 256) == (16, 16)
    assert Grid((21, 30, 52)).tile(None, 128) == (3, 10, 4)
    assert Grid((13, 7)).tile(None, 16) == (13, 1)


def test_one_group_and_all_of_the_budget_are_dense():
    states = grid_states(96)
    everything = torch.ones(96, 96, dtype=torch.bool)
    for method in (GRAT(0.3, group=(8, 12)), GRAT(1.0)):
        torch.testing.assert_close(
            sparse_attention(*states, method, grid=(8, 12), scaling=0.5),
            masked(states, everything, 0.5),
            rtol=0,
            atol=2e-6,
        )


def test_a_prompt_reads_the_first_group_and_those_before_its_own():
    call = random_call(256)
    blocks = GRAT(1.0, block=16, radius=2).pattern(call).blocks
    rows = torch.arange(16)
    wanted = (rows[:, None] - rows <= 2) & (rows <= rows[:, None]) | (rows == 0)
    assert torch.equal(blocks, wanted.expand(4, -1, -1))
    assert GRAT(1.0).reads_all
    assert not GRAT(1.0, radius=2).reads_all


@pytest.mark.parametrize("keep", [0.2, 0.5, 90])
@pytest.mark.parametrize(("count", "start"), [(411, 0), (411, 160)])
def test_the_budget_of_a_prompt_is_honoured_and_used(keep, count, start):
    call = random_call(count, start)
    method = GRAT(keep, block=16)
    spent, allowed = int(assert_faithful(method, call).sum()), method.pairs(call) * 4
    assert spent <= allowed + 256 * (start > 0)
    if not start:  # later calls pay for what rows before them took too much of
        assert allowed - spent < 3 * 4 * 256


def test_chunks_read_what_the_whole_reads_and_batches_what_rows_read():
    method, ids = GRAT(0.4, block=16), tokens(144)
    torch.testing.assert_close(said(method, ids, [37, 60, 47]), said(method, ids, [144]), rtol=0, atol=2e-4)
    call = random_call(144)
    part, whole = method.pattern(part_of(call, 37, 97)), method.pattern(call)
    assert torch.equal(mask_of(part), mask_of(whole)[:, 37:97, :97])
    assert_batch_is_rows(method)


def test_any_method_reads_a_sequence():
    query, key, value = grid_states(150)
    states = query[:, :, -70:], key, value
    before = torch.arange(150) <= torch.arange(80, 150)[:, None]
    torch.testing.assert_close(sparse_attention(*states, BlockTopK(1.0)), masked(states, before), rtol=0, atol=2e-6)
    sparse = sparse_attention(*states, BlockTopK(0.3, block=16))
    assert sparse.shape == (2, 4, 70, 8)
    assert float((sparse - masked(states, before)).abs().max()) > 0.01


def test_what_is_refused():
    states = grid_states(96)
    for bad, name in (({"region": "round"}, "region"), ({"radius": -1}, "radius"), ({"group": (0,)}, "group")):
        with pytest.raises(InvalidInputError, match=name):
            GRAT(**bad)
    with pytest.raises(InvalidInputError, match="divisor of every axis"):
        sparse_attention(*states, GRAT(group=(3, 5)), grid=(8, 12))
    with pytest.raises(InvalidInputError, match="tokens of the grid"):
        sparse_attention(*states, GRAT(), grid=(8, 12), text_tokens=1)
    with pytest.raises(InvalidInputError, match="text_tokens"):
        sparse_attention(*states, GRAT(), text_tokens=1)
    with pytest.raises(InvalidInputError, match="grid"):
        sparse_attention(*states, GRAT(), grid=(2, 2, 4, 6))
    with pytest.raises(InvalidInputError, match="key"):
        sparse_attention(states[0], states[1][:, :, :, :4], states[2], GRAT())
    with pytest.raises(InvalidInputError, match="method"):
        sparse_attention(*states, "grat")
    with pytest.raises(MethodRefusedError, match="knows grids"):
        sparse_attention(*states, BlockTopK(0.5), grid=(8, 12))
