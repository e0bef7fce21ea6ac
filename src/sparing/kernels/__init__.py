"""Attention over ragged heads: storage, the torch path, and a slow reference.

`ragged.RaggedStore` holds keys and values, `attend.attend` is the path that runs. A native decode kernel belongs
here too, chosen inside `attend.attend` by what the machine offers; `reference` is never imported by fast code.
"""
