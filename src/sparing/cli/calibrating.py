"""Measuring what a method needs to know of a model: `sparing calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from sparing.cli.options import model_options

if TYPE_CHECKING:
    from sparing.loading import ModelSpec


@click.command()
@click.option("--method", "method_name", required=True, help="A method that needs measurements; see `sparing methods`.")
@model_options
@click.option("--samples", default=16, show_default=True, type=click.IntRange(1), help="How many are made offline.")
@click.option("--length", default=512, show_default=True, type=click.IntRange(8), help="Tokens per sample.")
@click.option("--seed", default=0, show_default=True)
@click.option("--batch-size", default=8, show_default=True, type=click.IntRange(1))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The safetensors file to write.")
def calibrate(
    method_name: str, spec: ModelSpec, samples: int, length: int, seed: int, batch_size: int, out: Path
) -> None:  # fmt: skip
    """Measure what a method needs to know of a model, on data made offline, and save it for other commands."""
    from sparing.cli.progress import ProgressBar
    from sparing.core.measured import needed_by
    from sparing.core.scores import save_scores
    from sparing.scoring import calibrate as measure

    needs = needed_by(method_name)
    loaded = spec.load()
    with ProgressBar(method_name) as told:
        found = measure(
            loaded.model, method_name, loaded.tokenizer, samples=samples, length=length, seed=seed,
            batch_size=batch_size, progress=told, name=spec.name,
        )  # fmt: skip
    save_scores(out, found)
    for scores in found:
        click.echo(f"{scores.scorer}: n = {scores.n}" + "".join(f"; {note}" for note in scores.notes))
    click.echo(f"{' and '.join(needs)}: {out}")
    click.echo(f'use it as "{method_name}(scores={out})"')


COMMANDS = (calibrate,)
