"""`rerank` and `rerank_many` as they are called, on a tiny model and on the bundled one; reordering; chat templates."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparing.core.ranker import Ranker, RankerInfo, rankers
from sparing.errors import InvalidInputError, UnknownNameError
from sparing.measures.documents import graded_ndcg
from sparing.methods.rerank.icr import ICR
from sparing.models import resolve
from sparing.reranking import Ranked, TokenizedText, reorder_for_long_context, rerank, rerank_many
from sparing.tasks.ranking_sets import fact_set
from sparing.testing import tiny_model
from tests.methods.rerank.characters import Characters

DOCUMENTS = ["the old river", "a story of ships", "bells", "hills and more hills"]


class Given(Ranker):
    """Scores that are given."""

    info = RankerInfo("given", "-", "", Ranker)

    def __init__(self, *scores):
        self.scores = scores

    def score(self, lens, text, queries, documents):
        assert not lens.model.training
        return torch.tensor(self.scores, dtype=torch.float64).expand(len(queries), -1)


def by_given(*scores):
    return rerank(tiny_model("llama").train(), Characters(), "why", DOCUMENTS, Given(*scores))


def test_the_best_come_first_and_equal_ones_keep_their_order():
    found = by_given(0.5, 2.0, 0.5, -1.0)
    assert found == [Ranked(1, 2.0), Ranked(0, 0.5), Ranked(2, 0.5), Ranked(3, -1.0)]
    assert all(type(document) is int and type(score) is float for document, score in found)
    again = by_given(*(score for _, score in found))
    assert [document for document, _ in again] == [0, 1, 2, 3], "what is sorted stays as it is"


@pytest.mark.parametrize("ranker", ["icr", "first"])
def test_a_ranking_is_a_permutation_and_leaves_no_trace(ranker):
    model = tiny_model("llama").train()
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        before = model(ids).logits
    attention = model.config._attn_implementation
    found = rerank(model, Characters(), "why", DOCUMENTS, ranker)
    assert sorted(document for document, _ in found) == [0, 1, 2, 3]
    assert model.training
    assert model.config._attn_implementation == attention
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)


def test_many_queries_are_each_alone():
    model = tiny_model("llama")
    for ranker in ("icr", "first"):
        together = rerank_many(model, Characters(), ["why", "where are they"], DOCUMENTS, ranker)
        assert together == [rerank(model, Characters(), q, DOCUMENTS, ranker) for q in ("why", "where are they")]


@pytest.mark.parametrize(
    ("queries", "documents", "ranker", "expected"),
    [
        (["why"], [], "icr", "documents"), (["why"], "the river", "icr", "documents: got 'the river'"),
        (["why"], ["river", " "], "icr", r"documents\[1\]"), (["why"], ["river", 5], "icr", r"documents\[1\]: got 5"),
        (["why"], ["\ud800"], "icr", "half characters"), ([], ["river"], "icr", "queries"),
        ([""], ["river"], "icr", r"queries\[0\]"), ("why", ["river"], "icr", "queries: got 'why'"),
        (["why"], ["river"], 5, "ranker: got 5"), (["why"], ["river"], "icr(", "ranker"),
    ],
)  # fmt: skip
def test_what_is_refused(queries, documents, ranker, expected):
    with pytest.raises(InvalidInputError, match=expected):
        rerank_many(tiny_model("llama"), Characters(), queries, documents, ranker)


def test_an_unknown_ranker_is_named():
    with pytest.raises(UnknownNameError, match="did you mean icr"):
        rerank(tiny_model("llama"), Characters(), "why", DOCUMENTS, "irc")


def test_the_registry_holds_the_papers():
    assert {name: info.paper for name, info in rankers().items()} == {
        "first": "2406.15657", "icr": "2410.02642", "qrhead": "2506.09944",
    }  # fmt: skip
    assert all(info.summary and issubclass(info.ranker, Ranker) for info in rankers().values())


# -- reordering --------------------------------------------------------------------------------------------------------


def test_the_best_stand_at_both_ends():
    assert reorder_for_long_context([1, 2, 3, 4, 5, 6]) == [1, 3, 5, 6, 4, 2]
    assert reorder_for_long_context([1, 2, 3, 4, 5]) == [1, 3, 5, 4, 2]
    assert reorder_for_long_context([1]) == [1]
    assert reorder_for_long_context([]) == []


@pytest.mark.parametrize("count", [1, 2, 7, 20])
def test_reordering_is_a_permutation_whose_ranks_rise_towards_the_middle(count):
    items = [object() for _ in range(count)]
    found = reorder_for_long_context(items)
    assert sorted(map(id, found)) == sorted(map(id, items))
    places = {id(item): min(place, count - 1 - place) for place, item in enumerate(found)}
    from_the_ends = [places[id(item)] for item in items]
    assert from_the_ends == sorted(from_the_ends)
    assert items[:2] == [found[0], found[-1]][:count]


# -- chat templates ----------------------------------------------------------------------------------------------------


class Chatting(Characters):
    """A tokenizer whose template puts a turn around the user's words."""

    chat_template = "yes"

    def apply_chat_template(self, turns, tokenize, add_generation_prompt):
        assert not tokenize
        assert add_generation_prompt
        return "".join(f"<{turn['role']}>{turn['content']}</{turn['role']}>" for turn in turns) + "<model>"


class Deaf(Chatting):
    def apply_chat_template(self, turns, tokenize, add_generation_prompt):
        return "<user></user>"


def test_a_chat_template_stands_around_the_documents_and_the_query():
    """Its special tokens are its own: the one that the tokenizer puts in front of plain text is not added to them."""
    text, plain = TokenizedText(Chatting()), Characters()
    assert text.before == plain.encode("<user>", add_special_tokens=False)
    assert text.after == plain.encode("</user><model>", add_special_tokens=False)
    assert (TokenizedText(plain).before, TokenizedText(plain).after) == ([1], [])


def test_the_end_of_a_chat_turn_asks_as_well():
    """Same documents, same query; what stands behind the query is among the rows that are averaged."""
    model = tiny_model("llama", torch.float64)
    seen = []
    handle = model.get_input_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    rerank(model, Chatting(), "why", DOCUMENTS)
    handle.remove()
    endings = [ids for ids in seen if ids.shape[0] > 2][1:]
    assert len(endings) == 2
    tail = Characters().encode("why</user><model>", add_special_tokens=False)
    assert endings[1][-len(tail) :].tolist() == tail


class Echo(Chatting):
    def apply_chat_template(self, turns, tokenize, add_generation_prompt):
        return turns[0]["content"] * 2


class Failing(Chatting):
    def apply_chat_template(self, turns, tokenize, add_generation_prompt):
        raise TypeError("no system prompt")


@pytest.mark.parametrize("tokenizer", [Deaf(), Echo(), Failing()], ids=["deaf", "echo", "failing"])
def test_a_template_that_does_not_hand_on_the_users_words_is_refused(tokenizer):
    with pytest.raises(InvalidInputError, match="chat template"):
        rerank(tiny_model("llama"), tokenizer, "why", DOCUMENTS)


# -- the bundled model -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundled():
    folder = resolve("bundled")
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def test_the_bundled_model_finds_facts_and_a_random_order_does_not(bundled):
    made = fact_set(seed=100, documents=10, queries=5)
    gains, chance, rng = [], [], random.Random(0)
    for ranking, grades in zip(rerank_many(*bundled, made.queries, made.documents, ICR()), made.grades, strict=True):
        scores = torch.tensor([score for _, score in sorted(ranking)])
        gains.append(float(graded_ndcg(scores, grades)))
        chance += [float(graded_ndcg(torch.tensor([rng.random() for _ in grades]), grades)) for _ in range(20)]
    # Both documents about the key come first in either order: (1 + 2 / log2 3) / (2 + 1 / log2 3) = 0.8597 at least.
    assert min(gains) > 0.859
    assert sum(chance) / len(chance) < 0.7


def test_the_documents_numbers_are_the_newest_results():
    root = Path(__file__).parent.parent
    result = max((root / "benchmarks" / "results").glob("rerank_*.md"), key=lambda path: path.stem[-10:])
    rows = [line for line in result.read_text("utf-8").splitlines() if line.startswith("|")]
    assert len(rows) > 10
    assert set(rows) <= set((root / "docs" / "rerank.md").read_text("utf-8").splitlines())
