"""Results as pages and sentences: `render_report` is a pure function from rows to one HTML file."""

from sparing.compare.report.page import render_report
from sparing.compare.report.summary import summary

__all__ = ["render_report", "summary"]
