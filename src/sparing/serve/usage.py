"""What compressing a prompt came to."""

from __future__ import annotations

from dataclasses import dataclass

from sparing.adapters.cache import EvictingCache


@dataclass(frozen=True)
class Usage:
    """What a prompt came to, once it was read and compressed.

    Attributes:
        prompt_tokens: all of them. cached_tokens: those that a document had brought.
        dropped_tokens: how many of them a KV head has dropped, on average over heads and compressed layers.
        bytes_kept, bytes_full: what the cache holds, and what transformers' dynamic cache would.
    """

    prompt_tokens: int
    cached_tokens: int
    dropped_tokens: float
    bytes_kept: int
    bytes_full: int

    @property
    def kept_tokens(self) -> float:
        """Those that were not dropped."""
        return self.prompt_tokens - self.dropped_tokens

    @classmethod
    def of(cls, cache: EvictingCache, prompt_tokens: int, cached_tokens: int = 0) -> Usage:
        """Read off a cache."""
        report, dropped = cache.report(), 0.0
        if report.plan is not None:
            heads = sum(len(layer.kept[0]) for layer in report.plan.layers)
            dropped += (report.plan.tokens_seen - report.plan.tokens_kept) / heads
        if report.prompt is not None:  # dropped before the model read any of it
            dropped += report.prompt.dropped[0]
        return cls(prompt_tokens, cached_tokens, dropped, report.bytes_kept, report.bytes_full)
