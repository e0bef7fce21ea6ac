"""Head ablation against the loss of whole forwards with one head taken away by plain torch hooks, in float64."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch

from sparing.adapters.lens import ModelLens
from sparing.core.edits import ABLATIONS, AblateHeads
from sparing.core.head_scorer import parse_scorer
from sparing.core.samples import NeedleSample
from sparing.editing import edit
from sparing.errors import InvalidInputError
from sparing.methods.heads.ablation import HeadAblation
from sparing.scoring import score
from sparing.testing import tiny_model
from tests.methods.heads import edited_attention, slow

# Scores are float32 of float64 log-probabilities (up to 20 nats); norms round to float32 in between, alike in both.
CLOSE = 1e-5


def sample_of(seed=0, length=20, answer=3):
    """Random tokens; the answer is as good as any other for a loss."""
    ids = torch.randint(1, 64, (length + answer,), generator=torch.Generator().manual_seed(seed)).tolist()
    return NeedleSample(tuple(ids[:length]), tuple(ids[length:]), ("x",), (2, 8), (4, 7), answer)


def log_prob(model, sample, hooks=()):
    """log p(answer | context), one token after another."""
    total, context = 0.0, list(sample.ids)
    for token in sample.answer_ids:
        total += float(slow.run(model, tuple(context), list(hooks)).log_softmax(-1)[token])
        context.append(token)
    return total


def whole(sample):
    return (*sample.ids, *sample.answer_ids)


def lost(model, sample, layer, head, value):
    """Nats per answer token lost when a head's (T, D) output over context and answer is `value`."""

    def change(x):
        return slow.with_head(x, head, value[: x.shape[1]])

    without = log_prob(model, sample, [(slow.projection(model, layer), "input", change)])
    return (log_prob(model, sample) - without) / len(sample.answer_ids)


def values_of(model, sample):
    """Per layer (Hq, T, D) values that each query head reads."""
    return [values for _, values, _ in edited_attention.calls_of(model, torch.tensor([whole(sample)]))]


@pytest.mark.parametrize("kind", ["zero", "mean", "uniform"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_every_head_is_taken_away_as_by_hand(name, kind):
    model, sample = slow.model_of(name), sample_of()
    found = score(model, HeadAblation(kind), data=[sample])
    outputs, values = slow.heads_of(model, whole(sample)), values_of(model, sample)
    tokens = len(whole(sample))
    assert found.values.shape == (2, slow.HEADS)
    for layer in range(2):
        for head in range(slow.HEADS):
            said = outputs[layer][:, head]
            instead = {
                "zero": torch.zeros_like(said),
                "mean": (sum(said) / tokens).expand_as(said),
                "uniform": torch.stack([sum(values[layer][head, : t + 1]) / (t + 1) for t in range(tokens)]),
            }[kind]
            expected = lost(model, sample, layer, head, instead)
            assert float(found.values[layer, head]) == pytest.approx(expected, abs=CLOSE), (layer, head)
    assert float(found.values.abs().max()) > 1e-2


def test_a_uniform_head_of_a_sliding_window_sees_its_window_only():
    model, sample = slow.model_of("gemma3"), sample_of()
    found, values = score(model, HeadAblation("uniform"), data=[sample]).values, values_of(model, sample)
    for layer, window in ((0, 16), (1, 1000)):
        for head in range(slow.HEADS):
            seen = [values[layer][head, max(0, t - window + 1) : t + 1] for t in range(len(whole(sample)))]
            expected = lost(model, sample, layer, head, torch.stack([run.mean(0) for run in seen]))
            assert float(found[layer, head]) == pytest.approx(expected, abs=CLOSE)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_resampled_heads_say_what_they_said_at_another_token_of_the_sample(name):
    """What each head said instead is read off the projections' inputs, and the loss is worked out from it by hand."""
    model, sample = slow.model_of(name), sample_of()
    given = {}  # per layer, of the last forward that went through it: the one in which its own heads were ablated

    def keep(layer):
        return lambda module, args, output: given.__setitem__(layer, args[0])

    handles = [slow.projection(model, layer).register_forward_hook(keep(layer)) for layer in range(2)]
    found = score(model, HeadAblation("resample", seed=5), data=[sample]).values
    for handle in handles:
        handle.remove()
    outputs = slow.heads_of(model, whole(sample))
    for layer in range(2):
        for head in range(slow.HEADS):
            drawn = given[layer][head].view(-1, slow.HEADS, slow.DIM)[:, head]
            same = (drawn[:, None] - outputs[layer][:, head]).abs().amax(-1) < 1e-9
            assert bool((same.sum(-1) == 1).all()), "each is what this head said at some token"
            assert int(same.any(0).sum()) > 8, "23 draws of 23 hit 15 different ones on average"
            expected = lost(model, sample, layer, head, drawn)
            assert float(found[layer, head]) == pytest.approx(expected, abs=CLOSE)
    assert torch.equal(score(model, HeadAblation("resample", seed=5), data=[sample]).values, found)
    other = score(model, HeadAblation("resample", seed=6), data=[sample]).values
    assert not torch.allclose(other, found, atol=1e-3)


def test_samples_are_averaged():
    model, samples = slow.model_of("llama"), [sample_of(0), sample_of(1, length=14, answer=1), sample_of(2, answer=2)]
    alone = torch.stack([score(model, HeadAblation(), data=[sample]).values for sample in samples])
    found = score(model, HeadAblation(), data=samples, batch_size=2)
    assert found.n == 3
    assert torch.allclose(found.values, alone.mean(0), atol=1e-6)
    assert torch.allclose(found.standard_error, alone.std(0) / 3**0.5, atol=1e-6)


def test_more_heads_than_go_at_once():
    """Twelve heads take two forwards a layer; each is compared with an edit of its own."""
    model = tiny_model("llama", torch.float64, num_attention_heads=12, hidden_size=48)
    sample = sample_of()
    found = score(model, HeadAblation(), data=[sample]).values
    assert found.shape == (2, 12)
    for layer, head in ((0, 0), (0, 7), (0, 8), (1, 11)):
        with edit(model, AblateHeads(((layer, head),))):
            without = log_prob(model, sample)
        expected = (log_prob(model, sample) - without) / 3
        assert float(found[layer, head]) == pytest.approx(expected, abs=CLOSE)


@pytest.mark.parametrize("kind", ABLATIONS)
def test_only_the_head_that_reaches_the_output_matters(kind):
    model = slow.model_of("llama")
    with torch.no_grad():
        for layer in range(2):
            kept = slow.projection(model, layer).weight[:, 8:16].clone()
            slow.projection(model, layer).weight.zero_()
            if layer == 1:
                slow.projection(model, layer).weight[:, 8:16] = kept
    found = score(model, HeadAblation(kind), data=[sample_of()]).values
    assert float(found[1, 1].abs()) > 1e-3
    found[1, 1] = 0.0
    assert float(found.abs().max()) < 1e-6


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "deepseek_v3"])
def test_what_heads_lose_one_by_one_is_what_attention_says(name):
    """Σ_h (attn_out - attn_out without h) = attn_out - bias: the output projection is linear."""
    model = tiny_model(name, torch.float64)
    lens, ids = ModelLens(model), torch.tensor([sample_of().ids])
    last = lens.num_layers - 1

    def attention_output(*taken):
        found = {}
        with torch.no_grad(), ExitStack() as stack:
            for head in taken:
                stack.enter_context(edit(model, AblateHeads(((last, head),))))
            stack.enter_context(lens.hooked(sites={"attn_out": found.__setitem__}))
            lens.forward(ids)
        return found[last]

    intact = attention_output()
    lost_each = [intact - attention_output(head) for head in range(lens.num_heads)]
    bias = getattr(lens.layers[last].projection, "bias", None)
    expected = intact if bias is None else intact - bias
    assert torch.allclose(sum(lost_each), expected, atol=1e-10)
    assert torch.allclose(attention_output(*range(lens.num_heads)), intact - expected, atol=1e-10)
    assert all(float(part.abs().max()) > 1e-3 for part in lost_each)


def test_the_name_and_its_parameters():
    assert parse_scorer("ablation(kind=mean,seed=3)") == HeadAblation("mean", 3)
    with pytest.raises(InvalidInputError, match="kind: got 'shuffle', allowed is zero, mean, uniform, resample"):
        HeadAblation("shuffle")
    with pytest.raises(InvalidInputError, match="no samples"):
        score(slow.model_of("llama"), HeadAblation(), data=[])
