"""Every registered method, every contract check, every tiny model where models matter."""

from __future__ import annotations

import pytest

from sparing.core.method import methods
from sparing.testing import CHECKS, DeclaredRefusal, run_check
from sparing.testing.contract import models_for

METHODS = methods()
CASES = [
    pytest.param(method, check, model, id=f"{method}-{check.name}-{model}")
    for method in METHODS
    for check in CHECKS.values()
    for model in models_for(check)
]


@pytest.mark.parametrize(("method", "check", "model"), CASES)
def test_method_keeps_promise(method, check, model):
    try:
        run_check(check, METHODS[method].recipe, model)
    except DeclaredRefusal as refusal:
        pytest.skip(str(refusal))


def test_every_check_says_what_it_proves():
    for check in CHECKS.values():
        assert len(check.promise) > 30, check.name
