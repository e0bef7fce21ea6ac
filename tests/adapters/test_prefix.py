"""Going on from a prefix against whole forwards, in float64, on every structure."""

from __future__ import annotations

import pytest
import torch

from sparing.adapters.lens import ModelLens
from sparing.measures.patching import record
from sparing.testing import TINY_MODELS, tiny_model

LENGTH = 40
STARTS = (1, 10, 30, 39)  # within and beyond the sliding windows of 16, and up to a single token left
# Most norms and some rotations round to float32 (2^-24 = 6e-8), a token alone like a token among others.
CLOSE = 1e-6


def tokens(batch=1, seed=0):
    return torch.randint(1, 64, (batch, LENGTH), generator=torch.Generator().manual_seed(seed))


def with_prefix():
    """The tiny models that are not recurrent: all of them have to be able to go on."""
    return [name for name, spec in TINY_MODELS.items() if not spec.recurrent]


@pytest.mark.parametrize("name", with_prefix())
def test_forwards_behind_a_prefix_are_whole_forwards(name):
    model = tiny_model(name, torch.float64)
    lens = ModelLens(model)
    ids = tokens(batch=3)
    ids[:, :30] = ids[:1, :30]
    with torch.no_grad():
        whole = lens.forward(ids)
        for start in (1, 10, 30):
            prefix = lens.prefix(ids[:1, :start])
            for _ in range(2):  # the first leaves nothing behind
                assert torch.allclose(lens.forward(ids[:, start:], cache=prefix), whole[:, start:], atol=CLOSE)
            assert torch.allclose(lens.forward(ids[1:2, start:], cache=prefix), whole[1:2, start:], atol=CLOSE)


@pytest.mark.parametrize("name", with_prefix())
def test_forwards_from_a_layer_behind_a_prefix(name):
    model = tiny_model(name, torch.float64)
    lens, ids = ModelLens(model), tokens()
    whole = record(lens, ids[0].tolist())
    for start in STARTS:
        prefix = lens.prefix(ids[:, :start])
        behind = record(lens, ids[0, start:].tolist(), cache=prefix)
        for layer in range(lens.num_layers):
            with torch.no_grad():
                logits = lens.forward_from(layer, whole.residual[layer][:, start:], last=1, cache=prefix)
            assert torch.allclose(logits[0, -1], whole.logits, atol=CLOSE)
            assert torch.allclose(behind.heads[layer], whole.heads[layer][:, start:], atol=CLOSE)


@pytest.mark.parametrize("name", [name for name, spec in TINY_MODELS.items() if spec.recurrent])
def test_recurrent_models_begin_at_the_beginning(name):
    assert ModelLens(tiny_model(name)).prefix(tokens()) is None


def test_no_tokens_are_no_prefix():
    assert ModelLens(tiny_model("llama")).prefix(tokens()[:, :0]) is None
