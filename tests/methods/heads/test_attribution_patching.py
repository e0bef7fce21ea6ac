"""Attribution patching against gradients by hand, and against activation patching where a model is linear."""

from __future__ import annotations

import pytest
import torch

from sparing.core.samples import PairSample
from sparing.errors import InvalidInputError
from sparing.methods.heads.activation_patching import KINDS, ActivationPatching, ResidualPatching
from sparing.methods.heads.attribution_patching import AttributionPatching, ResidualAttribution
from sparing.scoring import score
from tests.methods.heads import gradients, slow

# Results are float32; norms of most models round to float32 in between, alike in both.
CLOSE = 1e-6


def linear_llama():
    """No norms, no MLPs, and a pattern that is the same for all inputs: logits are linear in everything."""
    model = gradients.with_norms(slow.model_of("llama"), linear=True)
    with torch.no_grad():
        for layer, block in enumerate(slow.blocks(model)):
            block.mlp.down_proj.weight.zero_()
            if layer > 0:
                block.self_attn.q_proj.weight.zero_()
    return model


@pytest.mark.parametrize("name", slow.NAMES)
def test_heads_are_the_gradient_formula_by_hand(name):
    model = slow.model_of(name)
    sample = slow.pair(model, length=24)
    found = score(model, AttributionPatching(), data=[sample]).values
    expected = gradients.per_head(gradients.effects(model, sample, gradients.heads_place))
    assert found.shape == expected.shape
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=CLOSE)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_places_are_the_gradient_formula_by_hand(name):
    model = slow.model_of(name)
    sample = slow.pair(model)
    found = score(model, ResidualAttribution(), data=[sample])
    assert found.axes == ("layer", "position", "kind")
    assert found.labels["kind"] == KINDS
    for kind, place in enumerate(gradients.PLACES):
        expected = gradients.effects(model, sample, place).sum(-1)
        assert torch.allclose(found.values[:, :, kind].double(), expected, rtol=1e-5, atol=CLOSE), KINDS[kind]


def test_heads_are_the_slope_of_patching_a_little():
    """By differences of whole forwards, no autograd: GPT-2's norms stay in float64, so small steps are exact enough."""
    model = slow.model_of("gpt2")
    sample = slow.pair(model)
    found = score(model, AttributionPatching(), data=[sample]).values
    clean, corrupt = (slow.heads_of(model, ids) for ids in (sample.clean, sample.corrupt))
    step = 1e-4  # the slope's error is of the order step² = 1e-8
    for layer in range(len(clean)):
        for head in range(slow.HEADS):
            moved = []
            for size in (-step, step):
                value = (corrupt[layer] + size * (clean[layer] - corrupt[layer]))[:, head]
                hook = (slow.projection(model, layer), "input", lambda x, v=value, h=head: slow.with_head(x, h, v))
                moved.append(slow.metric(model, sample, slow.run(model, sample.corrupt, [hook])))
            assert float(found[layer, head]) == pytest.approx((moved[1] - moved[0]) / (2 * step), abs=1e-5)


def test_on_a_linear_model_it_is_activation_patching():
    model = linear_llama()
    sample = slow.pair(model)
    by_gradient = score(model, AttributionPatching(), data=[sample]).values
    by_patching = score(model, ActivationPatching(), data=[sample]).values
    assert float(by_patching.abs().max()) > 0.1
    assert torch.allclose(by_gradient, by_patching, rtol=1e-5, atol=CLOSE)


def test_on_a_linear_model_places_are_those_of_residual_patching():
    model = linear_llama()
    sample = slow.pair(model)
    by_gradient = score(model, ResidualAttribution(), data=[sample]).values
    by_patching = score(model, ResidualPatching(), data=[sample]).values
    # Layer 0 still has a pattern that depends on what comes in.
    assert torch.allclose(by_gradient[1:], by_patching[1:], rtol=1e-5, atol=CLOSE)
    assert torch.allclose(by_gradient[0, :, 1:], by_patching[0, :, 1:], rtol=1e-5, atol=CLOSE)
    # All that differs comes in at layer 1: the places of its stream together are the whole way from corrupt to clean.
    assert float(by_gradient[1, :, 0].sum()) == pytest.approx(1.0, abs=1e-5)


def test_the_last_layers_direct_path_is_exact_and_earlier_layers_are_estimates():
    """Without norm and MLP behind it, the last layer adds to the logits linearly, whatever comes before."""
    model = gradients.with_norms(slow.model_of("llama"))
    with torch.no_grad():
        slow.mlp(model, 1).down_proj.weight.zero_()
    final = model.model.norm
    model.model.norm = gradients.ExactNorm(final.weight, final.variance_epsilon, linear=True)
    sample = slow.pair(model)
    by_gradient = score(model, AttributionPatching(), data=[sample]).values
    by_patching = score(model, ActivationPatching(), data=[sample]).values
    assert torch.allclose(by_gradient[1], by_patching[1], rtol=1e-5, atol=CLOSE)
    assert float((by_gradient[0] - by_patching[0]).abs().max()) > 1e-3


def test_heads_of_a_layer_add_up_to_its_attention():
    """attn_out = Σ_h z_h W_h, so the effects of the heads add up to those of attn_out over all positions."""
    model = slow.model_of("llama")
    sample = slow.pair(model)
    heads = score(model, AttributionPatching(), data=[sample]).values
    places = score(model, ResidualAttribution(), data=[sample]).values
    assert torch.allclose(heads.sum(1), places[:, :, KINDS.index("attn_out")].sum(1), rtol=1e-5, atol=1e-5)


def test_before_the_first_change_there_is_nothing():
    model = slow.model_of("llama")
    sample = slow.pair(model)
    values = score(model, ResidualAttribution(), data=[sample]).values
    assert min(sample.changed) == 3
    assert values.shape[1] == len(sample.clean)
    assert not values[:, :3].any()
    assert values[0, 3, 0] != 0


def test_a_head_that_says_nothing_has_no_effect():
    model = slow.model_of("llama")
    with torch.no_grad():
        slow.projection(model, 0).weight[:, 2 * slow.DIM : 3 * slow.DIM] = 0.0
    values = score(model, AttributionPatching(), data=[slow.pair(model)]).values
    assert float(values[0, 2]) == 0.0
    assert float(values[0].abs().max()) > 1e-3


def test_many_pairs_are_their_mean():
    model = slow.model_of("llama")
    samples = [slow.pair(model, seed=seed) for seed in range(3)]
    singles = [score(model, AttributionPatching(), data=[sample]).values for sample in samples]
    found = score(model, AttributionPatching(), data=samples)
    assert found.n == 3
    assert torch.allclose(found.values, torch.stack(singles).mean(0), rtol=1e-6)


def test_parameters_get_no_gradient_and_keep_their_flags():
    model = slow.model_of("llama")
    first, *others = model.parameters()
    first.requires_grad_(False)
    score(model, AttributionPatching(), data=[slow.pair(model)])
    assert all(p.grad is None for p in model.parameters())
    assert not first.requires_grad
    assert all(p.requires_grad for p in others)


@pytest.mark.parametrize("scorer", [AttributionPatching(), ResidualAttribution()], ids=["heads", "places"])
def test_prompts_that_cannot_be_patched_are_refused(scorer):
    model = slow.model_of("llama")
    with pytest.raises(InvalidInputError, match="3 and 2 tokens"):
        score(model, scorer, data=[PairSample((1, 2, 3), (1, 2), 4, 5)])
    with pytest.raises(InvalidInputError, match="on both prompts"):
        score(model, scorer, data=[PairSample((1, 2, 3), (1, 2, 3), 4, 5)])


def test_places_need_exactly_one_pair():
    model = slow.model_of("llama")
    with pytest.raises(InvalidInputError, match="exactly 1"):
        score(model, ResidualAttribution(), data=[slow.pair(model), slow.pair(model, seed=1)])
