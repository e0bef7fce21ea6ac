"""Uniform heads against the running mean of the values that each row may see, written as a loop in float64."""

from __future__ import annotations

import pytest
import torch

from sparing.core.lens import AttentionCall
from sparing.core.scorer import Softmax
from sparing.editing import edit
from sparing.errors import InvalidInputError
from sparing.measures.uniform import uniform_attention
from sparing.methods.heads.uniform_heads import UniformHeads
from tests.methods.heads import edited_attention as slow
from tests.methods.heads.slow import model_of

NAMES = ("llama", "qwen3", "gpt2", "gemma3", "gpt_oss")


@pytest.mark.parametrize("name", NAMES)
def test_a_uniform_head_says_the_mean_of_the_values_it_sees(name):
    def change(rows, logits):
        visible = (~logits.isinf()).double()
        return visible / visible.sum(-1, keepdim=True)

    slow.check_first_layer(model_of(name), UniformHeads(((0, 1), (0, 2))), [1, 2], change)


def test_that_is_the_running_mean_and_heads_of_a_group_say_the_same():
    model = model_of("llama")
    _, values, _ = slow.calls_of(model, slow.IDS[:1])[0]
    found = slow.outputs(model, slow.IDS[:1], UniformHeads(((0, 0), (0, 1), (0, 2))))[0][0]
    for head in range(3):
        for token in range(slow.LENGTH):
            mean = sum(values[head, seen] for seen in range(token + 1)) / (token + 1)
            assert torch.allclose(found[token, head], mean, atol=1e-13, rtol=1e-13)
    assert torch.equal(found[:, 0], found[:, 1]), "two query heads read one KV head"
    assert not torch.allclose(found[:, 1], found[:, 2], atol=1e-2)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_pads_are_not_seen_and_caches_are(name):
    slow.check_batch_and_decoding(model_of(name), UniformHeads(((0, 1), (0, 2), (1, 3))))


def test_any_pattern_of_visible_keys():
    """Runs of keys take prefix sums, anything else takes the long way; rows that see nothing say 0."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, 2, 300, 5, generator=generator, dtype=torch.float64)
    queries = torch.zeros(2, 4, 300, 3, dtype=torch.float64)
    causal = torch.ones(300, 300, dtype=torch.bool).tril()
    strided = causal & ((torch.arange(300)[:, None] - torch.arange(300)) % 3 == 0)
    pads = torch.arange(300) >= torch.tensor([0, 9])[:, None]
    for seen in (causal[None, None], strided[None, None], (causal & pads[:, None])[:, None]):
        call = AttentionCall(
            0, queries, values[..., :3], values, Softmax(1.0), lambda rows, seen=seen: seen[:, :, rows]
        )
        found = uniform_attention(call)
        assert found.shape == (2, 300, 4, 5)
        weights = seen.double() / seen.sum(-1, keepdim=True).clamp_min(1)
        expected = (weights @ values).repeat_interleave(2, dim=1).transpose(1, 2)
        assert torch.allclose(found, expected, atol=1e-12)
    assert not found[1, :9].any()
    whole = uniform_attention(call).float()
    half = AttentionCall(0, queries, values[..., :3], values.bfloat16(), Softmax(1.0), call.may_see)
    assert uniform_attention(half).dtype == torch.bfloat16
    # values rounded to 2^-9, their mean summed in float64 and rounded once more
    assert torch.allclose(uniform_attention(half).float(), whole, atol=2**-7, rtol=2**-7)


def test_generated_tokens_change():
    model, ids = model_of("llama"), slow.IDS[:1]
    how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    plain = model.generate(ids, **how)
    with edit(model, UniformHeads(tuple((0, head) for head in range(4)))):
        assert not torch.equal(model.generate(ids, **how), plain)
    assert torch.equal(model.generate(ids, **how), plain)


def test_bad_input_is_refused():
    with pytest.raises(InvalidInputError, match=r"pairs: .*at least one"):
        UniformHeads(())
    with pytest.raises(InvalidInputError, match="heads 0 to 3"), edit(model_of("llama"), UniformHeads(((0, 4),))):
        pass
