"""Position-invariant segments on the bundled model: what the order of documents does to answers, with and without.

Two tasks. *lookup*: every document holds one fact, and one of them is asked for. *conflict*: every document answers
the same question differently, so whatever is said depends on the order alone. All orders of 4 documents, and 24 drawn
ones of 8, are read by the model itself, and three of them as `position_invariant` reads them, each computed as it is
written. And the cost, on a random model.
"""

from __future__ import annotations

import argparse
import itertools
import random
import re
from functools import partial
from typing import Any

import torch
from common import (
    Time,
    conditions,
    header_text,
    median_ratio,
    medians,
    random_llama,
    random_prompt,
    table,
    timed,
    use_threads,
    write,
)
from torch import Tensor
from transformers.cache_utils import DynamicCache

from sparing.core.segments import SegmentedPrompt
from sparing.loading import LoadedModel, ModelSpec
from sparing.segments import SegmentSession, position_invariant
from sparing.tasks import haystack
from sparing.tasks.encoding import Encoder, Piece, join
from sparing.tasks.formats import NEEDLE, NEEDLE_QUESTION
from sparing.tasks.intervals import Interval, wilson

DOCUMENTS = {4: 128, 8: 64}  # documents, tokens of each
ORDERS = 24
OWN_ORDERS = 3  # of those, in which the session computes as well, each in its own order
ANSWER = 8  # tokens
TOKENS = 16  # after a prompt, timed together
COSTS = {4: 512, 16: 128}  # documents, tokens of each


def main() -> None:
    """Measure and write down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    use_threads(given.threads)
    loaded = ModelSpec("bundled", "float32", device="cpu").load()
    with position_invariant(loaded.model) as session:
        answers = [
            asked(loaded, session, task, count, given.contexts, given.seed)
            for task in ("lookup", "conflict")
            for count in DOCUMENTS
        ]
    costs = [cost(count, given.rounds, given.seed) for count in COSTS]
    result = conditions(given.seed) | {"answers": answers, "costs": costs}
    write("segments", result, text(result, given))


# -- answers ----------------------------------------------------------------------------------------------------------


def asked(
    loaded: LoadedModel, session: SegmentSession, task: str, count: int, contexts: int, seed: int
) -> dict[str, Any]:
    """Ask about `contexts` sets of documents, in many orders by the model itself and once by the session."""
    encoder, rows = Encoder(loaded.tokenizer), []
    for index in range(contexts):
        rng = random.Random(f"segments/{task}/{count}/{seed}/{index}")
        keys, values, documents = drawn(encoder, rng, task, count)
        wanted = rng.randrange(count)
        question = encoder(NEEDLE_QUESTION.format(kind="number", key=keys[wanted]))
        orders = list(itertools.permutations(range(count)))[:ORDERS] if count == 4 else shuffles(rng, count)
        prompts = [SegmentedPrompt.of(encoder.front, [documents[i] for i in order], question) for order in orders]
        plain = said(loaded, prompts)
        rows.append(
            {
                "wanted": values[wanted],
                "values": values,
                "places": [order.index(wanted) for order in orders],
                "plain": plain,
                "picked": [order.index(values.index(v)) if v in values else None
                           for order, v in zip(orders, plain, strict=True)],
                "invariant": [said(loaded, [prompt], session)[0] for prompt in prompts[:: ORDERS // OWN_ORDERS]],
            }
        )  # fmt: skip
    return {"task": task, "documents": count, "tokens": DOCUMENTS[count], "contexts": rows}


def said(
    loaded: LoadedModel, prompts: list[SegmentedPrompt], session: SegmentSession | None = None
) -> list[str | None]:
    """The first number of 5 digits in every answer. A session computes a prompt in the order that it has."""
    ids = torch.tensor([prompt.ids for prompt in prompts])
    cache = None if session is None else session._new_cache(prompts[0])
    written = loaded.model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=ANSWER, do_sample=False
    )
    found = [re.search(r"\d{5}", loaded.tokenizer.decode(row)) for row in written[:, ids.shape[1] :]]
    return [match.group() if match else None for match in found]


def drawn(encoder: Encoder, rng: random.Random, task: str, count: int) -> tuple[list[str], list[str], list[list[int]]]:
    """Keys, values and documents, each a passage of the novel with its fact between two sentences."""
    keys, values = haystack.draw_keys(rng, count), haystack.draw_values(rng, "number", count)
    keys = keys if task == "lookup" else [keys[0]] * count
    documents = []
    for key, value in zip(keys, values, strict=True):
        fact = Piece(encoder(NEEDLE.format(kind="number", key=key, value=value)))
        hay = haystack.fill(encoder, DOCUMENTS[count] - len(fact.ids), haystack.text(rng))
        documents.append(join([], haystack.insert(hay, [fact], [rng.random()]))[0])
    return keys, values, documents


def shuffles(rng: random.Random, count: int) -> list[tuple[int, ...]]:
    """Orders in which every document is at every place equally often: turned around from random starts."""
    orders = []
    for _ in range(ORDERS // count):
        start = rng.sample(range(count), count)
        orders += [tuple(start[shift:] + start[:shift]) for shift in range(count)]
    return orders


# -- cost -------------------------------------------------------------------------------------------------------------


def cost(count: int, rounds: int, seed: int) -> dict[str, Any]:
    """CPU time of a prompt and of a token after it, beside sdpa, on a random Llama of 14 M parameters."""
    model, length = random_llama("14m", torch.float32, seed), COSTS[count]
    ids = random_prompt(count * length + 32, seed)
    segments = ids[0, 16:-16].split(length)
    times: dict[str, list[Time]] = {name: [] for name in ("prompt", "plain prompt", "token", "plain token")}
    with position_invariant(model) as session:
        for _ in range(rounds):
            _, mine = session._begin(ids[0, :16], list(segments), ids[0, -16:])
            for kind, cache in (("", mine), ("plain ", DynamicCache(config=model.config))):
                times[kind + "prompt"].append(timed(partial(read, model, cache, ids, 1)))
                times[kind + "token"].append(timed(partial(read, model, cache, ids[:, :1], TOKENS)))
    return {
        "documents": count, "tokens": ids.shape[1],
        "prompt": medians(times["prompt"]), "prompt_ratio": median_ratio(times["prompt"], times["plain prompt"]),
        "token": medians(times["token"], TOKENS), "token_ratio": median_ratio(times["token"], times["plain token"]),
    }  # fmt: skip


@torch.no_grad()
def read(model: Any, cache: Any, ids: Tensor, times: int) -> None:
    """The same tokens some times in a row."""
    for _ in range(times):
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)


# -- words ------------------------------------------------------------------------------------------------------------


def text(result: dict[str, Any], given: argparse.Namespace) -> str:
    """The tables."""
    parts = [header_text("Position-invariant segments", result)]
    parts += [
        f"{given.contexts} contexts each; intervals are Wilson's over contexts. Model: the bundled one, float32.",
        "## lookup: a fact in every document, one is asked for",
        table(*lookup([row for row in result["answers"] if row["task"] == "lookup"])),
        "## conflict: every document answers the question differently",
        table(*conflict([row for row in result["answers"] if row["task"] == "conflict"])),
        f"## cost beside sdpa, random Llama (14 M parameters), float32, CPU time, {given.rounds} rounds",
        table(
            ["documents", "tokens", "prompt", "a token after it"],
            [
                [c["documents"], c["tokens"], f"{c['prompt_ratio']:.2f} ×", f"{c['token_ratio']:.2f} ×"]
                for c in result["costs"]
            ],
        ),
    ]
    return "\n\n".join(parts)


def lookup(cells: list[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Right answers, and how often all orders give the same answer."""
    rows = []
    for cell in cells:
        contexts = cell["contexts"]
        right = [[said == row["wanted"] for said in row["plain"]] for row in contexts]
        places = [
            [ok for row, oks in zip(contexts, right, strict=True)
             for place, ok in zip(row["places"], oks, strict=True) if place == at]
            for at in range(cell["documents"])
        ]  # fmt: skip
        by_place = [sum(oks) / len(oks) for oks in places]
        rows.append(
            [
                cell["documents"], wilson([sum(oks) / len(oks) for oks in right]),
                f"{min(by_place):.2f} (place {by_place.index(min(by_place)) + 1})",
                same(contexts, "plain"),
                wilson([float(row["invariant"][0] == row["wanted"]) for row in contexts]), same(contexts, "invariant"),
            ]
        )  # fmt: skip
    return ["documents", "model: right", "worst place", "same in all orders", "invariant: right",
            "same in all orders"], rows  # fmt: skip


def same(contexts: list[dict[str, Any]], who: str) -> Interval:
    """The share of contexts about which the same is said in all orders."""
    return wilson([float(len(set(row[who])) == 1) for row in contexts])


def conflict(cells: list[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Which place the model picks, and how often all orders give the same answer."""
    rows = []
    for cell in cells:
        contexts, count = cell["contexts"], cell["documents"]
        picks = [place for row in contexts for place in row["picked"]]
        shares = [picks.count(at) / len(picks) for at in range(count)]
        rows.append(
            [
                count, " ".join(f"{share:.2f}" for share in shares), f"{picks.count(None) / len(picks):.2f}",
                same(contexts, "plain"),
                wilson([float(row["invariant"][0] in row["values"]) for row in contexts]), same(contexts, "invariant"),
            ]
        )  # fmt: skip
    return ["documents", "model: answer from place 1, 2, ...", "from none", "same in all orders",
            "invariant: from a document", "same in all orders"], rows  # fmt: skip


if __name__ == "__main__":
    main()
