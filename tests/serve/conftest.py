"""One server for all tests that leave it as they found it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from live import Live, load, serving

from sparing.core.parsing import parse_method


@pytest.fixture(scope="session")
def live() -> Iterator[Live]:
    with serving(load(), parse_method("snapkv", 0.5), max_request_bytes=200_000) as running:
        yield running
