"""ActQKV: the probe, the blocks it asks for, and layers paid by density."""

import math

import pytest
import torch
from oracles import EPS, PlainRotary, build, random_case

from methods.reading import best_of_blocks, decode, prompt_state, stored_until
from sparing.core.token_scores import TokenScores
from sparing.errors import InvalidInputError
from sparing.methods.kv.actqkv import ActQKV, InformationDensity, ProbeQuery, probe

PADS, ROTARY = (0, 3, 7), PlainRotary(8)


def probed(queries):
    """The probe of a list of float64 queries, a number at a time."""
    count, dim = len(queries), len(queries[0])
    mean = [sum(q[c] for q in queries) / count for c in range(dim)]
    var = [sum((q[c] - mean[c]) ** 2 for q in queries) / count for c in range(dim)]
    bias = [sum((q[c] - mean[c]) ** 2 / var[c] if var[c] else 0.0 for c in range(dim)) / dim for q in queries]
    total = sum(math.exp(b) for b in bias)
    return [sum(math.exp(b) / total * q[c] for b, q in zip(bias, queries, strict=True)) for c in range(dim)]


def block_scores(case, row, head, tokens, window, size):
    """Mean over the group of probe · mean key, of every block, before rotation."""
    pad = PADS[row]
    back = {slot: ROTARY.matrix(slot - pad).T for slot in range(pad, tokens)}
    last = range(max(tokens - window, pad), tokens)
    scores = []
    for start in range(pad, tokens, size):
        inside = range(start, min(start + size, tokens))
        mean = sum(back[s] @ case.stored.keys[row, head, s].double() for s in inside) / len(inside)
        found = [
            torch.tensor(probed([(back[s] @ case.queries.states[row, h, s].double()).tolist() for s in last])).double()
            for h in (2 * head, 2 * head + 1)
        ]
        scores.append(sum(float(p.double() @ mean) for p in found) / 2)
    return scores


def test_reads_what_the_equation_says():
    case = random_case(seed=1, tokens=30, rotary=ROTARY)
    compared = 0
    for read in decode(ProbeQuery(window=5, block=4), case, prompt=25, count=13, sizes=(9, 1, 15)):
        tokens = read.step.stored.keys.shape[2]
        for row, pad in enumerate(PADS):
            full = (tokens - pad) // 4
            for head in range(2):
                scores = block_scores(case, row, head, tokens, 5, 4)
                scores[full - 1], scores[0], scores[-1] = 1e9, 2e9, 3e9
                assert read.slots(row, head) == best_of_blocks(scores, 4, tokens, pad, 13)
                compared += 1
    assert compared == 30


def test_scores_are_the_attention_of_the_probe_to_blocks():
    case, reader = random_case(seed=2, tokens=19, rotary=ROTARY), ProbeQuery(window=6, block=4)
    scores = reader.score(prompt_state(reader, case, 19, (19,)), stored_until(case, 19))
    for row, pad in enumerate(PADS):
        for head in range(2):
            raw = [x * 8**-0.5 for x in block_scores(case, row, head, 19, 6, 4)]
            mass = [math.exp(x) / sum(math.exp(y) for y in raw) for x in raw]
            for slot in range(pad, 19):
                block = (slot - pad) // 4
                length = min(4, 19 - pad - 4 * block)
                assert float(scores[row, head, slot]) == pytest.approx(mass[block] / length, abs=2**12 * EPS)
    assert torch.allclose(scores.sum(-1), torch.ones(3, 2))


def test_an_outlier_is_the_probe_and_equal_queries_are_their_own():
    real = torch.ones(1, 24, dtype=torch.bool)
    equal = torch.full((1, 1, 24, 4), 0.3)
    torch.testing.assert_close(probe(equal, real), equal[:, :, 0])
    odd = equal.clone()
    odd[0, 0, 11] = torch.tensor([5.0, -4.0, 3.0, -2.0])
    # b is 23 for the outlier and 1/23 for the others.
    torch.testing.assert_close(probe(odd, real), odd[:, :, 11], atol=24 * 10 * math.exp(1 / 23 - 23), rtol=1e-6)


def test_pads_are_in_no_probe():
    window = torch.randn(1, 1, 6, 4, generator=torch.Generator().manual_seed(0))
    poisoned = torch.cat([torch.full((1, 1, 3, 4), torch.nan), window], dim=2)
    real = torch.tensor([[False] * 3 + [True] * 6])
    torch.testing.assert_close(probe(poisoned, real), probe(window, torch.ones(1, 6, dtype=torch.bool)))


def test_planted_block_is_read():
    keys, queries = torch.zeros(1, 1, 41, 8), torch.zeros(1, 1, 41, 8)
    keys[0, 0, 20:24, 3] = queries[..., 3] = 2.0
    read = decode(ProbeQuery(window=4, block=4), build(queries, keys), prompt=40, count=13)[0]
    assert read.slots(0, 0) == [0, 1, 2, 3, 20, 21, 22, 23, 36, 37, 38, 39, 40]


def test_growing_is_rebuilding():
    case, reader = random_case(seed=3, tokens=24, rotary=ROTARY), ProbeQuery(window=4, block=5)
    for read in decode(reader, case, prompt=13, count=2):
        fresh = reader._covering({"window": read.state["window"]}, read.step.stored)
        torch.testing.assert_close(read.state["sums"], fresh["sums"], atol=2**8 * EPS, rtol=0)


def layers(*masses):
    values = [torch.tensor(mass).expand(2, 3, -1) for mass in masses]
    valid = torch.ones(2, 3, len(masses[0]), dtype=torch.bool)
    return [TokenScores(v, valid, torch.zeros_like(valid, dtype=torch.int64)) for v in values]


def test_layers_are_paid_by_density():
    """Entropies ln 8, ln 2 and 0 over ln 8: densities 1, 1/3, 0. Heads get at least 1, at most 8, else 3 : 1."""
    even, two, one = [1 / 8] * 8, [0.5, 0.5] + [0.0] * 6, [1.0] + [0.0] * 7
    counts = InformationDensity(least=1).allocate(layers(even, two, one), [4, 2])
    assert [int(c[0].sum()) for c in counts] == [24, 9, 3]
    for row, total in ((0, 36), (1, 18)):
        assert sum(int(c[row].sum()) for c in counts) == total
    spread = InformationDensity(least=3).allocate(layers(even, two, one), [4, 2])
    assert min(int(c[0].min()) for c in spread) == 3
    assert [c[1].tolist() for c in spread] == [[2, 2, 2]] * 3  # not even the least is there: even


def test_equal_densities_are_equal_budgets():
    counts = InformationDensity().allocate(layers([0.25] * 4, [0.25] * 4), [3, 4])
    assert [c.tolist() for c in counts] == [[[3] * 3, [4] * 3]] * 2


def test_enough_room_is_dense_and_a_crop_keeps_what_is_left_of_the_window():
    case, reader = random_case(seed=4, tokens=20, rotary=ROTARY), ProbeQuery(window=4, block=4)
    reads = decode(reader, case, prompt=18, count=20)
    assert all(read.choice.slots is None for read in reads)
    state = reads[-1].state
    assert torch.equal(reader.crop(state, 18)["window"], state["window"][:, :, :2])
    assert reader.crop(state, 16) is None


def test_the_defaults_and_what_is_refused():
    parts = ActQKV().parts()
    assert parts.reader == ProbeQuery(32, 32)
    assert parts.allocator == InformationDensity(32)
    for bad in ({"window": 0}, {"block": 0}):
        with pytest.raises(InvalidInputError, match=next(iter(bad))):
            ActQKV(**bad)
