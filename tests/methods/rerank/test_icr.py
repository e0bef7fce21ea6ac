"""ICR against the paper's equations, in float64 loops over full attention maps of eager models."""

from __future__ import annotations

import math

import pytest
import torch

from sparing.adapters.lens import ModelLens
from sparing.errors import InvalidInputError, MethodRefusedError
from sparing.measures.documents import query_attention, total_query_attention
from sparing.methods.rerank.icr import ICR
from sparing.methods.rerank.qrhead import QRHeadRanker
from sparing.reranking import TokenizedText, rerank, rerank_many
from sparing.testing import TINY_MODELS, planted, tiny_model
from tests.methods.heads.maps import NAMES, maps, tokens
from tests.methods.rerank.characters import Characters, prompt

DOCUMENTS = ("the old river", "a much longer story of ships and storms", "Q", "green hills and a bell", "no")
QUERIES = ("Where is the bell?", "ships", "What is old?")
# Most norms round to float32 (2^-24), and a cached token rounds like a token among others: 1e-6 of each head's mass,
# which is at most 1 per document, for each of 2 layers of 4 heads (gemma3: 3) and two queries.
CLOSE = 1e-6
TOLERANCE = CLOSE * 2 * 3 * 4


def mean_rows(model, documents, query, heads=None):
    """s_j: for every token before the query, the sum over (layer, head) of the mean over the query's rows."""
    ids, spans, start = prompt(documents, query)
    attention = maps(model, ids).tolist()
    chosen = heads or [(layer, head) for layer in range(len(attention)) for head in range(len(attention[0]))]
    rows = range(start, len(ids))
    s = [sum(sum(attention[layer][head][t][j] for t in rows) / len(rows) for layer, head in chosen)
         for j in range(start)]  # fmt: skip
    return s, spans


def slow_icr(model, documents, query, heads=None, *, calibrated=True, filtered=True, deviations=2.0):
    """Scores of documents that stand in the prompt in this order; the options make wrong ones."""
    s, spans = mean_rows(model, documents, query, heads)
    null = mean_rows(model, documents, "N/A", heads)[0] if calibrated else [0.0] * len(s)
    scores = []
    for start, end in spans:
        c = [s[j] - null[j] for j in range(start, end)]
        mean = sum(c) / len(c)
        deviation = math.sqrt(sum((x - mean) ** 2 for x in c) / (len(c) - 1)) if len(c) > 1 else math.inf
        scores.append(sum(x for x in c if not filtered or x > mean - deviations * deviation))
    return scores


def scores(model, ranker, query=QUERIES[0], documents=DOCUMENTS):
    """In the order of the documents."""
    found = rerank(model, Characters(), query, documents, ranker)
    return [score for _, score in sorted(found)]


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_definition_on_random_models(name):
    model = tiny_model(name, torch.float64)
    found = scores(model, ICR(reverse=False))
    assert found == pytest.approx(slow_icr(model, DOCUMENTS, QUERIES[0]), abs=TOLERANCE)
    assert max(map(abs, found)) > 100 * TOLERANCE
    behind = slow_icr(model, DOCUMENTS[::-1], QUERIES[0])[::-1]
    assert scores(model, ICR()) == pytest.approx(behind, abs=TOLERANCE)
    plain = slow_icr(model, DOCUMENTS, QUERIES[0], calibrated=False)
    assert scores(model, ICR(reverse=False, calibrated=False)) == pytest.approx(plain, abs=TOLERANCE)


@pytest.mark.parametrize("wrong", [{"calibrated": False}, {"filtered": False}, {"deviations": 1.0}], ids=str)
def test_what_is_not_the_definition_is_seen(wrong):
    """Broken specimens: each deviates from what the code gives, somewhere."""
    model = tiny_model("gpt2", torch.float64)
    broken = slow_icr(model, DOCUMENTS, QUERIES[0], **wrong)
    found = scores(model, ICR(reverse=False))
    assert max(abs(a - b) for a, b in zip(found, broken, strict=True)) > 100 * TOLERANCE


def test_the_content_free_query_scores_exactly_nothing():
    for name in NAMES:
        found = rerank(tiny_model(name), Characters(), "N/A", DOCUMENTS)
        assert [tuple(each) for each in found] == [(index, 0.0) for index in range(len(DOCUMENTS))]


def test_a_document_of_one_token_keeps_it():
    """Such a document has no deviation; as a bare letter behind its number, "Q" is two tokens (a space), "" one."""
    model = tiny_model("llama", torch.float64)
    lens, text = ModelLens(model), TokenizedText(Characters())
    ids, spans, start = prompt(["", "two"], "why")
    null = prompt(["", "two"], "N/A")[0]
    assert spans[0][1] - spans[0][0] == 1
    c = (query_attention(lens, ids, start) - query_attention(lens, null, start)).sum((0, 1))[spans[0][0]]
    found = ICR(reverse=False).score(lens, text, ["why"], ["", "two"])
    assert float(found[0, 0]) == pytest.approx(float(c), abs=TOLERANCE)
    assert found[0, 0] != 0


def test_several_queries_read_the_documents_once():
    """Every query gives what it gives alone, bit for bit; the tokens run are those of one prompt and all queries."""
    model, seen = tiny_model("llama"), []
    together = rerank_many(model, Characters(), QUERIES, DOCUMENTS)
    assert together == [rerank(model, Characters(), query, DOCUMENTS) for query in QUERIES]
    lens, text = ModelLens(model), TokenizedText(Characters())
    handle = model.get_input_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0].numel()))
    ICR().score(lens, text, QUERIES, DOCUMENTS)
    handle.remove()
    prompts = [prompt(DOCUMENTS, query) for query in ("N/A", *QUERIES)]
    assert seen == [prompts[0][2], *(len(ids) - start for ids, _, start in prompts)]


@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_prefix_and_chosen_heads_change_nothing_but_the_work(name):
    """On every structure: with a prefix or without, some heads or all, against the measure that keeps heads apart."""
    model = tiny_model(name, torch.float64)
    lens, ids, start = ModelLens(model), tokens(60), 40
    apart = query_attention(lens, ids, start).double()
    prefix = lens.prefix(torch.tensor([ids[:start]]))
    assert (prefix is None) == TINY_MODELS[name].recurrent
    chosen = {0: [2, 1], lens.num_layers - 1: [3]} if lens.num_layers > 1 else {0: [2, 1, 3]}
    some = sum(apart[layer, head] for layer, heads in chosen.items() for head in heads)
    for given in {None, prefix}:
        # Kept in float32 by the one, and rounded to it by the norms of both: 1e-6 of a row for each of up to 12 heads.
        assert torch.allclose(total_query_attention(lens, ids, start, given), apart.sum((0, 1)), atol=12 * CLOSE)
        assert torch.allclose(total_query_attention(lens, ids, start, given, chosen), some, atol=3 * CLOSE)
    assert float((apart.sum((0, 1)) - some).abs().max()) > 100 * 12 * CLOSE


class Words:
    """Knows "w0" to "w63" and the content-free query, which is w50; all other words are nothing."""

    chat_template = None

    def encode(self, text, add_special_tokens=True):
        known = {"N/A": 50} | {f"w{number}": number for number in range(64)}
        return [known[word] for word in text.split() if word in known]


def test_the_document_that_has_the_querys_words_by_hand():
    """A planted head looks at copies of its own token: of two query rows each gives half of its mass to its word in the
    second document and half to itself, the row of the content-free query gives all to itself: 2 · 1/2 / 2 - 0.
    """
    documents = ["w10 w11 w12 w13", "w20 w30 w21 w22 w31 w23", "w40 w41 w42"]
    model = planted.copying_model(torch.float64)
    found = rerank(model, Words(), "w30 w31", documents, QRHeadRanker(heads=(planted.ECHO,)))
    assert [document for document, _ in found] == [1, 0, 2]
    assert [score for _, score in found] == pytest.approx([0.5, 0, 0], abs=CLOSE)
    assert rerank(model, Words(), "w30 w31", documents)[0].document == 1


def test_longer_than_the_model_is_refused_with_the_number_of_tokens():
    documents = ["x" * 200, "y" * 300]
    ids = prompt(documents, "why")[0]
    with pytest.raises(InvalidInputError, match=rf"{len(ids)} tokens.*512 positions.*fewer documents"):
        rerank(tiny_model("llama"), Characters(), "why", documents)
    # To the token: what fits is ranked.
    room = 512 - len(prompt(["x" * 200, ""], "why")[0])
    assert len(rerank(tiny_model("llama"), Characters(), "why", ["x" * 200, "y" * room])) == 2


def test_attention_that_is_no_number_is_refused():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.fill_(torch.inf)
    with pytest.raises(MethodRefusedError, match="not finite"):
        rerank(model, Characters(), "why", DOCUMENTS)


def test_half_precision_ranks_in_float32():
    """The scores of a model in bfloat16 are those of its own queries and keys, taken in float32: no steps of 2^-8."""
    found = [score for _, score in rerank(tiny_model("llama", torch.bfloat16), Characters(), "why", DOCUMENTS)]
    assert any(score != float(torch.tensor(score).bfloat16()) for score in found)
