"""Rankers on generated documents: nDCG@10 beside BM25 and a random order, and what reading the documents once saves.

Writes the table of docs/rerank.md too. Needs rank-bm25.
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import conditions, header_text, median_ratio, medians, random_llama, table, timed, use_threads, write
from rank_bm25 import BM25Okapi

from sparing.adapters.lens import ModelLens
from sparing.core.scores import Scores
from sparing.loading import ModelSpec
from sparing.measures.documents import graded_ndcg
from sparing.methods.rerank.icr import ICR
from sparing.methods.rerank.qrhead import QRHeadRanker
from sparing.reranking import TokenizedText, rerank_many
from sparing.scoring import score
from sparing.tasks import bootstrap, context_means
from sparing.tasks.ranking_sets import RankingSet, fact_set, pairing_set

DOCUMENT = Path(__file__).parent.parent / "docs" / "rerank.md"
START, END = "<!-- ranking: written by benchmarks/rerank.py -->", "<!-- /ranking -->"
SETS: dict[str, Callable[..., RankingSet]] = {"facts": fact_set, "pairs": pairing_set}
HEADS = 4  # of the bundled model's 16; the paper's 16 would be all of them
DETECTION_SEED = 1000
RANDOM_ROUNDS = 3

# (set) → scores (queries, documents)
Rank = Callable[[RankingSet], Sequence[Sequence[float]]]


class ReadsAll(ModelLens):
    """Shares nothing: every query reads all documents."""

    def prefix(self, ids: Any) -> None:
        """None, as where a model cannot go on from a prefix."""


def contestants(loaded: Any, heads: Scores) -> dict[str, Rank]:
    """By the name that the table shows."""

    def by(ranker: Any) -> Rank:
        def rank(made: RankingSet) -> list[list[float]]:
            found = rerank_many(loaded.model, loaded.tokenizer, made.queries, made.documents, ranker)
            return [[score for _, score in sorted(ranking)] for ranking in found]

        return rank

    return {
        "`icr`": by("icr"),
        "`icr(calibrated=false)`": by("icr(calibrated=false)"),
        f"`qrhead(top={HEADS})`": by(QRHeadRanker(scores=heads, top=HEADS)),
        "`first`": by("first"),
        "BM25": bm25,
        "random order": chance,
    }


def bm25(made: RankingSet) -> list[list[float]]:
    """rank-bm25's Okapi with its own parameters, over small-letter words."""
    words = [re.findall(r"\w+", text.lower()) for text in made.documents]
    index = BM25Okapi(words)
    return [index.get_scores(re.findall(r"\w+", query.lower())).tolist() for query in made.queries]


def chance(made: RankingSet) -> list[list[float]]:
    """Random scores, the same for the same set."""
    rng = random.Random(made.documents[0])
    return [[rng.random() for _ in made.documents] for _ in made.queries]


def quality(loaded: Any, seeds: range, heads: Scores) -> list[dict[str, Any]]:
    """nDCG@10 of every ranker on every kind of set, one mean a set."""
    rows = []
    for name, make in SETS.items():
        sets = [make(seed) for seed in seeds]
        for ranker, rank in contestants(loaded, heads).items():
            gains = [
                [
                    float(graded_ndcg(torch.tensor(scores), grades))
                    for scores, grades in zip(rank(made), made.grades, strict=True)
                ]
                for made in sets
            ]
            found = bootstrap(context_means(gains))
            print(f"{name:6} {ranker:24} {found}")
            rows.append({"set": name, "ranker": ranker, "mean": found.mean, "low": found.low, "high": found.high,
                         "n": found.n, "ndcg": gains})  # fmt: skip
    return rows


def times(name: str, model: Any, tokenizer: Any, rounds: int) -> list[dict[str, Any]]:
    """ICR that reads the documents once against ICR that reads them for every query."""
    rows, text = [], TokenizedText(tokenizer)
    sharing, apart = ModelLens(model), ReadsAll(model)
    for queries in (1, 5):
        made = fact_set(0, documents=20, queries=queries, words=45)
        tokens = sum(len(text(" " + document)) for document in made.documents)
        clocks: dict[str, list[Any]] = {"shared": [], "apart": []}
        work = {key: lambda lens=lens: ICR().score(lens, text, made.queries, made.documents)  # noqa: B023
                for key, lens in (("shared", sharing), ("apart", apart))}  # fmt: skip
        differ = float((work["shared"]() - work["apart"]()).abs().max())
        for index in range(rounds):
            for key in list(work)[:: 1 if index % 2 else -1]:
                clocks[key].append(timed(work[key]))
        rows.append({
            "model": name, "queries": queries, "document_tokens": tokens, "largest_difference": differ,
            "times": {key: medians(found) for key, found in clocks.items()},
            "ratio": median_ratio(clocks["shared"], clocks["apart"]),
            "ratio_wall": median_ratio(clocks["shared"], clocks["apart"], "wall"),
            "rounds": {key: [[each.wall, each.cpu] for each in found] for key, found in clocks.items()},
        })  # fmt: skip
    return rows


def quality_table(result: dict[str, Any]) -> str:
    """The rankers, a column for each kind of set."""
    rows: dict[str, list[str]] = {}
    for each in result["quality"]:
        cell = f"{each['mean']:.3f} [{each['low']:.3f}, {each['high']:.3f}]"
        rows.setdefault(each["ranker"], [each["ranker"]]).append(cell)
    return table(["ranker", *SETS], list(rows.values()))


def times_table(result: dict[str, Any]) -> str:
    """What reading once saves."""
    cells = [
        [each["model"], each["document_tokens"], each["queries"], f"{each['times']['apart']['cpu_ms']:.0f}",
         f"{each['times']['shared']['cpu_ms']:.0f}", f"{each['ratio']:.2f}", f"{each['largest_difference']:.0e}"]
        for each in result["times"]
    ]  # fmt: skip
    header = ["model", "document tokens", "queries", "read each time, CPU ms", "read once, CPU ms", "ratio",
              "scores differ by"]  # fmt: skip
    return table(header, cells)


def notes(result: dict[str, Any]) -> list[str]:
    """What the numbers are."""
    return [
        f"- nDCG@10, mean over {result['quality'][0]['n']} sets of 5 queries, bootstrapped 95 % interval over sets; "
        "bundled model, float32",
        "- facts: 20 passages of a novel with a fact each; pairs: 8 documents of the same words, paired otherwise",
        f"- qrhead: the best {HEADS} of 16 heads by `sparing score --scorer qrhead`, measured on 16 other samples",
        f"- Times: medians of {result['rounds']} rounds (random model: {result['random_rounds']}), ratio within a "
        "round; the forward for N/A is in all of them",
    ]


def markdown(result: dict[str, Any]) -> str:
    """The result as text."""
    head = header_text("Ranking generated documents", result)
    return "\n".join([head, *notes(result), "", quality_table(result), "", times_table(result)])


def document(text: str, result: dict[str, Any]) -> str:
    """The text of docs/rerank.md with the result's tables in it."""
    head, _, rest = text.partition(START)
    tail = rest.partition(END)[2]
    made = [*header_text("", result).splitlines()[2:], *notes(result)]
    parts = [START, quality_table(result), "", times_table(result), "", *made, END]
    return head + "\n".join(parts) + tail


def main() -> None:
    """Run, write the results and the document's tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=20, help="sets of documents of each kind")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the first set")
    args = parser.parse_args()
    use_threads(args.threads)
    loaded = ModelSpec("bundled", "float32", "cpu").load()
    heads = score(loaded.model, "qrhead", loaded.tokenizer, samples=16, length=512, seed=DETECTION_SEED)
    sets = range(args.seed, args.seed + args.sets)
    random_model = random_llama("14m", torch.float32, 0)
    result = {
        **conditions(args.seed, "rank-bm25"), "rounds": args.rounds,
        "random_rounds": RANDOM_ROUNDS, "heads": heads.top(HEADS), "quality": quality(loaded, sets, heads),
        "times": [
            *times("bundled", loaded.model, loaded.tokenizer, args.rounds),
            *times("random, 14 M", random_model, loaded.tokenizer, RANDOM_ROUNDS),
        ],
    }  # fmt: skip
    write("rerank", result, markdown(result))
    DOCUMENT.write_text(document(DOCUMENT.read_text("utf-8"), result), "utf-8")


if __name__ == "__main__":
    main()
