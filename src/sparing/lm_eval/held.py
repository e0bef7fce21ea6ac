"""What the caches of a whole run have held."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from sparing.adapters.cache import EvictingCache


@dataclass
class Held:
    """Sums over all prompts.

    Attributes:
        prompts: how many were read.
        bytes_full: what full caches would have held in the end. bytes_kept: what was held; tokens of answers included.
        tokens_seen, tokens_kept: of each layer, KV head and prompt, when tokens were last dropped.
        read: of each batch, the share of what was held that answers read, for methods that read a part.
        density: of each batch, the share of dense attention that was computed, for methods that read less of a prompt.
        notes: what a cache had to say, e.g. why nothing was dropped, and of how many prompts.
    """

    prompts: int = 0
    bytes_full: int = 0
    bytes_kept: int = 0
    tokens_seen: int = 0
    tokens_kept: int = 0
    read: list[float] = field(default_factory=list)
    density: list[float] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)

    def add(self, cache: EvictingCache, prompts: int) -> None:
        """Count what a cache holds now; `prompts`: how many it is of."""
        report, density = cache.report(), cache.density
        self.prompts += prompts
        self.bytes_full += report.bytes_full
        self.bytes_kept += report.bytes_kept
        if report.plan is not None:
            self.tokens_seen += report.plan.tokens_seen
            self.tokens_kept += report.plan.tokens_kept
        self.read += [] if report.read_share is None else [report.read_share]
        self.density += [] if density is None else [density]
        self.notes.update(dict.fromkeys(report.notes, prompts))

    def facts(self) -> dict[str, Any]:
        """As plain values, for the harness's results; None where there is nothing to tell."""
        return {
            "prompts": self.prompts,
            "bytes_full": self.bytes_full,
            "bytes_kept": self.bytes_kept,
            "share": self.bytes_kept / self.bytes_full if self.bytes_full else None,
            "token_share": self.tokens_kept / self.tokens_seen if self.tokens_seen else None,
            "read_share": statistics.mean(self.read) if self.read else None,
            "density": statistics.mean(self.density) if self.density else None,
            "notes": dict(self.notes),
        }

    def __str__(self) -> str:
        if not self.prompts:
            return "no prompt was compressed"
        facts = self.facts()
        told = [f"{self.bytes_kept:,} of {self.bytes_full:,} bytes ({facts['share']:.1%}) held in the end"]
        for name, what in (
            ("token_share", "of the tokens kept"),
            ("read_share", "of what was held read by answers"),
            ("density", "of dense attention computed"),
        ):
            if facts[name] is not None:
                told.append(f"{facts[name]:.1%} {what}")
        notes = "".join(f"; {count} times: {note}" for note, count in self.notes.items())
        return f"{self.prompts} prompts, {', '.join(told)}{notes}"
