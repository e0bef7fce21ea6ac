"""Echo and induction on planted heads and as float64 loops over whole maps; the block of random tokens."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sparing.errors import InvalidInputError
from sparing.methods.heads.echo_induction import Echo, Induction, draw_block
from sparing.scoring import score
from sparing.testing import planted, tiny_model
from tests.methods.heads.maps import CLOSE, NAMES, maps


def both(model, block, repeats, seed=0):
    return (score(model, make(block, repeats), seed=seed).values for make in (Echo, Induction))


@pytest.mark.parametrize(("block", "repeats"), [(8, 4), (16, 2), (20, 3)])
def test_planted_heads_worked_by_hand(block, repeats):
    """In copy c a token stands c times. The echo head looks at all of them, itself included: (c - 1) / c earlier.

    The induction head looks behind the c - 1 earlier ones; the block's first token also matches place 0 (it counts as
    before itself), so its mass behind earlier copies is (c - 1) / c.
    """
    echo, induction = both(planted.copying_model(), block, repeats)
    earlier = sum((c - 1) / c for c in range(2, repeats + 1)) / (repeats - 1)
    assert float(echo[planted.ECHO]) == pytest.approx(earlier, abs=CLOSE)
    assert float(induction[planted.INDUCTION]) == pytest.approx((block - 1 + earlier) / block, abs=CLOSE)
    # Place 0 is an earlier copy of the block's first token.
    at_zero = sum(1 / c for c in range(2, repeats + 1)) / (repeats - 1) / block
    assert float(echo[planted.INDUCTION]) == pytest.approx(at_zero, abs=CLOSE)
    assert float(induction[planted.ECHO]) == pytest.approx(0, abs=CLOSE)
    # c - 1 of the t + 1 tokens that row t sees, if it looks at everything alike.
    rows = range(block, block * repeats)
    alike = sum((t // block) / (t + 1) for t in rows) / len(rows)
    for scores in (echo, induction):
        assert float(scores[planted.UNIFORM]) == pytest.approx(alike, abs=CLOSE)
        assert float(scores[planted.PREVIOUS]) == pytest.approx(0, abs=CLOSE)


def test_a_head_at_the_blocks_distance_is_one_or_the_other():
    """Heads that look 8 and 7 back, at blocks of 8: a perfect echo head and a perfect induction head."""
    heads = [planted.distance(8), planted.distance(7), planted.distance(6), planted.distance(9)]
    echo, induction = both(planted.planted_model([heads]), 8, 4)
    # 9 back from the first of the 24 rows there is nothing: the head looks at the first token instead.
    assert echo[0].tolist() == pytest.approx([1, 0, 0, 1 / 24], abs=CLOSE)
    assert induction[0].tolist() == pytest.approx([0, 1, 0, 0], abs=CLOSE)


@pytest.mark.parametrize("name", NAMES)
def test_they_are_the_definitions_on_random_models(name):
    model = tiny_model(name, torch.float64)
    block, repeats, seed = 11, 4, 3
    lens = SimpleNamespace(tokenizer=None, vocabulary_size=64)
    ids = draw_block(lens, block, seed) * repeats
    attention = maps(model, ids)
    echo, induction = (torch.zeros(attention.shape[:2], dtype=torch.float64) for _ in range(2))
    for row in range(block, len(ids)):
        for place in range(row):
            if ids[place] == ids[row]:
                echo += attention[:, :, row, place] / (len(ids) - block)
                induction += attention[:, :, row, place + 1] / (len(ids) - block)
    found = both(model, block, repeats, seed)
    for measured, expected in zip(found, (echo, induction), strict=True):
        assert torch.allclose(measured.double(), expected, atol=CLOSE)


def test_more_rows_than_a_tile_holds():
    """512 rows are looked at in several tiles; a model that sees everything alike has a closed form."""
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.zero_()
    block, repeats = 128, 4
    rows = range(block, block * repeats)
    alike = sum((t // block) / (t + 1) for t in rows) / len(rows)
    for scores in both(model, block, repeats):
        assert torch.allclose(scores, torch.full((2, 4), alike), atol=CLOSE)


def test_blocks_hold_no_token_twice_and_no_special_one():
    tokenizer = SimpleNamespace(all_special_ids=[0, 1, 63])
    lens = SimpleNamespace(tokenizer=tokenizer, vocabulary_size=64)
    block = draw_block(lens, 61, 0)
    assert sorted(block) == list(range(2, 63))
    assert draw_block(lens, 61, 0) == block
    assert draw_block(lens, 61, 1) != block
    longer = draw_block(lens, 200, 0)
    assert len(longer) == 200
    assert set(longer) <= set(range(2, 63))
    nobody = SimpleNamespace(tokenizer=None, vocabulary_size=8)
    assert sorted(draw_block(nobody, 8, 0)) == list(range(8))


def test_what_does_not_fit_is_refused():
    for make in (Echo, Induction):
        for bad in ({"block": 1}, {"repeats": 1}):
            with pytest.raises(InvalidInputError, match=next(iter(bad))):
                make(**bad)
        with pytest.raises(InvalidInputError, match="at most the model's 512 positions"):
            score(tiny_model("llama"), make(block=257, repeats=2))
