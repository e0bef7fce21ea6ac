"""A measurement as a picture, by matplotlib (the extra `plots`)."""

from __future__ import annotations

import importlib
import os
import tempfile
from pathlib import Path
from typing import Any

from sparing.compare.ablation_curve import AblationCurve
from sparing.compare.measurement.views import LineView, MapView, ScatterView, TextView, View, views
from sparing.core.scores import Scores
from sparing.errors import MissingExtraError, OutputError

NUMBERED = 16


def save_png(
    scores: Scores,
    path: str | os.PathLike[str],
    *,
    compare: Scores | None = None,
    curve: AblationCurve | None = None,
) -> Path:
    """Draw a measurement: maps, curves and scatter below one another; coloured text is for pages only.

    Args:
        compare, curve: see `render_scores`.

    Raises:
        MissingExtraError: matplotlib is not installed. OutputError: the file cannot be written.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    seen = views(scores, compare, curve)
    drawn: list[View] = [*seen.maps, *seen.lines, *seen.scatters]
    heights = [_height(view) for view in drawn]
    widest = max((view.values.shape[1] for view in seen.maps), default=0)
    size = (min(40.0, max(6.5, 0.22 * widest + 2.5)), sum(heights) + 0.6)
    figure = Figure(figsize=size, layout="constrained", dpi=150)
    figure.suptitle(f"{scores.scorer} of {scores.model.name} (n = {scores.n})", fontsize=11)
    plots = figure.subplots(len(drawn), 1, squeeze=False, height_ratios=heights)[:, 0]
    for view, axes in zip(drawn, plots, strict=True):
        _draw(view, axes, figure)
    return _write(figure, Path(path))


def require_matplotlib() -> None:
    """Refuse to go on without matplotlib.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError:
        raise MissingExtraError("matplotlib", "plots") from None


def _height(view: View) -> float:
    return max(1.6, 0.3 * view.values.shape[0] + 1.2) if isinstance(view, MapView) else 3.4


def _draw(view: View, axes: Any, figure: Any) -> None:
    axes.set_title(view.title, fontsize=9)
    if isinstance(view, MapView):
        _draw_map(view, axes, figure)
    elif isinstance(view, LineView):
        _draw_lines(view, axes)
    elif isinstance(view, ScatterView):
        axes.scatter([p[0] for p in view.points], [p[1] for p in view.points], s=16)
        axes.set(xlabel=view.x_name, ylabel=view.y_name, title=f"{view.title}\n{view.words}")
    else:
        assert not isinstance(view, TextView), "text is not drawn"


def _draw_map(view: MapView, axes: Any, figure: Any) -> None:
    """Blue above 0, orange-red below, white at 0; grey where there is no value."""
    from matplotlib import colormaps

    colours = colormaps["RdBu"].with_extremes(bad="0.8")
    image = axes.imshow(view.values.numpy(), cmap=colours, vmin=-view.bound, vmax=view.bound, aspect="auto")
    figure.colorbar(image, ax=axes)
    axes.set(xlabel=view.column_name, ylabel=view.row_name)
    axes.set_yticks(range(len(view.rows)), view.rows, fontsize=7)
    every = 1 if len(view.columns) <= 64 else 4
    places = range(0, len(view.columns), every)
    is_text = any(not label.isdigit() for label in view.columns)
    # A dollar sign would begin a formula.
    names = [view.columns[at].replace("$", r"\$") for at in places]
    axes.set_xticks(places, names, fontsize=7, rotation=90 if is_text else 0)
    if len(view.columns) <= NUMBERED:
        for row, values in enumerate(view.values.tolist()):
            for column, value in enumerate(values):
                if value == value:
                    colour = "white" if abs(value) > 0.6 * view.bound else "black"
                    axes.text(column, row, f"{value:.2g}", ha="center", va="center", fontsize=7, color=colour)


def _draw_lines(view: LineView, axes: Any) -> None:
    for line in view.lines:
        (drawn,) = axes.plot(line.x, line.y, label=line.name, marker="o" if line.points else None, markersize=3)
        if line.low:
            axes.fill_between(line.x, line.low, line.high, alpha=0.2, color=drawn.get_color())
    if view.level is not None:
        axes.axhline(view.level[0], linestyle=":", color="0.3", linewidth=1, label=view.level[1])
    if view.range is not None:
        axes.set_ylim(view.range[0] - 0.02, view.range[1] + 0.02)
    if len(view.lines) > 1:
        axes.legend(fontsize=7)
    axes.set(xlabel=view.x_name, ylabel=view.y_name)


def _write(figure: Any, target: Path) -> Path:
    """Whole or not at all."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=target.parent, suffix=".png")
        os.close(handle)
        try:
            figure.savefig(temporary, metadata={"Software": None})
            os.replace(temporary, target)
        finally:
            Path(temporary).unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(target, str(error)) from error
    return target
