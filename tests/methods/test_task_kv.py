"""Task-KV against its equation, and a head that gathers something else than the others."""

import dataclasses
import math

import pytest
import torch
from oracles import build, dense_attention, random_case

import sparing
from methods.roles import kept
from sparing.core.scorer import Softmax
from sparing.errors import InvalidInputError
from sparing.methods.kv.task_kv import SemanticCentre, TaskKV


def states(case, window):
    state = None
    for queries, stored in case.chunks([case.tokens]):
        state = SemanticCentre(window).observe(state, queries, stored)
    return state


def oracle(case, window, tokens):
    """distance[b][h] of KV heads, and C[b][h][j] of query heads, in float64 with plain loops."""
    attention = dense_attention(case.queries, case.stored)
    kv_heads, query_heads = case.stored.keys.shape[1], case.queries.states.shape[1]
    group = query_heads // kv_heads
    distances, masses = [], []
    for b in range(case.queries.states.shape[0]):
        pad = int(case.stored.pads[b])
        rows = [i for i in range(max(case.tokens - window, 0), case.tokens) if i >= pad]
        gathered, mass_of = [torch.zeros(8, dtype=torch.float64) for _ in range(kv_heads)], []
        for h in range(query_heads):
            mass = [sum(attention[b][h][i][j] for i in rows) / len(rows) for j in range(case.tokens)]
            mass_of.append(mass)
            for j in sorted(range(pad, case.tokens), key=lambda j: -mass[j])[:tokens]:
                gathered[h // group] += mass[j] * case.stored.values[b, h // group, j].double() / group
        centre = sum(gathered) / kv_heads
        distances.append([float((v - centre).norm()) for v in gathered])
        masses.append(mass_of)
    return distances, masses


@pytest.mark.parametrize(("window", "tokens"), [(4, 5), (32, 256), (1, 1)])
def test_distances_equal_the_equation(window, tokens):
    case = random_case(seed=8, kv_heads=3)
    found = SemanticCentre(window, tokens=tokens).distances(states(case, window), case.stored)
    wanted, _ = oracle(case, window, tokens)
    torch.testing.assert_close(found.double(), torch.tensor(wanted, dtype=torch.float64), atol=1e-5, rtol=0)


def test_token_scores_equal_the_equation():
    case = random_case(seed=9)
    found = case.score(SemanticCentre(4, kernel_size=3), [6, 7])
    _, masses = oracle(case, 4, 256)
    for b in range(3):
        pad = int(case.stored.pads[b])
        for h in range(2):
            mean = [(masses[b][2 * h][j] + masses[b][2 * h + 1][j]) / 2 for j in range(13)]
            for j in range(pad, 13):
                near = [mean[m] for m in (j - 1, j, j + 1) if pad <= m < 13]
                assert float(found[b, h, j]) == pytest.approx(sum(near) / len(near), abs=1e-5)


def test_enough_tokens_are_all_tokens():
    case = random_case(seed=10)
    whole, more = (SemanticCentre(4, tokens=t).distances(states(case, 4), case.stored) for t in (13, 1000))
    assert torch.equal(whole, more)


def planted():
    """Four KV heads, uniform attention. Three gather (1, 0) up to a little, the last gathers (0, 1)."""
    values = torch.zeros(1, 4, 8, 2)
    values[0, :3, :, 0] = torch.tensor([1.0, 1.1, 0.9])[:, None]
    values[0, 3, :, 1] = 1.0
    return build(torch.zeros(1, 4, 8, 2), torch.zeros(1, 4, 8, 2), values, softmax=Softmax(1.0))


def test_the_head_that_gathers_something_else_is_first_and_the_nearest_to_the_centre_second():
    """Centre (0.75, 0.25): distances √(.0625 + .0625), √(.1225 + .0625), √(.0225 + .0625), √(.5625 + .5625)."""
    case, scorer = planted(), SemanticCentre(8)
    found = scorer.distances(states(case, 8), case.stored)
    expected = [math.sqrt(x) for x in (0.125, 0.185, 0.085, 1.125)]
    assert found[0].tolist() == pytest.approx(expected, abs=1e-6)
    ranks = scorer.rank_heads(states(case, 8), case.stored)
    assert torch.argsort(ranks[0], descending=True).tolist() == [3, 2, 1, 0]


def test_pads_are_no_part_of_it():
    case = random_case(seed=11)
    gone = ~case.stored.valid[..., None]
    poisoned = dataclasses.replace(case.stored, values=case.stored.values.masked_fill(gone, torch.nan))
    scorer, state = SemanticCentre(4), states(case, 4)
    assert torch.equal(scorer.distances(state, poisoned), scorer.distances(state, case.stored))
    for row in range(3):
        alone = case.alone(row)
        torch.testing.assert_close(
            scorer.distances(states(alone, 4), alone.stored)[0], scorer.distances(state, case.stored)[row],
            atol=1e-5, rtol=0,
        )  # fmt: skip


def test_one_head_of_each_layer_keeps_everything_the_other_its_ends_and_the_best():
    """2 heads of 64, 2 · 45 tokens: one whole head, 26 for the other: 5 first (45 / 8) and 11 recent (45 / 4)."""
    found = kept(TaskKV(45, beta=0.5, last=0.5))
    for heads in found.values():
        assert sorted(len(head) for head in heads) == [26, 64]
        short = min(heads, key=len)
        assert short[:5] == list(range(5))
        assert short[-11:] == list(range(53, 64))


def test_what_is_kept_whole_depends_on_the_prompt():
    from sparing.testing import held_positions, random_prompt, run_method, tiny_model

    whole = set()
    for seed in range(6):
        run = run_method(tiny_model("llama"), TaskKV(45, beta=0.5, last=0.5), random_prompt(64, steps=0, seed=seed))
        whole.add(tuple(len(rows[0][0]) for rows in held_positions(run.cache).values()))
    assert len(whole) > 1


def test_a_small_budget_makes_no_head_whole():
    """2 · 20 tokens of 64: a whole head would not fit."""
    assert [len(head) for heads in kept(TaskKV(20, beta=0.5, last=0.5)).values() for head in heads] == [20] * 4


def test_defaults_are_the_papers():
    scorer, allocator = sparing.TaskKV().parts().scorer, sparing.TaskKV().parts().allocator
    assert (scorer.window, scorer.kernel_size, scorer.tokens) == (32, 7, 256)
    assert scorer.protects(10_000) == (16, 256)
    assert (allocator.first, allocator.last) == (0.25, 4 / 32)


@pytest.mark.parametrize(
    ("bad", "name"),
    [({"beta": 1.5}, "first"), ({"last": -1.0}, "last"), ({"window": 0}, "window"), ({"kernel_size": 2}, "kernel_size"),
     ({"tokens": 0}, "tokens"), ({"sinks": -1}, "sinks"), ({"recent": -1}, "recent")],
)  # fmt: skip
def test_refuses(bad, name):
    with pytest.raises(InvalidInputError, match=name):
        TaskKV(0.5, **bad)
