"""What is searched: methods, allocators, the precision of what is held, budgets, and how prompts are read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sparing.compare.cells import Contestant
from sparing.core.allocate import ALLOCATORS
from sparing.core.budget import Keep
from sparing.core.method import methods
from sparing.core.parsing import check_method
from sparing.errors import SparingError
from sparing.tune.request import Request

OWN = "own"
EXACT = 16
DENSE = "dense"
# Where the time to the first token counts: prefill methods that reached their speed goals (docs/prefill.md).
PREFILLS = (DENSE, "block_top_k", "vertical_slash", "xattention")
# What codes take beside their bits: the scales of their groups, and the newest tokens, which stay exact.
CODE_OVERHEAD = 1.25


@dataclass(frozen=True)
class Space:
    """All candidates.

    Attributes:
        methods: as text. request: its limits bound the sizes that are tried.
        element_bits: of a number in the model's own cache. full_bytes: most that a prompt takes in the full cache.
        allocators, bits, prefills: what each method takes; found out by trying.
    """

    methods: Sequence[str]
    request: Request
    element_bits: int
    full_bytes: int
    allocators: dict[str, list[str]] = field(init=False, default_factory=dict)
    bits: dict[str, list[int]] = field(init=False, default_factory=dict)
    prefills: dict[str, list[str]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        for text in self.methods:
            self.allocators[text] = [OWN, *(name for name in sorted(ALLOCATORS) if _is_method(f"{text}+{name}"))]
            self.bits[text] = [EXACT, *(bits for bits in (8, 4) if _is_method(with_field(text, f"bits={bits}")))]
            is_quicker = self.request.first_token is not None and _is_method(f"{PREFILLS[1]} & {text}")
            self.prefills[text] = list(PREFILLS) if is_quicker else [DENSE]

    @property
    def largest(self) -> float:
        """The largest share of the full cache's bytes that is worth trying."""
        limits = [self.request.memory or 1.0, (self.request.bytes or self.full_bytes) / self.full_bytes]
        return min(0.95, *limits)

    @property
    def smallest(self) -> float:
        """The smallest; without a limit on the loss, less than may be held only loses more."""
        return self.largest / 2 if self.request.max_loss is None else min(0.03, self.largest / 2)

    def first(self) -> list[dict[str, Any]]:
        """What `suggest` is to begin with: every method as published, as large as it may be."""
        return [
            {"method": text, "size": self.largest, f"allocator of {text}": OWN, f"bits of {text}": EXACT,
             "prefill": DENSE}
            for text in self.methods
        ]  # fmt: skip

    def suggest(self, trial: Any) -> Contestant:
        """The candidate that an Optuna trial asks for."""
        text = trial.suggest_categorical("method", list(self.methods))
        size = trial.suggest_float("size", self.smallest, self.largest, log=True)
        allocator = self._choice(trial, f"allocator of {text}", self.allocators[text])
        bits = self._choice(trial, f"bits of {text}", self.bits[text])
        prefill = self._choice(trial, "prefill", self.prefills[text])
        density = 1.0 if prefill == DENSE else trial.suggest_float("density", 0.1, 0.5, log=True)
        return self.candidate(text, size, allocator, bits, prefill, density)

    @staticmethod
    def _choice(trial: Any, name: str, choices: list[Any]) -> Any:
        return trial.suggest_categorical(name, choices) if len(choices) > 1 else choices[0]

    def candidate(
        self,
        text: str,
        size: float,
        allocator: str = OWN,
        bits: int = EXACT,
        prefill: str = DENSE,
        density: float = 1.0,
    ) -> Contestant:
        """A method that should hold `size` of the full cache's bytes."""
        if bits != EXACT:
            text = with_field(text, f"bits={bits}")
        if allocator != OWN:
            text = f"{text}+{allocator}"
        if prefill != DENSE:
            text = f"{prefill}(keep={density:.3g}) & {text}"
        held = min(1.0, bits / self.element_bits * CODE_OVERHEAD) if bits != EXACT else 1.0
        return Contestant(text, self._keep(min(1.0, size / held)))

    def resized(self, candidate: Contestant, factor: float) -> Contestant:
        """The same with a budget that is so many times as large."""
        keep = candidate.keep
        share = float(keep) if isinstance(keep, float) else float(str(keep).removesuffix("B")) / self.full_bytes
        return Contestant(candidate.name, self._keep(min(1.0, share * factor)))

    def is_full(self, candidate: Contestant) -> bool:
        """True if it keeps everything as the model itself does: that is the full cache under another name."""
        return candidate.keep == self._keep(1.0) and "bits=" not in candidate.name and "&" not in candidate.name

    def _keep(self, share: float) -> Keep:
        """The budget as a share; in bytes where the request is, so that longer prompts keep to it too."""
        share = float(f"{share:.3g}")
        return share if self.request.bytes is None else f"{int(share * self.full_bytes)}B"


def default_methods() -> list[str]:
    """All registered methods of KV caches that need no measurement and no draft model."""
    return [
        info.name
        for info in methods().values()
        if info.family == "kv_cache" and info.needs_nothing and info.name != "random"
    ]


def with_field(text: str, given: str) -> str:
    """A method's text with one more field, of the last method that it names."""
    *before, last = text.split("&")
    found = re.fullmatch(r"(\s*\w+\s*)(?:\((.*?)\))?((?:\s*\+.*)?)", last)
    if found is None:
        return text
    name, inside, allocator = found.groups()
    fields = ", ".join(part for part in (inside, given) if part)
    return "&".join([*before, f"{name.rstrip()}({fields}){allocator}"])


def _is_method(text: str) -> bool:
    try:
        check_method(text)
    except SparingError:
        return False
    return True
