"""The boundary predictor: learns planted boundaries, agrees with a slow regression, is what calibration saves."""

import math

import pytest
import torch
from click.testing import CliRunner

import sparing
from sparing.cli import cli
from sparing.core.parsing import parse_method
from sparing.core.samples import TextSample
from sparing.core.scores import load_scores
from sparing.errors import InvalidInputError
from sparing.measures.boundaries import key_features, pairs_within, scored
from sparing.methods.heads.boundaries import Boundaries, Text, logistic, windows
from sparing.testing import tiny_model


def test_the_regression_is_at_its_minimum():
    """At the minimum of a convex loss its gradient is 0: Σ (σ(w·x + b) - y) x + ridge w, and for the bias likewise."""
    g = torch.Generator().manual_seed(0)
    inputs = torch.randn(300, 5, generator=g)
    labels = (inputs @ torch.tensor([1.0, -2.0, 0.0, 0.5, 0.0]) + torch.randn(300, generator=g)) > 1
    weights = logistic(inputs, labels, 2.0)

    def gradient(bias):
        rest = torch.sigmoid(inputs.double() @ weights + bias) - labels.double()
        return inputs.double().T @ rest + 2.0 * weights, float(rest.sum()) + 2.0 * bias

    low, high = -10.0, 10.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (low, middle) if gradient(middle)[1] > 0 else (middle, high)
    assert float(gradient(low)[0].abs().max()) < 1e-8
    assert weights[1] < weights[2] < weights[0]


def test_what_is_learned_from_is_what_is_scored():
    keys = torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(0))
    weights = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(1)) * pairs_within(4)
    features = key_features(keys, 4)
    found = windows(features, pairs_within(4)) @ weights[:, pairs_within(4)].flatten()
    torch.testing.assert_close(found, scored(features, weights)[4:-3], rtol=1e-4, atol=1e-5)


def planted(seed):
    """Keys that turn every 20 tokens, and boundaries there."""
    g = torch.Generator().manual_seed(seed)
    keys = torch.randn(2, 200, 8, generator=g) * 0.3
    keys = keys + torch.randn(2, 10, 8, generator=g).repeat_interleave(20, dim=1)
    labels = torch.zeros(200, dtype=torch.bool)
    labels[20::20] = True
    return Text(key_features(keys, 4), labels)


def test_planted_boundaries_are_learned_and_found_in_unseen_texts():
    scorer = Boundaries()
    weights = scorer._learned([planted(seed) for seed in range(8)])
    assert sum(scorer._found(weights, planted(seed)) for seed in range(8, 12)) / 4 > 0.9
    # Of 20 positions per boundary, chance finds 1 in 20.
    assert scorer._found(torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(3)), planted(8)) < 0.6
    empty = Text(planted(0).features, torch.zeros(200, dtype=torch.bool))
    assert math.isnan(scorer._found(weights, empty))


def test_calibrating_saves_a_predictor_that_prompts_are_read_with(tmp_path):
    path = tmp_path / "dhsa.safetensors"
    words = ["calibrate", "--method", "dhsa", "--samples", "4", "--length", "192", "--out", str(path)]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    (scores,) = load_scores(path)
    assert scores.axes == ("layer",)
    assert scores.extras["weights"].shape == (4, 2, 8, 8)
    assert bool((scores.values >= 0).all() and (scores.values <= 1).all())
    assert "3 texts were learned from, 1 scored" in scores.notes
    assert parse_method(f"dhsa(scores={path})", 0.5).measurements == (scores,)


def test_texts_without_boundaries_and_bad_numbers_are_refused():
    with pytest.raises(InvalidInputError, match="without a boundary"):
        sparing.score(tiny_model("llama"), "boundaries", data=[TextSample((1, 2, 3, 4, 5, 6, 7))])
    for bad in ({"window": 0}, {"distance": 0}, {"theta": 0.9}, {"chunk": 0}, {"ridge": 0.0}):
        with pytest.raises(InvalidInputError, match=next(iter(bad))):
            Boundaries(**bad)
