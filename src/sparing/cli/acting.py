"""Acting on what was measured: `sparing edit`, `sparing ablate` and `sparing corpus`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparing.cli.cluster import cluster_options
from sparing.cli.options import count_or_share, model_options, whole_numbers
from sparing.errors import InvalidInputError, require

if TYPE_CHECKING:
    from sparing.loading import ModelSpec
    from sparing.scale.pool import Cluster

SCORES = click.option(
    "--scores", default=None, type=click.Path(path_type=Path), help="A measurement of heads, from `sparing score`."
)


@click.command()
@model_options
@SCORES
@click.option("--top", default=None, help="Edit the best-scored heads: a number, or a share of all.")
@click.option("--heads", default=None, help="Edit these heads: layer.head, comma-separated, e.g. 2.1,3.0.")
@click.option("--scale", default=None, type=float, help="Multiply what the heads say by this number.")
@click.option("--ablate", type=click.Choice(["zero", "mean"]), default=None, help="Take the heads away.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The folder of the new checkpoint.")
def edit(
    spec: ModelSpec, scores: Path | None, top: str | None, heads: str | None, scale: float | None,
    ablate: str | None, out: Path,
) -> None:  # fmt: skip
    """Fold an edit of heads into an ordinary checkpoint."""
    from sparing.core.edits import HeadEdit, ScaleHeads
    from sparing.editing import ablate as take_away
    from sparing.editing import head_outputs, save_edited
    from sparing.tasks.probes import text_samples

    if (scale is None) == (ablate is None):
        raise InvalidInputError("edit", {"scale": scale, "ablate": ablate}, "one of --scale and --ablate")
    loaded = spec.load()
    chosen = _heads(scores, top, heads, loaded.model)
    if scale is not None:
        made: HeadEdit = ScaleHeads(dict.fromkeys(chosen, scale))
    else:
        texts = text_samples(loaded.tokenizer, 4, min(512, loaded.max_length or 512)) if ablate == "mean" else []
        made = take_away("mean" if texts else "zero", chosen, head_outputs(loaded.model, texts) if texts else None)
    save_edited(loaded.model, loaded.tokenizer, [made], out)
    click.echo(f"edited {len(chosen)} heads: {', '.join(f'{layer}.{head}' for layer, head in chosen)}")
    click.echo(f"checkpoint: {out}")


@click.command()
@model_options
@click.option("--scores", required=True, type=click.Path(path_type=Path), help="A measurement of heads.")
@click.option("--task", "task_name", default="needle_single", show_default=True, help="A task, or a file of your own.")
@click.option("--kind", type=click.Choice(["zero", "mean", "uniform", "resample"]), default="zero", show_default=True)
@click.option("--length", default=512, show_default=True, type=click.IntRange(8), help="Tokens per sample.")
@click.option("--samples", default=10, show_default=True, type=click.IntRange(1))
@click.option("--counts", default=None, help="Heads to take away, comma-separated; by default 1, 2, 4, ... to half.")
@click.option("--draws", default=5, show_default=True, type=click.IntRange(1), help="Random sets per count.")
@click.option("--seed", default=0, show_default=True)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The JSON file to write.")
@click.option("--html", default=None, type=click.Path(path_type=Path), help="A page with the curve.")
def ablate(
    spec: ModelSpec, scores: Path, task_name: str, kind: Any, length: int, samples: int, counts: str | None,
    draws: int, seed: int, out: Path, html: Path | None,
) -> None:  # fmt: skip
    """Take heads away, best-scored first, and see what a task loses: the ablation curve."""
    from sparing.cli.progress import ProgressBar
    from sparing.compare.ablation_curve import ablation_curve
    from sparing.core.scores import Scores
    from sparing.tasks import named

    measured, task = Scores.load(scores), named(task_name)
    removed = None if counts is None else whole_numbers("counts", counts)
    loaded = spec.load()
    with ProgressBar("ablating") as told:
        curve = ablation_curve(
            loaded.model, loaded.tokenizer, measured, task, length=length, samples=samples, kind=kind,
            counts=removed, draws=draws, seed=seed, progress=told,
        )  # fmt: skip
    curve.save(out)
    click.echo(f"intact {curve.full:.2f} on {curve.task} (n = {curve.n})")
    for count, best, worst, drawn in zip(curve.counts, curve.top, curve.bottom, curve.random, strict=True):
        spread = f"{min(drawn):.2f} to {max(drawn):.2f}"
        click.echo(f"{count:4} heads away: best-scored {best:.2f}   random {spread}   worst-scored {worst:.2f}")
    click.echo(f"curve: {out}")
    if html is not None:
        from sparing.compare.measurement.page import render_scores
        from sparing.compare.store import write_text_atomic

        write_text_atomic(html, render_scores(measured, curve=curve))
        click.echo(f"page: {html}")


@click.command()
@model_options
@click.option("--scores", required=True, type=click.Path(path_type=Path), help="A measurement of heads.")
@click.option("--top", default="0.05", show_default=True, help="Heads made uniform: a number, or a share of all.")
@click.option("--data", multiple=True, required=True, type=click.Path(path_type=Path), help="JSON lines, or a folder.")
@click.option("--domain", default=None, help="Put all texts into one domain.")
@click.option("--share", default=0.2, show_default=True, type=float, help="Of every domain that is chosen.")
@click.option("--length-matched", is_flag=True, help="Choose the same share among texts of like length.")
@click.option("--max-tokens", default=4096, show_default=True, type=click.IntRange(2), help="Longer texts are cut.")
@click.option("--batch-tokens", default=8192, show_default=True, type=click.IntRange(2))
@cluster_options
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The folder of scores and chosen texts.")
def corpus(
    spec: ModelSpec, scores: Path, top: str, data: tuple[Path, ...], domain: str | None, share: float,
    length_matched: bool, max_tokens: int, batch_tokens: int, cluster: Cluster, out: Path,
) -> None:  # fmt: skip
    """Score the texts of a corpus by what retrieval heads do for them, and choose the best (AttentionInfluence)."""
    from sparing.cli.progress import ProgressBar
    from sparing.core.scores import Scores
    from sparing.corpus import score_corpus, select_top

    require(0 < share <= 1, "share", share, "a share in (0, 1]")
    measured = Scores.load(scores)
    with ProgressBar("scoring") as told:
        new = score_corpus(
            spec, measured, data, out, top=count_or_share("top", top), domain=domain, max_tokens=max_tokens,
            batch_tokens=batch_tokens, cluster=cluster,
            progress=lambda done, what: told(done, 0, what),
        )  # fmt: skip
    click.echo(f"{new} texts scored now: {out / 'results.jsonl'}")
    for part in select_top(data, out, share=share, length_matched=length_matched, domain=domain):
        click.echo(
            f"{part.domain}: {part.chosen} of {part.texts} chosen, score {part.chosen_score:.3f} against "
            f"{part.score:.3f}, {part.chosen_tokens:.0f} tokens against {part.tokens:.0f}"
        )
    click.echo(f"chosen: {out / 'selected.jsonl'}")


def _heads(scores: Path | None, top: str | None, heads: str | None, model: Any) -> tuple[tuple[int, int], ...]:
    """The heads that were named, or the top of a measurement of this model."""
    from sparing.adapters.lens import ModelLens
    from sparing.core.edits import chosen_heads
    from sparing.core.scores import Scores

    if heads is not None:
        if scores is not None or top is not None:
            allowed = "--heads, or --scores together with --top, not both"
            raise InvalidInputError("heads", heads, allowed)
        pairs = []
        for part in heads.split(","):
            layer, dot, head = part.strip().partition(".")
            if not (dot and layer.isdigit() and head.isdigit()):
                raise InvalidInputError("heads", heads, "layer.head, comma-separated, e.g. 2.1,3.0")
            pairs.append((int(layer), int(head)))
        return chosen_heads(pairs)
    if scores is None or top is None:
        raise InvalidInputError("heads", None, "--heads, or --scores together with --top")
    return chosen_heads(Scores.load(scores, ModelLens(model).identity), count_or_share("top", top))


COMMANDS = (edit, ablate, corpus)
