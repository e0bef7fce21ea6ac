"""What holds for the scorer of every registered method, on tensors alone."""

import dataclasses

import pytest
import torch
from oracles import PlainRotary, random_case

from sparing.core.method import methods
from sparing.core.scores import ModelIdentity
from sparing.testing.measurements import with_measurements

# Two layers of two KV heads with two query heads each, as the cases here have.
MODEL = ModelIdentity("case", "Case", 2, 4, 2, 8, "case")
SCORERS = {name: with_measurements(info.recipe, MODEL)().parts().scorer for name, info in methods().items()}
VALUES_MATTER = ("ExpectedAttentionScore", "LeverageAndAttention")
POSITION_ONLY = ("random", "streaming_llm")


@pytest.fixture(params=SCORERS, name="scorer")
def each_scorer(request):
    return SCORERS[request.param]


def close(a, b):
    torch.testing.assert_close(a, b, atol=3e-6, rtol=3e-5)


def test_a_padded_row_scores_as_it_does_alone(scorer):
    case = random_case(seed=30, rotary=PlainRotary(8))
    scores = case.score(scorer)
    assert scores.dtype == torch.float32
    for row, pad in enumerate([0, 3, 7]):
        alone = case.alone(row).score(scorer)[0]
        if type(scorer).__name__ == "Recency":  # positions count the pads; only the order matters
            alone = alone + pad
        close(scores[row, :, pad:], alone)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_lies_in_pads_does_not_matter(scorer, poison):
    case = random_case(seed=31, rotary=PlainRotary(8))
    clean = case.score(scorer)
    gone = ~case.stored.valid[..., None]
    stored = dataclasses.replace(
        case.stored,
        keys=case.stored.keys.masked_fill(gone, poison),
        values=case.stored.values.masked_fill(gone, poison),
    )
    states = case.queries.states.masked_fill(~case.queries.valid[:, None, :, None], poison)
    dirty = dataclasses.replace(case, stored=stored, queries=dataclasses.replace(case.queries, states=states)).score(
        scorer
    )
    assert torch.equal(clean[case.stored.valid], dirty[case.stored.valid])


def test_chunks_end_where_one_shot_does(scorer):
    case = random_case(seed=32, rotary=PlainRotary(8))
    for sizes in ([1] * 13, [6, 7], [12, 1]):
        close(case.score(scorer), case.score(scorer, sizes))


def test_exchanging_kv_heads_exchanges_their_scores(scorer):
    case = random_case(seed=33, rotary=PlainRotary(8))
    stored = dataclasses.replace(case.stored, keys=case.stored.keys.flip(1), values=case.stored.values.flip(1))
    states = case.queries.states.unflatten(1, (2, 2)).flip(1).flatten(1, 2)
    flipped = dataclasses.replace(case, stored=stored, queries=dataclasses.replace(case.queries, states=states))
    if type(scorer).__name__ == "RandomScore":
        assert torch.equal(flipped.score(scorer), case.score(scorer))  # numbers belong to the head
    else:
        close(flipped.score(scorer), case.score(scorer).flip(1))


def test_inputs_are_left_alone_and_twice_is_the_same(scorer):
    case = random_case(seed=34, rotary=PlainRotary(8))
    before = [t.clone() for t in (case.stored.keys, case.stored.values, case.queries.states)]
    first, second = case.score(scorer, [5, 8]), case.score(scorer, [5, 8])
    assert torch.equal(first, second)
    for old, new in zip(before, (case.stored.keys, case.stored.values, case.queries.states), strict=True):
        assert torch.equal(old, new)


def test_values_matter_to_some_only(scorer):
    case = random_case(seed=35, tokens=30, rotary=PlainRotary(8))  # more than any scorer protects at the ends
    values = case.stored.values * torch.linspace(0.5, 2, 30)[:, None]
    other = dataclasses.replace(case, stored=dataclasses.replace(case.stored, values=values))
    same = torch.equal(case.score(scorer), other.score(scorer))
    assert same == (type(scorer).__name__ not in VALUES_MATTER)
