"""Shared maths: tensors in, tensors out. Exact in float32, tiled, never (tokens x tokens)."""
