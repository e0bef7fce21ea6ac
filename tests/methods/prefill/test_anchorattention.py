"""AnchorAttention: gaps by the equation, columns found by hand, thetas at their ends, budgets and refusals."""

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
from sparing.core.pattern import Pattern, always_on
from sparing.core.prefill import PromptCall
from sparing.core.scorer import Softmax
from sparing.errors import InvalidInputError, MethodRefusedError
from sparing.methods.prefill.anchorattention import AnchorAttention


def gaps(call, block, first, local, step):
    """{(head, group, key): (gap, pairs)} of every column that may be read, an element at a time in float64."""
    s, first_block, found = logits(call), call.start // block, {}
    for head in range(call.heads):
        for number in range(first_block, -(-call.tokens // block)):
            rows = range(max(number * block, call.start), min((number + 1) * block, call.tokens))
            levels = []
            for row in rows:
                anchor = [j for j in range(row + 1) if j // block < first or number - local <= j // block]
                levels.append(math.log(sum(math.exp(float(s[head, row - call.start, j])) for j in anchor)))
            level = sum(levels) / len(rows)
            query = call.query[head, rows.start - call.start : rows.stop - call.start].double().mean(0)
            for key in range(first * block, max((number - local) * block, 0)):
                z = float(query @ call.keys[head // call.group, key].double()) * call.softmax.scaling
                if call.softmax.softcap is not None:
                    z = math.tanh(z / call.softmax.softcap) * call.softmax.softcap
                at = (head, number // step - first_block // step, key)
                gap, pairs = found.get(at, (math.inf, 0))
                found[at] = (min(gap, level - z), pairs + len(rows))
    return found


@pytest.mark.parametrize(
    ("keep", "start", "first", "local", "step", "softcap"),
    [(0.6, 0, 1, 1, 3, None), (0.6, 0, 0, 0, 1, None), (0.6, 37, 1, 0, 2, None), (0.85, 48, 2, 1, 16, 2.0)],
)
def test_the_columns_are_those_of_the_smallest_gaps(keep, start, first, local, step, softcap):
    call = replace(random_call(134, start, seed=1, size=2.0), softmax=Softmax(0.25, softcap))
    method = AnchorAttention(keep=keep, block=16, first=first, local=local, step=step)
    pattern = method.pattern(call)
    always = replace(pattern, columns=None)
    known = gaps(call, 16, first, local, step)
    left, wanted = method.pairs(call) * call.heads - int(always.pairs().sum()), set()
    for at, (_, pairs) in sorted(known.items(), key=lambda item: item[1][0]):
        if pairs > left:
            break
        left -= pairs
        wanted.add(at)
    assert {tuple(at) for at in pattern.columns.nonzero().tolist()} == wanted
    assert 20 < len(wanted) < len(known) - 20
    grid = call.grid(16)
    assert torch.equal(always.blocks, always_on(grid, first, local).expand_as(grid.blocks))


def test_a_theta_is_the_largest_gap():
    call = random_call(134, seed=2, size=2.0)
    known = gaps(call, 16, 1, 1, 3)
    values = sorted(gap for gap, _ in known.values())
    theta = (values[50] + values[51]) / 2
    found = AnchorAttention(keep=1.0, block=16, step=3, theta=theta).pattern(call).columns.nonzero()
    assert {tuple(at) for at in found.tolist()} == {at for at, (gap, _) in known.items() if gap <= theta}
    assert len(found) == 51


def planted() -> PromptCall:
    """Queries of head 0 see key 40 with a logit of 6, those of head 1 key 75; all other logits are 0."""
    query, keys = torch.zeros(2, 128, 16), torch.zeros(1, 128, 16)
    query[0, :, 0] = query[1, :, 1] = 6.0
    keys[0, 40, 0] = keys[0, 75, 1] = 1.0
    return replace(random_call(128, heads=2, kv_heads=1), query=query, keys=keys, softmax=Softmax(1.0))


def test_planted_columns_are_found_by_their_own_head():
    """Rows behind have anchors of 17 to 48 logits of 0, levels of 2.8 to 3.9: the planted keys' gaps are about -3."""
    pattern = AnchorAttention(keep=1.0, block=16, theta=0.0, step=4).pattern(planted())
    # Groups are rows 0 to 63 and 64 to 127: key 40 (block 2) is read in both, by rows from 64 on, since blocks 2 and 3
    # read it in their window; key 75 (block 4) by rows from 96 on.
    assert pattern.columns.nonzero().tolist() == [[0, 1, 40], [1, 1, 75]]
    read = mask_of(pattern)
    assert read[0, 64:, 40].all()
    assert read[1, 96:, 75].all()
    assert not read[0, 96:, 75].any()
    assert not read[1, 64:, 40].any()


def test_only_columns_close_to_the_level_are_taken():
    """The level is the log of the sum, at least 6 where the anchor holds a logit of 6: one of 5 has a gap over 1."""
    call = planted()
    call.keys[0, 0, 0] = 1.0  # a sink as heavy as the column: levels are log(e^6 + n - 1), 6.05 to 6.12
    call.keys[0, 40, 0] = 5 / 6
    for theta, found in ((1.0, False), (1.2, True)):
        columns = AnchorAttention(keep=1.0, block=16, theta=theta, step=4).pattern(call).columns
        assert bool(columns[0, 1, 40]) == found


def test_no_column_is_an_a_shape_and_all_of_them_are_dense():
    call = random_call(150, seed=3)
    nothing = AnchorAttention(keep=1.0, block=16, local=2, theta=-math.inf)
    grid = call.grid(16)
    a_shape = Pattern(150, 0, 16, always_on(grid, 1, 2).expand_as(grid.blocks))
    assert torch.equal(mask_of(nothing.pattern(call)), mask_of(a_shape))
    assert not nothing.reads_all
    for everything in (AnchorAttention(keep=1.0, block=16, theta=math.inf), AnchorAttention(keep=1.0, block=16)):
        assert everything.pattern(call).pairs().tolist() == [150 * 151 // 2] * 4
        assert_faithful(everything, call)
    assert AnchorAttention(keep=1.0).reads_all


@pytest.mark.parametrize("keep", [0.35, 0.5, 0.8, 60])
@pytest.mark.parametrize(("count", "start", "step"), [(150, 0, 4), (131, 37, 2), (160, 96, 16)])
def test_faithful_and_within_budget(keep, count, start, step):
    call = random_call(count, start, seed=4, size=2.0)
    method = AnchorAttention(keep=keep, block=16, local=0, step=step)
    assert_faithful(method, call)
    assert_budget(method, call, unused=step * 16)


def test_a_theta_leaves_the_budget_unused():
    call = random_call(150, seed=5, size=2.0)
    ample, scarce = (AnchorAttention(keep=keep, block=16, local=0, theta=3.0) for keep in (0.9, 0.3))
    assert float(ample.pattern(call).density().mean()) < 0.85
    assert float(scarce.pattern(call).density().mean()) <= 0.3
    assert scarce.pattern(call).columns.sum() < ample.pattern(call).columns.sum()


def test_a_key_that_all_rows_of_a_group_may_not_see_leaks_nothing():
    """Changing the last key changes no column but through the last row's own level."""
    call = random_call(150, seed=6)
    method = AnchorAttention(keep=1.0, block=16, step=4, theta=4.0)
    other = replace(call, keys=call.keys.clone(), values=call.values.clone())
    other.keys[:, 149] += 5.0
    one, two = (method.pattern(each).columns for each in (call, other))
    assert torch.equal(one[:, :2], two[:, :2])
    assert one[:, :2].any()


def test_a_batch_is_its_rows_and_chunks_are_refused():
    method = AnchorAttention(keep=0.5, block=16, local=0, step=2)
    assert_batch_is_rows(method)
    ids = tokens(96)
    with pytest.raises(MethodRefusedError, match="anchorattention"):
        said(method, ids, [48, 48])
    dense = said(AnchorAttention(keep=1.0), ids, [96])
    assert not torch.allclose(said(method, ids, [96]), dense, atol=1e-3)


def test_the_papers_numbers_and_what_is_refused():
    method = AnchorAttention()
    assert (method.block, method.step, method.first, method.theta) == (128, 16, 1, None)
    for bad in ({"step": 0}, {"first": -1}, {"local": -1}, {"theta": math.nan}):
        with pytest.raises(InvalidInputError, match=next(iter(bad))):
            AnchorAttention(**bad)
    with pytest.raises(MethodRefusedError, match="not made of a scorer"):
        method.block_parts()
