"""What caches cost, and the budget of bytes over all that live."""

from __future__ import annotations

from dataclasses import dataclass

# Tokens that a cache has room for beyond what it holds, at most (`adapters.reading`), and the share of what it holds
# that it has besides (`kernels.ragged`); bytes beside a token's key and value in each lane: position, score, bias.
_SLACK_TOKENS, _SLACK_SHARE, _LANE_BYTES = 64, 64, 12
# Methods that hold summaries of pages beside the tokens take up to an eighth more, and a last page that is not full has
# one as well, of no more bytes than so many tokens.
_SUMMARIES, _LAST_SUMMARY = 9 / 8, 4


@dataclass(frozen=True)
class Costs:
    """Bytes of a cache on one model with one method, as measured on two short prompts.

    Attributes:
        fixed: of any prompt. per_token: of every token of a prompt, before or after it is compressed, whichever is
            more, what scorers note included.
        full: of every token in transformers' cache. lanes: (layer, KV head) pairs.
    """

    fixed: int
    per_token: int
    full: int
    lanes: int

    @classmethod
    def fitted(cls, short: tuple[int, int], long: tuple[int, int], full: int, lanes: int) -> Costs:
        """From two (tokens, bytes) that were measured.

        What grows by less than `full` is no straight line (queries that are noted of a prompt's last chunk, say), and
        then the worse of the two costs per token is taken.
        """
        (tokens, held), (more_tokens, more_held) = short, long
        # A method that shortens prompts to a number of tokens may have read as many of both.
        per_token = 0 if more_tokens == tokens else _ceil(more_held - held, more_tokens - tokens)
        if per_token < full:
            return cls(0, max(_ceil(held, tokens), _ceil(more_held, more_tokens)), full, lanes)
        return cls(max(0, held - per_token * tokens), per_token, full, lanes)

    def reading(self, tokens: int) -> int:
        """Bytes of a prompt, at most: as a rule while it has been read and not been compressed yet."""
        stored = self.per_token * (tokens + _LAST_SUMMARY)
        return self.fixed + stored + stored // _SLACK_SHARE

    def growing(self, held: int, tokens: int) -> int:
        """Bytes that so many further tokens add, at most, to a compressed cache that holds `held` bytes."""
        per_token = int(max(self.per_token, self.full) * _SUMMARIES) + _LANE_BYTES * self.lanes + 1
        return (tokens + _SLACK_TOKENS) * per_token + held // _SLACK_SHARE


class MemoryBudget:
    """Bytes that are promised to requests and documents, never more than a limit when they are promised.

    Args:
        limit: bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._promised: dict[object, int] = {}

    @property
    def reserved(self) -> int:
        """Bytes that are promised in all."""
        return sum(self._promised.values())

    @property
    def free(self) -> int:
        """Bytes that can still be promised."""
        return self.limit - self.reserved

    def of(self, owner: object) -> int:
        """Bytes that are promised to one."""
        return self._promised.get(owner, 0)

    def reserve(self, owner: object, size: int) -> bool:
        """Promise `size` bytes, if they are free."""
        if size > self.free:
            return False
        self._promised[owner] = size
        return True

    def resize(self, owner: object, size: int) -> None:
        """What is held is known better now. (A fact, so it is not refused where it exceeds the limit.)"""
        if owner in self._promised:
            self._promised[owner] = size

    def hand_over(self, owner: object, new: object, size: int) -> None:
        """Another one holds it from now on, and so many bytes of it."""
        self._promised.pop(owner, None)
        self._promised[new] = size

    def release(self, owner: object) -> None:
        """It holds nothing any more; asking twice does no harm."""
        self._promised.pop(owner, None)


def _ceil(whole: int, parts: int) -> int:
    return -(-whole // parts)
