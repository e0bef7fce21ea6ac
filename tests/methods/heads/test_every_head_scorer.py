"""Every registered head scorer keeps every promise, on tiny models of every structure."""

import pytest

from sparing.core.head_scorer import parse_scorer, scorers
from sparing.errors import SparingError, UnsupportedModelError
from sparing.testing import TINY_MODELS
from sparing.testing.head_scorers import CHECKS

# What learns, learns a few steps only; what repeats long blocks, repeats short ones.
QUICK: dict[str, str] = {
    "echo": "echo(block=16)",
    "induction": "induction(block=16)",
    "duo": "duo(sinks=2,recent=8,steps=3)",
    "lofit": "lofit(epochs=2)",
    "subnetwork": "subnetwork(steps=3)",
}


@pytest.mark.parametrize("model", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", scorers())
def test_promise(name, check, model):
    try:
        check(parse_scorer(QUICK.get(name, name)), model)
    except UnsupportedModelError as refusal:
        pytest.skip(f"refused by name: {refusal}")


@pytest.mark.parametrize("model", [m for m in TINY_MODELS if m not in ("llama", "gemma3", "gpt2")])
@pytest.mark.parametrize("name", scorers())
def test_other_structures_work_or_are_refused_by_name(name, model):
    try:
        CHECKS[0](parse_scorer(QUICK.get(name, name)), model)
    except SparingError as refusal:
        pytest.skip(f"refused by name: {refusal}")
