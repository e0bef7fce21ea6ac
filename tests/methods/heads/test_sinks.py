"""Sink mass, by hand and as a float64 mean of a column."""

from __future__ import annotations

import pytest
import torch

from sparing.core.samples import TextSample
from sparing.methods.heads.sinks import SinkMass
from sparing.scoring import score
from sparing.testing import planted, tiny_model
from tests.methods.heads.maps import CLOSE, NAMES, maps, tokens

LENGTH = 30


@pytest.mark.parametrize("pads", [0, 20])
def test_sink_mass_worked_by_hand(pads):
    """With a longer text beside it, the first token is not the first of its row."""
    model = planted.copying_model()
    text = TextSample(tuple(range(1, LENGTH + 1)))
    longer = TextSample(tuple(range(1, LENGTH + pads + 1)))
    found = score(model, SinkMass(), data=[text, longer]).values
    expected = torch.zeros(2, 4)
    for n in (LENGTH, LENGTH + pads):
        rows = range(1, n)
        expected[planted.SINK] += 0.5
        expected[planted.UNIFORM] += 0.5 * sum(1 / (t + 1) for t in rows) / len(rows)
        expected[planted.PREVIOUS] += 0.5 * sum(t <= 1 for t in rows) / len(rows)
        expected[planted.AT_THREE] += 0.5 * sum(t <= 3 for t in rows) / len(rows)
        expected[planted.AT_TWENTY] += 0.5 * sum(t <= 20 for t in rows) / len(rows)
        # No token comes twice: an induction head finds nothing, and looks at all alike.
    expected[planted.UNIFORM_TOO] = expected[planted.INDUCTION] = expected[planted.UNIFORM]
    assert torch.allclose(found, expected, atol=CLOSE)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_mean_of_the_first_column(name):
    model = tiny_model(name, torch.float64)
    texts = [TextSample(tokens(LENGTH, seed)) for seed in range(2)]
    expected = sum(maps(model, text.ids)[:, :, 1:, 0].mean(-1) for text in texts) / 2
    assert torch.allclose(score(model, SinkMass(), data=texts).values.double(), expected, atol=CLOSE)


def test_a_text_of_one_token_is_not_counted():
    found = score(tiny_model("llama"), SinkMass(), data=[TextSample((3,)), TextSample((3, 4))])
    assert found.n == 1
