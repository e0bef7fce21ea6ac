"""Prompts with segments whose order shall not matter: a prefix, segments (documents, options), a suffix.

Every segment is placed to *end* where the last one ends, as if it stood alone between prefix and suffix. What stands
nearer to a query than a segment shifts that segment back; who shifts whom is up to a `SegmentAttention`.

Shape legend: B rows (sequences), Hq query heads, H KV heads, Q query tokens, N stored tokens, D head size, k segments.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from sparing.errors import InvalidInputError, require

Ids = Sequence[int] | Tensor


@dataclass(frozen=True)
class SegmentedPrompt:
    """The token ids of a prompt in three parts; made by `of`."""

    prefix: tuple[int, ...]
    segments: tuple[tuple[int, ...], ...]
    suffix: tuple[int, ...]

    @classmethod
    def of(cls, prefix: Ids, segments: Sequence[Ids], suffix: Ids) -> SegmentedPrompt:
        """Check and convert what a user gives: lists of ids, tensors (n,) or (1, n).

        Raises:
            InvalidInputError: no token ids, no segments, an empty segment, or an empty suffix.
        """
        parts = tuple(_ids(f"segment {number}", ids) for number, ids in enumerate(segments))
        require(len(parts) >= 1, "segments", "none", "at least one")
        for number, part in enumerate(parts):
            require(len(part) >= 1, f"segment {number}", "no tokens", "at least one token")
        after = _ids("suffix", suffix)
        fix = "the answer follows the suffix: with none it would follow one of the segments"
        require(len(after) >= 1, "suffix", "no tokens", "at least one token", fix)
        return cls(_ids("prefix", prefix), parts, after)

    def in_canonical_order(self) -> SegmentedPrompt:
        """The same prompt for all orders of the segments: sorted by their ids, which mean nothing.

        Arithmetic then runs in one order, so that rounding and ties cannot tell the given orders apart either.
        """
        return replace(self, segments=tuple(sorted(self.segments)))

    @property
    def ids(self) -> list[int]:
        """All tokens in a row."""
        return [*self.prefix, *(token for segment in self.segments for token in segment), *self.suffix]

    @property
    def layout(self) -> Layout:
        """Where the parts are."""
        return Layout(len(self.prefix), tuple(len(segment) for segment in self.segments))


@dataclass(frozen=True)
class Region:
    """Query tokens that see the same: [first, last) are its tokens, causal among themselves.

    Attributes:
        rows: those of its tokens that are queries now, [start, stop).
        visible: tokens from the front of the prompt that are seen, its own among them.
        own: number of the segment that it is; None for prefix and suffix.
    """

    rows: tuple[int, int]
    first: int
    last: int
    visible: int
    own: int | None = None


@dataclass(frozen=True)
class Layout:
    """Where the parts of a prompt are; the suffix, and all that is generated, goes on from `end`.

    Attributes:
        prefix: tokens of the prefix. lengths: tokens of every segment.
    """

    prefix: int
    lengths: tuple[int, ...]

    @cached_property
    def end(self) -> int:
        """The first token of the suffix; so many tokens are before it."""
        return self.prefix + sum(self.lengths)

    @cached_property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """[start, stop) of every segment."""
        spans, start = [], self.prefix
        for length in self.lengths:
            spans.append((start, start + length))
            start += length
        return tuple(spans)

    def positions(self, tokens: int) -> Tensor:
        """(tokens,) int64: the position of every token; segments overlap, since each ends right before the suffix."""
        return torch.cat([self._positions_before_end, torch.arange(self.end, tokens)])

    @cached_property
    def _positions_before_end(self) -> Tensor:
        stacked = [torch.arange(self.end - length, self.end) for length in self.lengths]
        return torch.cat([torch.arange(self.prefix), *stacked])

    def regions(self, start: int, tokens: int) -> Iterator[Region]:
        """The regions of the query tokens [start, tokens): prefix, each segment, and all from the suffix on."""
        whole = [Region((0, self.prefix), 0, self.prefix, self.prefix)]
        whole += [Region(span, *span, self.end, number) for number, span in enumerate(self.spans)]
        whole += [Region((self.end, tokens), self.end, tokens, tokens)]
        for region in whole:
            rows = (max(region.rows[0], start), region.rows[1])
            if rows[0] < rows[1]:
                yield replace(region, rows=rows)


@dataclass(frozen=True)
class SegmentCall:
    """One attention call of one layer: the last Q of N tokens ask.

    Attributes:
        query: (B, Hq, Q, D). keys, values: (B, H, N, D) and (B, H, N, Dv). Neither queries nor keys are rotated.
        layout: where the parts are. scaling: factor on the dot products.
        turn: rotates x (..., T, D) to positions that are (T,), or broadcast to (..., T), by the model's own rotary
            embedding.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    layout: Layout
    scaling: float
    turn: Callable[[Tensor, Tensor], Tensor]

    @property
    def tokens(self) -> int:
        """N."""
        return self.keys.shape[2]

    @property
    def start(self) -> int:
        """Which token the first query is."""
        return self.keys.shape[2] - self.query.shape[2]


class SegmentAttention(Protocol):
    """How a prompt with segments is attended."""

    def attend(self, call: SegmentCall) -> Tensor:
        """(B, Hq, Q, Dv): the output of every head, of queries from the first token on, or of the suffix and later."""
        ...


def _ids(what: str, given: Any) -> tuple[int, ...]:
    """Token ids as a tuple."""
    if isinstance(given, Tensor) and not given.is_floating_point() and given.dim() == 2 and len(given) == 1:
        given = given[0]
    if isinstance(given, Tensor) and (given.is_floating_point() or given.dim() != 1):
        raise InvalidInputError(what, tuple(given.shape), "token ids: whole numbers, (n,) or (1, n)")
    ids = given.tolist() if isinstance(given, Tensor) else given
    is_list = isinstance(ids, list | tuple) and all(type(token) is int and token >= 0 for token in ids)
    require(is_list, what, reprlib.repr(ids), "token ids: whole numbers >= 0", "tokenize every part by itself")
    return tuple(ids)
