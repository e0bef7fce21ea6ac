"""One model, and one server for all tests that leave it as they found it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from live import Live, load, serving
from transformers import AutoTokenizer

from sparing.core.parsing import parse_method
from sparing.loading import LoadedModel
from sparing.models import resolve


@pytest.fixture(scope="session")
def live() -> Iterator[Live]:
    with serving(load(), parse_method("snapkv", 0.5), max_request_bytes=200_000) as running:
        yield running


@pytest.fixture(scope="session")
def loaded() -> LoadedModel:
    """Another one than the shared server's, so that both can be at work."""
    return load()


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(resolve("bundled"))
