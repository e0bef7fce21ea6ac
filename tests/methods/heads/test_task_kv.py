"""Semantic distance on planted heads and as a float64 loop."""

from __future__ import annotations

import math

import pytest
import torch

from sparing.core.samples import TextSample
from sparing.errors import InvalidInputError
from sparing.methods.heads.task_kv import SemanticDistance
from sparing.scoring import score
from sparing.testing import planted, tiny_model
from tests.methods.heads.maps import CLOSE, maps, tokens


def test_the_head_that_gathers_something_else_is_far():
    """Three heads gather token a, one gathers b: the centre is (3a + b) / 4 with a and b orthogonal unit vectors."""
    heads = [planted.columns({2: 1.0})] * 3 + [planted.columns({5: 1.0})]
    text = TextSample(tuple(range(10, 50)))
    found = score(planted.planted_model([heads]), SemanticDistance(), data=[text]).values[0]
    assert found.tolist() == pytest.approx([math.sqrt(2) / 4] * 3 + [3 * math.sqrt(2) / 4], abs=CLOSE)


def test_only_the_most_attended_tokens_count():
    """A head gives .6, .3, .1 to three tokens; with two that count, the third's share is lost, not spread."""
    heads = [planted.columns({0: 0.6, 1: 0.3, 2: 0.1})] + [planted.columns({5: 1.0})] * 3
    text = TextSample(tuple(range(10, 50)))
    model = planted.planted_model([heads])
    for count, kept in ((2, (0.6, 0.3)), (3, (0.6, 0.3, 0.1)), (1, (0.6,))):
        found = score(model, SemanticDistance(tokens=count), data=[text]).values[0]
        length = math.sqrt(sum(share**2 for share in kept) + 1)  # from the others' unit vector
        assert found.tolist() == pytest.approx([0.75 * length, *[0.25 * length] * 3], abs=CLOSE)


def test_only_the_last_rows_are_looked_at():
    """A head at distance 1 gathers what stands before the last row, if one row is looked at."""
    heads = [planted.distance(1)] + [planted.columns({0: 1.0})] * 3
    text = TextSample((7, 7, 8, 9))
    model = planted.planted_model([heads])
    one = score(model, SemanticDistance(window=1), data=[text]).values[0]  # e_8 against e_7
    assert one.tolist() == pytest.approx([0.75 * math.sqrt(2)] + [0.25 * math.sqrt(2)] * 3, abs=CLOSE)
    two = score(model, SemanticDistance(window=2), data=[text]).values[0]  # (e_7 + e_8) / 2 against e_7
    assert two.tolist() == pytest.approx([0.75 * math.sqrt(0.5)] + [0.25 * math.sqrt(0.5)] * 3, abs=CLOSE)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize(("window", "count"), [(8, 6), (32, 256), (1, 1)])
def test_it_is_the_definition_on_random_models(name, window, count):
    """Query heads that share a KV head gather the same values with their own weights; short texts in a batch too."""
    model = tiny_model(name, torch.float64)
    texts = [TextSample(tokens(length, length)) for length in (40, 6, 25)]
    found = score(model, SemanticDistance(window, count), data=texts).values
    expected = sum(distances(model, name, text.ids, window, count) for text in texts) / 3
    assert torch.allclose(found.double(), expected, rtol=CLOSE, atol=CLOSE)


def distances(model, name, ids, window, count):
    attention, values = maps(model, ids), values_of(model, name, ids)
    layers, heads, length = attention.shape[:3]
    result = torch.zeros(layers, heads, dtype=torch.float64)
    for layer in range(layers):
        gathered = []
        for head in range(heads):
            mass = attention[layer, head, -min(window, length) :].mean(0).tolist()
            chosen = sorted(range(length), key=lambda j: -mass[j])[:count]
            kv = head // (heads // values[layer].shape[1])
            gathered.append(sum(mass[j] * values[layer][j, kv] for j in chosen))
        centre = sum(gathered) / heads
        result[layer] = torch.stack([(v - centre).norm() for v in gathered])
    return result


def values_of(model, name, ids):
    """Per layer (T, H, D) values, as the projections make them."""
    found, handles = [], []
    for block in model.transformer.h if name == "gpt2" else model.model.layers:
        maker = block.attn.c_attn if name == "gpt2" else block.self_attn.v_proj
        width = 32 if name == "gpt2" else 16
        handles.append(
            maker.register_forward_hook(
                lambda _, args, out, width=width: found.append(out[0, :, -width:].view(len(ids), -1, 8))
            )
        )
    with torch.no_grad():
        model(torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("bad", [{"window": 0}, {"tokens": 0}])
def test_numbers_out_of_range_are_refused(bad):
    with pytest.raises(InvalidInputError, match=next(iter(bad))):
        SemanticDistance(**bad)
