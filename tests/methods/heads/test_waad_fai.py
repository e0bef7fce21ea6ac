"""WAAD and FAI against heads whose maps are known, and the definitions in float64; credit by hand."""

from __future__ import annotations

import math

import pytest
import torch

from sparing.core.samples import TextSample
from sparing.errors import InvalidInputError
from sparing.methods.heads.waad_fai import Credit, WaadFai, chosen_layers
from sparing.scoring import score
from sparing.testing import planted, tiny_model
from tests.methods.heads.maps import CLOSE, NAMES, maps, tokens

LENGTH = 60
ONE_OF_FOUR = 0.25


def timelines(heads, **more):
    text = TextSample(tuple(range(LENGTH)), more.pop("response", 0))
    model = planted.planted_model([heads])
    return score(model, WaadFai(share=ONE_OF_FOUR, layers="all", **more), data=[text])


@pytest.mark.parametrize("window", [4, 10])
@pytest.mark.parametrize("back", [1, 4, 7, 15])
def test_waad_of_a_head_at_distance_d_is_min_d_w(back, window):
    found = timelines([planted.columns({0: 1.0})] * 3 + [planted.distance(back)], window=window)
    assert found.extras["local_heads"].tolist() == [[0, 3]]
    expected = [min(t, back, window) for t in range(LENGTH)]
    assert found.values[0].tolist() == pytest.approx(expected, rel=CLOSE)


def test_fai_of_constant_columns_is_that_constant():
    """The global head gives columns 0, 1 and 2 the shares .5, .3 and .2 from every row on that sees them."""
    found = timelines([planted.columns({0: 0.5, 1: 0.3, 2: 0.2})] + [planted.distance(1)] * 3)
    assert found.extras["global_heads"].tolist() == [[0, 0]]
    fai = found.values[1]
    assert fai[:3].tolist() == pytest.approx([0.5, 0.3, 0.2], rel=CLOSE)
    assert fai[3:50].tolist() == pytest.approx([0] * 47, abs=CLOSE)
    assert fai[50:].isnan().all(), "no token comes 10 places after these"


def test_fai_looks_at_a_band_of_later_tokens_only():
    """A head at distance 15: column s is looked at by row s + 15 alone, which is one of near..far rows or none."""
    heads = [planted.distance(15)] + [planted.distance(1)] * 3
    fai = timelines(heads, near=15, far=18).values[1]
    assert fai[1:42].tolist() == pytest.approx([1 / 4] * 41, rel=CLOSE)
    assert fai[42:45].tolist() == pytest.approx([1 / 3, 1 / 2, 1], rel=CLOSE)  # the text ends
    assert fai[45:].isnan().all()
    fai = timelines(heads, near=16, far=18).values[1]
    assert fai[1:44].tolist() == pytest.approx([0] * 43, abs=CLOSE)


def test_only_rows_of_the_response_count():
    found = timelines([planted.columns({0: 1.0})] + [planted.distance(1)] * 3, response=40)
    waad, fai = found.values
    assert waad[:40].isnan().all()
    assert waad[40:].tolist() == pytest.approx([1] * 20, rel=CLOSE)
    # Column 0 is looked at by all of the rows 40 to 50 that count for it.
    assert float(fai[0]) == pytest.approx(1, rel=CLOSE)
    assert fai[1:50].tolist() == pytest.approx([0] * 49, abs=CLOSE)


@pytest.mark.parametrize("name", NAMES)
def test_both_are_the_definitions_on_random_models(name):
    model, response = tiny_model(name, torch.float64), 12
    text = TextSample(tokens(50), response)
    scorer = WaadFai(window=5, near=4, far=9, layers="all")
    found = score(model, scorer, data=[text])
    attention, length = maps(model, text.ids), len(text.ids)
    rows = range(response, length)
    spans = {
        (layer, head): sum(float(a[t, s]) * (t - s) for t in rows for s in range(t + 1))
        for layer, heads in enumerate(attention)
        for head, a in enumerate(heads)
    }
    ranked = sorted(spans, key=spans.get)
    count = int(0.3 * len(ranked))
    local, wide = ranked[:count], ranked[-count:]
    assert sorted(map(tuple, found.extras["local_heads"].tolist())) == sorted(local)
    assert sorted(map(tuple, found.extras["global_heads"].tolist())) == sorted(wide)
    near, far = (sum(attention[head] for head in group) / count for group in (local, wide))
    for t in range(length):
        waad, fai = float(found.values[0, t]), float(found.values[1, t])
        expected = sum(float(near[t, s]) * min(t - s, 5) for s in range(t + 1))
        assert math.isnan(waad) if t < response else waad == pytest.approx(expected, abs=10 * CLOSE)
        viewers = [u for u in rows if t + 4 <= u <= t + 9]
        assert math.isnan(fai) == (not viewers)
        if viewers:
            assert fai == pytest.approx(sum(float(far[u, t]) for u in viewers) / len(viewers), abs=CLOSE)


def test_layers_in_the_middle():
    """[L/3, 2L/3] rounded down; five evenly spaced ones, or as many as there are."""
    assert chosen_layers(32) == [10, 13, 16, 18, 21]
    assert chosen_layers(12) == [4, 5, 6, 7, 8]
    assert chosen_layers(6) == [2, 3, 4]
    assert chosen_layers(1) == [0]


def test_the_middle_is_what_is_looked_at_by_default():
    model = tiny_model("llama", num_hidden_layers=6)
    found = score(model, WaadFai(), data=[TextSample(tokens(30))])
    both = {*found.extras["local_heads"][:, 0].tolist(), *found.extras["global_heads"][:, 0].tolist()}
    assert both <= {2, 3, 4}
    assert len(found.extras["local_heads"]) == int(0.3 * 3 * 4)


@pytest.mark.parametrize("bad", [
    {"window": 0}, {"near": 0}, {"near": 20, "far": 19}, {"share": 0.0}, {"share": 0.51}, {"layers": "some"},
])  # fmt: skip
def test_parameters_out_of_range_are_refused(bad):
    with pytest.raises(InvalidInputError, match=next(iter(bad))):
        WaadFai(**bad)


def test_it_takes_one_text_only():
    with pytest.raises(InvalidInputError, match="exactly 1 text"):
        score(tiny_model("llama"), WaadFai(), data=[TextSample(tokens(30))] * 2)


# Changes of WAAD: 0 4 0 0 8 8 0 0 0 and 0 for the last token; the median of WAAD is 1.
WAAD = torch.tensor([5.0, 5.0, 1.0, 1.0, 1.0, 9.0, 1.0, 1.0, 1.0, 1.0])
FAI = torch.tensor([0.1, 0.1, 0.7, 0.1, 0.1, 0.1, 0.9, 0.1, math.nan, math.nan])


def test_credit_worked_by_hand():
    """Top 2 of 10 changes: 4 and 5. Top 2 of 8 by FAI (0.25 of those that have one): 2 and 6."""
    weights = Credit(share=0.25).weights(WAAD, FAI)
    assert weights["local"].tolist() == [1, 1, 1, 1, 1.5, 1.5, 1, 1, 1, 1]
    assert weights["global"].tolist() == [1, 1, 1.5, 1, 1, 1, 1.5, 1, 1, 1]
    # 2 has no change before it that counts; 6 gives half of its bonus to 4, the first of the largest changes.
    assert weights["coupled"].tolist() == [1, 1, 1.5, 1, 1.25, 1, 1.25, 1, 1, 1]


def test_credit_is_not_moved_further_than_its_reach_nor_by_tokens_that_look_far_back():
    weights = Credit(share=0.25, reach=1).weights(WAAD, FAI)["coupled"]
    assert weights[4:7].tolist() == [1, 1.25, 1.25]
    restless = WAAD.clone()
    restless[6] = 9.0  # above the median: 6 is an anchor that nothing introduces
    weights = Credit(share=0.25).weights(restless, FAI)
    assert torch.equal(weights["coupled"], weights["global"])


def test_credit_moves_bonus_and_makes_none():
    g = torch.Generator().manual_seed(0)
    waad, fai = torch.rand(200, generator=g) * 10, torch.rand(200, generator=g)
    weights = Credit().weights(waad, fai)
    assert weights["local"].sum() == weights["global"].sum() == 200 + 0.5 * 80
    assert float(weights["coupled"].sum()) == pytest.approx(float(weights["global"].sum()))
    assert not torch.equal(weights["coupled"], weights["global"])
