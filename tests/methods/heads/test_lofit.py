"""LoFiT against its formula, folded into the weights by hand; and what both stages learn on a tiny task."""

import pytest
import torch

from sparing.adapters.lens import ModelLens
from sparing.core.head_scorer import Run
from sparing.core.samples import NeedleSample
from sparing.errors import InvalidInputError
from sparing.measures.optimise import answer_loss
from sparing.methods.heads.lofit import Lofit, adjusted, tune_vectors
from sparing.scoring import score
from sparing.testing import assert_same_trace, tiny_model, trace

SHAPE = (2, 4, 8)


def samples(count=8, seed=0):
    """Random prompts of several lengths with one and the same answer, which the model does not know."""
    g = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(1, 64, (10 + i,), generator=g).tolist() for i in range(count)]
    return [NeedleSample(tuple(ids), (7, 9), ("?",), (0, 1), (0, 1), 2) for ids in prompts]


def only(layer, head):
    """A model in which one head alone reaches the residual stream."""
    model = tiny_model("llama")
    with torch.no_grad():
        for number, block in enumerate(model.model.layers):
            keep = torch.zeros(32)
            if number == layer:
                keep[head * 8 : head * 8 + 8] = 2.0
            block.self_attn.o_proj.weight.mul_(keep)
    return model


def test_nothing_learned_changes_nothing():
    model, zero = tiny_model("llama"), torch.zeros(SHAPE)
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        before = model(ids).logits
        with adjusted(ModelLens(model), zero, zero):
            assert torch.equal(model(ids).logits, before)


def test_heads_are_scaled_and_shifted_as_the_formula_says():
    """(1 + A) ⊙ z before the projection is its columns times (1 + A); v before it is W v after it."""
    g = torch.Generator().manual_seed(1)
    scaling, shift = (torch.randn(SHAPE, generator=g, dtype=torch.float64) for _ in range(2))
    model, folded = (tiny_model("llama", torch.float64, attention_bias=True) for _ in range(2))
    with torch.no_grad():
        for layer, block in enumerate(folded.model.layers):
            projection = block.self_attn.o_proj
            projection.bias.copy_(
                model.model.layers[layer].self_attn.o_proj.bias + projection.weight @ shift[layer].flatten()
            )
            projection.weight.mul_(1 + scaling[layer].flatten())
        ids = torch.arange(1, 20)[None]
        with adjusted(ModelLens(model), scaling, shift):
            found = model(ids).logits
        assert float((found - folded(ids).logits).abs().max()) < 1e-9
        assert float((found - model(ids).logits).abs().max()) > 1e-2


def test_the_loss_falls_and_the_score_is_the_norm_of_what_was_learned():
    found = score(tiny_model("llama"), Lofit(learning_rate=0.05, epochs=20), data=samples(), batch_size=4)
    assert found.values.shape == (2, 4)
    assert bool((found.values > 0).all())
    answers, penalty = found.extras["loss"].T
    assert found.extras["loss"].shape == (40, 2)
    assert float(answers[-2:].mean()) < 0.8 * float(answers[:2].mean())
    assert float(penalty[-1]) > 10 * float(penalty[0])
    told = f"loss on the answers: {answers[:2].mean():.4g} in the first epoch, {answers[-2:].mean():.4g} in the last"
    assert told in found.notes


@pytest.mark.parametrize("unit", [(0, 2), (1, 1)])
def test_heads_that_reach_nothing_are_not_scaled(unit):
    """Their only gradient is the penalty's, which takes their noise away."""
    found = score(only(*unit), Lofit(learning_rate=0.02, epochs=20), data=samples(), batch_size=4)
    assert found.ranked()[0] == unit
    others = [float(value) for value in found.values.flatten()]
    others.remove(float(found.values[unit]))
    assert float(found.values[unit]) > 10 * max(others)


def test_without_learning_the_score_is_the_noise():
    """N(0, 0.001) in 8 dimensions has a norm of about 0.001 √8; the seed gives it."""
    slow = Lofit(learning_rate=1e-12, epochs=1)
    first, again, other = (score(tiny_model("llama"), slow, data=samples(2), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.values, again.values)
    assert not torch.equal(first.values, other.values)
    assert 0.001 < float(first.values.mean()) < 0.005


def test_penalty_is_the_sum_of_sizes():
    """√(2/π) · 0.001 each on average, 64 numbers, factor 3."""
    found = score(tiny_model("llama"), Lofit(learning_rate=1e-12, epochs=1, sparsity=3.0), data=samples(2))
    assert float(found.extras["loss"][0, 1]) == pytest.approx(3 * 64 * 0.001 * 0.798, rel=0.3)


def test_vectors_lower_the_loss_through_the_chosen_heads():
    model = tiny_model("llama")
    lens, data = ModelLens(model), samples()
    before = trace(model)
    heads = [(1, 3), (0, 0)]
    vectors = tune_vectors(lens, heads, Run(data, batch_size=4), learning_rate=0.2, epochs=20)
    assert list(vectors) == heads
    assert all(vector.shape == (8,) and vector.dtype == torch.float32 for vector in vectors.values())
    assert_same_trace(before, trace(model))
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    shift = torch.zeros(SHAPE)
    for head, vector in vectors.items():
        assert not vector.requires_grad
        shift[head] = vector
    with torch.no_grad():
        untouched = answer_loss(lens, data)
        with adjusted(lens, torch.zeros(SHAPE), shift):
            assert float(answer_loss(lens, data)) < 0.8 * float(untouched)


def test_an_interruption_restores_the_model():
    model = tiny_model("llama")

    def interrupt(done, total, what):
        raise KeyboardInterrupt

    before = trace(model)
    with pytest.raises(KeyboardInterrupt):
        tune_vectors(ModelLens(model), [(0, 0)], Run(samples(), progress=interrupt))
    assert_same_trace(before, trace(model))
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("heads", [[], [(0, 0), (0, 0)], [(2, 0)], [(0, 4)], [(-1, 0)]])
def test_bad_heads_are_refused(heads):
    with pytest.raises(InvalidInputError, match="heads"):
        tune_vectors(ModelLens(tiny_model("llama")), heads, Run(samples()))


def test_no_samples_are_refused():
    with pytest.raises(InvalidInputError, match="at least one sample"):
        tune_vectors(ModelLens(tiny_model("llama")), [(0, 0)], Run([]))


@pytest.mark.parametrize("bad", [{"learning_rate": 0.0}, {"sparsity": -1.0}, {"epochs": 0}])
def test_bad_parameters_are_refused(bad):
    with pytest.raises(InvalidInputError, match=next(iter(bad))):
        Lofit(**bad)
