"""ZeroTuning against the paper's two forms: a scaled and renormalised weight, and a biased logit."""

from __future__ import annotations

import math

import pytest
import torch

from sparing.editing import edit
from sparing.errors import InvalidInputError
from sparing.measures import attention
from sparing.methods.heads.zerotuning import BiasFirstToken
from tests.methods.heads import edited_attention as slow
from tests.methods.heads.slow import model_of


@pytest.fixture(autouse=True)
def narrow_tiles(monkeypatch):
    """Three tiles of rows instead of one."""
    monkeypatch.setattr(attention, "ROWS_PER_TILE", 16)


@pytest.mark.parametrize("gamma", [0.25, 3.0])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gemma3"])
def test_the_first_tokens_weight_is_scaled_and_the_row_renormalised(name, gamma):
    def change(rows, logits):
        new = rows.clone()
        new[:, 0] *= gamma
        return new / new.sum(-1, keepdim=True)

    slow.check_first_layer(model_of(name), BiasFirstToken(((0, 1), (0, 2)), gamma), [1, 2], change)


@pytest.mark.parametrize("gamma", [0.25, 3.0])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_that_is_a_bias_of_ln_gamma_on_its_logit(name, gamma):
    def change(rows, logits):
        biased = logits.clone()
        biased[:, 0] += math.log(gamma)
        return biased.softmax(-1)

    slow.check_first_layer(model_of(name), BiasFirstToken(((0, 1), (0, 2)), gamma), [1, 2], change)


def test_by_hand():
    """Weights 1/2, 1/4, 1/4 with γ = 2 become 1, 1/4, 1/4 over 3/2; with γ = 1/2, 1/4, 1/4, 1/4 over 3/4."""
    rows = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.5, 0.25, 0.25]])
    call = slow.call_with(rows, torch.tensor([12.0, 0.0, 24.0]))
    assert slow.attend(call).flatten().tolist() == pytest.approx([12, 6, 12])
    for gamma, expected in ((2.0, [12, 8, 12]), (0.5, [12, 4, 12])):
        found = BiasFirstToken(((0, 0),), gamma).attention(call, slow.attend)
        assert found.flatten().tolist() == pytest.approx(expected)
    call = slow.call_with(rows, torch.tensor([12.0, 0.0, 0.0]))
    found = BiasFirstToken(((0, 0),), 2.0).attention(call, slow.attend)
    assert found.flatten().tolist() == pytest.approx([12, 8, 8])
    found = BiasFirstToken(((1, 0),), 2.0).attention(call, slow.attend)
    assert torch.equal(found, slow.attend(call)), "another layer is left alone"


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_the_first_token_is_found_behind_pads_and_in_caches(name):
    made = BiasFirstToken(tuple((layer, head) for layer in range(2) for head in (1, 2)), 5.0)
    slow.check_batch_and_decoding(model_of(name), made)


def test_a_logit_that_takes_mass_away_counts_in_the_denominator():
    """gpt-oss' sinks are part of the softmax, so the biased logit is the meaning there too."""
    model = model_of("gpt_oss")
    logits, values, _ = slow.calls_of(model, slow.IDS[:1])[0]
    found = slow.outputs(model, slow.IDS[:1], BiasFirstToken(((0, 1),), 3.0))[0][0, :, 1]
    biased = logits[1].clone()
    biased[:, 0] += math.log(3.0)
    sink = model.model.layers[0].self_attn.sinks[1].detach().expand(slow.LENGTH, 1)
    expected = torch.cat([biased, sink], dim=-1).softmax(-1)[:, :-1] @ values[1]
    assert torch.allclose(found, expected, atol=1e-6)  # its own softmax is in float32


def test_a_factor_of_one_changes_no_bit():
    model = model_of("llama")
    with torch.no_grad():
        plain = model(slow.IDS).logits
        with edit(model, BiasFirstToken(((0, 1), (1, 3)), 1.0)):
            assert torch.equal(model(slow.IDS).logits, plain)
        with edit(model, BiasFirstToken(((0, 1), (1, 3)), 1.5)):
            assert not torch.allclose(model(slow.IDS).logits, plain, atol=1e-3)


def test_generated_tokens_change():
    model, ids = model_of("llama"), slow.IDS[:1]
    how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    plain = model.generate(ids, **how)
    with edit(model, BiasFirstToken(tuple((layer, head) for layer in range(2) for head in range(4)), 100.0)):
        assert not torch.equal(model.generate(ids, **how), plain)
    assert torch.equal(model.generate(ids, **how), plain)


def test_bad_input_is_refused():
    for gamma in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(InvalidInputError, match=r"gamma: .*above 0"):
            BiasFirstToken(((0, 0),), gamma)
    with pytest.raises(InvalidInputError, match=r"pairs: .*at least one"):
        BiasFirstToken(())
    with pytest.raises(InvalidInputError, match="heads 0 to 3"), edit(model_of("llama"), BiasFirstToken(((0, 4),))):
        pass
