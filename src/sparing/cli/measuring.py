"""Measuring heads: `sparing score` and `sparing agree`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparing.cli.cluster import cluster_options
from sparing.cli.options import command_line, count_or_share, model_options

if TYPE_CHECKING:
    from sparing.loading import ModelSpec
    from sparing.scale.pool import Cluster


@click.command()
@model_options
@click.option("--scorer", required=True, help="See `sparing scorers`; fields in brackets: `name(field=value)`.")
@click.option(
    "--data", type=click.Path(path_type=Path), default=None, help="Samples of your own; made offline if not given."
)
@click.option(
    "--samples", default=None, type=click.IntRange(1), help="How many samples (default: 16, or all of your own)."
)
@click.option(
    "--length", default=512, show_default=True, type=click.IntRange(8), help="Tokens per sample made offline."
)
@click.option("--seed", default=0, show_default=True)
@click.option("--batch-size", default=8, show_default=True, type=click.IntRange(1))
@click.option("--patience", default=0, show_default=True, type=click.IntRange(0),
              help="Stop once the top 10 % have stayed the same for so many samples; 0: never.")  # fmt: skip
@click.option("--max-seconds", default=math.inf, type=float, help="Stop after so long, with what there is.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The safetensors file to write.")
@click.option("--html", default=None, type=click.Path(path_type=Path), help="A page that shows the measurement.")
@click.option("--png", default=None, type=click.Path(path_type=Path), help="The same as a picture (needs matplotlib).")
@click.option("--against", default=None, type=click.Path(path_type=Path), help="Another measurement to compare with.")
@cluster_options
def score(
    spec: ModelSpec, scorer: str, data: Path | None, samples: int | None, length: int, seed: int, batch_size: int,
    patience: int, max_seconds: float, out: Path, html: Path | None, png: Path | None, against: Path | None,
    cluster: Cluster,
) -> None:  # fmt: skip
    """Measure heads, layers or positions of a model, and save the result for other commands."""
    from sparing.cli.progress import ProgressBar
    from sparing.core.head_scorer import StopRule, parse_scorer
    from sparing.core.scores import Scores

    parsed = parse_scorer(scorer)
    other = Scores.load(against) if against is not None else None
    if other is not None:
        other.require_axes(*parsed.info.axes)
    if png is not None:
        from sparing.compare.measurement.png import require_matplotlib

        require_matplotlib()
    from sparing.scale.scores import Measurement, measure
    from sparing.scoring import Settings

    settings = Settings(samples or 16, length, seed, batch_size, StopRule(patience=patience), max_seconds)
    measurement = Measurement(spec, parsed, settings, data, cut=samples is not None)
    check = other.check_model if other is not None else lambda identity: None
    with ProgressBar(parsed.info.name) as told:
        found = measure(measurement, cluster, check, told)
    found.save(out)
    _print(found, other)
    click.echo(f"scores: {out}")
    if html is not None:
        from sparing.compare.measurement.page import render_scores
        from sparing.compare.store import write_text_atomic

        html.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(html, render_scores(found, compare=other, command=command_line()))
        click.echo(f"page: {html}")
    if png is not None:
        from sparing.compare.measurement.png import save_png

        save_png(found, png, compare=other)
        click.echo(f"picture: {png}")


@click.command()
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", type=click.Path(path_type=Path))
@click.option("--top", default="0.1", show_default=True, help="Units in the top: a number, or a share.")
def agree(first: Path, second: Path, top: str) -> None:
    """Compare two measurements of one model: rank correlation, and overlap of the top."""
    from sparing.core.scores import Scores
    from sparing.core.scores import agree as compare

    k = count_or_share("top", top)
    click.echo(str(compare(Scores.load(first), Scores.load(second), k)))


def _print(found: Any, other: Any) -> None:
    """The ten best units, and how two measurements agree."""
    from sparing.core.scores import agree as compare

    errors = found.standard_error
    for unit in found.ranked()[:10]:
        names = [
            found.labels[axis][i] if axis in found.labels else str(i) for axis, i in zip(found.axes, unit, strict=True)
        ]
        where = "  ".join(f"{axis} {name}" for axis, name in zip(found.axes, names, strict=True))
        spread = "" if errors is None else f" ± {float(errors[unit]):.3g}"
        click.echo(f"{where:24} {float(found.values[unit]):.4g}{spread}")
    click.echo(f"n = {found.n}" + "".join(f"; {note}" for note in found.notes))
    if other is not None:
        click.echo(str(compare(found, other)))


COMMANDS = (score, agree)
