"""ChunkKV against its equation, and on chunks worked out by hand."""

from dataclasses import dataclass, replace

import pytest
import torch
from oracles import attention_error, build, dense_attention, kept_positions, random_case

from sparing.core.scorer import Scorer
from sparing.core.token_scores import TokenScores
from sparing.errors import InvalidInputError
from sparing.methods.kv.chunkkv import Chunked, ChunkKV
from sparing.methods.kv.expected_attention import ExpectedAttentionScore
from sparing.methods.kv.snapkv import WindowAttention


@dataclass(frozen=True)
class Given(Scorer):
    """Scores that a test has written."""

    numbers: tuple[float, ...]

    def score(self, state, stored):
        return torch.tensor(self.numbers).expand(stored.valid.shape)


def order(scores, stored):
    return TokenScores(scores, stored.valid, torch.zeros_like(stored.positions)).order


def oracle(case, window: int, size: int) -> list:
    """s[b][h][j]: mean over the chunk of the mean attention of the last rows, mean over the group."""
    attention = dense_attention(case.queries, case.stored)
    rows, heads = case.queries.states.shape[:2]
    kv_heads, tokens = case.stored.keys.shape[1:3]
    group = heads // kv_heads
    scores = [[[None] * tokens for _ in range(kv_heads)] for _ in range(rows)]
    for b in range(rows):
        pad = int(case.stored.pads[b])
        last = [i for i in range(tokens - window, tokens) if i >= pad]
        for h in range(kv_heads):
            for j in range(pad, tokens):
                begin = pad + (j - pad) // size * size
                chunk = range(begin, min(begin + size, tokens))
                mass = [attention[b][h * group + g][i][m] for g in range(group) for i in last for m in chunk]
                scores[b][h][j] = sum(mass) / (group * len(last) * len(chunk))
    return scores


@pytest.mark.parametrize("size", [1, 3, 5, 100])
def test_equals_the_equation(size):
    case = random_case()
    scores = case.score(Chunked(WindowAttention(window=4, kernel_size=1), size))
    for b, row in enumerate(oracle(case, 4, size)):
        for h, head in enumerate(row):
            for j, expected in enumerate(head):
                if expected is not None:
                    assert float(scores[b, h, j]) == pytest.approx(expected, abs=attention_error(case))


def test_hand_numbers():
    """Chunks of three: means 2, 4 and, of the two tokens that are left, 3."""
    stored = build(torch.zeros(1, 1, 8, 2), torch.zeros(1, 1, 8, 2)).stored
    scores = Chunked(Given((0.0, 6.0, 0.0, 4.0, 4.0, 4.0, 5.0, 1.0)), 3).score(None, stored)
    assert scores[0, 0].tolist() == [2, 2, 2, 4, 4, 4, 3, 3]


def test_whole_chunks_stay_and_the_last_one_gives_its_first_tokens():
    """Token by token 1 would be first; by chunks 3..5 come first, then 6 and 7, then 0, 1, 2 in order."""
    stored = build(torch.zeros(1, 1, 8, 2), torch.zeros(1, 1, 8, 2)).stored
    chunked = Chunked(Given((0.0, 6.0, 0.0, 4.0, 4.0, 4.0, 5.0, 1.0)), 3).score(None, stored)
    best = order(chunked, stored)[0, 0]
    assert [kept_positions(best, n) for n in (2, 3, 5, 6, 7)] == [
        [3, 4], [3, 4, 5], [3, 4, 5, 6, 7], [0, 3, 4, 5, 6, 7], [0, 1, 3, 4, 5, 6, 7],
    ]  # fmt: skip
    plain = Given((0.0, 6.0, 0.0, 4.0, 4.0, 4.0, 5.0, 1.0)).score(None, stored)
    assert kept_positions(order(plain, stored)[0, 0], 2) == [1, 6]


def test_a_chunk_that_lost_tokens_is_the_mean_of_what_is_left():
    """Of positions 0, 1, 2 | 3, 4, 5 the tokens 0 and 4 are gone: means of 6, 0 and of 4, 2."""
    case = build(torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2))
    stored = replace(case.stored, positions=torch.tensor([[[1, 2, 3, 5]]]))
    assert Chunked(Given((6.0, 0.0, 4.0, 2.0)), 3).score(None, stored)[0, 0].tolist() == [3, 3, 3, 3]


def test_chunks_begin_at_the_first_real_token():
    """Two pads: chunks of two are positions 2, 3 | 4, 5, as without pads."""
    padded = build(torch.zeros(1, 1, 6, 2), torch.zeros(1, 1, 6, 2), pads=(2,)).stored
    scores = Chunked(Given((9.0, 9.0, 1.0, 3.0, 5.0, 5.0)), 2).score(None, padded)
    assert scores[0, 0, 2:].tolist() == [2, 2, 5, 5]


def test_wraps_any_scorer_and_keeps_its_habits():
    scorer = Chunked(ExpectedAttentionScore(), 4)
    assert scorer.needs_rotary
    assert scorer.protects(10) == (4, 0)
    scores = random_case().score(Chunked(ExpectedAttentionScore(n_future=8), 4), [6, 7])
    assert len({round(x, 9) for x in scores[0, 0].tolist()}) == 4  # 13 tokens, 4 chunks


def test_defaults_and_refusals():
    scorer = ChunkKV().parts().scorer
    assert (scorer.size, scorer.scorer.window, scorer.scorer.kernel_size) == (10, 32, 1)
    assert scorer.protects(100) == (0, 32)
    for bad in ({"size": 0}, {"window": 0}):
        with pytest.raises(InvalidInputError, match=next(iter(bad))):
            ChunkKV(**bad)
