"""Measurements to look at: `render_scores` makes one self-contained page, `save_png` a picture."""

from __future__ import annotations

from sparing.compare.measurement.page import render_scores
from sparing.compare.measurement.png import save_png

__all__ = ["render_scores", "save_png"]
