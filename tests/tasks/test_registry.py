"""Tasks by name."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest

from sparing import tasks
from sparing.errors import InvalidInputError, UnknownNameError
from sparing.tasks.metrics import METRICS
from sparing.tasks.registry import task

NAMES = {
    "common_words",
    "copy",
    "frequent_words",
    "kv_retrieval",
    "needle_multikey",
    "needle_multiquery",
    "needle_multivalue",
    "needle_single",
    "perplexity",
    "variable_tracking",
}


def test_names():
    assert set(tasks.names()) >= NAMES
    assert list(tasks.names()) == sorted(tasks.names())


def test_every_task_says_what_it_is():
    for name in tasks.names():
        made = tasks.get(name)
        assert made.name == made.label == name
        assert made.kind in ("generation", "likelihood")
        assert made.num_samples is None
        assert made.metric in METRICS or (made.kind, made.metric) == ("likelihood", "1/perplexity")
        assert 10 < len(made.description) < 80
        assert "\n" not in made.description
        assert made.questions_per_context >= 1


def test_options_and_labels():
    made = tasks.get("needle_multikey", haystack="noise", keys=8)
    assert made.label == "needle_multikey:haystack=noise:keys=8"
    assert tasks.get(made.label) == made
    assert tasks.get(made.label).questions_per_context == 8
    assert tasks.get("needle_multikey:keys=8", haystack="noise") == made
    assert tasks.get("needle_multikey:keys=4").label == "needle_multikey"
    with pytest.raises(FrozenInstanceError):
        made.keys = 2


def test_unknown_name_suggests():
    with pytest.raises(UnknownNameError, match="needle_single"):
        tasks.get("needle_singel")
    with pytest.raises(UnknownNameError, match="did you mean haystack"):
        tasks.get("needle_single", haystak="noise")


@pytest.mark.parametrize("label", ["copy:4", "copy:questions=many", "copy:questions=0", "copy:", "copy:name=x"])
def test_bad_options_are_refused(label):
    with pytest.raises(InvalidInputError):
        tasks.get(label)


def test_a_name_is_given_once():
    with pytest.raises(AssertionError, match="copy"):
        task("copy")(type(tasks.get("copy")))
