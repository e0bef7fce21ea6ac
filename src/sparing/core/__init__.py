"""Scores, budgets, allocators, plans, methods and the session: the idea of the library, in tensors."""
