"""Rankers: which of some documents answer a query, by one file per paper."""
