"""Scorers of heads, layers and positions, and what acts on heads; one file per paper."""
