"""Attention span against heads whose distance is known, and the definition in float64."""

from __future__ import annotations

import math

import pytest
import torch

from sparing.core.samples import TextSample
from sparing.core.scores import ModelIdentity, Scores
from sparing.errors import InvalidInputError, ScoresMismatchError
from sparing.methods.heads.span import AttentionSpan, local_and_global
from sparing.scoring import score
from sparing.testing import planted, tiny_model
from tests.methods.heads.maps import CLOSE, NAMES, maps, tokens

LENGTH = 40


@pytest.mark.parametrize("response", [0, 30])
def test_spans_worked_by_hand(response):
    """A head at distance d looks min(t, d) back, a uniform one t / 2, one at the first token t."""
    text = TextSample(tuple(range(1, LENGTH + 1)), response)
    found = score(planted.copying_model(), AttentionSpan(), data=[text]).values
    rows = range(response, LENGTH)
    by_hand = {
        planted.PREVIOUS: lambda t: min(t, 1),
        planted.AT_THREE: lambda t: min(t, 3),
        planted.AT_TWENTY: lambda t: min(t, 20),
        planted.UNIFORM: lambda t: t / 2,
        planted.SINK: lambda t: t,
        planted.ECHO: lambda t: 0,  # no token comes twice
    }
    for head, back in by_hand.items():
        assert float(found[head]) == pytest.approx(sum(map(back, rows)) / len(rows), rel=CLOSE, abs=CLOSE)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("response", [0, 17, LENGTH - 1])
def test_it_is_the_definition_on_random_models(name, response):
    model = tiny_model(name, torch.float64)
    text = TextSample(tokens(LENGTH), response)
    attention = maps(model, text.ids)
    expected = torch.zeros(attention.shape[:2], dtype=torch.float64)
    for t in range(response, LENGTH):
        for s in range(t + 1):
            expected += attention[:, :, t, s] * (t - s) / (LENGTH - response)
    found = score(model, AttentionSpan(), data=[text]).values
    assert torch.allclose(found.double(), expected, rtol=CLOSE, atol=CLOSE)


def test_each_text_of_a_batch_has_its_own_response():
    model = tiny_model("llama", torch.float64)
    texts = [TextSample(tokens(12, 1), 9), TextSample(tokens(LENGTH, 2), 3)]
    alone = torch.stack([score(model, AttentionSpan(), data=[text]).values for text in texts]).mean(0)
    assert torch.allclose(score(model, AttentionSpan(), data=texts).values, alone, atol=CLOSE)


def spans(values):
    identity = ModelIdentity("m", "M", 2, 5, 5, 8, "x")
    return Scores(torch.tensor(values), ("layer", "head"), "attention_span", identity)


def test_local_heads_are_the_shortest_and_global_the_longest():
    found = spans([[5.0, 1.0, 8.0, 3.0, 4.0], [0.5, 9.0, 2.0, 7.0, 6.0]])
    assert local_and_global(found) == ([(1, 0), (0, 1), (1, 2)], [(1, 1), (0, 2), (1, 3)])
    assert local_and_global(found, 0.01) == ([(1, 0)], [(1, 1)]), "at least one of each"
    local, wide = local_and_global(found, 0.5)
    assert len({*local, *wide}) == 10, "no head is both"


def test_shares_and_scores_of_other_kinds_are_refused():
    found = spans([[1.0, 2.0], [3.0, 4.0]])
    for share in (0.0, 0.6, math.nan):
        with pytest.raises(InvalidInputError, match="share"):
            local_and_global(found, share)
    layers = Scores(torch.ones(2), ("layer",), "lofit", found.model)
    with pytest.raises(ScoresMismatchError, match="layer × head"):
        local_and_global(layers)
