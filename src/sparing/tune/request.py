"""What a user asks for: limits on memory, time and loss."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from sparing.errors import InvalidInputError, require

if TYPE_CHECKING:
    from sparing.tune.standing import Standing

NEEDED = "at least one of --memory, --bytes, --latency, --first-token and --max-loss"
_BROKEN = {
    "memory": "holds {:.1%} of the bytes, more than {:.1%}",
    "bytes": "holds {:,} bytes, more than {:,}",
    "latency": "takes {:.3g} s a token, more than {:.3g}",
    "first_token": "takes {:.3g} s until the first token, more than {:.3g}",
    "max_loss": "loses {:.1%}, more than {:.1%}",
}
_SECONDS = {"s": 1.0, "ms": 1e-3}


@dataclass(frozen=True)
class Request:
    """Limits; None where there is none.

    Attributes:
        memory: share of the full cache's bytes that may be held, in (0, 1].
        bytes: that the cache of any one prompt may hold.
        latency: seconds per decoded token. first_token: seconds until a prompt has been read and compressed.
        max_loss: how much of the full cache's score may be lost, as a share of it, in [0, 1).

    Raises:
        InvalidInputError: a limit that can't be, or none at all.
    """

    memory: float | None = None
    bytes: int | None = None
    latency: float | None = None
    first_token: float | None = None
    max_loss: float | None = None

    def __post_init__(self) -> None:
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        require(any(value is not None for value in given.values()), "request", None, NEEDED)
        require(self.memory is None or 0 < self.memory <= 1, "memory", self.memory, "a share in (0, 1]")
        require(self.max_loss is None or 0 <= self.max_loss < 1, "max_loss", self.max_loss, "a share in [0, 1)")
        for name in ("bytes", "latency", "first_token"):
            require(given[name] is None or given[name] > 0, name, given[name], "a number above 0")

    @property
    def minds_time_only(self) -> bool:
        """True if what may be spent is limited in time, and not in bytes."""
        in_time = self.latency is not None or self.first_token is not None
        return in_time and self.memory is None and self.bytes is None

    def broken(self, standing: Standing) -> list[str]:
        """The limits that a candidate breaks as it was measured, as words; empty if it meets the request."""
        limits = self.limits(standing).items()
        return [_BROKEN[name].format(found, limit) for name, (limit, found) in limits if found > limit]

    def limits(self, standing: Standing) -> dict[str, tuple[float, float]]:
        """Each limit by its name, and what a candidate was measured to have of it; none that was not measured."""
        measured = {
            "memory": standing.share,
            "bytes": standing.bytes_kept,
            "latency": standing.decode_s,
            "first_token": standing.prefill_s,
            "max_loss": standing.loss.mean,
        }
        limits = {name: (getattr(self, name), found) for name, found in measured.items() if found is not None}
        return {name: (limit, found) for name, (limit, found) in limits.items() if limit is not None}

    def __str__(self) -> str:
        words = {
            "memory": "at most {:.3g} % of the cache's bytes",
            "bytes": "at most {:,} bytes a prompt",
            "latency": "at most {:.3g} s a token",
            "first_token": "at most {:.3g} s until the first token",
            "max_loss": "a loss of at most {:.3g} %",
        }
        given = ((text, getattr(self, name)) for name, text in words.items())
        return ", ".join(text.format(100 * v if "%" in text else v) for text, v in given if v is not None)


def parse_seconds(text: str) -> float:
    """ "30ms" or "1.5s" as seconds.

    Raises:
        InvalidInputError: not a time.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(ms|s)\s*", text)
    if found is None:
        raise InvalidInputError("time", text, 'a time such as "30ms" or "1.5s"')
    return float(found.group(1)) * _SECONDS[found.group(2)]


def parse_share(text: str) -> float:
    """ "1%" or "0.01" as a share.

    Raises:
        InvalidInputError: not a number.
    """
    number = text.strip().removesuffix("%")
    try:
        return float(number) / (100 if number != text.strip() else 1)
    except ValueError:
        raise InvalidInputError("share", text, 'a share such as "1%" or "0.01"') from None
