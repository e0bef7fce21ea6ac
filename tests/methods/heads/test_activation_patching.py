"""Activation patching against one whole forward per site, in float64."""

from __future__ import annotations

import pytest
import torch

from sparing.core.samples import PairSample
from sparing.errors import InvalidInputError
from sparing.methods.heads.activation_patching import KINDS, ActivationPatching, ResidualPatching
from sparing.scoring import score
from tests.methods.heads import slow

# Two orders of the same float64 sums; norms of most models round to float32 in between, alike in both.
CLOSE = 1e-6


@pytest.mark.parametrize("positions", ["all", "last"])
@pytest.mark.parametrize("name", slow.NAMES)
def test_a_heads_output_is_patched_as_by_hand(name, positions):
    model = slow.model_of(name)
    sample = slow.pair(model, length=24)
    found = score(model, ActivationPatching(positions=positions), data=[sample]).values
    clean = slow.heads_of(model, sample.clean)
    for layer in range(len(clean)):
        for head in range(slow.HEADS):

            def patch(x, layer=layer, head=head):
                value = clean[layer][:, head].clone()
                if positions == "last":
                    value[:-1] = x[0].view(-1, slow.HEADS, slow.DIM)[:-1, head]
                return slow.with_head(x, head, value)

            logits = slow.run(model, sample.corrupt, [(slow.projection(model, layer), "input", patch)])
            assert float(found[layer, head]) == pytest.approx(slow.metric(model, sample, logits), abs=CLOSE)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_places_of_the_residual_stream_are_patched_as_by_hand(name):
    model = slow.model_of(name)
    sample = slow.pair(model)
    found = score(model, ResidualPatching(), data=[sample])
    assert found.labels["kind"] == KINDS == ("resid_pre", "attn_out", "mlp_out")
    places = [
        lambda m, layer: (slow.blocks(m)[layer], "input"),
        lambda m, layer: (slow.projection(m, layer), "output"),
        lambda m, layer: (slow.mlp(m, layer), "output"),
    ]
    for kind, place in enumerate(places):
        clean = slow.sites_of(model, sample.clean, place)
        for layer in range(len(clean)):
            for position in range(len(sample.clean)):

                def patch(x, layer=layer, position=position, clean=clean):
                    new = x.clone()
                    new[0, position] = clean[layer][position]
                    return new

                logits = slow.run(model, sample.corrupt, [(*place(model, layer), patch)])
                expected = slow.metric(model, sample, logits)
                assert float(found.values[layer, position, kind]) == pytest.approx(expected, abs=CLOSE)


def test_positions_before_the_first_change_have_no_effect():
    model = slow.model_of("llama")
    sample = slow.pair(model)
    assert min(sample.changed) == 3
    assert not score(model, ResidualPatching(), data=[sample]).values[:, :3].any()


@pytest.mark.parametrize("site", ["query", "key", "value"])
def test_queries_keys_and_values_of_a_head(site):
    """Patching the value of every KV head and the pattern's makers brings the head's output back; one alone, less."""
    model = slow.model_of("llama")
    sample = slow.pair(model)
    found = score(model, ActivationPatching(site=site), data=[sample]).values
    expected = _patched_projection(model, sample, site)
    assert torch.allclose(found, expected, atol=1e-5)


def _patched_projection(model, sample, site):
    """Keys and values before rotation are patched at the projection: the rotation is the same in both prompts."""
    count = slow.HEADS if site == "query" else slow.KV_HEADS
    layers = range(len(slow.blocks(model)))
    maker = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}[site]
    modules = [getattr(slow.blocks(model)[layer].self_attn, maker) for layer in layers]
    clean = slow.sites_of(model, sample.clean, lambda m, layer: (modules[layer], "output"))
    found = torch.zeros(len(modules), count)
    for layer in layers:
        for head in range(count):

            def patch(x, layer=layer, head=head):
                part = slice(head * slow.DIM, (head + 1) * slow.DIM)
                return slow.with_head(x, head, clean[layer][:, part])

            logits = slow.run(model, sample.corrupt, [(modules[layer], "output", patch)])
            found[layer, head] = slow.metric(model, sample, logits)
    return found.repeat_interleave(slow.HEADS // count, dim=1)


def test_only_the_head_that_reaches_the_output_matters():
    model = slow.model_of("llama")
    for layer in range(2):
        weight = slow.projection(model, layer).weight
        with torch.no_grad():
            weight[:, [i for i in range(32) if not (layer == 1 and 8 <= i < 16)]] = 0.0
    found = score(model, ActivationPatching(), data=[slow.pair(model)]).values
    assert float(found[1, 1].abs()) > 1e-3
    found[1, 1] = 0.0
    assert float(found.abs().max()) < 1e-9


def test_prompts_that_cannot_be_patched_are_refused():
    model = slow.model_of("llama")
    with pytest.raises(InvalidInputError, match="3 and 2 tokens"):
        score(model, ActivationPatching(), data=[PairSample((1, 2, 3), (1, 2), 4, 5)])
    with pytest.raises(InvalidInputError, match="on both prompts"):
        score(model, ActivationPatching(), data=[PairSample((1, 2, 3), (1, 2, 3), 4, 5)])
    with pytest.raises(InvalidInputError, match="exactly 1"):
        score(model, ResidualPatching(), data=[slow.pair(model), slow.pair(model, seed=1)])
    with pytest.raises(InvalidInputError, match="query, key, value"):
        ActivationPatching(site="pattern")
