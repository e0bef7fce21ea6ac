"""Choosing a method, a budget and an allocator for one's own model, work and limits; see `tune`."""

from __future__ import annotations

from sparing.tune.request import Request
from sparing.tune.tuner import Outcome, tune

__all__ = ["Outcome", "Request", "tune"]
