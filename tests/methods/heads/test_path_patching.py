"""Path patching, PH3 and back-patching against whole forwards with everything frozen by hand, in float64."""

from __future__ import annotations

import math

import pytest
import torch

from sparing.errors import InvalidInputError, UnsupportedModelError
from sparing.methods.heads.back_patching import BackPatching
from sparing.methods.heads.path_patching import PathPatching
from sparing.methods.heads.ph3 import PH3
from sparing.scoring import score
from tests.methods.heads import slow

CLOSE = 1e-6


def frozen_logits(model, sample, sender, more=()):
    """Last logits of the clean prompt with one head's corrupt output and all other heads' clean ones."""
    clean, corrupt = (slow.heads_of(model, ids) for ids in (sample.clean, sample.corrupt))
    hooks = []
    for layer in range(len(clean)):

        def freeze(x, layer=layer):
            new = clean[layer].clone()
            if layer == sender[0]:
                new[:, sender[1]] = corrupt[layer][:, sender[1]]
            return new.reshape(x.shape)

        hooks.append((slow.projection(model, layer), "input", freeze))
    return slow.run(model, sample.clean, [*hooks, *more])


@pytest.mark.parametrize("name", slow.NAMES)
def test_paths_to_the_logits(name):
    model = slow.model_of(name)
    sample = slow.pair(model, length=20)
    found = score(model, PathPatching(), data=[sample]).values
    for layer in range(found.shape[0]):
        for head in range(slow.HEADS):
            expected = 1 - slow.metric(model, sample, frozen_logits(model, sample, (layer, head)))
            assert float(found[layer, head]) == pytest.approx(expected, abs=CLOSE)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_with_frozen_mlps_it_is_the_closed_form(name):
    model = slow.model_of(name)
    sample = slow.pair(model)
    found = score(model, PathPatching(mlps="frozen"), data=[sample]).values
    mlps = slow.sites_of(model, sample.clean, lambda m, layer: (slow.mlp(m, layer), "output"))
    for layer in range(2):
        for head in range(slow.HEADS):
            freeze = [(slow.mlp(model, at), "output", lambda x, at=at: mlps[at][None]) for at in range(2)]
            logits = frozen_logits(model, sample, (layer, head), freeze)
            assert float(found[layer, head]) == pytest.approx(1 - slow.metric(model, sample, logits), abs=CLOSE)


def test_the_closed_form_is_refused_where_norms_stand_behind_the_mlp():
    model = slow.model_of("gemma3")
    with pytest.raises(UnsupportedModelError, match="do not simply add"):
        score(model, PathPatching(mlps="frozen"), data=[slow.pair(model)])


@pytest.mark.parametrize("into", ["query", "key", "value"])
def test_paths_into_another_head(into):
    """By hand: the receiver's projection output in the frozen run, put into a clean run for the receiver alone."""
    model = slow.model_of("llama")
    sample = slow.pair(model)
    receiver = (1, 2)
    found = score(model, PathPatching(receiver="1.2", into=into), data=[sample]).values
    assert not found[1].any(), "a head says nothing to its own layer"
    attention = slow.blocks(model)[1].self_attn
    maker = getattr(attention, {"query": "q_proj", "key": "k_proj", "value": "v_proj"}[into])
    at = receiver[1] if into == "query" else receiver[1] // 2
    for head in range(slow.HEADS):
        heard = []
        frozen_logits(model, sample, (0, head), [(maker, "output", lambda x, heard=heard: heard.append(x.clone()))])
        told = []

        def tell(x, heard=heard):
            part = slice(at * slow.DIM, (at + 1) * slow.DIM)
            new = x.clone()
            new[..., part] = heard[0][..., part]
            return new

        # What the receiver says when it is told, then a clean run in which it says that.
        tap = (slow.projection(model, 1), "input", lambda x, told=told: told.append(x.clone()))
        slow.run(model, sample.clean, [(maker, "output", tell), tap])
        said = told[0][0].view(-1, slow.HEADS, slow.DIM)[:, receiver[1]]
        say = (slow.projection(model, 1), "input", lambda x, said=said: slow.with_head(x, receiver[1], said))
        expected = 1 - slow.metric(model, sample, slow.run(model, sample.clean, [say]))
        assert float(found[0, head]) == pytest.approx(expected, abs=CLOSE)


@pytest.mark.parametrize("receiver", ["2", "a.b", "1.", "-1.0"])
def test_receivers_that_are_none_are_refused(receiver):
    with pytest.raises(InvalidInputError, match=r"layer\.head"):
        PathPatching(receiver=receiver)


def test_receivers_that_the_model_lacks_are_refused():
    model = slow.model_of("llama")
    with pytest.raises(InvalidInputError, match=r"below 2\.4"):
        score(model, PathPatching(receiver="5.0"), data=[slow.pair(model)])
    with pytest.raises(InvalidInputError, match="recomputed where a head receives"):
        PathPatching(receiver="1.0", mlps="frozen")


def test_ph3_is_the_difference_of_two_probabilities_lost():
    model = slow.model_of("llama")
    sample = slow.pair(model)
    found = score(model, PH3(), data=[sample])
    before = slow.run(model, sample.clean).softmax(-1)
    for layer in range(2):
        for head in range(slow.HEADS):
            after = frozen_logits(model, sample, (layer, head)).softmax(-1)
            context = float(before[sample.answer] - after[sample.answer])
            memory = float(before[sample.wrong] - after[sample.wrong])
            assert float(found.extras["context"][layer, head]) == pytest.approx(context, abs=CLOSE)
            assert float(found.extras["memory"][layer, head]) == pytest.approx(memory, abs=CLOSE)
            assert float(found.values[layer, head]) == pytest.approx(context - memory, abs=CLOSE)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_back_patching(name):
    model = slow.model_of(name)
    sample = slow.pair(model)
    found = score(model, BackPatching(), data=[sample]).values
    layers = len(slow.blocks(model))
    into = slow.sites_of(model, sample.clean, lambda m, layer: (slow.blocks(m)[layer], "input"))
    before = float(slow.run(model, sample.clean).log_softmax(-1)[sample.answer])
    for source in range(layers):
        for target in range(layers):
            if target >= source:
                assert math.isnan(float(found[source, target]))
                continue

            def patch(x, source=source):
                new = x.clone()
                new[0, -1] = into[source][-1]
                return new

            logits = slow.run(model, sample.clean, [(slow.blocks(model)[target], "input", patch)])
            after = float(logits.log_softmax(-1)[sample.answer])
            assert float(found[source, target]) == pytest.approx(after - before, abs=CLOSE)


def test_all_heads_together_are_what_attention_adds():
    """Σ over heads of z_h W_h is attn_out: zeroing heads one by one adds up to zeroing attention (in the residual)."""
    from sparing.adapters.lens import ModelLens

    model = slow.model_of("gpt2")
    lens = ModelLens(model)
    sample = slow.pair(model)
    for layer, z in enumerate(slow.heads_of(model, sample.clean)):
        added = slow.sites_of(model, sample.clean, lambda m, at: (slow.projection(m, at), "output"))[layer]
        parts = torch.einsum("thd,hde->the", z, lens.output_weight(layer))
        assert torch.allclose(parts.sum(1) + slow.projection(model, layer).bias, added, atol=1e-12)
