"""A measurement whose batches are spread over workers is the measurement of one process."""

from __future__ import annotations

import pytest
import torch

import sparing
from sparing.core.head_scorer import StopRule, parse_scorer
from sparing.errors import InvalidInputError, ScoresMismatchError
from sparing.loading import ModelSpec
from sparing.scale.pool import Cluster
from sparing.scale.scores import Measurement, _in_order, measure
from sparing.scoring import Settings

SETTINGS = Settings(samples=5, length=160, batch_size=2)


def of_one_process(scorer):
    loaded = ModelSpec().load()
    return sparing.score(
        loaded.model, scorer, loaded.tokenizer, samples=5, length=160, batch_size=2, name="bundled"
    )  # fmt: skip


def equal(a, b):
    same = {
        name: (a.__dict__[name], b.__dict__[name])
        for name in ("axes", "scorer", "model", "parameters", "data", "n", "notes")
    }
    assert all(first == second for first, second in same.values()), same
    assert torch.equal(a.values, b.values)
    errors = (a.standard_error, b.standard_error)
    assert errors == (None, None) or torch.equal(*errors)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["induction", "qrhead", "retrieval"])
def test_means_and_others_are_the_same_here_and_on_ray(name, ray):
    alone = of_one_process(name)
    for cluster in (None, Cluster("auto", workers=2)):
        equal(measure(Measurement(ModelSpec(), parse_scorer(name), SETTINGS), cluster), alone)


@pytest.mark.slow
def test_the_stop_rule_stops_at_the_same_sample_on_ray(ray):
    settings = Settings(samples=30, length=160, batch_size=1, stop=StopRule(patience=3))
    here, there = (
        measure(Measurement(ModelSpec(), parse_scorer("induction"), settings), cluster)
        for cluster in (None, Cluster("auto", workers=2))
    )
    equal(here, there)
    assert here.n < 30


def test_batches_that_come_early_wait():
    assert list(_in_order([(2, "c"), (0, "a"), (3, "d"), (1, "b")])) == ["a", "b", "c", "d"]


def test_another_model_is_refused_before_anything_is_measured():
    def refuse(identity):
        assert identity.name == "bundled"
        raise ScoresMismatchError("another model")

    told, measurement = [], Measurement(ModelSpec(), parse_scorer("induction"), SETTINGS)
    with pytest.raises(ScoresMismatchError):
        measure(measurement, None, refuse, lambda *words: told.append(words))
    assert told == []


@pytest.mark.parametrize("numbers", [{"samples": 0}, {"batch_size": 0}, {"max_seconds": 0.0}])
def test_numbers_that_cannot_be(numbers):
    with pytest.raises(InvalidInputError):
        Settings(**numbers)
