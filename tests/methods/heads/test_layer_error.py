"""Layer errors against their definition on whole models, one number at a time, and where they must be zero or one."""

import math

import pytest
import torch
from slow import DIM, HEADS, KV_HEADS, blocks, model_of, projection

from sparing.core.samples import TextSample
from sparing.errors import InvalidInputError
from sparing.methods.heads.layer_error import LayerError
from sparing.scoring import score


def texts(*lengths):
    g = torch.Generator().manual_seed(1)
    return [TextSample(tuple(torch.randint(1, 64, (n,), generator=g).tolist())) for n in lengths]


def calls(model, ids):
    """Per layer (queries, keys, values) as the attention gets them, float64, of a model of transformers' own."""
    from transformers import AttentionInterface

    found = []

    def attention(module, query, key, value, mask, scaling=None, **kwargs):
        found.append((query[0], key[0], value[0], scaling or query.shape[-1] ** -0.5))
        keys, values = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (key, value))
        return torch.nn.functional.scaled_dot_product_attention(
            query, keys, values, is_causal=True, scale=scaling
        ).transpose(1, 2), None

    before = model.config._attn_implementation
    AttentionInterface.register("slow_layer_error", attention)
    try:
        model.set_attn_implementation("slow_layer_error")
        with torch.no_grad():
            model(torch.tensor([ids]), use_cache=False)
    finally:
        model.set_attn_implementation(before)
        AttentionInterface._global_mapping.pop("slow_layer_error", None)
    return found


def softmax(logits):
    top = max(logits.values())
    weights = {j: math.exp(logit - top) for j, logit in logits.items()}
    total = sum(weights.values())
    return {j: weight / total for j, weight in weights.items()}


def slow(model, ids, tokens, steps, window, kernel):
    """e_l of one text, by the definition."""
    errors, end = [], len(ids) - steps
    for layer, (q, k, v, scale) in enumerate(calls(model, ids)):
        out = projection(model, layer).weight.detach()  # (E, Hq·D) of a linear map
        row = lambda h, i, seen: softmax(  # noqa: E731
            {j: scale * float(q[h, i] @ k[h // (HEADS // KV_HEADS), j]) for j in seen if j <= i}  # noqa: B023
        )
        mass = [0.0] * end
        for i in range(end - window, end):
            for h in range(HEADS):
                for j, weight in row(h, i, range(end)).items():
                    mass[j] += weight / window / HEADS
        voted = range(end - window)
        pooled = {}
        for j in voted:
            near = [mass[m] for m in range(j - kernel // 2, j + kernel // 2 + 1) if m in voted]
            pooled[j] = sum(near) / len(near)
        kept = sorted(sorted(voted, key=lambda j: -pooled[j])[: tokens - window]) + list(range(end - window, len(ids)))
        total = 0.0
        for i in range(end, len(ids)):
            sums = []
            for seen in (range(len(ids)), kept):
                z = [sum(w * v[h // (HEADS // KV_HEADS), j] for j, w in row(h, i, seen).items()) for h in range(HEADS)]
                sums.append(out @ torch.cat(z))
            total += float((sums[1] - sums[0]).norm()) / (float(sums[0].norm()) + 1e-5)
        errors.append(total / steps)
    return errors


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_equals_the_definition(name):
    model = model_of(name)
    samples = texts(40, 33, 47)
    found = score(model, LayerError(tokens=9, steps=4, window=3, kernel_size=3), data=samples)
    wanted = torch.tensor([slow(model, list(s.ids), 9, 4, 3, 3) for s in samples])
    assert found.axes == ("layer",)
    assert found.n == 3
    torch.testing.assert_close(found.values, wanted.mean(0).float(), atol=1e-5, rtol=0)
    assert bool((found.values > 0.01).all())


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_a_budget_that_holds_the_prompt_loses_nothing(name):
    found = score(model_of(name), LayerError(tokens=24, steps=16, window=8), data=texts(40))
    assert float(found.values.abs().max()) < 1e-6


def test_fewer_tokens_lose_more():
    model = model_of("llama")
    small, large = (score(model, LayerError(tokens=t, steps=8, window=2), data=texts(200)).values for t in (4, 150))
    assert bool((small > large).all())


def test_a_layer_whose_values_are_all_alike_loses_nothing_and_the_others_do():
    """If every token says the same, it does not matter which are read."""
    model = model_of("llama")
    attention = blocks(model)[1].self_attn
    with torch.no_grad():
        attention.v_proj.weight.zero_()
        attention.v_proj.bias = torch.nn.Parameter(torch.ones(KV_HEADS * DIM, dtype=torch.float64))
    found = score(model, LayerError(tokens=10, steps=4), data=texts(60)).values
    assert float(found[1]) < 1e-6
    assert float(found[0]) > 0.01


def test_a_text_that_is_too_short_is_not_counted():
    long, short = texts(60, 20)
    found = score(model_of("llama"), LayerError(), data=[long, short])
    alone = score(model_of("llama"), LayerError(), data=[long])
    assert found.n == 1
    torch.testing.assert_close(found.values, alone.values, atol=1e-6, rtol=0)
    with pytest.raises(InvalidInputError, match="samples of which at least one counts"):
        score(model_of("llama"), LayerError(), data=[short])


@pytest.mark.parametrize("bad", [{"tokens": 7}, {"steps": 0}, {"window": 0}, {"kernel_size": 2}])
def test_refuses(bad):
    with pytest.raises(InvalidInputError, match=next(iter(bad))):
        LayerError(**bad)
