"""H2O against its equation: column sums of the prompt, then one row more per decoded token."""

import math

import pytest
import torch
from oracles import attention_error, build, dense_attention, random_case

from sparing.core.token_scores import TokenScores, guard_ends
from sparing.errors import InvalidInputError
from sparing.methods.kv.h2o import H2O, AccumulatedAttention


@pytest.mark.parametrize("sizes", [[13], [6, 7], [1] * 13, [11, 2]], ids=str)
def test_equals_the_dense_column_sums(sizes):
    case = random_case(seed=1)
    attention = dense_attention(case.queries, case.stored)
    scores = case.score(AccumulatedAttention(), sizes)
    for b in range(3):
        real = range(int(case.stored.pads[b]), 13)
        for h in range(2):
            for j in real:
                expected = sum(attention[b][2 * h + g][i][j] for g in range(2) for i in real) / 2
                assert float(scores[b, h, j]) == pytest.approx(expected, abs=attention_error(case, 13))


def test_uniform_attention_favours_early_tokens():
    """n = 64: the first token gets 1 + 1/2 + ... + 1/64 = 4.7439, the last 1/64."""
    case = build(torch.zeros(1, 1, 64, 4), torch.ones(1, 1, 64, 4))
    scores = case.score(AccumulatedAttention())[0, 0]
    assert float(scores[0]) == pytest.approx(4.743890903705, abs=1e-5)
    assert float(scores[-1]) == pytest.approx(1 / 64, abs=1e-7)


def test_planted_heavy_column_survives():
    """Every row from 2 on pays 9/(9 + i) to key 2; it outweighs all but the first token, which row 0 gives 1."""
    keys = torch.zeros(1, 1, 12, 2)
    keys[0, 0, 2, 0] = math.log(9) * 2**0.5
    case = build(torch.tensor([1.0, 0.0]).expand(1, 1, 12, 2), keys)
    scores = case.score(AccumulatedAttention())[0, 0]
    expected = sum(9 / (9 + i) for i in range(2, 12))
    assert float(scores[2]) == pytest.approx(expected, abs=1e-5)
    assert scores.argmax() == 2


def decode_oracle(sums: dict[int, float], rows: list[dict[int, float]], recent: int, size: int) -> list[int]:
    """The paper's rule: add the row, then drop the lightest token outside the most recent ones."""
    for step, row in enumerate(rows):
        new = size + step
        sums = {j: s + row[j] for j, s in {**sums, new: 0.0}.items()}
        del sums[min((j for j in sums if j <= new - recent), key=lambda j: sums[j])]
    return sorted(sums)


def test_decoding_equals_recomputation_by_loops():
    """Five steps on six tokens: at each, the row is a softmax over the tokens that are left."""
    generator = torch.Generator().manual_seed(3)
    scorer, recent, size = AccumulatedAttention(), 2, 6
    logits = torch.randn(5, 11, generator=generator) * 2
    scores = torch.rand(1, 1, size, generator=generator)
    sums = {j: float(scores[0, 0, j]) for j in range(size)}
    positions, rows = torch.arange(size).view(1, 1, -1), []
    for step, row in enumerate(logits):
        positions = torch.cat([positions, torch.tensor([[[size + step]]])], dim=-1)
        attention = row[positions[0, 0]].softmax(0)
        rows.append(dict(zip(positions[0, 0].tolist(), attention.double().tolist(), strict=True)))
        scores = scorer.step(torch.nn.functional.pad(scores, (0, 1)), attention.view(1, 1, 1, 1, -1), positions)
        valid = torch.ones_like(positions, dtype=torch.bool)
        guard = guard_ends(valid, positions, torch.zeros(1, dtype=torch.int64), 0, recent)
        kept = TokenScores(scores, valid, guard).order[0, 0, :size].sort().values
        scores, positions = scores[..., kept], positions[..., kept]
    expected = decode_oracle(sums, rows, recent, size)
    assert positions[0, 0].tolist() == expected


def test_step_averages_the_group_and_adds_the_rows():
    attention = torch.tensor([[[[0.1, 0.9], [0.2, 0.8]], [[0.5, 0.5], [0.6, 0.4]]]])[:, None]  # (1, 1, G=2, Q=2, N=2)
    scores = AccumulatedAttention().step(torch.tensor([[[1.0, 2.0]]]), attention, torch.arange(2).view(1, 1, 2))
    torch.testing.assert_close(scores, torch.tensor([[[1.7, 3.3]]]))  # 1 + (0.1+0.2+0.5+0.6)/2


def test_half_of_the_budget_is_recent():
    assert H2O().parts().scorer.protects(20) == (0, 10)
    assert H2O(recent=0.3).parts().scorer.protects(10) == (0, 3)  # 0.3 * 10 is 3.0000000000000004 or 2.9999...
    assert H2O().parts().moment == "every_step"


@pytest.mark.parametrize("recent", [-0.1, 1.5, math.nan])
def test_refuses(recent):
    with pytest.raises(InvalidInputError, match="recent"):
        H2O(recent=recent)
