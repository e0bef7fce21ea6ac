"""Focus: the entropy of rows, against heads that look at one, two or all tokens, and a float64 loop."""

from __future__ import annotations

import math

import pytest
import torch

from sparing.core.samples import TextSample
from sparing.methods.heads.focus import Focus
from sparing.scoring import score
from sparing.testing import planted, tiny_model
from tests.methods.heads.maps import CLOSE, NAMES, maps, tokens

LENGTH = 40
SLIDING_WINDOW = 16  # of gemma3's first layer


def test_focus_worked_by_hand():
    """One token: 1. All alike: 0. Two alike: 1 - ln 2 / ln n for rows that see n > 2 keys, and 0 for the row with 2."""
    heads = [planted.columns({0: 1.0}), planted.uniform(), planted.columns({0: 0.5, 1: 0.5}), planted.distance(2)]
    model = planted.planted_model([heads])
    found = score(model, Focus(), data=[TextSample(tokens(LENGTH))]).values[0]
    two = sum(1 - math.log(2) / math.log(n) for n in range(2, LENGTH + 1)) / (LENGTH - 1)
    assert found.tolist() == pytest.approx([1, 0, two, 1], abs=CLOSE)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_definition_on_random_models(name):
    model = tiny_model(name, torch.float64)
    text = TextSample(tokens(LENGTH))
    attention = maps(model, text.ids)
    found = score(model, Focus(), data=[text]).values
    for layer, heads in enumerate(attention):
        for head, rows in enumerate(heads):
            total = 0.0
            for t in range(1, LENGTH):
                seen = t + 1 if name != "gemma3" or layer > 0 else min(t + 1, SLIDING_WINDOW)
                entropy = -sum(p * math.log(p) for p in rows[t].tolist() if p > 0)
                total += 1 - entropy / math.log(seen)
            assert float(found[layer, head]) == pytest.approx(total / (LENGTH - 1), abs=CLOSE)


def test_learned_sinks_outside_of_the_keys_do_not_make_a_head_look_focused():
    """gpt_oss: with keys that are all 0 every row is uniform over its keys, whatever the sink takes of it."""
    model = tiny_model("gpt_oss")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight.zero_()
            layer.self_attn.k_proj.bias.zero_()
    found = score(model, Focus(), data=[TextSample(tokens(LENGTH))]).values
    assert torch.allclose(found, torch.zeros(2, 4), atol=1e-5)


def test_a_text_of_one_token_says_nothing():
    found = score(tiny_model("llama"), Focus(), data=[TextSample((5,)), TextSample(tokens(9))])
    assert found.n == 1
    assert found.values.isfinite().all()
