"""QRHead on a planted head and as a float64 loop; the scores of documents and nDCG by hand."""

from __future__ import annotations

import math

import pytest
import torch

from sparing.adapters.lens import ModelLens
from sparing.core.samples import RankingSample
from sparing.errors import InvalidInputError
from sparing.measures.documents import document_scores, ndcg, query_attention
from sparing.methods.heads.qrhead import QRHead
from sparing.scoring import score
from sparing.testing import planted, tiny_model
from tests.methods.heads.maps import CLOSE, NAMES, maps, tokens

# Three documents behind an opening; the query names 30 and 31, which the second one holds.
DOCUMENTS = (1, *range(10, 16), *(20, 30, 21, 22, 31), *range(40, 46))
SPANS = ((1, 7), (7, 12), (12, 18))
PLANTED = RankingSample((*DOCUMENTS, 30, 31), (*DOCUMENTS, 50, 51), SPANS, len(DOCUMENTS), (1,))


def test_the_head_that_finds_the_querys_words_finds_the_document():
    """Each of two query rows gives half of its mass to its word in the document (half to itself): 2 · 1/2 / 2."""
    model = planted.copying_model()
    found = score(model, QRHead(), data=[PLANTED]).values
    assert float(found[planted.ECHO]) == pytest.approx(0.5, abs=CLOSE)
    for head in (planted.UNIFORM, planted.SINK, planted.PREVIOUS, planted.AT_THREE, planted.AT_TWENTY):
        assert float(found[head]) == pytest.approx(0, abs=CLOSE), "looks at what the content-free query looks at"
    ranked = score(model, QRHead(by="ndcg"), data=[PLANTED]).values
    assert float(ranked[planted.ECHO]) == 1
    # All documents score 0, and ties go to the first: the gold one is second.
    assert float(ranked[planted.UNIFORM]) == pytest.approx(1 / math.log2(3))


def test_query_attention_is_a_mean_over_the_query_rows():
    model = tiny_model("llama", torch.float64)
    ids, start = tokens(200), 30  # more query rows than a tile holds
    expected = maps(model, ids)[:, :, start:, :start].mean(2)
    found = query_attention(ModelLens(model), ids, start)
    assert found.shape == (2, 4, 30)
    assert torch.allclose(found.double(), expected, atol=CLOSE)


def ranking(seed):
    """Documents of several lengths, one of a single token; queries of different lengths."""
    spans = ((1, 9), (11, 12), (12, 20), (21, 33))
    text, real, null = tokens(33, seed), tokens(7, seed + 1), tokens(4, seed + 2)
    return RankingSample((*text, *real), (*text, *null), spans, 33, (0, 3) if seed else (2,))


def slow_documents(model, sample):
    """(L, Hq, documents): calibrated attention, filtered and added up, token by token."""
    real, null = (maps(model, ids)[:, :, sample.query_start :] for ids in (sample.ids, sample.null_ids))
    result = torch.zeros(*real.shape[:2], len(sample.documents), dtype=torch.float64)
    for layer in range(real.shape[0]):
        for head in range(real.shape[1]):
            for document, (start, end) in enumerate(sample.documents):
                c = [float(real[layer, head, :, j].mean() - null[layer, head, :, j].mean()) for j in range(start, end)]
                mean = sum(c) / len(c)
                deviation = math.sqrt(sum((x - mean) ** 2 for x in c) / (len(c) - 1)) if len(c) > 1 else math.inf
                result[layer, head, document] = sum(x for x in c if x > mean - 2 * deviation)
    return result


def slow_ndcg(scores, gold):
    order = sorted(range(len(scores)), key=lambda i: -scores[i])[:10]
    gain = sum(1 / math.log2(rank + 2) for rank, document in enumerate(order) if document in gold)
    return gain / sum(1 / math.log2(rank + 2) for rank in range(min(len(gold), 10)))


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_definition_on_random_models(name):
    model = tiny_model(name, torch.float64)
    samples = [ranking(seed) for seed in range(2)]
    slow = [slow_documents(model, sample) for sample in samples]
    mass = sum(s[:, :, list(sample.gold)].sum(-1) for s, sample in zip(slow, samples, strict=True)) / 2
    assert torch.allclose(score(model, QRHead(), data=samples).values.double(), mass, atol=CLOSE)
    gains = torch.zeros(mass.shape)
    for s, sample in zip(slow, samples, strict=True):
        for layer in range(len(s)):
            for head in range(4):
                gains[layer, head] += slow_ndcg(s[layer, head].tolist(), sample.gold) / 2
    assert torch.allclose(score(model, QRHead(by="ndcg"), data=samples).values, gains, atol=CLOSE)
    assert gains.min() < gains.max() <= 1


def test_tokens_far_below_their_document_are_left_out():
    """Nine tokens at 1 and one at -10: mean -0.1, deviation 3.48, so -10 is below -7.06 and goes."""
    tokens_of = torch.tensor([1.0] * 9 + [-10.0])
    assert document_scores(tokens_of, [(0, 10)]).tolist() == [9.0]
    # Four at 1 and one at -10: mean -1.2, deviation 4.92; -10 is above -11.04 and stays.
    assert document_scores(tokens_of[5:], [(0, 5)]).tolist() == [-6.0]


def test_documents_of_one_token_and_of_equal_tokens():
    found = document_scores(torch.tensor([[0.5, 2.0, 2.0, -1.0]]), [(0, 1), (1, 3), (3, 4)])
    # Of equal tokens none is above the mean: the strict filter leaves 0.
    assert found.tolist() == [[0.5, 0.0, -1.0]]


def test_ndcg_worked_by_hand():
    scores = torch.tensor([0.1, 0.9, 0.5, 0.7])
    assert float(ndcg(scores, [1])) == 1
    assert float(ndcg(scores, [0])) == pytest.approx(1 / math.log2(5))
    both = (1 + 1 / math.log2(4)) / (1 + 1 / math.log2(3))
    assert float(ndcg(scores, [1, 2])) == pytest.approx(both)
    assert float(ndcg(scores, [3], at=1)) == 0
    assert ndcg(torch.stack([scores, -scores]), [0]).tolist() == pytest.approx([1 / math.log2(5), 1])
    many = torch.arange(20.0)
    assert float(ndcg(many, [9])) == 0, "eleventh of twenty"
    assert float(ndcg(many, [10])) == pytest.approx(1 / math.log2(11))


def test_the_same_query_twice_says_nothing():
    sample = RankingSample(PLANTED.ids, PLANTED.ids, SPANS, len(DOCUMENTS), (1,))
    assert not score(tiny_model("llama"), QRHead(), data=[sample]).values.any()


def test_other_measures_are_refused():
    with pytest.raises(InvalidInputError, match="ndcg"):
        QRHead(by="accuracy")
