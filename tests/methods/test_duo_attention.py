"""DuoAttention: which heads keep everything, and what the others keep, worked out by hand."""

import math

import pytest
import torch

import sparing
from methods.roles import MODEL, kept, measured
from sparing.core.scores import Scores
from sparing.errors import InvalidInputError, ScoresMismatchError

GATES = measured("duo", [[0.1, 0.9], [0.7, 0.0]])


def ends(first, total, length=64):
    """The first tokens and the newest, `total` in all."""
    return [*range(first), *range(length - total + first, length)]


@pytest.mark.parametrize(
    ("keep", "full", "others"),
    [
        (0.75, [(0, 1), (1, 0)], [32, 32]),  # 4 · 48 = 192 = 2 · 64 + 2 · 32; a third full head would leave 0
        (0.5, [(0, 1)], [22, 21, 21]),  # 128 = 64 + 22 + 21 + 21; a second would leave 0 < 2 · 8
        (0.25, [], [16, 16, 16, 16]),  # 64: one full head would leave 0
        (18, [], [18, 18, 18, 18]),  # 72 = 64 + 8 < 64 + 3 · 8
        (22, [(0, 1)], [8, 8, 8]),  # 88 = 64 + 3 · 8
    ],
)
def test_open_gates_keep_everything_and_the_others_sinks_and_recent_tokens(keep, full, others):
    found = kept(sparing.DuoAttention(keep, GATES, sinks=4, recent=4))
    left = iter(others)
    for layer in (0, 1):
        for head in (0, 1):
            expected = list(range(64)) if (layer, head) in full else ends(4, next(left))
            assert found[layer][head] == expected, (layer, head)


def test_gates_of_query_heads_count_by_the_best_of_a_kv_head():
    by_query = measured("retrieval", [[0.1, 0.0, 0.0, 0.9], [0.0, 0.7, 0.0, 0.0]])
    method, same = (sparing.DuoAttention(0.5, scores) for scores in (by_query, GATES))
    assert method.parts().allocator.importances == ((pytest.approx(0.1), pytest.approx(0.9)), (pytest.approx(0.7), 0.0))
    assert kept(method) == kept(same)


def test_a_gate_that_was_not_measured_opens_last():
    holed = measured("duo", [[math.nan, 0.0], [0.0, 0.0]])
    assert sparing.DuoAttention(0.5, holed).parts().allocator.importances[0] == (-math.inf, 0.0)


def test_layers_are_those_of_the_model_also_where_some_slide():
    """gemma3's first layer slides and is not compressed; the open gate of layer 2 is that of its last layer."""
    from sparing.adapters.lens import ModelLens
    from sparing.testing import tiny_model

    identity = ModelLens(tiny_model("gemma3")).identity
    assert identity.num_layers == 3
    gates = measured("duo", [[1.0, 1.0], [0.1, 0.0], [0.0, 0.9]], identity)
    found = kept(sparing.DuoAttention(0.5, gates, sinks=0, recent=4), name="gemma3")
    assert sorted(found) == [1, 2]
    assert [len(head) for layer in (1, 2) for head in found[layer]] == [22, 21, 21, 64]


def test_what_is_decoded_stays():
    from sparing.testing import held_positions, random_prompt, run_method, tiny_model

    run = run_method(tiny_model("llama"), sparing.DuoAttention(22, GATES, 4, 4), random_prompt(64, steps=5))
    assert [len(head) for head in held_positions(run.cache)[0][0]] == [13, 69]


@pytest.mark.parametrize("nothing", [None, (), "duo.safetensors", (GATES, "x")])
def test_no_measurement_is_refused_with_the_way_to_one(nothing):
    with pytest.raises(InvalidInputError, match=r"duo.scores: got .*sparing calibrate --method duo"):
        sparing.DuoAttention(0.5, nothing)


def test_measurements_of_other_units_are_refused():
    with pytest.raises(ScoresMismatchError, match="layer × head"):
        sparing.DuoAttention(0.5, Scores(torch.ones(2), ("layer",), "layer_error", MODEL))


@pytest.mark.parametrize("bad", [{"sinks": -1}, {"recent": -1}])
def test_refuses(bad):
    with pytest.raises(InvalidInputError, match=next(iter(bad))):
        sparing.DuoAttention(0.5, GATES, **bad)
