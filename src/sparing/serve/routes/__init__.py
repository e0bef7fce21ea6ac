"""Every route, one module for each kind. A new kind is a module with a `router`, named below."""

from __future__ import annotations

from sparing.serve.routes import completions, documents, page, rerank, status

ROUTERS = tuple(module.router for module in (completions, documents, rerank, status, page))
