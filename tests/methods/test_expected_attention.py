"""Expected Attention against its closed form, the closed form against sampling, and both with real rotary maps."""

import math

import pytest
import torch
from oracles import PlainRotary, build, random_case
from transformers import LlamaConfig, LlamaForCausalLM

from sparing.adapters.rotary import find_rotary
from sparing.core.scorer import Softmax
from sparing.errors import InvalidInputError
from sparing.methods.kv.expected_attention import ExpectedAttention, ExpectedAttentionScore


def oracle(case, row: int, head: int, n_future: int, sinks: int, epsilon: float, matrix=None) -> torch.Tensor:
    """(n,) scores of one KV head of one row without its pads, in float64; `matrix(p)` is the rotation to p."""
    case = case.alone(row)
    stored, group = case.stored, case.queries.states.shape[1] // case.stored.keys.shape[1]
    tokens, dim = stored.keys.shape[2:]
    keys, values = stored.keys[0, head].double(), stored.values[0, head].double()
    turn = torch.eye(dim, dtype=torch.float64)
    if matrix is not None:
        turn = sum(matrix(tokens + t) for t in range(n_future)) / n_future
    expected = torch.zeros(tokens, dtype=torch.float64)
    for g in range(group):
        raw = case.queries.states[0, head * group + g].double()
        if matrix is not None:
            raw = torch.stack([matrix(p).T @ q for p, q in enumerate(raw)])
        counted = raw[sinks:]
        mean = sum(counted) / len(counted)
        covariance = sum(torch.outer(q - mean, q - mean) for q in counted) / len(counted)
        mean, covariance = turn @ mean, turn @ covariance @ turn.T
        z = torch.stack([k @ mean / math.sqrt(dim) + k @ covariance @ k / (2 * dim) for k in keys])
        expected += z.softmax(0) / group
    return (expected + epsilon) * torch.stack([v.norm() for v in values])


@pytest.mark.parametrize("sizes", [[13], [6, 7], [1] * 13], ids=str)
@pytest.mark.parametrize("rotary", [None, PlainRotary(8)], ids=["unrotated", "rotary"])
@pytest.mark.parametrize("epsilon", [0.0, 0.02])
def test_equals_the_equation(rotary, sizes, epsilon):
    case = random_case(seed=19, rotary=rotary)
    scores = case.score(ExpectedAttentionScore(n_future=9, sinks=2, epsilon=epsilon), sizes)
    matrix = rotary.matrix if rotary is not None else None
    for row, pad in enumerate([0, 3, 7]):
        for head in range(2):
            expected = oracle(case, row, head, 9, 2, epsilon, matrix)
            torch.testing.assert_close(scores[row, head, pad:].double(), expected, atol=1e-6, rtol=2e-5)


def test_the_closed_form_is_the_mean_over_gaussian_queries():
    """E[exp(q·k/√d)] over a million sampled queries, for ten keys: within five standard errors of the closed form."""
    generator = torch.Generator().manual_seed(20)
    prompt = torch.randn(1, 1, 400, 4, generator=generator) @ torch.diag(torch.tensor([1.5, 1.0, 0.5, 0.2])) + 0.3
    keys = torch.randn(1, 1, 400, 4, generator=generator) * 0.7
    case = build(prompt, keys, torch.nn.functional.normalize(torch.ones_like(keys), dim=-1))
    scores = case.score(ExpectedAttentionScore(sinks=0))[0, 0].double()
    rows = prompt[0, 0].double()
    factor = torch.linalg.cholesky(torch.cov(rows.T, correction=0))
    sampled = rows.mean(0) + torch.randn(1_000_000, 4, generator=generator, dtype=torch.float64) @ factor.T
    weights = (sampled @ keys[0, 0, :10].double().T / 2).exp()
    error = 5 * weights.std(0) / weights.mean(0) / 1000
    ratio = (weights.mean(0) / weights.mean(0).sum()) / (scores[:10] / scores[:10].sum())
    assert bool((ratio.log().abs() < error + error.max()).all())


def test_without_covariance_it_is_the_softmax_of_the_mean_query():
    """All queries equal: s = softmax(k · q / √d) times the value's norm."""
    keys = torch.randn(1, 2, 12, 8, generator=torch.Generator().manual_seed(21))
    query = torch.arange(8.0) / 4
    case = build(query.expand(1, 4, 12, 8), keys)
    expected = (keys @ query / 8**0.5).softmax(-1) * keys.norm(dim=-1)
    torch.testing.assert_close(case.score(ExpectedAttentionScore()), expected, atol=1e-6, rtol=1e-5)


def test_hand_numbers():
    """Scaling 1, queries +1 and -1: mean 0, variance 1; keys 0 and 2 get exp(0) and exp(2), values 1 and 3."""
    queries = torch.tensor([1.0, -1.0]).view(1, 1, 2, 1)
    case = build(
        queries,
        torch.tensor([0.0, 2.0]).view(1, 1, 2, 1),
        torch.tensor([1.0, 3.0]).view(1, 1, 2, 1),
        softmax=Softmax(1.0),
    )
    scores = case.score(ExpectedAttentionScore(sinks=0))[0, 0]
    total = 1 + math.e**2
    torch.testing.assert_close(scores, torch.tensor([1 / total, 3 * math.e**2 / total]))


def test_planted_key_along_the_mean_query_comes_first():
    generator = torch.Generator().manual_seed(22)
    direction = torch.nn.functional.normalize(torch.randn(8, generator=generator), dim=0)
    queries = 3 * direction + 0.1 * torch.randn(1, 1, 30, 8, generator=generator)
    keys = torch.nn.functional.normalize(torch.randn(1, 1, 30, 8, generator=generator), dim=-1)
    keys[0, 0, 17] = direction
    assert int(build(queries, keys).score(ExpectedAttentionScore())[0, 0].argmax()) == 17


def test_a_large_mean_does_not_swallow_the_covariance():
    """Queries with a bias of 300: sums of squares in float32 would lose a variance of 0.01."""
    generator = torch.Generator().manual_seed(23)
    queries = 300 + 0.1 * torch.randn(1, 1, 50, 4, generator=generator)
    keys = 20 * torch.randn(1, 1, 50, 4, generator=generator)
    keys -= keys.mean(-1, keepdim=True)  # orthogonal to the bias, so that the covariance decides
    case = build(queries, keys)
    for sizes in ([50], [20, 30]):
        scores = case.score(ExpectedAttentionScore(), sizes)[0, 0].double()
        torch.testing.assert_close(scores, oracle(case, 0, 0, 1, 4, 0.0), atol=1e-4, rtol=2e-2)


def test_real_rotary_of_a_tiny_llama():
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=32,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    rotates, rotary = find_rotary(LlamaForCausalLM(config), 8)
    assert rotates
    plain = PlainRotary(8, base=10_000.0)
    case = random_case(seed=24, rotary=rotary)
    scores = case.score(ExpectedAttentionScore(n_future=16), [5, 8])
    for row, pad in enumerate([0, 3, 7]):
        expected = oracle(case, row, 1, 16, 4, 0.0, plain.matrix)
        torch.testing.assert_close(scores[row, 1, pad:].double(), expected, atol=1e-6, rtol=2e-5)


def test_a_prompt_of_sinks_only_is_still_finite():
    keys = torch.randn(1, 1, 3, 4, generator=torch.Generator().manual_seed(25))
    assert bool(torch.isfinite(build(keys, keys).score(ExpectedAttentionScore())).all())


def test_defaults_and_refusal():
    scorer = ExpectedAttention().parts().scorer
    assert (scorer.n_future, scorer.sinks, scorer.epsilon, scorer.protects(100)) == (512, 4, 0.0, (4, 0))
    for bad in ({"n_future": 0}, {"sinks": -1}, {"epsilon": -1.0}):
        with pytest.raises(InvalidInputError, match=next(iter(bad))):
            ExpectedAttention(**bad)
