"""`/v1/rerank`: what the library says, beside requests whose caches are being compressed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from live import FILLER, Live, load

import sparing
from sparing.adapters.lens import discover, read_only

QUERY = "What is the special magic number for amber river?"
TEXTS = [
    "The special magic number for quiet meadow is: 71263.",
    "The special magic number for amber river is: 48152.",
    "The grass is green. The sky is blue.",
]


def ask(live: Live, **more):
    return live.post("/v1/rerank", json={"model": "bundled", "query": QUERY, "documents": TEXTS} | more)


def test_the_order_is_that_of_the_library(live):
    loaded = load()
    expected = sparing.rerank(loaded.model, loaded.tokenizer, QUERY, TEXTS)
    body = ask(live).json()
    assert [(each["index"], each["relevance_score"]) for each in body["results"]] == [
        (each.document, pytest.approx(each.score, abs=1e-6)) for each in expected
    ]
    assert body["results"][0] == {"index": 1, "relevance_score": body["results"][0]["relevance_score"]}
    assert body["model"] == "bundled"
    assert body["usage"]["total_tokens"] > 20


def test_the_best_with_their_texts_in_jinas_and_coheres_form(live):
    body = ask(live, documents=[{"text": text} for text in TEXTS], top_n=1, return_documents=True).json()
    assert [(each["index"], each["document"]) for each in body["results"]] == [(1, {"text": TEXTS[1]})]


def test_answers_beside_rankings_are_what_they_are_alone(live):
    """The method is off the model for one step of a ranking, and back on for the next token."""

    def write(number: int) -> str:
        prompt = FILLER * 12 + f" The magic number is {number}." + FILLER
        done = live.client().completions.create(model="bundled", prompt=prompt, max_tokens=12, temperature=0)
        return done.choices[0].text

    alone = [write(number) for number in range(4)]
    with ThreadPoolExecutor(8) as pool:
        texts = [pool.submit(write, number) for number in range(4)]
        rankings = [pool.submit(ask, live) for _ in range(4)]
        assert [text.result() for text in texts] == alone
        orders = {tuple(each["index"] for each in ranking.result().json()["results"]) for ranking in rankings}
    assert len(orders) == 1


def test_the_promise_covers_what_a_ranking_holds(live, monkeypatch):
    """Of many short documents the numbers are most of the prompt."""
    held = []

    def noted(cache):
        bytes_held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        held.append((bytes_held, live.service.memory.reserved - live.service.documents.held))
        return read_only(cache)

    monkeypatch.setattr("sparing.adapters.lens.read_only", noted)
    assert ask(live, documents=["x"] * 60).status_code == 200
    [(bytes_held, promised)] = held
    assert bytes_held <= promised


def test_the_model_is_looked_at_once_for_all_rankings(live, monkeypatch):
    looked = []
    monkeypatch.setattr("sparing.adapters.lens.discover", lambda *given: looked.append(1) or discover(*given))
    assert ask(live).json()["results"] == ask(live).json()["results"]
    assert len(looked) <= 1


@pytest.mark.parametrize(
    ("more", "status", "said"),
    [
        ({"documents": []}, 400, "documents"),
        ({"documents": [3]}, 400, "documents"),
        ({"documents": ["  "]}, 400, "documents[0]"),
        ({"query": ""}, 400, "query"),
        ({"top_n": 0}, 400, "top_n"),
        ({"model": "another"}, 404, "not served here"),
        ({"ranker": "first"}, 400, "ranker"),
        ({"documents": ["word " * 9000]}, 400, "tokens"),
    ],
)
def test_what_cannot_be_ranked_is_refused_by_name(live, more, status, said):
    done = ask(live, **more)
    assert done.status_code == status
    assert said in done.json()["error"]["message"]
    assert ask(live).status_code == 200, "and the next one is served"
