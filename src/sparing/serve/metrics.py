"""What Prometheus is told."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from sparing.serve.usage import Usage

if TYPE_CHECKING:
    from sparing.serve.service import Service

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """Counters of one server, in a registry of their own."""

    media_type = CONTENT_TYPE_LATEST

    def __init__(self, service: Service) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter("sparing_requests", "Responses.", ["route", "status"], registry=registry)
        self._seconds = Histogram(
            "sparing_request_seconds", "From a request to the end of its response.", ["route"],
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self._first = Histogram(
            "sparing_first_token_seconds", "From a request to its answer's first piece of text.",
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self._tokens = Counter("sparing_tokens", "Tokens read and written.", ["kind"], registry=registry)
        self._kept = Counter(
            "sparing_bytes_kept", "Bytes that prompts held once compressed, documents once.", registry=registry
        )
        self._freed = Counter(
            "sparing_bytes_freed", "Bytes fewer than transformers' dynamic cache would hold.", registry=registry
        )
        memory, documents = service.memory, service.documents
        gauges = {
            "sparing_memory_limit_bytes": ("What all caches may hold.", lambda: memory.limit),
            "sparing_memory_reserved_bytes": ("What is promised to requests and documents.", lambda: memory.reserved),
            "sparing_document_bytes": ("What compressed documents hold.", lambda: documents.held),
            "sparing_documents": ("Compressed documents.", lambda: len(documents)),
            "sparing_requests_live": ("Requests being worked on.", lambda: service.live),
            "sparing_requests_waiting": ("Accepted requests that wait.", lambda: service.waiting),
        }
        for name, (text, value) in gauges.items():
            Gauge(name, text, registry=registry).set_function(value)

    def responded(self, route: str, status: int, seconds: float) -> None:
        """A response has ended."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def first_text(self, seconds: float) -> None:
        """The first piece of an answer has come."""
        self._first.observe(seconds)

    def prompt_read(self, usage: Usage) -> None:
        """A prompt was read; what a document has brought was counted when it was."""
        self._tokens.labels("prompt").inc(usage.prompt_tokens - usage.cached_tokens)
        if not usage.cached_tokens:
            self._kept.inc(usage.bytes_kept)
            self._freed.inc(max(0, usage.bytes_full - usage.bytes_kept))

    def written(self, tokens: int) -> None:
        """An answer is complete."""
        self._tokens.labels("completion").inc(tokens)

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self._registry)
