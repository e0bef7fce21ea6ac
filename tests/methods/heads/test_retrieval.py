"""Retrieval and semantic retrieval against a model that copies by construction, and the equations in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparing.core.samples import NeedleSample
from sparing.errors import InvalidInputError
from sparing.methods.heads.retrieval import Retrieval
from sparing.methods.heads.semantic_retrieval import SemanticRetrieval
from sparing.models import resolve
from sparing.scoring import score
from sparing.testing import planted, tiny_model
from tests.methods.heads.maps import CLOSE, NAMES, greedy, maps, tokens

# 24 tokens; the last one also stands at 9, before the value 41 42 43 44 at 10 to 13. The needle is 7 to 14.
PROMPT = (1, 2, 3, 4, 5, 6, 7, 31, 32, 40, 41, 42, 43, 44, 33, 8, 9, 10, 11, 12, 13, 14, 15, 40)
PLANTED = NeedleSample(PROMPT, (41, 42, 43, 44), ("41 42 43 44",), needle=(7, 15), value=(10, 14), max_new_tokens=4)
# The same in a longer context, so that a batch of both has pads.
FURTHER = NeedleSample(
    (*range(16, 25), *PROMPT), PLANTED.answer_ids, PLANTED.answers, (16, 24), (19, 23), PLANTED.max_new_tokens
)


@pytest.fixture(scope="module")
def model():
    return planted.copying_model()


def test_the_planted_model_says_the_value(model):
    assert greedy(model, PROMPT, 4) == list(PLANTED.answer_ids)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_head_that_copies_scores_one_and_all_others_zero(model, batch_size):
    found = score(model, Retrieval(), data=[PLANTED, FURTHER], batch_size=batch_size).values
    expected = torch.zeros(2, 4)
    expected[planted.INDUCTION] = 1.0
    assert torch.equal(found, expected)


def test_looking_at_the_same_tokens_elsewhere_is_not_copying(model):
    """The fact is said to stand where none of its tokens are, or one place off."""
    other = replace(PLANTED, needle=(15, 20), value=(15, 19))
    assert not score(model, Retrieval(), data=[other]).values.any()
    shifted = replace(PLANTED, value=(11, 15))  # 42 43 44 33: three of four are said
    assert float(score(model, Retrieval(), data=[shifted]).values[planted.INDUCTION]) == 0.75


def test_a_token_of_the_value_counts_once(model):
    """41 42 41 42 goes round: eight tokens are said, and still each place counts once."""
    prompt = (1, 2, 3, 40, 41, 42, 40, 41, 42, 5, 40)
    sample = NeedleSample(prompt, (41, 42), ("41 42",), (3, 6), (4, 6), 8)
    assert 0 < float(score(model, Retrieval(), data=[sample]).values.max()) <= 1


def test_semantic_mass_worked_by_hand(model):
    """All four answer tokens are told from rows that see 24, 25, 26, 27 keys, of which the needle is 8."""
    found = score(model, SemanticRetrieval(), data=[PLANTED]).values
    seen = [24, 25, 26, 27]
    alike = sum(8 / n for n in seen) / 4
    assert float(found[planted.INDUCTION]) == pytest.approx(1, abs=CLOSE)
    assert float(found[planted.UNIFORM]) == pytest.approx(alike, abs=CLOSE)
    assert float(found[planted.UNIFORM_TOO]) == pytest.approx(alike, abs=CLOSE)
    # The rows' own tokens are 40 41 42 43: each stands once in the needle, and once in its own row.
    assert float(found[planted.ECHO]) == pytest.approx(0.5, abs=CLOSE)
    # Rows 23 to 26 look 20 back, at 3 to 6, in front of the needle.
    for head in (planted.SINK, planted.PREVIOUS, planted.AT_THREE, planted.AT_TWENTY):
        assert float(found[head]) == pytest.approx(0, abs=CLOSE)


def copied(model, sample):
    """Wu et al.'s |g ∩ k| / |k| with k the places of the value, and CompressKV's mass, one row at a time."""
    said = greedy(model, sample.ids, sample.max_new_tokens)
    value, needle = range(*sample.value), range(*sample.needle)
    sets = {}
    mass, told = 0.0, 0
    for step, token in enumerate(said):
        rows = maps(model, (*sample.ids, *said[:step]))[:, :, -1]
        for layer, heads in enumerate(rows):
            for head, row in enumerate(heads):
                most = int(row.argmax())
                if most in value and sample.ids[most] == token:
                    sets.setdefault((layer, head), set()).add(most)
        if any(sample.ids[place] == token for place in needle):
            mass = mass + rows[:, :, list(needle)].sum(-1)
            told += 1
    share = torch.zeros(rows.shape[:2], dtype=torch.float64)
    for unit, places in sets.items():
        share[unit] = len(places) / len(value)
    return share, mass / told


def own_words(model, seed):
    """A prompt of the model's own words, as it then goes on saying them; the value is what it repeats."""
    start = tokens(6, seed)
    ids = (*start, *greedy(model, start, 24 + seed))
    said = greedy(model, ids, 6)
    return NeedleSample(ids, tuple(said), ("",), (8, 28), (10, 26), 6)


@pytest.mark.parametrize("name", NAMES)
def test_both_are_the_equations_on_random_models(name):
    model = tiny_model(name, torch.float64)
    samples = [own_words(model, seed) for seed in range(3)]
    expected = [copied(model, sample) for sample in samples]
    assert sum(share.sum() for share, _ in expected) > 0, "nothing was copied, nothing is tested"
    found = score(model, Retrieval(), data=samples)
    semantic = score(model, SemanticRetrieval(), data=samples)
    assert found.n == semantic.n == 3
    assert torch.allclose(found.values.double(), sum(share for share, _ in expected) / 3, atol=CLOSE)
    assert torch.allclose(semantic.values.double(), sum(mass for _, mass in expected) / 3, atol=CLOSE)


@pytest.mark.parametrize("scorer", [Retrieval, SemanticRetrieval])
def test_samples_answered_wrongly_do_not_count(model, scorer):
    half = replace(PLANTED, answer_ids=(41, 42, 50, 51))  # exactly half is said: not more than 0.5
    found = score(model, scorer(), data=[PLANTED, half])
    assert found.n == 1
    assert found.notes == ("1 of 2 samples were not counted (see the scorer)",)
    assert score(model, scorer(min_recall=0.49), data=[PLANTED, half]).n == 2
    with pytest.raises(InvalidInputError, match="at least one counts"):
        score(model, scorer(), data=[half])


@pytest.mark.parametrize("batch_size", [1, 2])
def test_what_is_said_beyond_a_samples_own_limit_does_not_count(model, batch_size):
    """In a batch, tokens are decoded for as long as any sample needs."""
    short = replace(PLANTED, max_new_tokens=3)
    found = score(model, Retrieval(), data=[short, FURTHER], batch_size=batch_size).values
    assert float(found[planted.INDUCTION]) == (0.75 + 1) / 2
    alike = [sum(8 / (n + at) for at in range(steps)) / steps for n, steps in ((24, 3), (33, 4))]
    found = score(model, SemanticRetrieval(), data=[short, FURTHER], batch_size=batch_size).values
    assert float(found[planted.UNIFORM]) == pytest.approx(sum(alike) / 2, abs=CLOSE)


def test_the_bundled_models_copying_heads_are_found():
    """It was trained to copy; layer 2 and one head of layer 3 do it, and 0.1 is the paper's line for such heads."""
    folder = resolve("bundled")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    found = score(model, Retrieval(), tokenizer, samples=8, length=384)
    assert {unit for unit in found.ranked() if found.values[unit] >= 0.1} == {(2, 0), (2, 1), (2, 2), (2, 3), (3, 0)}
    assert float(found.values[2].min()) > 0.7


@pytest.mark.parametrize("scorer", [Retrieval, SemanticRetrieval])
@pytest.mark.parametrize("share", [-0.1, 1.0, math.nan])
def test_shares_out_of_range_are_refused(scorer, share):
    with pytest.raises(InvalidInputError, match="min_recall"):
        scorer(min_recall=share)
