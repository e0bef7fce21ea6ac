"""CompressKV against its equation, and the one head that looks at the fact among many that look at the sink."""

import dataclasses
import math

import pytest
import torch
from oracles import attention_error, build, dense_attention, random_case

import sparing
from methods.roles import kept, measured
from sparing.core.scorer import Softmax
from sparing.errors import InvalidInputError, ScoresMismatchError
from sparing.methods.kv.compresskv import ChosenHeadsAttention
from sparing.methods.kv.snapkv import WindowAttention

SEMANTIC = measured("semantic_retrieval", [[0.1, 0.4, 0.3, math.nan], [0.0, 0.2, 0.2, 0.9]])
ERRORS = measured("layer_error", [0.1, 0.3])


def oracle(case, heads, window, kernel):
    """s[b][j]: mean over the chosen heads and the last rows, pooled over the neighbours that exist."""
    attention = dense_attention(case.queries, case.stored)
    first = case.tokens - window
    scores = []
    for b in range(case.queries.states.shape[0]):
        pad = int(case.stored.pads[b])
        rows = [i for i in range(first, case.tokens) if i >= pad]
        mass = [sum(attention[b][h][i][j] for h in heads for i in rows) / len(rows) / len(heads)
                for j in range(case.tokens)]  # fmt: skip
        voted = range(pad, first)
        row = {}
        for j in voted:
            near = [mass[m] for m in range(j - kernel // 2, j + kernel // 2 + 1) if m in voted]
            row[j] = sum(near) / len(near)
        scores.append(row)
    return scores


@pytest.mark.parametrize("heads", [(0,), (3,), (0, 2), (0, 1, 2, 3)])
@pytest.mark.parametrize("sizes", [[13], [6, 7], [1] * 13], ids=str)
def test_equals_the_equation(heads, sizes):
    case = random_case(seed=1)
    found = case.score(ChosenHeadsAttention((heads, (0,)), window=4, kernel_size=3), sizes)
    assert torch.equal(found[:, 0], found[:, 1])
    for b, row in enumerate(oracle(case, heads, 4, 3)):
        for j, expected in row.items():
            assert float(found[b, 1, j]) == pytest.approx(expected, abs=attention_error(case))


def test_one_semantic_head_among_many_that_look_at_the_sink():
    """Eight query heads; seven put 63/70 of their mass on token 0, the eighth on token 5. Kept: one beside the last.

    SnapKV's mean of all eight chooses the sink; the semantic head's own vote is for token 5.
    """
    keys = torch.zeros(1, 1, 8, 2)
    keys[0, 0, 0, 0] = keys[0, 0, 5, 1] = math.log(63)
    queries = torch.tensor([1.0, 0.0]).repeat(1, 8, 8, 1)
    queries[0, 7] = torch.tensor([0.0, 1.0])
    case = build(queries, keys, softmax=Softmax(1.0))
    by_all = case.score(WindowAttention(window=1, kernel_size=1))[0, 0, :7]
    by_one = case.score(ChosenHeadsAttention(((7,), (0,)), window=1, kernel_size=1))[0, 0, :7]
    assert int(by_all.argmax()) == 0
    assert int(by_one.argmax()) == 5
    assert float(by_one[5]) == pytest.approx(63 / 70)


def test_heads_are_those_of_the_layers_number_among_all_that_attend():
    case = random_case(seed=2)
    scorer = ChosenHeadsAttention(((0,), (3,)), 4, 3)
    third = dataclasses.replace(case, stored=dataclasses.replace(case.stored, layer=0, attention_layer=1))
    assert torch.equal(third.score(scorer), case.score(ChosenHeadsAttention(((3,),), 4, 3)))
    assert not torch.equal(third.score(scorer), case.score(scorer))


def test_a_vote_is_for_a_token_wherever_a_head_holds_it():
    """KV head 1 holds the tokens in another order: what head 0's query head says of a token counts for it there."""
    case = random_case(seed=12).alone(0)
    scorer = ChosenHeadsAttention(((0,),), 4, kernel_size=1)
    turned = {}
    for name in ("keys", "values", "positions"):
        both = getattr(case.stored, name).clone()
        both[:, 1] = both[:, 1].flip(1)
        turned[name] = both
    moved = dataclasses.replace(case.stored, **turned)
    state = scorer.observe(None, case.queries, moved)
    plain = case.score(scorer)
    assert torch.equal(scorer.score(state, moved)[0, 0], plain[0, 0])
    assert torch.equal(scorer.score(state, moved)[0, 1], plain[0, 0].flip(0))
    of_the_other = ChosenHeadsAttention(((2,),), 4, kernel_size=1)
    torch.testing.assert_close(
        of_the_other.score(state, moved)[0, 0], case.score(of_the_other)[0, 0], atol=1e-6, rtol=0
    )


def test_the_best_heads_of_each_layer_are_chosen():
    """Ties go to the lower index, and what was not measured comes last."""
    method = sparing.CompressKV(0.5, (SEMANTIC, ERRORS), heads=2)
    assert method.parts().scorer.heads == ((1, 2), (1, 3))
    assert sparing.CompressKV(0.5, (ERRORS, SEMANTIC), heads=3).parts().scorer.heads == ((0, 1, 2), (1, 2, 3))


def test_all_heads_of_a_layer_keep_the_same_tokens_and_layers_by_their_error():
    """2 layers, 24 tokens: 8 each first, then 32 as 1 : 3. Both heads alike."""
    found = kept(sparing.CompressKV(24, (SEMANTIC, ERRORS), heads=1, base=8))
    assert found[0][0] == found[0][1]
    assert found[1][0] == found[1][1]
    assert [len(found[layer][0]) for layer in (0, 1)] == [16, 32]
    assert all(found[layer][0][-8:] == list(range(56, 64)) for layer in (0, 1))


def test_layers_are_those_of_the_model_also_where_some_slide():
    """gemma3: layers 1 and 2 of three are compressed. Their errors are 0 and 1, and the first layer's is nobody's."""
    from sparing.adapters.lens import ModelLens
    from sparing.testing import tiny_model

    identity = ModelLens(tiny_model("gemma3")).identity
    semantic = measured("semantic_retrieval", [[0.5] * 4, [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]], identity)
    errors = measured("layer_error", [5.0, 0.0, 1.0], identity)
    method = sparing.CompressKV(20, (semantic, errors), heads=1, base=10)
    assert method.parts().scorer.heads == ((0,), (1,), (3,))
    assert [len(head) for heads in kept(method, name="gemma3").values() for head in heads] == [10, 10, 30, 30]


def test_both_measurements_are_needed_and_of_the_right_units():
    with pytest.raises(
        ScoresMismatchError, match="compresskv needs one measurement by each of semantic_retrieval, layer"
    ):
        sparing.CompressKV(0.5, SEMANTIC)
    by_kv_head = SEMANTIC.per_kv_head()
    with pytest.raises(ScoresMismatchError, match="layer × head"):
        sparing.CompressKV(0.5, (by_kv_head, ERRORS))


def test_heads_of_another_model_are_refused():
    case = random_case()
    for heads in (((4,), (0,)), ()):
        with pytest.raises((ScoresMismatchError, InvalidInputError)):
            case.score(ChosenHeadsAttention(heads, 4, 3))


@pytest.mark.parametrize("bad", [{"heads": 0}, {"window": 0}, {"kernel_size": 4}, {"base": -1}, {"cap": 0.5}])
def test_refuses(bad):
    with pytest.raises(InvalidInputError, match=next(iter(bad))):
        sparing.CompressKV(0.5, (SEMANTIC, ERRORS), **bad)
