"""PINE against its definition, token by token and head by head in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from segment_oracle import attention_of_a_head, turn

from sparing.core.segments import Layout, SegmentCall
from sparing.methods.rerank import pine
from sparing.methods.rerank.pine import Pine, shifts

# Sums of less than 100 products of numbers near 1, in another order: well below 100 * 2^-53 * 100 = 1e-12.
CLOSE = 1e-11
SCALING = 0.4


def definition(call):
    """(B, Hq, N, Dv) for a call in which all tokens ask."""
    group = call.query.shape[1] // call.keys.shape[1]
    heads = [
        attention_of_a_head(q, call.keys[row, h // group], call.values[row, h // group], call.layout.prefix,
                            call.layout.lengths, call.scaling)
        for row, queries in enumerate(call.query) for h, q in enumerate(queries)
    ]  # fmt: skip
    return torch.stack(heads).view(*call.query.shape[:3], -1)


# -- cases ------------------------------------------------------------------------------------------------------------


def call_of(prefix, lengths, suffix, seed=0, rows=1, heads=4, kv_heads=2, dim=6):
    generator = torch.Generator().manual_seed(seed)
    tokens = prefix + sum(lengths) + suffix
    draw = lambda h, d: torch.randn(rows, h, tokens, d, generator=generator, dtype=torch.float64) * 1.5  # noqa: E731
    states = draw(heads, dim), draw(kv_heads, dim), draw(kv_heads, 5)
    return SegmentCall(*states, Layout(prefix, tuple(lengths)), SCALING, turn)


def reordered(call, order):
    """The same tokens with the segments in another order, and where each token has gone."""
    layout = call.layout
    starts = [list(range(*layout.spans[j])) for j in order]
    index = [*range(layout.prefix), *itertools.chain(*starts), *range(layout.end, call.tokens)]
    query, keys, values = (x[:, :, index] for x in (call.query, call.keys, call.values))
    lengths = tuple(layout.lengths[j] for j in order)
    return SegmentCall(query, keys, values, Layout(layout.prefix, lengths), SCALING, turn), index


CASES = [
    (2, (3, 2, 4), 3), (0, (2, 2), 2), (1, (3,), 2), (3, (1, 1, 1, 1), 4), (1, (5, 1, 2, 3), 1), (2, (2, 3), 0),
]  # fmt: skip


def assert_is_the_definition(call):
    assert (Pine().attend(call) - definition(call)).abs().max() < CLOSE


@pytest.mark.parametrize(("prefix", "lengths", "suffix"), CASES)
@pytest.mark.parametrize("heads", [(4, 2), (2, 2), (3, 1)])
def test_it_is_the_definition(prefix, lengths, suffix, heads):
    assert_is_the_definition(call_of(prefix, lengths, suffix, heads=heads[0], kv_heads=heads[1]))


def test_rows_of_a_batch_do_not_meet():
    assert_is_the_definition(call_of(1, (3, 2, 2), 2, rows=3))


@pytest.mark.parametrize("height", [1, 2, 3])
def test_tiles_make_no_difference(height, monkeypatch):
    monkeypatch.setattr(pine, "ROWS_PER_TILE", height)
    assert_is_the_definition(call_of(4, (5, 2, 3), 4))


def test_later_tokens_say_what_they_say_with_the_prompt():
    call = call_of(2, (3, 2, 4), 5)
    whole = Pine().attend(call)
    for start in (11, 13, 15):
        later = SegmentCall(call.query[:, :, start:], call.keys, call.values, call.layout, SCALING, turn)
        assert (Pine().attend(later) - whole[:, :, start:]).abs().max() < CLOSE


def _farthest_first(importance, layout, own=None):
    return shifts(-importance, layout, own)


def _own_anywhere(importance, layout, own=None):
    return shifts(importance, layout)


def _by_attention_in_all(importance, layout, own=None):
    return shifts(importance * torch.tensor(layout.lengths), layout, own)


def _as_written(importance, layout, own=None):
    return shifts(torch.arange(len(layout.lengths), dtype=importance.dtype).expand_as(importance), layout, own)


def _stacked(importance, layout, own=None):
    return torch.zeros_like(shifts(importance, layout, own))


@pytest.mark.parametrize("broken", [_farthest_first, _own_anywhere, _by_attention_in_all, _as_written, _stacked])
def test_the_comparison_sees_wrong_orders(broken, monkeypatch):
    monkeypatch.setattr(pine, "shifts", broken)
    with pytest.raises(AssertionError):
        assert_is_the_definition(call_of(2, (3, 2, 4), 3))


# -- what follows from it ---------------------------------------------------------------------------------------------


def assert_orders_make_no_difference(attend, call, count):
    expected = attend(call)
    for order in itertools.permutations(range(count)):
        other, index = reordered(call, order)
        assert (attend(other) - expected[:, :, index]).abs().max() < CLOSE


@pytest.mark.parametrize("lengths", [(3, 2), (3, 2, 4), (3, 1, 2, 3)])
def test_every_token_says_the_same_in_all_orders(lengths):
    assert_orders_make_no_difference(Pine().attend, call_of(2, lengths, 3), len(lengths))


def causal(call):
    """Ordinary attention."""
    group = call.query.shape[1] // call.keys.shape[1]
    where = torch.arange(call.tokens)
    keys, values = (x.repeat_interleave(group, dim=1) for x in (turn(call.keys, where), call.values))
    logits = turn(call.query, where) @ keys.transpose(-1, -2) * SCALING
    return logits.masked_fill(where > where[:, None], -torch.inf).softmax(-1) @ values


def test_the_order_check_sees_ordinary_attention():
    with pytest.raises(AssertionError):
        assert_orders_make_no_difference(causal, call_of(2, (3, 2, 4), 3), 3)


def test_one_segment_is_ordinary_attention():
    call = call_of(2, (4,), 3)
    assert (Pine().attend(call) - causal(call)).abs().max() < CLOSE
    two = call_of(2, (2, 2), 3)
    assert (Pine().attend(two) - causal(two)).abs().max() > 0.01


def test_shifts_worked_out_by_hand():
    layout = Layout(1, (4, 2, 3))
    importance = torch.tensor([[0.1, 0.5, 0.3], [0.6, 0.1, 0.2]])
    assert shifts(importance, layout).tolist() == [[5, 0, 2], [0, 7, 4]]
    assert shifts(importance, layout, own=0).tolist() == [[0, 4, 6], [0, 7, 4]]


def test_equal_importance_keeps_the_order_of_the_prompt():
    assert shifts(torch.tensor([0.2, 0.2, 0.2]), Layout(0, (4, 2, 3))).tolist() == [0, 4, 6]


def test_the_nearest_segment_is_the_one_with_the_largest_mean_attention():
    """A planted pattern: one strong token in a long segment against a short one that is strong throughout."""
    query = torch.tensor([1.0, 0.0]).expand(1, 1, 1, 2).double()
    keys = torch.tensor([[8.0, 0], [0, 0], [0, 0], [0, 0], [7, 0], [7, 0], [0, 0]]).expand(1, 1, 7, 2).double()
    seen = []

    def watch(x, positions):
        seen.append(positions)
        return x

    Pine().attend(SegmentCall(query, keys, keys, Layout(0, (4, 2)), 1.0, watch))
    # Means: e^8 / 4 (and next to nothing) against e^7: 745 < 1097, so the first segment moves back by 2.
    assert seen[-1].tolist() == [[[[8, 6]]]]
