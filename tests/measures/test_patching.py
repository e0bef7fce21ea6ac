"""Walking through a prompt, and what a pair shares, against whole runs in float64."""

from __future__ import annotations

import pytest
import torch

from sparing.adapters.lens import ModelLens
from sparing.core.samples import PairSample
from sparing.errors import InvalidInputError
from sparing.measures.patching import behind_common_start, record, walk
from sparing.testing import TINY_MODELS, tiny_model
from sparing.testing.inspection import assert_same_trace, trace

# A step goes through the same operations in the same order, but masks may be made anew, and so may rotations.
CLOSE = 1e-9
IDS = torch.randint(1, 64, (40,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_walk_sees_what_a_run_records(name):
    model = tiny_model(name, torch.float64)
    lens = ModelLens(model)
    before, whole = trace(model), record(lens, IDS)
    steps = list(walk(lens, IDS))
    assert len(steps) == lens.num_layers
    for step, residual, heads in zip(steps, whole.residual, whole.heads, strict=True):
        assert step.call is None
        assert torch.allclose(step.residual, residual, atol=CLOSE)
        assert torch.allclose(step.heads, heads, atol=CLOSE)
    assert_same_trace(before, trace(model))


def test_the_calls_of_a_walk_are_those_of_the_run():
    lens = ModelLens(tiny_model("llama", torch.float64))
    queries = {}

    def keep(call, attend):
        queries[call.layer] = call.queries
        return attend(call)

    with lens.hooked(attention=keep):
        record(lens, IDS)
    for layer, step in enumerate(walk(lens, IDS, calls=True)):
        assert step.call.layer == layer
        assert torch.equal(step.call.queries, queries[layer])


def test_a_walk_behind_a_prefix():
    lens = ModelLens(tiny_model("gemma3", torch.float64))
    whole = record(lens, IDS)
    for layer, step in enumerate(walk(lens, IDS[25:], lens.prefix(torch.tensor([IDS[:25]])))):
        assert torch.allclose(step.heads, whole.heads[layer][:, 25:], atol=1e-6)  # norms round to float32


def test_a_walk_that_is_left_leaves_nothing():
    model = tiny_model("llama")
    before = trace(model)
    steps = walk(ModelLens(model), IDS, calls=True)
    next(steps)
    assert_same_trace(before, trace(model))


def test_a_pair_behind_what_it_shares():
    lens = ModelLens(tiny_model("llama"))
    short, cache = behind_common_start(lens, PairSample((1, 2, 3, 4), (1, 2, 5, 4), 7, 8))
    assert (short.clean, short.corrupt, short.answer, short.wrong) == ((3, 4), (5, 4), 7, 8)
    assert cache.get_seq_length() == 2
    for whole in (PairSample((1, 2), (3, 2), 7, 8), PairSample((1, 2), (1, 2), 7, 8)):
        assert behind_common_start(lens, whole) == (whole, None)
    with pytest.raises(InvalidInputError, match="2 and 1 tokens"):
        behind_common_start(lens, PairSample((1, 2), (1,), 7, 8))
