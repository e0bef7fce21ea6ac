"""Dense or sparse: which is faster for a call, by what was measured on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from sparing.core.prefill import PromptCall, SparsePrefill


@dataclass
class Dispatcher:
    """Decides call by call."""

    def is_worth(self, method: SparsePrefill, query: Tensor, keys: Tensor) -> bool:
        """True if sparse attention is expected to be faster than dense attention."""
        return True

    def note(self, method: SparsePrefill, call: PromptCall, seconds: float) -> None:
        """Learn from a call that has been attended sparsely."""
