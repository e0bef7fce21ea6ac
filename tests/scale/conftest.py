"""A Ray cluster of this machine, whatever clusters it belongs to or belonged to."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def ray():
    """Two CPUs, for all tests of a module."""
    module = pytest.importorskip("ray", reason="the extra sparing[ray] is not installed")
    module.init("local", num_cpus=2, include_dashboard=False, logging_level="error", log_to_driver=False)
    yield module
    module.shutdown()
