"""What there is to see in a measurement, in numbers only: maps, lines and coloured text for the page and the picture.

Every unit is somewhere: axes of heads and layers become one map, a layer × position × kind measurement one map per
kind, a kind × position one a line over the text and the text in its colours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparing.compare.ablation_curve import AblationCurve
from sparing.core.scores import Scores, agree

NAMES = {"layer": "layer", "head": "head", "kv_head": "KV head", "position": "position", "source": "source layer",
         "target": "target layer"}  # fmt: skip


@dataclass(frozen=True)
class MapView:
    """A matrix of scores: values and errors (rows, columns), labels of both sides, and what the sides are."""

    title: str
    values: Tensor
    rows: Sequence[str]
    columns: Sequence[str]
    row_name: str
    column_name: str
    errors: Tensor | None = None

    @property
    def bound(self) -> float:
        """The value drawn in full colour: the largest size of any; 0 is drawn in none."""
        return float(self.values.nan_to_num(0).abs().max()) or 1.0


@dataclass(frozen=True)
class Line:
    """A curve: y over x, nan where there is none; low and high are a band around it."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    points: bool = True


@dataclass(frozen=True)
class LineView:
    """Curves over one pair of axes. Attributes: level: a horizontal line and its name. range: of y, if it has one."""

    title: str
    x_name: str
    y_name: str
    lines: Sequence[Line]
    level: tuple[float, str] | None = None
    range: tuple[float, float] | None = None


@dataclass(frozen=True)
class TextView:
    """Tokens and a value for each, nan for none."""

    title: str
    tokens: Sequence[str]
    values: Sequence[float]


@dataclass(frozen=True)
class ScatterView:
    """Two measurements of the same units: (x, y, name) each, and what they have in common in words."""

    title: str
    x_name: str
    y_name: str
    points: Sequence[tuple[float, float, str]]
    words: str


View = MapView | LineView | TextView | ScatterView


@dataclass(frozen=True)
class Seen:
    """All views of a measurement, in reading order."""

    maps: list[MapView] = field(default_factory=list)
    lines: list[LineView] = field(default_factory=list)
    texts: list[TextView] = field(default_factory=list)
    scatters: list[ScatterView] = field(default_factory=list)


def views(scores: Scores, compare: Scores | None = None, curve: AblationCurve | None = None) -> Seen:
    """What there is to see.

    Args:
        compare: another measurement of the same units. curve: what a task loses without the heads.

    Raises:
        ScoresMismatchError: `compare` is over other units.
    """
    seen = Seen()
    if scores.axes == ("kind", "position"):
        _timelines(scores, seen)
    else:
        seen.maps.extend(_maps(scores))
    if curve is not None:
        seen.lines.append(ablation_view(curve))
    if "loss" in scores.extras:
        seen.lines.extend(_losses(scores.extras["loss"]))
    if compare is not None:
        seen.scatters.append(scatter_view(scores, compare))
    return seen


def unit_name(scores: Scores, unit: Sequence[int]) -> str:
    """A unit in words: "layer 2, head 1"."""
    parts = []
    for axis, index in zip(scores.axes, unit, strict=True):
        label = scores.labels.get(axis)
        named = NAMES.get(axis, axis)
        parts.append(f"{named} {index}" + (f" “{shown(label[index])}”" if label and axis == "position" else "")
                     if axis != "kind" or not label else label[index])  # fmt: skip
    return ", ".join(parts)


def shown(token: str) -> str:
    """A token as one line of text."""
    return token.replace("Ġ", " ").replace("▁", " ").replace("\r", "").replace("\n", "⏎")


def ablation_view(curve: AblationCurve) -> LineView:
    """Task score against heads taken away: best-scored, random (mean, and the band of all draws), worst-scored."""
    x = [0.0, *map(float, curve.counts)]
    draws = [[curve.full], *curve.random]
    lines = [
        Line("best-scored first", x, [curve.full, *curve.top]),
        Line("random others", x, [sum(d) / len(d) for d in draws], [min(d) for d in draws], [max(d) for d in draws]),
        Line("worst-scored first", x, [curve.full, *curve.bottom]),
    ]
    title = f"{curve.task}: score without heads ({curve.kind} ablation, n = {curve.n})"
    top = max(1.0, curve.full, *curve.top, *curve.bottom)
    return LineView(title, "heads taken away", "score", lines, (curve.full, "intact"), (0.0, top))


def scatter_view(scores: Scores, other: Scores) -> ScatterView:
    """Unit by unit against another measurement, with Pearson's r, rank correlation and the overlap of the top 10 %."""
    found = agree(scores, other)  # refuses other units
    both = ~(scores.values.isnan() | other.values.isnan())
    points = [
        (float(other.values[unit]), float(scores.values[unit]), unit_name(scores, unit))
        for unit in map(tuple, both.nonzero().tolist())
    ]
    if scores.scorer == other.scorer:
        names = f"{other.scorer} (other)", f"{scores.scorer} (this)"
    else:
        names = other.scorer, scores.scorer
    return ScatterView(f"{names[1]} against {names[0]}", names[0], names[1], points, str(found))


def _maps(scores: Scores) -> list[MapView]:
    values, errors = scores.values, scores.standard_error
    if values.dim() == 1:
        values = values[:, None]
        errors = errors[:, None] if errors is not None else None
    axes = scores.axes if len(scores.axes) > 1 else (*scores.axes, "")
    rows, columns = (_labels(scores, axis, values.shape[at]) for at, axis in enumerate(axes[:2]))
    names = NAMES.get(axes[0], axes[0]), NAMES.get(axes[1], axes[1])
    if values.dim() == 2:
        return [MapView(scores.scorer, values, rows, columns, *names, errors)]
    # The last axis is the kind; all kinds share no scale: each map says its own.
    kinds = _labels(scores, axes[2], values.shape[2])
    return [
        MapView(f"{scores.scorer}: {kind}", values[..., at], rows, columns, *names,
                errors[..., at] if errors is not None else None)
        for at, kind in enumerate(kinds)
    ]  # fmt: skip


def _timelines(scores: Scores, seen: Seen) -> None:
    length = scores.values.shape[1]
    tokens = scores.labels.get("position")
    for kind, values in zip(_labels(scores, "kind", len(scores.values)), scores.values, strict=True):
        line = Line(kind, [float(at) for at in range(length)], values.tolist(), points=False)
        seen.lines.append(LineView(f"{kind} over the text", "position in tokens", kind, [line]))
        if tokens is not None:
            seen.texts.append(TextView(f"{kind}, token by token", tokens, values.tolist()))


def _losses(curve: Tensor) -> list[LineView]:
    """One plot per column of the loss curve: the first is what is learned, the second the penalty."""
    curve = curve if curve.dim() == 2 else curve[:, None]
    names = ("loss", "penalty") if curve.shape[1] == 2 else tuple(f"loss {at}" for at in range(curve.shape[1]))
    steps = torch.arange(len(curve)).tolist()
    return [
        LineView(f"{name} while learning", "step", name, [Line(name, steps, curve[:, at].tolist(), points=False)])
        for at, name in enumerate(names)
    ]


def _labels(scores: Scores, axis: str, size: int) -> list[str]:
    return [shown(label) for label in scores.labels.get(axis, map(str, range(size)))]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from low to high: steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    step = next(s * power for s in (1, 2, 5, 10) if s * power * count >= (high - low) * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [at * step for at in range(first, math.floor(high / step + 1e-9) + 1)]
