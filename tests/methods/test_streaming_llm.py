"""StreamingLLM: the exact set of kept tokens."""

import pytest
import torch
from oracles import random_case

from sparing.core.token_scores import TokenScores, guard_ends, select
from sparing.errors import InvalidInputError
from sparing.methods.kv.streaming_llm import Recency, StreamingLLM


def kept(case, scorer, counts):
    stored = case.stored
    guard = guard_ends(stored.valid, stored.positions, stored.pads, *scorer.protects(int(counts.min())))
    return select(TokenScores(case.score(scorer), stored.valid, guard), counts)


def test_first_and_last_of_every_row():
    """13 tokens, 0, 3 and 7 pads: four sinks after the pads, then the newest."""
    result = kept(random_case(), Recency(sinks=4), torch.tensor([[7, 7], [7, 7], [5, 5]]))
    assert result[0][0].tolist() == [0, 1, 2, 3, 10, 11, 12]
    assert result[1][1].tolist() == [3, 4, 5, 6, 10, 11, 12]
    assert result[2][0].tolist() == [7, 8, 9, 10, 12]


def test_a_budget_below_the_sinks_keeps_the_first_ones():
    result = kept(random_case(), Recency(sinks=4), torch.tensor([[2, 2]] * 3))
    assert [row[0].tolist() for row in result] == [[0, 1], [3, 4], [7, 8]]


def test_no_sinks_is_a_sliding_window():
    result = kept(random_case(), Recency(sinks=0), torch.tensor([[3, 3]] * 3))
    assert [row[0].tolist() for row in result] == [[10, 11, 12]] * 3


def test_the_window_slides_while_decoding():
    """Budget 5 = 2 sinks + 3: after tokens 5, 6 and 7 came one at a time, 0 1 and 5 6 7 are left."""
    scorer, positions = Recency(sinks=2), torch.arange(5).view(1, 1, -1)
    for new in (5, 6, 7):
        positions = torch.cat([positions, torch.tensor([[[new]]])], dim=-1)
        scores = scorer.step(torch.zeros(positions.shape), None, positions)
        valid = torch.ones_like(positions, dtype=torch.bool)
        guard = guard_ends(valid, positions, torch.zeros(1, dtype=torch.int64), *scorer.protects(5))
        positions = positions[..., TokenScores(scores, valid, guard).order[0, 0, :5].sort().values]
    assert positions.tolist() == [[[0, 1, 5, 6, 7]]]


def test_defaults_and_refusal():
    assert StreamingLLM().parts().scorer.protects(100) == (4, 0)
    assert StreamingLLM().parts().moment == "every_step"
    with pytest.raises(InvalidInputError, match="sinks: got -1"):
        StreamingLLM(sinks=-1)
