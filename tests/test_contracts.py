"""Every registered method, every contract check, and the tiny models where models matter.

`make test` takes the two structures that differ most; `make contracts` takes all (SPARING_ALL_MODELS=1).
"""

from __future__ import annotations

import os
from functools import partial

import pytest
import transformers
from packaging import version

from sparing import H2O, AdaKV, SnapKV, StreamingLLM, ThinK
from sparing.adapters.structure import read_structure
from sparing.core.method import methods
from sparing.core.prefill import SparsePrefill
from sparing.errors import UnsupportedModelError
from sparing.kernels import compact
from sparing.testing import CHECKS, TINY_MODELS, DeclaredRefusal, run_check, tiny_model
from sparing.testing.contract import models_for
from sparing.testing.measurements import identity, with_measurements
from sparing.testing.prefill import ON_CALLS, ON_MODELS, SOME_MODELS

METHODS = {name: info for name, info in methods().items() if info.family == "kv_cache"}
SPARSE = {name: info for name, info in methods().items() if issubclass(info.recipe, SparsePrefill)}


def unsupported() -> dict[str, str]:
    """Tiny models whose cache this version of transformers builds in a way of its own."""
    refused = {}
    for name in TINY_MODELS:
        try:
            read_structure(tiny_model(name))
        except UnsupportedModelError as error:
            refused[name] = str(error)
    return refused


UNSUPPORTED = unsupported()
# Every head for itself, and whole tokens only.
FEW = ("llama", "deepseek_v3")
MODELS = tuple(TINY_MODELS) if os.environ.get("SPARING_ALL_MODELS") == "1" else FEW
CASES = [
    pytest.param(method, check, model, id=f"{method}-{check.name}-{model}")
    for method in METHODS
    for check in CHECKS.values()
    for model in models_for(check, MODELS)
]


@pytest.mark.parametrize(("method", "check", "model"), CASES)
def test_method_keeps_promise(method, check, model):
    if model in UNSUPPORTED:
        pytest.skip(UNSUPPORTED[model])
    try:
        run_check(check, METHODS[method].recipe, model)
    except DeclaredRefusal as refusal:
        pytest.skip(str(refusal))


@pytest.mark.parametrize("check", ON_CALLS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", SPARSE)
def test_sparse_prefill_keeps_promise(name, check):
    check(with_measurements(SPARSE[name].recipe, identity("llama")))


@pytest.mark.parametrize("model", SOME_MODELS)
@pytest.mark.parametrize("check", ON_MODELS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", SPARSE)
def test_sparse_prefill_keeps_promise_on_models(name, check, model):
    check(with_measurements(SPARSE[name].recipe, identity(model)), model)


CODED = {
    "snapkv 8 bits": partial(SnapKV, bits=8),
    "adakv 4 bits": partial(AdaKV, bits=4),
    "h2o 8 bits": partial(H2O, bits=8),
    "streaming_llm 4 bits": partial(StreamingLLM, bits=4),
    "think": ThinK,
    "think 8 bits": partial(ThinK, bits=8),
}
CODED_CASES = [
    pytest.param(make, check, model, id=f"{name}-{check.name}-{model}")
    for name, make in CODED.items()
    for check in CHECKS.values()
    if check.models != "none"
    for model in models_for(check, ("llama", "gpt2", "gpt_oss", "gemma3", "deepseek_v3"))
]


@pytest.mark.parametrize(("make", "check", "model"), CODED_CASES)
def test_codes_keep_promise(make, check, model, monkeypatch):
    if model in UNSUPPORTED:
        pytest.skip(UNSUPPORTED[model])
    # Tiny prompts: with pages and windows of the usual size nothing would become codes.
    monkeypatch.setattr(compact, "PAGE", 8)
    monkeypatch.setattr(compact, "RECENT", 2)
    try:
        run_check(check, make, model)
    except DeclaredRefusal as refusal:
        pytest.skip(str(refusal))


def test_current_transformers_supports_every_tiny_model():
    if version.parse(transformers.__version__) < version.parse("5.20"):
        pytest.skip("hybrid models bring a cache class of their own in early 5.x, which sparing refuses by name")
    assert not UNSUPPORTED


def test_every_check_says_what_it_proves():
    for check in CHECKS.values():
        assert len(check.promise) > 30, check.name
