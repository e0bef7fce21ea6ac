"""Neighborhood attention: windows, strides and dilations by the definition, in prompts and on grids."""

import functools
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
from methods.prefill.test_grat import grid_states, masked, read_by
from sparing import sparse_attention
from sparing.core.grids import Grid
from sparing.core.parsing import parse_method
from sparing.errors import InvalidInputError
from sparing.methods.prefill.neighborhood import Neighborhood, near_on_axis


@functools.cache
def causal(count, window, stride, dilation):
    """(N, N) bool: the leader's rule, a pair at a time."""
    read = torch.zeros(count, count, dtype=torch.bool)
    for i, j in itertools.product(range(count), repeat=2):
        leader = i // dilation // stride * stride + stride - 1
        read[i, j] = j <= i and i % dilation == j % dilation and leader - j // dilation < window
    return read


def centred(count, window, stride, dilation):
    """(n, n) bool: windows around the middle row of each group, moved inside, a row at a time."""
    read = torch.zeros(count, count, dtype=torch.bool)
    for rest in range(dilation):
        mine = list(range(rest, count, dilation))
        for at, i in enumerate(mine):
            leader = min(at // stride * stride + stride // 2, len(mine) - 1)
            first = min(max(leader - window // 2, 0), len(mine) - window)
            read[i, mine[first : first + window]] = True
    return read


@pytest.mark.parametrize("start", [0, 37, 64])
@pytest.mark.parametrize(
    ("window", "stride", "dilation"),
    [
        (16, None, 1),
        (48, None, 1),
        (20, None, 1),
        (9, 1, 1),
        (16, 16, 1),
        (32, 8, 1),
        (24, 24, 1),
        (7, 3, 1),
        (5, 2, 3),
    ],
)
def test_a_prompt_is_read_as_the_rule_says(window, stride, dilation, start):
    call = random_call(150, start)
    method = Neighborhood(1.0, block=16, window=window, stride=stride, dilation=dilation)
    mask = assert_faithful(method, call)
    assert torch.equal(mask, causal(150, window, stride or 16, dilation)[start:].expand(4, -1, -1))


def test_stride_one_slides_and_stride_w_is_blocked():
    call, rows = random_call(96), torch.arange(96)
    apart = rows[:, None] - rows
    sliding = mask_of(Neighborhood(1.0, block=16, window=12, stride=1).pattern(call))[0]
    assert torch.equal(sliding, (apart >= 0) & (apart < 12))
    blocked = mask_of(Neighborhood(1.0, block=16, window=12, stride=12).pattern(call))[0]
    assert torch.equal(blocked, (apart >= 0) & (rows[:, None] // 12 == rows // 12))


def test_windows_that_begin_at_blocks_need_no_rule():
    call = random_call(96)
    for window, stride in ((32, 16), (64, 32), (32, 32)):
        assert Neighborhood(1.0, block=16, window=window, stride=stride).pattern(call).rule is None
    assert Neighborhood(1.0, block=16, window=32, stride=8).pattern(call).rule is not None


@pytest.mark.parametrize("keep", [0.1, 0.25, 0.45, 90])
@pytest.mark.parametrize(("count", "start"), [(301, 0), (301, 160), (128, 0)])
@pytest.mark.parametrize(("stride", "dilation"), [(None, 1), (1, 1), (24, 1), (4, 2)])
def test_the_budget_is_honoured_and_used(keep, count, start, stride, dilation):
    call = random_call(count, start)
    method = Neighborhood(keep, block=16, stride=stride, dilation=dilation)
    pattern = method.pattern(call)
    spent, allowed = int(pattern.pairs().sum()), method.pairs(call) * 4
    assert spent == int(mask_of(pattern).sum())
    group = (stride or 16) * dilation
    late = 4 * group**2 / 4 * (start > 0)  # a group may have begun before, with its longer rows now
    always = int((causal(count, stride or 16, stride or 16, dilation)[start:]).sum()) * 4
    assert spent <= max(allowed, always) + late
    if dilation == 1 or keep < 0.4:  # a dilated row reads at most half of what there is
        assert allowed - spent < 4 * 2 * group**2 + 4 * call.rows // group


@pytest.mark.parametrize(("stride", "dilation"), [(None, 1), (5, 1), (2, 3)])
def test_chunks_read_what_the_whole_reads(stride, dilation):
    method, ids = Neighborhood(0.3, block=16, stride=stride, dilation=dilation), tokens(144)
    torch.testing.assert_close(said(method, ids, [37, 60, 47]), said(method, ids, [144]), rtol=0, atol=2e-4)
    call = random_call(144)
    part, whole = method.pattern(part_of(call, 37, 97)), method.pattern(call)
    assert torch.equal(mask_of(part), mask_of(whole)[:, 37:97, :97])
    assert_batch_is_rows(method)


@pytest.mark.parametrize(
    ("count", "window", "stride", "dilation"),
    [(9, 3, 1, 1), (9, 4, 1, 1), (12, 4, 4, 1), (12, 6, 4, 1), (11, 5, 3, 1), (13, 4, 2, 3), (8, 8, 2, 1)],
)
def test_an_axis_is_read_as_the_definition_says(count, window, stride, dilation):
    mask = near_on_axis(count, window, stride, dilation)
    assert torch.equal(mask, centred(count, window, stride, dilation))
    assert bool((mask.sum(-1) == window).all())  # also at the borders
    assert bool(mask.diagonal().all())


def test_dilation_is_so_many_problems_of_their_own():
    mask = near_on_axis(12, 3, 1, 3)
    for rest in range(3):
        assert torch.equal(mask[rest::3, rest::3], near_on_axis(4, 3, 1, 1))
    assert int(mask.sum()) == 12 * 3


GRIDS = [
    ((6, 8), (3, 4), 1, 1, 0), ((6, 8), (3, 5), (3, 4), 1, 5), ((4, 6, 8), (2, 3, 4), 1, 1, 0), ((8, 8), 4, 2, 2, 3),
    ((4, 6, 6), (3, 4, 3), (2, 3, 2), (1, 1, 2), 11), ((40,), 9, None, 1, 4),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "window", "stride", "dilation", "text"), GRIDS)
def test_a_grid_is_read_on_all_axes(shape, window, stride, dilation, text):
    method = Neighborhood(1.0, block=16, window=window, stride=stride, dilation=dilation)
    axes, tile = len(shape), Grid(shape).tile(None, 16)
    sizes = [x if isinstance(x, tuple) else (x,) * axes for x in (window, stride or tile, dilation)]
    per_axis = [centred(n, w, s, d) for n, w, s, d in zip(shape, *sizes, strict=True)]
    cells = list(itertools.product(*map(range, shape)))
    wanted = torch.ones(len(cells) + text, len(cells) + text, dtype=torch.bool)
    for (i, a), (j, b) in itertools.product(enumerate(cells), repeat=2):
        wanted[i, j] = all(bool(mask[x, y]) for mask, x, y in zip(per_axis, a, b, strict=True))
    assert torch.equal(read_by(method.lay_out(Grid(shape, text))), wanted)
    states = grid_states(len(wanted))
    out = sparse_attention(*states, method, grid=shape, text_tokens=text)
    torch.testing.assert_close(out, masked(states, wanted), rtol=0, atol=2e-6)


@pytest.mark.parametrize("keep", [0.1, 0.25, 0.6, 40])
@pytest.mark.parametrize(("shape", "text"), [((16, 16), 0), ((8, 8, 8), 9), ((12, 20), 16)])
def test_the_budget_of_a_grid_is_honoured_and_used(keep, shape, text):
    method, grid = Neighborhood(keep, block=16, stride=1), Grid(shape, text)
    pattern = method.lay_out(grid).pattern
    spent, allowed = int(pattern.pairs()[0]), method.grid_pairs(grid)
    assert spent <= max(allowed, text * (grid.tokens + grid.cells) + grid.cells)
    if allowed > text * (grid.tokens + grid.cells):
        assert spent > 0.8 * allowed  # windows are whole numbers on every axis


def test_windows_that_begin_at_tiles_need_no_rule():
    method = Neighborhood(1.0, block=16, window=12, stride=4)
    assert method.lay_out(Grid((16, 16))).pattern.rule is None
    assert Neighborhood(1.0, block=16, window=11, stride=4).lay_out(Grid((16, 16))).pattern.rule is not None


def test_what_is_dense_and_what_is_refused():
    assert Neighborhood(1.0).reads_all
    assert not Neighborhood(1.0, window=64).reads_all
    assert not Neighborhood(1.0, dilation=2).reads_all
    assert parse_method("neighborhood(window=64,stride=8,dilation=2)") == Neighborhood(
        0.5, window=64, stride=8, dilation=2
    )
    for bad in ({"window": 0}, {"stride": 0}, {"dilation": 0}, {"window": ()}, {"stride": (2, 0)}):
        with pytest.raises(InvalidInputError, match=next(iter(bad))):
            Neighborhood(**bad)
    with pytest.raises(InvalidInputError, match="at least the stride, 16"):
        Neighborhood(window=8, block=16).pattern(random_call(64))
    with pytest.raises(InvalidInputError, match="one for each of the 1 axes"):
        Neighborhood(window=(8, 8), stride=1, block=16).pattern(random_call(64))
    with pytest.raises(InvalidInputError, match="at most an axis"):
        Neighborhood(dilation=9, block=16).lay_out(Grid((8, 8)))
