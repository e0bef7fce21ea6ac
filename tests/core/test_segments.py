"""Prompts with segments: where everything is, worked out by hand, and what is refused."""

from __future__ import annotations

import pytest
import torch

from sparing.core.segments import Layout, Region, SegmentedPrompt
from sparing.errors import InvalidInputError


def test_every_segment_ends_where_the_last_one_does():
    layout = Layout(2, (3, 1, 2))
    assert (layout.end, layout.spans) == (8, ((2, 5), (5, 6), (6, 8)))
    assert layout.positions(10).tolist() == [0, 1, 5, 6, 7, 7, 6, 7, 8, 9]


def test_regions_cover_a_whole_prompt():
    regions = list(Layout(2, (3, 1)).regions(0, 9))
    assert regions == [
        Region((0, 2), 0, 2, 2),
        Region((2, 5), 2, 5, 6, own=0),
        Region((5, 6), 5, 6, 6, own=1),
        Region((6, 9), 6, 9, 9),
    ]


def test_regions_of_a_prompt_without_prefix_and_of_later_tokens():
    assert [region.own for region in Layout(0, (3, 1)).regions(0, 5)] == [0, 1, None]
    assert list(Layout(2, (3, 1)).regions(7, 9)) == [Region((7, 9), 6, 9, 9)]


def test_a_prompt_takes_lists_and_tensors():
    given = SegmentedPrompt.of([1], [torch.tensor([2, 3]), torch.tensor([[4]])], torch.tensor([5]))
    assert given == SegmentedPrompt((1,), ((2, 3), (4,)), (5,))
    assert given.ids == [1, 2, 3, 4, 5]
    assert given.layout == Layout(1, (2, 1))
    assert SegmentedPrompt.of([], [[2]], [5]).prefix == ()


def test_the_canonical_order_is_one_for_all_orders():
    one, other = (SegmentedPrompt.of([1], segments, [5]) for segments in ([[4], [2, 3], [2]], [[2], [4], [2, 3]]))
    assert one != other
    assert one.in_canonical_order() == other.in_canonical_order()
    assert one.in_canonical_order().segments == ((2,), (2, 3), (4,))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (([1], [], [2]), "segments: got 'none', allowed is at least one"),
        (([1], [[2], []], [3]), "segment 1: got 'no tokens'"),
        (([1], [[2]], []), "suffix: got 'no tokens'.*it would follow one of the segments"),
        (("text", [[2]], [3]), "prefix: got \"'text'\", allowed is token ids"),
        (([1], ["text"], [3]), "segment 0: got \"'text'\""),
        (([1], [[2]], [3.5]), "suffix"),
        (([True], [[2]], [3]), "prefix"),
        (([-1], [[2]], [3]), "prefix"),
        ((torch.ones(2), [[2]], [3]), r"prefix: got \(2,\), allowed is token ids"),
        ((torch.ones(2, 2, dtype=torch.int64), [[2]], [3]), r"prefix: got \(2, 2\)"),
    ],
)
def test_what_is_no_prompt_is_refused(parts, message):
    with pytest.raises(InvalidInputError, match=message):
        SegmentedPrompt.of(*parts)
