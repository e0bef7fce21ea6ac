"""Ranking documents by a model: `sparing rerank`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sparing.cli.options import model_options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sparing.loading import ModelSpec
    from sparing.reranking import Ranked
    from sparing.tasks.ranking_files import GivenDocument

# The first words of a document in the table.
SHOWN = 60


class _WithRankers(click.Command):
    """A command whose help ends with the rankers; they are looked up when help is asked for."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the rankers down."""
        from sparing.core.ranker import rankers

        with formatter.section("Rankers"):
            formatter.write_dl([(name, f"{info.summary} ({info.paper})") for name, info in rankers().items()])


@click.command(cls=_WithRankers)
@model_options
@click.option("--query", required=True, help="What the documents should answer.")
@click.option(
    "--docs", required=True, type=click.Path(path_type=Path),
    help='JSON lines, {"id": ..., "text": ...}, and "title", "relevance" if wished; the best of a first stage first.',
)  # fmt: skip
@click.option("--ranker", default="icr", show_default=True,
              help='See below; fields in brackets: "qrhead(scores=heads.safetensors,top=4)".')  # fmt: skip
@click.option(
    "--reorder", is_flag=True, help="Write --out with the best at both ends, as a long prompt should have it."
)
@click.option("--out", default=None, type=click.Path(path_type=Path), help="JSON lines: the documents, rank and score.")
def rerank(spec: ModelSpec, query: str, docs: Path, ranker: str, reorder: bool, out: Path | None) -> None:
    """Rank documents by how well they answer a query, by what a model attends to."""
    from sparing.compare.store import write_text_atomic
    from sparing.core.ranker import parse_ranker
    from sparing.reranking import reorder_for_long_context
    from sparing.reranking import rerank as ranked_by
    from sparing.tasks.ranking_files import load_documents

    if reorder and out is None:
        raise click.UsageError("--reorder says how --out is written; give --out as well")
    documents, by = load_documents(docs), parse_ranker(ranker)
    loaded = spec.load()
    ranked = ranked_by(loaded.model, loaded.tokenizer, query, [document.content for document in documents], by)
    rows = [{**documents[each.document].row, "rank": rank, "score": each.score} for rank, each in enumerate(ranked, 1)]
    lines = [
        json.dumps(row, ensure_ascii=False) + "\n" for row in (reorder_for_long_context(rows) if reorder else rows)
    ]
    if out is not None:
        write_text_atomic(out, "".join(lines))
    _print(ranked, documents)
    _print_ndcg(ranked, documents)
    if out is not None:
        click.echo(f"ranked: {out}")


def _print(ranked: Sequence[Ranked], documents: Sequence[GivenDocument]) -> None:
    """A table, the best first."""
    judged = any(document.relevance is not None for document in documents)
    table = [("rank", "id", "score", *(["relevance"] if judged else []), "document")]
    for rank, each in enumerate(ranked, 1):
        document = documents[each.document]
        grade = [f"{document.relevance or 0:g}"] if judged else []
        start = " ".join(document.content[: 4 * SHOWN].split())[:SHOWN]
        table.append((str(rank), str(document.id), f"{each.score:.4g}", *grade, start))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)][:-1]
    for *cells, start in table:
        click.echo("  ".join([*(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)), start]))


def _print_ndcg(ranked: Sequence[Ranked], documents: Sequence[GivenDocument]) -> None:
    """How good the ranking is, if the file says what is relevant."""
    import torch

    from sparing.measures.documents import graded_ndcg

    grades = [documents[each.document].relevance for each in ranked]
    if all(grade is None for grade in grades):
        return
    if not any(grades):
        click.echo("nDCG@10: none, no document is relevant")
        return
    in_order = torch.arange(len(grades), 0, -1)
    click.echo(f"nDCG@10: {float(graded_ndcg(in_order, [grade or 0 for grade in grades])):.4f}")


COMMANDS = (rerank,)
