"""Attention: over ragged heads, and over the part of a prompt that a pattern says.

`ragged.RaggedStore` and `compact.CompactStore` hold keys and values, `attend.attend` attends over them; `sparse` reads
prompts. Both choose the native kernels (`native`) where they are built; `reference` is never imported by fast code.
"""
