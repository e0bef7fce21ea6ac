"""The QRHead ranker: ICR's equations over chosen heads, and which heads are taken."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sparing.core.ranker import parse_ranker
from sparing.core.scores import Scores
from sparing.errors import InputFileError, InvalidInputError, ScoresMismatchError, UnknownNameError
from sparing.methods.rerank.icr import ICR
from sparing.methods.rerank.qrhead import QRHeadRanker
from sparing.reranking import rerank
from sparing.scoring import score
from sparing.testing import tiny_model
from tests.methods.heads.maps import NAMES
from tests.methods.rerank.characters import Characters
from tests.methods.rerank.test_icr import DOCUMENTS, QUERIES, TOLERANCE, scores, slow_icr

EVERY = tuple((layer, head) for layer in range(2) for head in range(4))
SOME = ((1, 3), (0, 1), (1, 0))


@pytest.fixture(scope="module")
def measured() -> Scores:
    """Scores of the tiny llama, made so that heads are ranked 1.3, 0.1, 1.0 and then the others."""
    found = score(tiny_model("llama"), "sink_mass", Characters(), samples=1, length=40)
    values = torch.zeros(2, 4)
    for rank, (layer, head) in enumerate(SOME):
        values[layer, head] = 3.0 - rank
    return dataclasses.replace(found, values=values, standard_error=None)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_oss"])
def test_all_heads_are_icr(name):
    """In float64; gpt_oss rounds to float32 on the way, alike in both."""
    model = tiny_model(name, torch.float64)
    for reverse in (True, False):
        found = scores(model, QRHeadRanker(heads=EVERY, reverse=reverse))
        assert found == pytest.approx(scores(model, ICR(reverse=reverse)), abs=1e-12)
    assert scores(model, QRHeadRanker(heads=EVERY[:-1])) != pytest.approx(scores(model, ICR()), abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_some_heads_are_the_definition_over_them(name):
    model = tiny_model(name, torch.float64)
    found = scores(model, QRHeadRanker(heads=SOME, reverse=False))
    assert found == pytest.approx(slow_icr(model, DOCUMENTS, QUERIES[0], SOME), abs=TOLERANCE)
    assert max(map(abs, found)) > 100 * TOLERANCE


def test_attention_is_summed_before_it_is_filtered():
    """Heads scored one by one and added up give something else: the filter is not linear."""
    model = tiny_model("llama", torch.float64)
    together = scores(model, QRHeadRanker(heads=SOME))
    alone = [scores(model, QRHeadRanker(heads=(head,))) for head in SOME]
    assert together != pytest.approx([sum(parts) for parts in zip(*alone, strict=True)], abs=100 * TOLERANCE)


@pytest.mark.parametrize("top", [3, 0.375])
def test_the_top_of_a_measurement(measured, top):
    model = tiny_model("llama")
    assert scores(model, QRHeadRanker(scores=measured, top=top)) == scores(model, QRHeadRanker(heads=SOME))


def test_a_file_of_scores(measured, tmp_path):
    path = measured.save(tmp_path / "heads.safetensors")
    assert parse_ranker(f"qrhead(scores={path},top=2,reverse=false)") == QRHeadRanker(
        scores=measured, top=2, reverse=False
    )


def test_heads_of_another_model_are_refused(measured):
    with pytest.raises(ScoresMismatchError, match=r"measured on Llama.*this model is GPT2"):
        rerank(tiny_model("gpt2"), Characters(), "why", DOCUMENTS, QRHeadRanker(scores=measured))
    with pytest.raises(InvalidInputError, match=r"\(2, 0\).*layers 0 to 1, heads 0 to 3"):
        rerank(tiny_model("gpt2"), Characters(), "why", DOCUMENTS, QRHeadRanker(heads=((2, 0),)))


def test_scores_of_other_units_are_refused(measured):
    layers = dataclasses.replace(measured, values=measured.values[:, 0], axes=("layer",))
    with pytest.raises(ScoresMismatchError, match="layer × head"):
        QRHeadRanker(scores=layers)


@pytest.mark.parametrize("given", [{}, {"heads": ((0, 0),), "scores": "measured"}, {"scores": "heads.safetensors"}])
def test_scores_or_heads(given, measured):
    given = given | ({"scores": measured} if given.get("scores") == "measured" else {})
    with pytest.raises(InvalidInputError, match="sparing score --scorer qrhead"):
        QRHeadRanker(**given)


@pytest.mark.parametrize("given", [{"heads": ()}, {"top": 0}, {"top": 1.5}])
def test_numbers_out_of_range(given, measured):
    with pytest.raises(InvalidInputError):
        QRHeadRanker(**({"scores": measured} | given if "top" in given else given))


def test_texts_that_name_no_ranker(tmp_path):
    with pytest.raises(InvalidInputError, match="sparing score"):
        parse_ranker("qrhead")
    with pytest.raises(UnknownNameError, match="did you mean qrhead"):
        parse_ranker("qrhed")
    with pytest.raises(UnknownNameError, match="field of icr"):
        parse_ranker("icr(scores=heads.safetensors)")
    with pytest.raises(InputFileError, match="missing"):
        parse_ranker(f"qrhead(scores={tmp_path / 'missing'})")
    with pytest.raises(InvalidInputError, match=r"icr\.reverse"):
        parse_ranker("icr(reverse=7)")
