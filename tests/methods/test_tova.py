"""TOVA against its rule: the newest row, averaged over all heads, decides for the whole layer."""

import pytest
import torch
from oracles import attention_error, build, dense_attention, random_case

from sparing.core.token_scores import TokenScores, guard_ends
from sparing.methods.kv.tova import TOVA, LastRowAttention


@pytest.mark.parametrize("sizes", [[13], [6, 7], [1] * 13, [11, 2]], ids=str)
def test_equals_the_last_row_averaged_over_all_heads(sizes):
    case = random_case(seed=2)
    attention = dense_attention(case.queries, case.stored)
    scores = case.score(LastRowAttention(), sizes)
    for b in range(3):
        for j in range(13):
            expected = sum(attention[b][h][12][j] for h in range(4)) / 4
            for kv_head in range(2):
                assert float(scores[b, kv_head, j]) == pytest.approx(expected, abs=attention_error(case))


def test_all_heads_keep_the_same_tokens():
    """Head 0 looks at key 1 only, head 1 at key 2 only: both heads rank 1 and 2 alike, before 0."""
    keys = torch.zeros(1, 2, 4, 2)
    keys[0, 0, 1, 0] = keys[0, 1, 2, 0] = 20.0
    case = build(torch.tensor([1.0, 0.0]).expand(1, 2, 4, 2), keys)
    scores = case.score(LastRowAttention())
    torch.testing.assert_close(scores[0, 0], scores[0, 1], atol=0, rtol=0)
    torch.testing.assert_close(scores[0, 0], torch.tensor([0.0, 0.5, 0.5, 0.0]), atol=1e-5, rtol=0)


def loop_oracle(prompt: int, size: int, rows: list[list[list[float]]]) -> list[list[int]]:
    """Multi-state RNN of `size` states: append, average the newest row over the heads, drop the lowest but the newest.

    Args:
        rows: [step][head][position] logits of each new token.
    """
    held, history = list(range(prompt)), []
    for step, heads in enumerate(rows):
        held.append(prompt + step)
        mean = dict.fromkeys(held, 0.0)
        for logits in heads:
            weights = torch.tensor([logits[j] for j in held], dtype=torch.float64).softmax(0).tolist()
            for j, weight in zip(held, weights, strict=True):
                mean[j] += weight / len(heads)
        if len(held) > size:
            held.remove(min(held[:-1], key=mean.__getitem__))
        history.append(list(held))
    return history


def test_several_decoding_steps_equal_the_loop():
    generator = torch.Generator().manual_seed(4)
    size, steps, heads = 5, 6, 4
    logits = torch.randn(steps, heads, size + steps, generator=generator) * 2
    expected = loop_oracle(size, size, logits.double().tolist())
    scorer, positions = LastRowAttention(), torch.arange(size).expand(1, 2, -1)
    for step in range(steps):
        positions = torch.cat([positions, torch.full((1, 2, 1), size + step)], dim=-1)
        row = logits[step][:, positions[0, 0]].softmax(-1).view(1, 2, 2, 1, -1)  # (B, H, G, Q, N)
        scores = scorer.step(torch.zeros(positions.shape), row, positions)
        valid = torch.ones_like(positions, dtype=torch.bool)
        guard = guard_ends(valid, positions, torch.zeros(1, dtype=torch.int64), *scorer.protects(size))
        positions = positions.gather(-1, TokenScores(scores, valid, guard).order[..., :size].sort(-1).values)
        assert positions[0, 0].tolist() == positions[0, 1].tolist() == expected[step]


def test_a_token_that_matters_only_later_is_lost():
    """The method's limit: no attention now means gone, whatever comes later."""
    rows = [[[5.0, 5.0, -5.0, 5.0, 0.0]], [[0.0, 0.0, 50.0, 0.0, 0.0]]]
    assert 2 not in loop_oracle(3, 3, rows)[-1]
    scores = LastRowAttention().step(
        torch.zeros(1, 1, 4), torch.tensor(rows[0][0][:4]).softmax(0).view(1, 1, 1, 1, 4), torch.arange(4).view(1, 1, 4)
    )
    assert int(scores.argmin()) == 2


def test_protects_the_newest_token_only():
    assert LastRowAttention().protects(100) == (0, 1)
    assert TOVA().parts().moment == "every_step"


def test_of_several_new_rows_the_newest_decides():
    attention = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.3, 0.5]]).view(1, 1, 1, 2, 3)
    scores = LastRowAttention().step(torch.zeros(1, 1, 3), attention, torch.arange(3).view(1, 1, 3))
    torch.testing.assert_close(scores, torch.tensor([[[0.2, 0.3, 0.5]]]))
