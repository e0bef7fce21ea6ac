"""The output gate of a gated model, from the gate's own projection, and the refusal of models that have none."""

from __future__ import annotations

import pytest
import torch

from sparing.core.samples import TextSample
from sparing.errors import UnsupportedModelError
from sparing.methods.heads.output_gate import OutputGate
from sparing.scoring import score
from sparing.testing import tiny_model
from tests.methods.heads.maps import CLOSE, tokens

HEADS, DIM = 4, 8
ATTENTION_LAYER = 1  # layer 0 is linear attention, which has no heads that are scored


def attention_of(model):
    return model.model.layers[ATTENTION_LAYER].self_attn


def gates_and_outputs(model, ids):
    """Two (T, Hq, D): the gates, from the projection that makes queries and gates, and the gated outputs."""
    seen = {}
    module = attention_of(model)
    handles = [
        module.q_proj.register_forward_hook(lambda _, args, out: seen.update(gate=out)),
        module.o_proj.register_forward_pre_hook(lambda _, args: seen.update(gated=args[0])),
    ]
    with torch.no_grad():
        model(torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    gate = seen["gate"].view(-1, HEADS, 2, DIM)[:, :, 1].sigmoid()
    return gate, seen["gated"].view(-1, HEADS, DIM)


def test_it_is_the_mean_gate_weighted_by_what_passes():
    model = tiny_model("qwen3_next", torch.float64)
    texts = [TextSample(tokens(20, seed)) for seed in range(2)]
    expected = torch.zeros(HEADS, dtype=torch.float64)
    for text in texts:
        gate, gated = gates_and_outputs(model, text.ids)
        z = gated / gate
        for head in range(HEADS):
            passed = sum(float(gate[t, head] @ z[t, head] ** 2) for t in range(20))
            expected[head] += passed / sum(float(z[t, head] @ z[t, head]) for t in range(20)) / 2
    found = score(model, OutputGate(), data=texts).values[0]
    assert expected.max() - expected.min() > 0.01, "all gates are alike, nothing is tested"
    assert torch.allclose(found.double(), expected, atol=CLOSE)


def test_a_gate_that_is_always_half_open_scores_a_half():
    """A gate's projection of 0 gives sigmoid(0) = 1/2; the other heads keep theirs."""
    model = tiny_model("qwen3_next")
    before = score(model, OutputGate(), data=[TextSample(tokens(20))]).values[0]
    with torch.no_grad():
        attention_of(model).q_proj.weight.view(HEADS, 2, DIM, -1)[2, 1] = 0
    found = score(model, OutputGate(), data=[TextSample(tokens(20))]).values[0]
    assert float(found[2]) == pytest.approx(0.5, abs=CLOSE)
    assert torch.equal(found[[0, 1, 3]], before[[0, 1, 3]])
    assert abs(float(before[2]) - 0.5) > 1e-3


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_models_without_a_gate_are_refused(name):
    with pytest.raises(UnsupportedModelError, match="no gate"):
        score(tiny_model(name), OutputGate(), data=[TextSample(tokens(9))])
