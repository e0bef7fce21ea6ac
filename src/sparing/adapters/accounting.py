"""What a cache reports, and the bytes behind it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from sparing.core.plan import Plan

if TYPE_CHECKING:
    from sparing.adapters.prompt_attention import PrefillReport
    from sparing.adapters.shortening import Shortening


@dataclass(frozen=True)
class CacheReport:
    """What a cache holds.

    Attributes:
        method: the method's name.
        tokens_seen: tokens of the longest sequence that the model has read, pads included.
        bytes_full: what transformers' dynamic cache would hold for the same tokens, and those dropped from the prompt.
        bytes_kept: what this cache holds, with slack and bookkeeping.
        plan: what the last eviction kept; None if none has happened.
        read_share: of what is stored, the share that decoded tokens have read; None for methods that read everything.
        notes: what else there is to know, e.g. why nothing was dropped.
        prefill: what of the prompt's attention was computed; None where it was dense.
        prompt: what of the prompt was read; None where all of it was.
    """

    method: str
    tokens_seen: int
    bytes_full: int
    bytes_kept: int
    plan: Plan | None
    read_share: float | None = None
    notes: tuple[str, ...] = ()
    prefill: PrefillReport | None = None
    prompt: Shortening | None = None

    @property
    def share(self) -> float:
        """bytes_kept / bytes_full."""
        return self.bytes_kept / self.bytes_full if self.bytes_full else 1.0

    def __str__(self) -> str:
        sizes = f"{self.bytes_kept:,} of {self.bytes_full:,} bytes ({self.share:.1%})"
        read = "" if self.read_share is None else f", {self.read_share:.1%} of them read by decoded tokens"
        notes = "".join(f"; {note}" for note in (*self.notes, *filter(None, (self.prompt, self.prefill))))
        return f"{self.method}: {self.tokens_seen} tokens seen, {sizes} held{read}{notes}"


def bytes_alive(*owners: Any) -> int:
    """Bytes of the storages behind all tensors of some objects: a tensor may be a view of more than it shows."""
    found = (tensor.untyped_storage() for owner in owners for tensor in _tensors(owner))
    return sum({storage.data_ptr(): storage.nbytes() for storage in found}.values())


def _tensors(owner: Any) -> Iterator[Tensor]:
    if isinstance(owner, Tensor):
        yield owner
    elif isinstance(owner, dict):
        for value in owner.values():
            yield from _tensors(value)
    elif isinstance(owner, list | tuple | set | frozenset):
        for value in owner:
            yield from _tensors(value)
    elif hasattr(owner, "__dict__") and not isinstance(owner, nn.Module | type) and not callable(owner):
        yield from _tensors(vars(owner))
