"""DuoAttention's gates against the paper's blend, written out slowly; and a head that has to look far."""

import math

import pytest
import torch

from sparing.adapters.lens import ModelLens
from sparing.core.head_scorer import Run
from sparing.core.lens import AttentionCall
from sparing.core.samples import PasskeySample
from sparing.core.scorer import Softmax
from sparing.errors import InvalidInputError
from sparing.methods.heads import duo
from sparing.methods.heads.duo import Duo, streaming, telling_states
from sparing.scoring import score
from sparing.testing import assert_same_trace, tiny_model, trace

EPS = 2.0**-52


def passkey(seed=0, length=60):
    """Random tokens whose last six stand in the middle as well."""
    ids = torch.randint(1, 64, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    ids[20:26] = ids[-6:]
    return PasskeySample(tuple(ids), ((20, 23), (23, 26)), ((length - 6, length - 3), (length - 3, length)))


def attention_call(rows=7, stored=7, kv_heads=2, group=2, **softmax):
    g = torch.Generator().manual_seed(3)
    draw = lambda heads, count: torch.randn(2, heads, count, 4, generator=g, dtype=torch.float64)  # noqa: E731
    at = torch.arange(stored - rows, stored)
    causal = (torch.arange(stored) <= at[:, None])[None, None]
    queries, keys, values = draw(kv_heads * group, rows), draw(kv_heads, stored), draw(kv_heads, stored)
    return AttentionCall(0, queries, keys, values, Softmax(0.5, **softmax), lambda part: causal[:, :, part])


def slow_streaming(call, sinks, recent):
    """One output at a time: a softmax over the keys that are first, or near."""
    batch, heads, rows, _ = call.queries.shape
    group = heads // call.keys.shape[1]
    out = torch.zeros(batch, rows, heads, call.values.shape[-1], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for row in range(rows):
                i = row + call.keys.shape[2] - rows
                weights = {}
                for j in range(i + 1):
                    if j < sinks or i - j < recent:
                        logit = call.softmax.scaling * float(call.queries[b, h, row] @ call.keys[b, h // group, j])
                        if call.softmax.softcap:
                            logit = call.softmax.softcap * math.tanh(logit / call.softmax.softcap)
                        weights[j] = math.exp(logit)
                total = sum(weights.values())
                if call.softmax.sinks is not None:
                    total += math.exp(float(call.softmax.sinks[h]))
                for j, weight in weights.items():
                    out[b, row, h] += weight / total * call.values[b, h // group, j]
    return out


@pytest.mark.parametrize(("sinks", "recent"), [(0, 1), (1, 2), (2, 3), (0, 4), (3, 1), (9, 1), (1, 50)])
@pytest.mark.parametrize("rows", [11, 4, 1])
def test_streaming_is_attention_over_sinks_and_near_tokens(monkeypatch, sinks, recent, rows):
    """Also where a tile of rows is shorter than the window, and where keys are stored already."""
    monkeypatch.setattr(duo, "ROWS_PER_TILE", 3)
    call = attention_call(rows, 11)
    found = streaming(call, sinks, recent)
    assert found.shape == (2, rows, 4, 4)
    # A softmax of 11 terms and a sum of 11 products of numbers below 4: 100 roundings of at most 4 ε.
    assert float((found - slow_streaming(call, sinks, recent)).abs().max()) < 400 * EPS


@pytest.mark.parametrize("softmax", [{"softcap": 2.0}, {"sinks": torch.tensor([0.3, -1.0, 2.0, 0.0])}])
def test_streaming_follows_the_models_softmax(softmax):
    call = attention_call(**softmax)
    assert float((streaming(call, 1, 2) - slow_streaming(call, 1, 2)).abs().max()) < 400 * EPS


def test_the_oracle_tells_windows_apart():
    call = attention_call()
    assert float((streaming(call, 1, 3) - slow_streaming(call, 1, 2)).abs().max()) > 0.01


def test_open_gates_change_nothing():
    model = tiny_model("llama")
    lens, ids = ModelLens(model), torch.tensor([passkey().ids])
    with torch.no_grad():
        dense = model(ids).logits
        with lens.hooked(attention=Duo(sinks=2, recent=4).blend(torch.ones(2, 2))):
            assert torch.equal(lens.forward(ids), dense)
    found = score(model, Duo(sinks=2, recent=4, steps=1), data=[passkey()])
    assert float(found.extras["loss"][0, 0]) == 0.0
    assert float(found.extras["loss"][0, 1]) == pytest.approx(0.05)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_closed_gates_stream_throughout(name):
    """The same as the model under a dense mask of sinks and near tokens, which transformers itself applies."""
    model = tiny_model(name, torch.float64)
    lens, ids = ModelLens(model), torch.tensor([passkey().ids])
    i, j = torch.arange(60)[:, None], torch.arange(60)
    seen = (j <= i) & ((j < 3) | (i - j < 5))
    mask = torch.zeros(1, 1, 60, 60, dtype=torch.float64).masked_fill(~seen, float("-inf"))
    gates = torch.zeros(lens.num_layers, lens.num_kv_heads, dtype=torch.float64)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        with lens.hooked(attention=Duo(sinks=3, recent=5).blend(gates)):
            found = lens.forward(ids)
        assert float((found - expected).abs().max()) < 1e-9
        assert float((found - model(ids).logits).abs().max()) > 1e-3


def test_compared_states_are_those_before_each_answer_token():
    """After the final norm: times the unembedding they are the logits of the answers."""
    model = tiny_model("llama", torch.float64)
    sample = passkey()
    with torch.no_grad():
        states = telling_states(ModelLens(model), sample)
        logits = model(torch.tensor([sample.ids])).logits[0]
    predicting = [t - 1 for start, end in sample.answers for t in range(start, end)]
    assert torch.allclose(states @ model.lm_head.weight.T, logits[predicting], rtol=0, atol=1e-12)


def distillation(lens, scorer, sample, gates):
    with torch.no_grad():
        full = telling_states(lens, sample)
    with lens.hooked(attention=scorer.blend(gates)):
        return (telling_states(lens, sample) - full).square().mean()


@pytest.mark.parametrize(("name", "step", "error"), [("gpt2", 1e-5, 1e-6), ("llama", 1e-3, 1e-3)])
def test_gradients_of_the_gates_are_finite_differences(name, step, error):
    """A central difference is off by step² (times a third derivative), and by rounding over the step.

    Llama's norm rounds to float32 (6e-8), so that a small step is drowned there.
    """
    lens, scorer, sample = ModelLens(tiny_model(name, torch.float64)), Duo(sinks=2, recent=4), passkey()
    shape = (lens.num_layers, lens.num_kv_heads)
    gates = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(distillation(lens, scorer, sample, gates), gates)
    size = float(gradient.abs().max())
    assert size > 0.01
    for unit in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        moved = torch.zeros_like(gates)
        moved[unit] = step
        with torch.no_grad():
            up, down = (float(distillation(lens, scorer, sample, gates + sign * moved)) for sign in (1, -1))
        assert float(gradient[unit]) == pytest.approx((up - down) / (2 * step), abs=error * size)


def planted(layer, kv_head):
    """A model in which only the heads of one KV head reach the residual stream, and loudly."""
    model = tiny_model("llama")
    with torch.no_grad():
        for number, block in enumerate(model.model.layers):
            weight = block.self_attn.o_proj.weight
            keep = torch.zeros_like(weight)
            if number == layer:
                keep[:, kv_head * 16 : (kv_head + 1) * 16] = 5.0  # two query heads of size 8
            weight.mul_(keep)
    return model


@pytest.mark.parametrize("unit", [(0, 1), (1, 0)])
def test_the_head_that_must_look_far_stays_open_and_the_others_close(unit):
    data = [passkey(seed) for seed in range(6)]
    found = score(planted(*unit), Duo(sinks=2, recent=4, steps=60, learning_rate=0.05), data=data)
    assert float(found.values[unit]) > 0.9
    assert sorted(found.values.flatten().tolist())[:3] == [0.0, 0.0, 0.0]
    assert found.axes == ("layer", "kv_head")
    assert found.extras["loss"].shape == (60, 2)
    assert found.notes[0] == "all 60 steps were taken"


def test_same_seed_same_gates():
    measure = lambda seed: score(  # noqa: E731
        tiny_model("llama"), Duo(sinks=2, recent=4, steps=8), data=[passkey(i) for i in range(4)], seed=seed
    )
    assert torch.equal(measure(1).values, measure(1).values)
    assert not torch.equal(measure(1).values, measure(2).values)


def test_the_time_limit_is_kept():
    found = score(tiny_model("llama"), Duo(sinks=2, recent=4), data=[passkey()], max_seconds=1e-9)
    assert found.extras["loss"].shape == (1, 2)
    assert found.notes[0] == "stopped after 1 of 100 steps: 1e-09 s had passed"


def test_an_interruption_restores_the_model():
    model, data = tiny_model("llama"), [passkey()]
    before, said = trace(model), model(torch.tensor([data[0].ids])).logits

    def interrupt(done, total, what):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(model, Duo(sinks=2, recent=4), data=data, progress=interrupt)
    assert_same_trace(before, trace(model))
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert torch.equal(model(torch.tensor([data[0].ids])).logits, said)


def test_samples_within_the_window_are_refused():
    run = Run([passkey(length=40), passkey(length=50)])
    with pytest.raises(InvalidInputError, match="fewer than the 50 tokens of the longest sample"):
        Duo(sinks=10, recent=40).measure(ModelLens(tiny_model("llama")), run)


@pytest.mark.parametrize(
    "bad", [{"sinks": -1}, {"recent": 0}, {"steps": 0}, {"learning_rate": 0.0}, {"penalty": float("nan")}]
)
def test_bad_parameters_are_refused(bad):
    with pytest.raises(InvalidInputError, match=next(iter(bad))):
        Duo(**bad)
