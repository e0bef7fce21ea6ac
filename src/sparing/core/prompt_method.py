"""Methods that are about the reading of a prompt: what has been read stays stored, all of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparing.core.allocate import Uniform
from sparing.core.method import Method, Parts
from sparing.core.scorer import KeyValues, Scorer
from sparing.errors import MethodRefusedError


@dataclass(frozen=True)
class Everything(Scorer):
    """All tokens alike, for methods that drop none."""

    def score(self, state: object, stored: KeyValues) -> Tensor:
        """0 for every token."""
        return torch.zeros(stored.keys.shape[:3], device=stored.keys.device)


@dataclass(frozen=True)
class PromptMethod(Method):
    """Base of all methods that say what of a prompt is read, or how."""

    def parts(self) -> Parts:
        """Everything that is read stays stored."""
        return Parts(Everything(), Uniform())

    @property
    def keeps_all(self) -> bool:
        """Nothing that is read is ever dropped."""
        return True

    def _refuse(self, *settings: str, problem: str, fix: str) -> None:
        """Refuse settings of what is stored, or of how else the prompt is read.

        Raises:
            MethodRefusedError: one of them is given.
        """
        if any(getattr(self, name) is not None for name in settings):
            raise MethodRefusedError(self.label, problem, fix)
