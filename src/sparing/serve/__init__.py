"""An OpenAI-compatible server whose KV caches are compressed: `sparing serve`.

~~~
routes (event loop) ─► Service.submit: bytes reserved, place in the queue, or 429 ─► Worker (one thread, owns the model)
        ▲                                                                                 │ round robin, one step each:
        └────────────── events: read · piece of text · done · ended ◄─────────────────────┘ a chunk of a prompt, a token
~~~

The event loop owns all accounting (memory, documents, metrics), the worker's thread owns the model and every cache;
they talk through queues only, so neither needs a lock. Each request has its own compressed cache; there is no batching
across requests: what is promised is fairness.

Needs `pip install "sparing[serve]"`.
"""

from __future__ import annotations

from importlib.util import find_spec

from sparing.errors import MissingExtraError


def require_extra() -> None:
    """Refuse to go on without the packages of the extra.

    Raises:
        MissingExtraError: one is not installed.
    """
    for name in ("fastapi", "uvicorn", "prometheus_client"):
        if find_spec(name) is None:
            raise MissingExtraError(name, "serve")
