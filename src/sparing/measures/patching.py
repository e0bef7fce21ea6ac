"""The metric of patching experiments, and what all of them record first.

LD = logit(answer) - logit(wrong) at the last position
m  = (LD - LD_corrupt) / (LD_clean - LD_corrupt):  0 = as corrupt, 1 = as clean
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparing.core.lens import Attend, AttentionCall, Lens, Site
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


def record(lens: Lens, ids: Sequence[int], sites: Sequence[Site] = (), cache: Any = None) -> Recorded:
    """Run a prompt, behind a prefix if there is one, and keep what was asked for."""
    residual: dict[int, Tensor] = {}
    heads: dict[int, Tensor] = {}
    more: dict[Site, dict[int, Tensor]] = {site: {} for site in sites if site != "resid_pre"}
    more["resid_pre"] = residual
    setters = {site: _keep(found) for site, found in more.items()}
    with torch.no_grad(), lens.hooked(heads=_keep(heads), sites=setters):
        logits = lens.forward(torch.tensor([list(ids)]), last=1, cache=cache)[0, -1]
    ordered = {site: [found[i] for i in range(lens.num_layers)] for site, found in more.items()}
    numbers = range(lens.num_layers)
    return Recorded([residual[i] for i in numbers], [heads[i] for i in numbers], ordered, logits)


def _keep(found: dict[int, Tensor]) -> Callable[[int, Tensor], None]:
    def hook(layer: int, tensor: Tensor) -> None:
        found[layer] = tensor

    return hook


@dataclass(frozen=True)
class Step:
    """One layer of one prompt.

    Attributes:
        residual: what goes into its block, (1, T, E). heads: its heads' outputs, (1, T, Hq, Dv).
        call: what its attention gets, if that was asked for.
    """

    residual: Tensor
    heads: Tensor
    call: AttentionCall | None


def walk(lens: Lens, ids: Sequence[int], cache: Any = None, calls: bool = False) -> Iterator[Step]:
    """A prompt layer by layer, behind a prefix if there is one. A layer is run when it is asked for: one is held."""
    whole = torch.tensor([list(ids)])
    residual = _stopped(lens, 0, lambda: lens.forward(whole, last=1, cache=cache))
    for layer in range(lens.num_layers):
        heads: dict[int, Tensor] = {}
        found: dict[int, AttentionCall] = {}

        def keep(call: AttentionCall, attend: Attend, found: dict[int, AttentionCall] = found) -> Tensor:
            found[call.layer] = call
            return attend(call)

        run = partial(lens.forward_from, layer, residual, last=1, cache=cache)
        with lens.hooked(attention=keep if calls else None, heads=_keep(heads)):
            following = _stopped(lens, layer + 1, run)
        yield Step(residual, heads[layer], found.get(layer))
        residual = following


class _Reached(Exception):
    def __init__(self, residual: Tensor) -> None:
        self.residual = residual


def _stopped(lens: Lens, layer: int, run: Callable[[], Tensor]) -> Tensor:
    """Run as far as the layer's block: what would go into it. Behind the last layer: the last logits."""

    def stop(at: int, residual: Tensor) -> None:
        if at == layer:
            raise _Reached(residual)

    try:
        with torch.no_grad(), lens.hooked(sites={"resid_pre": stop}):
            return run()
    except _Reached as reached:
        return reached.residual


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


def behind_common_start(lens: Lens, sample: PairSample) -> tuple[PairSample, Any]:
    """The pair from its first changed token on, and the prefix to run both behind: (whole pair, None) if there is none.

    What comes before is the same in both prompts, and no patch changes it.

    Raises:
        InvalidInputError: prompts of different lengths.
    """
    check_pair(sample)
    start = min(sample.changed, default=0)
    cache = lens.prefix(torch.tensor([sample.clean[:start]], dtype=torch.int64))
    if cache is None:
        return sample, None
    return replace(sample, clean=sample.clean[start:], corrupt=sample.corrupt[start:]), cache


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
