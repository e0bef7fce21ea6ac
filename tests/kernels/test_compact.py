"""Coded tokens against KIVI's formulas in plain loops, and the compact store against plain lists."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from sparing.core.scorer import Softmax
from sparing.kernels import compact
from sparing.kernels.attend import attend, attend_with_rows
from sparing.kernels.coding import decode, encode
from sparing.kernels.compact import CompactStore
from sparing.kernels.ragged import RaggedStore

HEADS, DIM, SCALING = 2, 8, 8**-0.5


@pytest.fixture(autouse=True)
def small_pages(monkeypatch):
    monkeypatch.setattr(compact, "PAGE", 4)
    monkeypatch.setattr(compact, "RECENT", 3)


# -- numbers --------------------------------------------------------------------------------------------------------


def slow(numbers: list[float], bits: int) -> list[float]:
    """What the codes of some numbers stand for, in KIVI's words: zero point, scale, rounding."""
    zero = min(numbers)
    scale = (max(numbers) - zero) / (2**bits - 1)
    return [zero + scale * round((x - zero) / scale) if scale > 0 else zero for x in numbers]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("width", [6, 7])
def test_codes_are_those_of_the_formula_and_err_by_half_a_step(bits, dim, width):
    x = torch.randn(3, 5, width, generator=torch.Generator().manual_seed(bits), dtype=torch.float64)
    codes, scales, zeros = encode(x, dim, bits)
    assert codes.dtype == torch.uint8
    assert codes.shape[-1] == (width if bits == 8 else (width + 1) // 2)
    found = decode(codes, scales, zeros, dim, bits, width)
    moved, decoded = x.movedim(dim, -1), found.movedim(dim, -1)
    for numbers, mine in zip(moved.reshape(-1, moved.shape[-1]), decoded.reshape(-1, moved.shape[-1]), strict=True):
        assert mine.tolist() == pytest.approx(slow(numbers.tolist(), bits), abs=1e-12)
    assert bool(((found - x).abs() <= scales.unsqueeze(dim) / 2 + 1e-15).all())


def test_equal_numbers_are_exact():
    x = torch.full((1, 4, 3), 0.1)
    assert torch.equal(decode(*encode(x, 1, 4), 1, 4, 3), x)


def test_an_outlier_channel_harms_itself_only():
    """Channel 2 is 100 times larger: a scale per token would take the others' 4 bits, a scale per channel does not."""
    keys = torch.rand(1, 16, 4, generator=torch.Generator().manual_seed(0))
    keys[..., 2] *= 100
    others = [0, 1, 3]
    per_channel = decode(*encode(keys, 1, 4), 1, 4, 4)
    per_token = decode(*encode(keys, 2, 4), 2, 4, 4)
    assert float((per_channel - keys)[..., others].abs().max()) <= 1 / 30
    assert float((per_token - keys)[..., others].abs().max()) > 0.3


# -- the store ------------------------------------------------------------------------------------------------------


def fresh(bits: int | None, lengths: list[list[int]], seed: int = 0, bias: bool = False, scored: bool = True):
    """A store, and the keys and values that it was made of, (B, H, N, D) each."""
    g = torch.Generator().manual_seed(seed)
    rows, total = len(lengths), max(max(heads) for heads in lengths)
    keys, values = (torch.randn(rows, HEADS, total, DIM, generator=g, dtype=torch.float64) for _ in range(2))
    kept = [[torch.randperm(total, generator=g)[:n].sort().values for n in heads] for heads in lengths]
    positions = torch.arange(total).expand(rows, HEADS, -1)
    scores, biases = (torch.randn(rows, HEADS, total, generator=g) for _ in range(2))
    store = RaggedStore.pack(kept, keys, values, positions, scores if scored else None, biases if bias else None)
    return CompactStore.pack(store, bits), keys, values


def contents(store: CompactStore) -> list[list[tuple[int, float, float]]]:
    """(position, first key channel, score) of every token of every lane; checks that all views agree."""
    lanes, held = [], store.padded()
    for lane in range(store.rows * store.kv_heads):
        (keys, values), positions = store.lane(lane), store.lane_positions(lane)
        row, head = divmod(lane, store.kv_heads)
        valid = held.valid[row, head]
        assert torch.equal(held.keys[row, head][valid], keys)
        assert torch.equal(held.values[row, head][valid], values)
        assert torch.equal(held.positions[row, head][valid].int(), positions)
        assert int(store.lengths[lane]) == len(positions) == int(valid.sum())
        scores = [0.0] * len(positions) if held.scores is None else held.scores[row, head][valid].tolist()
        lanes.append(sorted(zip(positions.tolist(), keys[:, 0].tolist(), scores, strict=True)))
    return lanes


@pytest.mark.parametrize("seed", range(10))
def test_random_operations_equal_lists(seed):
    """With numbers held as they are, in pages all the same."""
    rng = random.Random(seed)
    store, *_ = fresh(None, [[rng.randint(1, 20) for _ in range(HEADS)] for _ in range(2)], seed)
    lanes, clock = contents(store), 20
    for _ in range(60):
        action = rng.choice(("append", "append", "drop_newest", "drop_one", "select", "rows", "clone", "scores"))
        least = min(map(len, lanes))
        if action == "append":
            count = rng.choice((1, 1, 1, 5, 13))
            new = torch.randn(store.rows, HEADS, count, DIM, dtype=torch.float64)
            store.append(new, new, clock)
            added = new.flatten(0, 1)[..., 0].tolist()
            lanes = [
                lane + [(clock + i, k, 0.0) for i, k in enumerate(ks)] for lane, ks in zip(lanes, added, strict=True)
            ]
            clock += count
        elif action == "drop_newest" and least > 1 and store.croppable > 1:
            newest = [store.lane_positions(i)[-1].item() for i in range(len(lanes))]
            store.drop_newest(1)
            lanes = [[t for t in lane if t[0] != p] for lane, p in zip(lanes, newest, strict=True)]
        elif action == "drop_one" and least > 1:
            some = torch.tensor([rng.random() < 0.7 for _ in lanes])
            victims = torch.tensor([rng.randrange(len(lane)) for lane in lanes])
            gone = [int(store.lane_positions(i)[v]) for i, v in enumerate(victims.tolist())]
            store.drop_one(victims, some)
            lanes = [[t for t in lane if not hit or t[0] != p] for lane, p, hit in zip(lanes, gone, some, strict=True)]
        elif action == "select" and least > 1:
            kept = [[torch.tensor(sorted(rng.sample(range(n), rng.randint(1, n)))) for n in row]
                    for row in store.lengths.view(store.rows, -1).tolist()]  # fmt: skip
            stay = [set(store.lane_positions(i)[s].tolist()) for i, s in enumerate(s for row in kept for s in row)]
            store = store.select(kept, store.bookkeeping().scores)
            lanes = [[t for t in lane if t[0] in mine] for lane, mine in zip(lanes, stay, strict=True)]
        elif action == "rows":
            rows = torch.tensor([rng.randrange(store.rows) for _ in range(rng.randint(1, 3))])
            store.select_rows(rows)
            lanes = [lanes[row * HEADS + head] for row in rows.tolist() for head in range(HEADS)]
        elif action == "clone":
            other, store = store, store.clone()
            other.window.keys.zero_()
            if other.pages is not None:
                other.pages.keys.zero_()
        elif action == "scores":
            known = store.bookkeeping()
            assert known.scores is not None
            store.write_scores(known.scores + 1)
            lanes = [[(p, k, float(torch.tensor(s) + 1)) for p, k, s in lane] for lane in lanes]
        assert contents(store) == [sorted(lane) for lane in lanes]


def test_the_newest_tokens_are_exact_and_the_others_are_codes():
    store, keys, values = fresh(4, [[20, 6]])
    ones = torch.ones(1, 2, 1, DIM, dtype=torch.float64)
    store.append(ones, ones, 20)
    # 20 tokens: 4 whole pages leave 4 in the window; 6 tokens are too few for a page beside the 3 newest.
    assert store.window.lengths.tolist() == [5, 7]
    assert store.pages is not None
    assert store.pages.lanes.tolist() == [0] * 4
    found_keys, found_values = store.lane(0)
    assert torch.equal(found_keys[16:20], keys[0, 0, 16:])
    assert torch.equal(found_values[16:20], values[0, 0, 16:])
    for page in range(4):
        part = slice(4 * page, 4 * page + 4)
        for d in range(DIM):
            assert found_keys[part, d].tolist() == pytest.approx(slow(keys[0, 0, part, d].tolist(), 4), abs=1e-12)
        for t in range(4 * page, 4 * page + 4):
            assert found_values[t].tolist() == pytest.approx(slow(values[0, 0, t].tolist(), 4), abs=1e-12)


def test_what_stays_keeps_its_codes():
    """Dropping 3 of 10 tokens changes nothing for the others, bit for bit: codes of codes would decay."""
    store, *_ = fresh(4, [[30, 30]])
    before = dict(zip(store.lane_positions(0).tolist(), store.lane(0)[0].tolist(), strict=True))
    for _ in range(2):
        kept = [torch.tensor([i for i in range(n) if i % 5 != 1]) for n in store.lengths.tolist()]
        store = store.select([kept], None)
        store.drop_one(torch.tensor([2, 2]), torch.tensor([True, False]))
    after = dict(zip(store.lane_positions(0).tolist(), store.lane(0)[0].tolist(), strict=True))
    assert 10 < len(after) < 25
    assert all(before[p] == row for p, row in after.items())


def test_everything_is_copied_rarely(monkeypatch):
    """Four lanes fill pages at different steps, each into its spare one: everything moves once in a page of tokens."""
    store, *_ = fresh(8, [[40, 41], [42, 43]], scored=False)
    moves = []
    replace_pages = CompactStore._replace_pages
    monkeypatch.setattr(CompactStore, "_replace_pages", lambda *args: (moves.append(1), replace_pages(*args)))
    for step in range(80):
        new = torch.randn(2, HEADS, 1, DIM, dtype=torch.float64)
        store.append(new, new, 43 + step)
    assert len(moves) <= 80 // 4 + 1
    assert store.lengths.tolist() == [120, 121, 122, 123]
    assert store.pages is not None
    # One empty page a lane at most.
    assert int((store.pages.counts == 0).sum()) <= 4


def test_half_empty_pages_are_coded_anew_into_full_ones():
    store, *_ = fresh(8, [[31, 31]])
    assert store.pages is not None
    assert store.pages.counts.tolist() == [4] * 14
    # The first lane keeps every third token; the second keeps all.
    store = store.select([[torch.arange(0, 31, 3), torch.arange(31)]], None)
    assert store.pages is not None
    assert torch.bincount(store.pages.lanes).tolist() == [3, 7]
    assert store.pages.counts[:3].tolist() == [4, 4, 2]


@pytest.mark.parametrize("new", [1, 2, 6])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("extras", [{}, {"softcap": 3.0}, {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])}], ids=str)
def test_attention_is_that_over_what_is_held(new, bias, extras):
    store, *_ = fresh(4, [[20, 9], [3, 14]], bias=bias)
    g = torch.Generator().manual_seed(9)
    fresh_keys = torch.randn(2, HEADS, new, DIM, generator=g, dtype=torch.float64)
    store.append(fresh_keys, fresh_keys, 20)
    query = torch.randn(2, 2 * HEADS, new, DIM, generator=g, dtype=torch.float64)
    softmax = Softmax(SCALING, **extras)
    wanted = torch.zeros(2, 2 * HEADS, new, DIM, dtype=torch.float64)
    for b, h, i in ((b, h, i) for b in range(2) for h in range(2 * HEADS) for i in range(new)):
        lane = b * HEADS + h // 2
        keys, values = store.lane(lane)
        logits = (keys @ query[b, h, i]) * SCALING
        if "softcap" in extras:
            logits = torch.tanh(logits / 3.0) * 3.0
        if bias:
            logits = logits + store.lane_bias(lane)
        logits = logits[: len(logits) - (new - 1 - i)]
        weights = logits.exp()
        total = weights.sum() + (extras["sinks"][h].double().exp() if "sinks" in extras else 0.0)
        wanted[b, h, i] = weights @ values[: len(weights)] / total
    found = attend(query, store, softmax)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)
    with_rows, _ = attend_with_rows(query, store, softmax)
    torch.testing.assert_close(with_rows, wanted, atol=3 * 26 * 2**-24, rtol=0)


@pytest.mark.parametrize("bits", [8, 4])
def test_attention_errs_no_more_than_codes_allow(bits):
    """A logit errs by at most δ = s Σ_d |q_d| s_d / 2, so weights by e^(2δ) - 1 in all, values by half their step."""
    store, keys, values = fresh(bits, [[40, 40]], scored=False)
    query = torch.randn(1, 2 * HEADS, 1, DIM, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    exact = RaggedStore.pack([[torch.arange(40)] * 2], keys, values, torch.arange(40).expand(1, 2, -1), None)
    found, wanted = (attend(query, s, Softmax(SCALING)) for s in (store, exact))
    assert store.pages is not None
    for head in range(2 * HEADS):
        mine = store.pages.lanes == head // 2
        steps, value_steps = store.pages.key_scales[mine], store.pages.value_scales[mine]
        delta = float((steps @ query[0, head, 0].abs()).max()) * SCALING / 2
        bound = float(torch.tensor(2 * delta).expm1() * values[0, head // 2].abs().max() + value_steps.max() / 2)
        error = float((found - wanted)[0, head].abs().max())
        assert 0 < error <= bound
        assert bits == 4 or bound < 0.2  # it says something


def test_what_has_become_codes_cannot_be_cropped():
    store, *_ = fresh(8, [[20, 6]])
    assert store.croppable == 4
    store.drop_newest(4)
    with pytest.raises(AssertionError):
        store.drop_newest(1)


def test_bytes_are_those_of_the_buffers():
    store, *_ = fresh(4, [[31, 20]])

    def tensors(owner: object) -> list[Tensor]:
        found = [value for value in vars(owner).values() if isinstance(value, Tensor)]
        return found + [t for v in vars(owner).values() if hasattr(v, "__dataclass_fields__") for t in tensors(v)]

    assert store.nbytes == sum(t.untyped_storage().nbytes() for t in tensors(store))
