"""Compactor: leverage blended with attention in both directions, inside chunks."""

import math
from dataclasses import replace

import pytest
import torch
from oracles import PlainRotary, build, random_case

from sparing.core.scorer import KeyValues, Queries, Softmax
from sparing.errors import InvalidInputError
from sparing.measures.attention import bidirectional_mass
from sparing.methods.kv.leverage import Compactor, LeverageAndAttention

PARTS = ([13], [6, 7], [1] * 13, [11, 2])


def leverage(keys: torch.Tensor, jitter: float) -> list[float]:
    """(N, D) float64 keys before rotation → x_jᵀ (XᵀX + ε I)⁻¹ x_j, one row at a time."""
    x = keys - keys.mean(0)
    gram = sum(torch.outer(row, row) for row in x) + jitter * torch.eye(x.shape[1], dtype=torch.float64)
    return [float(row @ torch.linalg.solve(gram, row)) for row in x]


def both_ways(queries: torch.Tensor, keys: torch.Tensor, chunk: int, scaling: float) -> list[float]:
    """(N, D) queries and keys of one head → attention per key from all rows of its chunk, earlier and later."""
    mass = []
    for j in range(len(keys)):
        begin = j // chunk * chunk
        members = range(begin, min(begin + chunk, len(keys)))
        logits = [[float(queries[i] @ keys[m]) * scaling for m in members] for i in members]
        mass.append(sum(math.exp(row[j - begin]) / sum(map(math.exp, row)) for row in logits))
    return mass


def standard(numbers: list[float], counts: list[bool]) -> list[float]:
    """Mean and deviation of those that count; 0 for the others."""
    chosen = [x for x, c in zip(numbers, counts, strict=True) if c]
    mean = sum(chosen) / max(len(chosen), 1)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in chosen) / max(len(chosen), 1))
    return [(x - mean) / deviation if c and deviation else 0.0 for x, c in zip(numbers, counts, strict=True)]


def oracle(case, scorer, row: int, head: int) -> list[float]:
    """The scores of one row and KV head, real tokens only."""
    alone = case.alone(row)
    keys, values = alone.stored.keys[0, head].double(), alone.stored.values[0, head].double()
    group = alone.queries.states.shape[1] // alone.stored.keys.shape[1]
    states = alone.queries.states[0, head * group : (head + 1) * group].double()
    masses = [both_ways(q, keys, scorer.chunk, alone.queries.softmax.scaling) for q in states]
    weighted = [sum(m) / group * float(v.norm()) for m, v in zip(zip(*masses, strict=True), values, strict=True)]
    pooled = []
    for j in range(len(weighted)):
        near = weighted[max(j - 1, 0) : j + 2]
        pooled.append(sum(near) / len(near))
    turned = keys
    if alone.stored.rotary is not None:
        turned = torch.stack([alone.stored.rotary.matrix(p).T @ k for p, k in enumerate(keys)])
    counts = [scorer.first <= j < len(keys) - scorer.recent for j in range(len(keys))]
    rare = standard(leverage(turned, scorer.jitter), counts)
    return [scorer.blend * x + y for x, y in zip(rare, standard(pooled, counts), strict=True)]


@pytest.mark.parametrize("rotary", [None, PlainRotary(8)], ids=["unrotated", "rotary"])
@pytest.mark.parametrize("sizes", PARTS, ids=str)
def test_equals_the_equation(rotary, sizes):
    """Three rows with 0, 3 and 7 pads: chunks begin at each row's first token, and one is short; GQA of 2 over 1."""
    case = random_case(seed=50, rotary=rotary)
    # Six keys in eight dimensions hardly explain each other: with a small jitter all leverages would be 1 but for
    # rounding, which standardising would blow up.
    scorer = LeverageAndAttention(sketch=0, jitter=4.0, first=2, recent=1, chunk=4, blend=0.7)
    scores = case.score(scorer, sizes)
    for row, pad in enumerate([0, 3, 7]):
        for head in range(2):
            wanted = torch.tensor(oracle(case, scorer, row, head))
            torch.testing.assert_close(scores[row, head, pad:], wanted, atol=2e-5, rtol=0)


def test_a_chunk_as_long_as_the_prompt_is_dense_attention_without_a_mask():
    case = random_case(seed=51)
    scorer = LeverageAndAttention(sketch=0, first=0, recent=0, chunk=64, blend=0.0)
    got = case.score(scorer)[0, 0]
    q, k = case.queries.states[0, :2].double(), case.stored.keys[0, 0].double()
    mass = (q @ k.T * 8**-0.5).softmax(-1).sum(1).mean(0) * case.stored.values[0, 0].double().norm(dim=-1)
    padded = torch.nn.functional.pad(mass, (1, 1))
    pooled = (padded[:-2] + padded[1:-1] + padded[2:]) / torch.tensor([2] + [3] * 11 + [2])
    wanted = (pooled - pooled.mean()) / pooled.std(correction=0)
    torch.testing.assert_close(got.double(), wanted, atol=1e-5, rtol=0)


def test_a_short_last_chunk_gives_nothing_to_padding():
    """Five equal tokens in chunks of four: 1 each from its own chunk, the last one too."""
    case = build(torch.ones(1, 1, 5, 4), torch.ones(1, 1, 5, 4))
    scorer = LeverageAndAttention(chunk=4)
    state = scorer.observe(None, case.queries, case.stored)
    assert state.mass.shape[-1] == 4
    full = scorer._with_next_chunk(state, case.stored).mass
    torch.testing.assert_close(full[0, 0], torch.tensor([1.0, 1, 1, 1, 1, 0, 0, 0]))


def test_logits_are_scaled_as_the_model_scales_them():
    """Two tokens, logits ln 3 and 0 for both rows: masses 1.5 and 0.5. Without the factor 1/2: 1.8 and 0.2."""
    keys = torch.zeros(1, 1, 2, 4)
    keys[0, 0, 0, 0] = 2 * math.log(3)
    queries = torch.tensor([1.0, 0, 0, 0]).expand(1, 1, 2, 4)
    case = build(queries, keys, softmax=Softmax(0.5))
    scorer = LeverageAndAttention(chunk=2)
    mass = scorer.observe(None, case.queries, case.stored).mass
    torch.testing.assert_close(mass[0, 0], torch.tensor([1.5, 0.5]))


def test_later_rows_count_and_other_chunks_do_not():
    """Only row 3 looks at token 1, which lies before it, and at token 0 of the other chunk as much; only row 0 looks at
    token 1 from before. Causal attention would have lost the second, a long chunk would have added the first.
    """
    keys = torch.eye(4)[None, None] * 8.0
    queries = torch.zeros(1, 1, 4, 4)
    queries[0, 0, 0, 1] = queries[0, 0, 3, 0] = 8.0
    case = build(queries, keys, softmax=Softmax(1.0))
    mass = LeverageAndAttention(chunk=2).observe(None, case.queries, case.stored).mass[0, 0]
    torch.testing.assert_close(mass, torch.tensor([0.5, 1.5, 1.0, 1.0]), atol=1e-6, rtol=0)


def test_protected_tokens_do_not_move_the_scale():
    """A sink with a huge value changes nobody's score but its own neighbour's (by pooling)."""
    plain = random_case(seed=52)
    values = plain.stored.values.clone()
    values[:, :, 7] *= 1e4  # the first real token of every row that has seven pads; in the first row, an ordinary one
    scorer = LeverageAndAttention(sketch=0, first=2, recent=1, chunk=4)
    loud = replace(plain, stored=replace(plain.stored, values=values))
    before, after = plain.score(scorer)[2, :, 9:], loud.score(scorer)[2, :, 9:]
    torch.testing.assert_close(before, after)
    assert not torch.allclose(plain.score(scorer)[0, :, 9:], loud.score(scorer)[0, :, 9:])


def test_standardised_per_head_and_sequence():
    """Values of one head times 100 leave every score as it is; over all heads together they would not."""
    case = random_case(seed=53)
    values = case.stored.values * torch.tensor([1.0, 100.0]).view(1, 2, 1, 1)
    scorer = LeverageAndAttention(first=2, recent=1, chunk=4)
    louder = replace(case, stored=replace(case.stored, values=values))
    torch.testing.assert_close(case.score(scorer), louder.score(scorer), atol=1e-4, rtol=0)


def test_planted_rare_key_and_planted_target_both_come_first():
    keys = torch.randn(1, 1, 64, 8, generator=torch.Generator().manual_seed(54)) * 0.1
    keys[..., 6:] = 0.0
    keys[0, 0, 40, 7] = 1.0  # rare: nothing else has the last axis
    keys[0, 0, 20, 6] = 9.0  # every row looks at it, but its axis is no rarer than the one above
    queries = torch.zeros(1, 1, 64, 8)
    queries[..., 6] = 3.0
    case = build(queries, keys, torch.ones(1, 1, 64, 8))
    scores = case.score(LeverageAndAttention(sketch=0, first=4, recent=4, chunk=64, blend=1.0))[0, 0]
    assert set(scores.topk(2).indices.tolist()) <= {19, 20, 21, 40}
    by_attention = case.score(LeverageAndAttention(sketch=0, first=4, recent=4, chunk=64, blend=0.0))[0, 0]
    assert set(by_attention.topk(3).indices.tolist()) == {19, 20, 21}
    assert int(case.score(LeverageAndAttention(sketch=0, first=4, recent=4, chunk=64, blend=50.0))[0, 0].argmax()) in (
        20, 40,
    )  # fmt: skip


def test_tokens_of_an_earlier_turn_count_as_average_in_attention():
    """Ten tokens are held of which the first four, of an earlier turn, have no queries: leverage alone ranks them."""
    g = torch.Generator().manual_seed(55)
    positions = torch.tensor([0, 3, 4, 9, 20, 21, 22, 23, 24, 25])
    keys, values = torch.randn(1, 1, 10, 8, generator=g), torch.randn(1, 1, 10, 8, generator=g)
    valid, pads = torch.ones(1, 1, 10, dtype=torch.bool), torch.zeros(1, dtype=torch.long)
    stored = KeyValues(keys, values, valid, positions.view(1, 1, 10), pads, 0, 1, None)
    queries = Queries(torch.randn(1, 2, 6, 8, generator=g), positions[4:], torch.ones(1, 6).bool(), Softmax(8**-0.5))
    scorer = LeverageAndAttention(sketch=0, first=0, recent=0, chunk=4, blend=0.5)
    scores = scorer.score(scorer.observe(None, queries, stored), stored)[0, 0]
    rare = standard(leverage(keys[0, 0].double(), 0.01), [True] * 10)
    torch.testing.assert_close(scores[:4], 0.5 * torch.tensor(rare[:4]), atol=1e-5, rtol=0)
    masses = [both_ways(q.double(), keys[0, 0, 4:].double(), 4, 8**-0.5) for q in queries.states[0]]
    weighted = [(a + b) / 2 * float(v.norm()) for a, b, v in zip(*masses, values[0, 0, 4:], strict=True)]
    pooled = [sum(weighted[max(j - 1, 0) : j + 2]) / len(weighted[max(j - 1, 0) : j + 2]) for j in range(6)]
    wanted = [0.5 * x + y for x, y in zip(rare[4:], standard(pooled, [True] * 6), strict=True)]
    torch.testing.assert_close(scores[4:], torch.tensor(wanted), atol=1e-5, rtol=0)


def test_heads_of_different_lengths_score_as_each_does_alone():
    """A later turn over heads that hold 4 and 2 older tokens: the shorter one is padded behind its newest token."""
    g = torch.Generator().manual_seed(56)
    keys, values = torch.randn(1, 2, 9, 8, generator=g), torch.randn(1, 2, 9, 8, generator=g)
    positions = torch.tensor([[0, 3, 4, 9, 20, 21, 22, 23, 24], [2, 7, 20, 21, 22, 23, 24, 0, 0]])[None]
    valid = torch.arange(9) < torch.tensor([9, 7])[None, :, None]
    stored = KeyValues(keys, values, valid, positions, torch.zeros(1, dtype=torch.long), 0, 1, None)
    queries = Queries(
        torch.randn(1, 2, 5, 8, generator=g), torch.arange(20, 25), torch.ones(1, 5).bool(), Softmax(0.35)
    )
    scorer = LeverageAndAttention(first=0, recent=0, chunk=2, blend=0.5)
    together = scorer.score(scorer.observe(None, queries, stored), stored)
    for head, count in ((0, 9), (1, 7)):
        part = [x[:, head : head + 1, :count] for x in (keys, values, valid, positions)]
        alone = KeyValues(*part, torch.zeros(1, dtype=torch.long), 0, 1, None)
        asked = replace(queries, states=queries.states[:, head : head + 1])
        wanted = scorer.score(scorer.observe(None, asked, alone), alone)
        torch.testing.assert_close(together[:, head, :count], wanted[:, 0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("softmax", [Softmax(0.5, softcap=2.0), Softmax(0.5, sinks=torch.tensor([0.3, -1.0]))])
def test_softcap_and_learned_sinks_are_the_models(softmax):
    g = torch.Generator().manual_seed(57)
    q, k = torch.randn(1, 2, 3, 4, generator=g), torch.randn(1, 1, 3, 4, generator=g)
    valid = torch.tensor([[True, True, False]])
    mass = bidirectional_mass(q, k.masked_fill(~valid[:, None, :, None], torch.nan), valid, softmax)
    for head in range(2):
        logits = 0.5 * q[0, head, :2].double() @ k[0, 0, :2].double().T
        if softmax.softcap:
            logits = 2 * (logits / 2).tanh()
        total = logits.exp().sum(-1) + (0 if softmax.sinks is None else float(softmax.sinks[head].double().exp()))
        wanted = (logits.exp() / total[:, None]).sum(0)
        torch.testing.assert_close(mass[0, head], torch.cat([wanted, torch.zeros(1)]).float(), atol=1e-6, rtol=0)


def test_the_blend_follows_the_budget():
    for keep, wanted in ((0.25, 0.75), (0.9, 0.1), (512, 0.35), ("1MiB", 0.35)):
        assert Compactor(keep=keep).parts().scorer.blend == pytest.approx(wanted)
    assert Compactor(keep=0.25, blend=0.5).parts().scorer.blend == 0.5


def test_defaults_and_refusals():
    scorer = Compactor().parts().scorer
    assert (scorer.sketch, scorer.jitter, scorer.chunk, scorer.protects(100)) == (48, 0.01, 256, (8, 4))
    for bad in ({"sketch": -1}, {"jitter": -0.1}, {"chunk": 0}, {"blend": float("nan")}, {"blend": float("inf")}):
        with pytest.raises(InvalidInputError, match=next(iter(bad))):
            Compactor(**bad)
