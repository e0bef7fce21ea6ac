"""The ablation curve: on the bundled model, whose copy heads are known, and head by head with the asking replaced."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch

from sparing.adapters.lens import ModelLens
from sparing.compare import ablation_curve as module
from sparing.compare.ablation_curve import AblationCurve, ablation_curve
from sparing.core.edits import ABLATIONS, AblateHeads
from sparing.core.scores import Scores
from sparing.errors import InvalidInputError, OutputError, ScoresMismatchError
from sparing.loading import ModelSpec
from sparing.methods.heads.uniform_heads import UniformHeads
from sparing.tasks import get
from sparing.testing import tiny_model
from sparing.testing.inspection import assert_same_trace, trace

# What trained into the bundled model: all of layer 2 and the first head of layer 3 copy what is asked for.
COPY_HEADS = [(2, 0), (2, 1), (2, 2), (2, 3), (3, 0)]


@pytest.fixture(scope="module")
def bundled():
    return ModelSpec(device="cpu").load()


def scores_of(model, best, name="planted"):
    """A measurement that ranks the given heads first, in their order."""
    identity = ModelLens(model).identity
    values = torch.zeros(identity.num_layers, identity.num_heads)
    for place, head in enumerate(best):
        values[head] = len(best) - place
    return Scores(values, ("layer", "head"), name, identity)


def test_without_the_copy_heads_no_needle_is_found(bundled, tmp_path):
    scores, before = scores_of(bundled.model, COPY_HEADS), trace(bundled.model)
    torch_state = torch.get_rng_state()
    curve = ablation_curve(
        bundled.model, bundled.tokenizer, scores, get("needle_single"), length=128, samples=4, counts=[1, 5], draws=1
    )
    assert curve.full == 1.0
    assert curve.top[1] <= 0.05
    assert curve.bottom == [1.0, 1.0]
    assert curve.top[0] == 1.0, "of several copy heads one can be spared"
    assert curve.heads[:5] == COPY_HEADS
    assert (curve.scorer, curve.task, curve.kind, curve.n) == ("planted", get("needle_single").label, "zero", 4)
    assert_same_trace(before, trace(bundled.model))
    assert torch.equal(torch.get_rng_state(), torch_state)

    curve.save(tmp_path / "curve.json")
    saved = json.loads((tmp_path / "curve.json").read_text())
    assert saved.keys() == asdict(curve).keys()
    assert AblationCurve(**{**saved, "heads": [tuple(head) for head in saved["heads"]]}) == curve
    with pytest.raises(OutputError):
        curve.save(tmp_path / "curve.json" / "below")


@pytest.mark.parametrize("kind", ["mean", "uniform", "resample"])
def test_every_way_of_taking_them_away_does_it(bundled, kind):
    curve = ablation_curve(
        bundled.model, bundled.tokenizer, scores_of(bundled.model, COPY_HEADS), get("needle_single"),
        length=96, samples=2, counts=[5], draws=1, kind=kind,
    )  # fmt: skip
    assert curve.full == 1.0
    assert curve.top[0] <= 0.05
    assert curve.bottom[0] == 1.0


@pytest.fixture
def asked(monkeypatch):
    """Which edits were at work when the task was asked; the score is minus the number of heads that were away."""
    seen = []

    def count(model, tokenizer, task, samples, taken):
        seen.append(taken)
        return float(-len(taken.pairs) if taken else 0)

    monkeypatch.setattr(module, "_score", count)
    return seen


def curve_of(bundled, scores=None, **more):
    scores = scores or scores_of(bundled.model, COPY_HEADS)
    return ablation_curve(
        bundled.model, bundled.tokenizer, scores, get("needle_single"), **{"length": 96, "samples": 1, **more}
    )


def test_which_heads_are_away(bundled, asked):
    told = []
    curve = curve_of(bundled, draws=3, seed=7, progress=lambda done, total, what: told.append((done, total, what)))
    assert curve.counts == [1, 2, 4, 8]
    assert asked[0] is None
    position = 1
    for count in curve.counts:
        top, bottom, *drawn = (list(edit.pairs) for edit in asked[position : position + 5])
        assert top == curve.heads[:count]
        assert bottom == curve.heads[-count:]
        for some in drawn:
            assert len(set(some)) == count
            assert not set(some) & set(top), "drawn heads are outside the top"
        position += 5
    assert len(asked) == position == 21
    assert len({edit.pairs for edit in asked[-3:]}) == 3, "draws differ"
    assert (curve.full, curve.top, curve.bottom) == (0.0, [-1, -2, -4, -8], [-1, -2, -4, -8])
    assert curve.random == [[-count] * 3 for count in curve.counts]
    assert [done for done, _, _ in told] == list(range(1, 22))
    assert {total for _, total, _ in told} == {21}
    assert told[-1][2] == "8 heads away"


def test_the_seed_says_which_heads_are_drawn(bundled, asked):
    for seed in (1, 1, 2):
        curve_of(bundled, counts=[4], draws=2, seed=seed)
    runs = [[edit and edit.pairs for edit in asked[start : start + 5]] for start in (0, 5, 10)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


@pytest.mark.parametrize("kind", ABLATIONS)
def test_the_kind_reaches_the_edit(bundled, asked, kind):
    curve = curve_of(bundled, counts=[2], draws=1, kind=kind)
    assert curve.kind == kind
    for edit in asked[1:]:
        if kind == "uniform":
            assert isinstance(edit, UniformHeads)
        else:
            assert isinstance(edit, AblateHeads)
            assert edit.kind == kind
            assert (edit.reference is None) == (kind == "zero")


def test_bad_input_is_refused(bundled, asked):
    for more, message in (
        ({"draws": 0}, "draws: got 0"),
        ({"samples": 0}, "samples: got 0"),
        ({"counts": [0]}, "counts: .* from 1 to 8"),
        ({"counts": [2, 9]}, "counts: .* from 1 to 8"),
        ({"length": 10**6}, "length: got 1000000"),
        ({"kind": "shuffle"}, "kind: got 'shuffle'"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            curve_of(bundled, **more)


def test_scores_of_other_units_or_another_model_are_refused(bundled, asked):
    ours = scores_of(bundled.model, COPY_HEADS)
    with pytest.raises(ScoresMismatchError, match="layer × head"):
        curve_of(bundled, replace(ours, axes=("layer", "kv_head")))
    with pytest.raises(ScoresMismatchError, match="measured on"):
        curve_of(bundled, scores_of(tiny_model("llama"), [(0, 0)]))
    assert asked == []
