"""The metric of patching experiments, and what all of them record first.

LD = logit(answer) - logit(wrong) at the last position
m  = (LD - LD_corrupt) / (LD_clean - LD_corrupt):  0 = as corrupt, 1 = as clean
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparing.core.lens import Lens, Site
from sparing.core.samples import PairSample
from sparing.errors import InvalidInputError, require


@dataclass(frozen=True)
class Recorded:
    """One forward of one prompt, as far as patching needs it.

    Attributes:
        residual: per layer what goes into its block, (1, T, E). heads: per layer the heads' outputs, (1, T, Hq, Dv).
        sites: what else was asked for, by site and layer, (1, T, E).
        logits: (V,) of the last position.
    """

    residual: list[Tensor]
    heads: list[Tensor]
    sites: dict[Site, list[Tensor]]
    logits: Tensor


def record(lens: Lens, ids: Sequence[int], sites: Sequence[Site] = ()) -> Recorded:
    """Run a prompt and keep what was asked for."""
    residual: dict[int, Tensor] = {}
    heads: dict[int, Tensor] = {}
    more: dict[Site, dict[int, Tensor]] = {site: {} for site in sites if site != "resid_pre"}
    more["resid_pre"] = residual
    setters = {site: _keep(found) for site, found in more.items()}
    with torch.no_grad(), lens.hooked(heads=_keep(heads), sites=setters):
        logits = lens.forward(torch.tensor([list(ids)]), last=1)[0, -1]
    ordered = {site: [found[i] for i in range(lens.num_layers)] for site, found in more.items()}
    numbers = range(lens.num_layers)
    return Recorded([residual[i] for i in numbers], [heads[i] for i in numbers], ordered, logits)


def _keep(found: dict[int, Tensor]) -> Callable[[int, Tensor], None]:
    def hook(layer: int, tensor: Tensor) -> None:
        found[layer] = tensor

    return hook


@dataclass(frozen=True)
class Metric:
    """The normalised logit difference of one pair."""

    answer: int
    wrong: int
    clean: float
    corrupt: float

    @classmethod
    def of(cls, sample: PairSample, clean: Tensor, corrupt: Tensor) -> Metric:
        """From the last logits (V,) of both prompts.

        Raises:
            InvalidInputError: both prompts give the same difference, so nothing could be recovered.
        """
        first, second = (float(x[sample.answer] - x[sample.wrong]) for x in (clean, corrupt))
        if first == second:
            fix = "take prompts to which the model gives different answers"
            raise InvalidInputError("pair", f"logit difference {first:g} on both prompts", "two different ones", fix)
        return cls(sample.answer, sample.wrong, first, second)

    def __call__(self, logits: Tensor) -> Tensor:
        """m of (..., V) last logits, in at least float32."""
        exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
        difference = exact[..., self.answer] - exact[..., self.wrong]
        return (difference - self.corrupt) / (self.clean - self.corrupt)


def check_pair(sample: PairSample) -> None:
    """Refuse prompts of different lengths.

    Raises:
        InvalidInputError: see there.
    """
    got = f"{len(sample.clean)} and {len(sample.corrupt)} tokens"
    require(len(sample.clean) == len(sample.corrupt) > 0, "pair", got, "two prompts of equally many tokens")


def only_sample(samples: Sequence[PairSample]) -> PairSample:
    """The sample of a measurement over positions.

    Raises:
        InvalidInputError: not exactly one.
    """
    require(len(samples) == 1, "samples", len(samples), "exactly 1 where positions are scored", "pass samples=1")
    return samples[0]


def groups(count: int, size: int) -> list[list[int]]:
    """0 .. count - 1, at most `size` at a time."""
    return [list(range(start, min(start + size, count))) for start in range(0, count, size)]
