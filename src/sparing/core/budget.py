"""Budgets, and the one place where shares become whole numbers.

`keep` is written by users in one of three ways:

| written        | meaning                                                                 |
|----------------|-------------------------------------------------------------------------|
| `0.25` (float) | ratio: that share of the tokens seen, in (0, 1]                          |
| `512` (int)    | count: that many tokens per KV head, on average over heads and layers   |
| `"64MiB"` (str)| bytes: what all compressed layers together may hold, keys and values    |

All of them become *tokens per KV head and layer* for one sequence; an allocator then moves tokens between
heads and layers without changing their sum.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparing.errors import InvalidInputError

Keep = float | int | str
BudgetKind = Literal["ratio", "count", "bytes"]

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "B": 1}
_ALLOWED = 'a ratio in (0, 1], a number of tokens (int >= 1), or bytes such as "64MiB"'


@dataclass(frozen=True)
class Budget:
    """How much may stay.

    Attributes:
        kind: "ratio", "count" or "bytes".
        amount: the ratio in (0, 1], the tokens per KV head, or the bytes.
    """

    kind: BudgetKind
    amount: float

    @classmethod
    def parse(cls, keep: Keep) -> Budget:
        """Read what a user wrote for `keep` (see the module's table).

        Raises:
            InvalidInputError: nan, a ratio outside (0, 1], a count below 1, or text that is no size.
        """
        if isinstance(keep, str):
            return cls("bytes", parse_bytes(keep, "keep", _ALLOWED))
        if isinstance(keep, bool) or not isinstance(keep, int | float):
            raise InvalidInputError("keep", keep, _ALLOWED)
        if isinstance(keep, int):
            if keep < 1:
                raise InvalidInputError("keep", keep, _ALLOWED)
            # The integer 1 is read as the ratio 1: nobody asks for a cache of a single token.
            return cls("ratio", 1.0) if keep == 1 else cls("count", keep)
        if not 0.0 < keep <= 1.0:  # also refuses nan
            raise InvalidInputError("keep", keep, _ALLOWED)
        return cls("ratio", keep)

    def tokens_per_head(self, tokens_seen: int, bytes_per_token: int) -> int:
        """Tokens that each KV head of each compressed layer may keep, on average, for one sequence.

        Args:
            tokens_seen: real tokens of the sequence so far, pads not counted.
            bytes_per_token: bytes of ONE token's key and value, averaged over KV heads, times the number of
                (layer, KV head) pairs: what one token costs in all compressed layers together.

        Returns:
            An integer in [1, tokens_seen] (0 if nothing was seen). Half rounds up.
        """
        if tokens_seen <= 0:
            return 0
        if self.kind == "ratio":
            tokens = int(self.amount * tokens_seen + 0.5)
        elif self.kind == "count":
            tokens = int(self.amount)
        else:
            tokens = int(self.amount // max(bytes_per_token, 1))
        return min(max(tokens, 1), tokens_seen)

    @property
    def keeps_all(self) -> bool:
        """True for the ratio 1: nothing may be dropped, whatever the length."""
        return self.kind == "ratio" and self.amount == 1.0


def parse_bytes(text: str, what: str = "bytes", allowed: str = 'a size such as "64MiB" or "2GiB"') -> int:
    """Bytes as typed on a command line: "2GiB". `what`, `allowed`: for the message.

    Raises:
        InvalidInputError: no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]i?B|B)\s*", text, flags=re.IGNORECASE)
    if match is None or float(match.group(1)) <= 0:
        raise InvalidInputError(what, text, allowed)
    return int(float(match.group(1)) * _UNITS[match.group(2).upper()])


def parse_keep(text: str) -> Keep:
    """`keep` as typed on a command line: "0.25" → ratio, "512" → tokens, "64MiB" → bytes.

    Raises:
        InvalidInputError: not a budget.
    """
    text = text.strip()
    keep: Keep
    if re.fullmatch(r"[+-]?\d+", text):
        keep = int(text)
    else:
        try:
            keep = float(text)
        except ValueError:
            keep = text
    Budget.parse(keep)
    return keep


def share_of(share: float, tokens: int) -> int:
    """The whole tokens in a share of them, rounded down; what is a whole number but for float noise stays one."""
    return int(share * tokens + 1e-9)


def round_to_total(shares: Tensor, total: int, low: Tensor | int = 0, high: Tensor | int | None = None) -> Tensor:
    """Whole numbers in proportion to `shares` that sum to `total` exactly, each within [low, high].

    The library's only rounding routine: largest remainder, with clamping; what a clamp cuts off or forces is
    spread over the others in proportion to their shares, and ties (up to 1e-9) go to the lower index.

    Args:
        shares: (groups,) non-negative weights, any scale; all zero means equal shares.
        total: the sum to reach.
        low, high: bounds, a number or (groups,) each. `high=None` means no upper bound.

    Returns:
        (groups,) int64 on the CPU, summing to `total`.

    Raises:
        InvalidInputError: no such numbers exist, or a share is negative or not finite.
    """
    weights = shares.detach().to("cpu", torch.float64).flatten()
    groups = weights.numel()
    if groups == 0 and total == 0:
        return torch.zeros(0, dtype=torch.int64)
    floor = torch.as_tensor(low, dtype=torch.int64).cpu().expand(groups).clone()
    no_bound = torch.full((groups,), max(total, 0), dtype=torch.int64)
    ceil = no_bound if high is None else torch.as_tensor(high, dtype=torch.int64).cpu().expand(groups)
    if not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()):
        raise InvalidInputError("shares", weights.tolist(), "finite numbers >= 0")
    crossed = (floor > ceil).nonzero()
    if len(crossed):
        group = int(crossed[0])
        raise InvalidInputError("bounds", (int(floor[group]), int(ceil[group])), "low <= high in every group")
    if not int(floor.sum()) <= total <= int(ceil.sum()):
        raise InvalidInputError(
            "total", total, f"between {int(floor.sum())} and {int(ceil.sum())}, the sums of the bounds"
        )
    ideal = _water_fill(weights, total, floor.double(), ceil.double())
    counts = ideal.floor().long().clamp(floor, ceil)
    missing = total - int(counts.sum())
    # What is missing is fewer than `groups`, and goes one each to the largest remainders with room left.
    room = (counts < ceil) if missing > 0 else (counts > floor)
    remainder = (ideal - counts).round(decimals=9) * (1 if missing > 0 else -1)  # equal up to noise is a tie
    remainder = remainder.masked_fill(~room, -torch.inf)
    chosen = torch.sort(remainder, descending=True, stable=True).indices[: abs(missing)]
    counts[chosen] += 1 if missing > 0 else -1
    assert int(counts.sum()) == total
    return counts


def _water_fill(weights: Tensor, total: int, floor: Tensor, ceil: Tensor) -> Tensor:
    """Real numbers scale * weights clamped to [floor, ceil], with the scale that makes them sum to `total`."""
    if float(weights.sum()) == 0.0:
        weights = torch.ones_like(weights)
    # A zero weight may still have to take what the others' ceilings leave over; a tiny share lets it.
    weights = weights.clamp_min(float(weights.max()) * 1e-12)
    free = weights * (total / float(weights.sum()))
    if bool(((free >= floor) & (free <= ceil)).all()):  # no bound holds: no search, which eviction would wait for
        return free
    below, above = 0.0, (float(ceil.max()) + 1.0) / float(weights.min())
    for _ in range(200):
        scale = 0.5 * (below + above)
        if scale in (below, above):  # neighbouring floats: nothing lies between
            break
        if float((weights * scale).clamp(floor, ceil).sum()) < total:
            below = scale
        else:
            above = scale
    return (weights * above).clamp(floor, ceil)
