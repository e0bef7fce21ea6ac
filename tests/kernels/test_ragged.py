"""The ragged store against plain lists, under random operations."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from sparing.kernels.ragged import RaggedStore

HEADS, DIM = 2, 3
Lane = list[tuple[float, int]]


def contents(store: RaggedStore) -> list[Lane]:
    """(first key channel, position) of every token of every lane, in any order; checks that buffers agree."""
    lanes = []
    for index, (start, length) in enumerate(store.spans):
        keys, values = store.lane(index)
        assert torch.equal(keys[:, 0], -values[:, 0])
        positions = store.positions[start : start + length].tolist()
        lanes.append(sorted(zip(keys[:, 0].tolist(), positions, strict=True)))
    return lanes


def tokens(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (B, H, q, D) whose channels all hold the token's number, and minus it."""
    keys = numbers[..., None].expand(*numbers.shape, DIM).clone()
    return keys, -keys


def fresh(rng: random.Random, lengths: list[list[int]]) -> tuple[RaggedStore, list[Lane]]:
    rows, total = len(lengths), 12
    numbers = torch.tensor([[[rng.random() for _ in range(total)] for _ in range(HEADS)] for _ in range(rows)])
    kept = [[torch.tensor(sorted(rng.sample(range(total), n))) for n in heads] for heads in lengths]
    positions = torch.arange(total).expand(rows, HEADS, -1)
    store = RaggedStore.pack(kept, *tokens(numbers), positions, numbers.clone())
    lanes = [
        sorted((float(numbers[r, h, i]), int(i)) for i in kept[r][h].tolist())
        for r in range(rows)
        for h in range(HEADS)
    ]
    return store, lanes


def append(rng: random.Random, store: RaggedStore, lanes: list[Lane], clock: int) -> tuple[list[Lane], int]:
    count = rng.choice((1, 1, 1, 3, 40))
    numbers = torch.tensor([[[rng.random() for _ in range(count)] for _ in range(HEADS)] for _ in range(store.rows)])
    store.append(*tokens(numbers), clock)
    added = numbers.flatten(0, 1).tolist()
    return [
        sorted(lane + [(number, clock + i) for i, number in enumerate(new)])
        for lane, new in zip(lanes, added, strict=True)
    ], clock + count


@pytest.mark.parametrize("seed", range(12))
def test_random_operations_equal_lists(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [[5, 5], [5, 5]] if seed % 3 == 0 else [[rng.randint(1, 12) for _ in range(HEADS)] for _ in range(2)]
    store, lanes = fresh(rng, lengths)
    clock = 12
    for _ in range(40):
        action = rng.choice(("append", "append", "drop_newest", "drop_one", "select_rows", "clone"))
        if action == "append":
            lanes, clock = append(rng, store, lanes, clock)
        elif action == "drop_newest" and min(map(len, lanes)) > 1:
            before = [store.lane(i)[0][-1, 0].item() for i in range(len(lanes))]
            store.drop_newest(1)
            lanes = [[t for t in lane if t[0] != gone] for lane, gone in zip(lanes, before, strict=True)]
        elif action == "drop_one" and min(map(len, lanes)) > 1:
            some = torch.tensor([rng.random() < 0.7 for _ in lanes])
            victims = torch.tensor([rng.randrange(len(lane)) for lane in lanes])
            gone = [store.lane(i)[0][int(v), 0].item() for i, v in enumerate(victims)]
            store.drop_one(victims, some)
            lanes = [[t for t in lane if not hit or t[0] != g] for lane, g, hit in zip(lanes, gone, some, strict=True)]
        elif action == "select_rows":
            rows = torch.tensor([rng.randrange(store.rows) for _ in range(rng.randint(1, 3))])
            store.select_rows(rows)
            lanes = [lanes[row * HEADS + head] for row in rows.tolist() for head in range(HEADS)]
        elif action == "clone":
            other = store
            store = store.clone()
            other.keys.zero_()
        assert contents(store) == lanes


def test_even_lanes_are_seen_as_one_tensor() -> None:
    store, _ = fresh(random.Random(0), [[4, 4], [4, 4]])
    assert store.even == 4
    keys, values = store.stacked()
    assert keys.shape == values.shape == (2, HEADS, 4, DIM)
    assert torch.equal(keys[1, 0], store.lane(2)[0])


def test_uneven_lanes_are_not() -> None:
    store, _ = fresh(random.Random(0), [[4, 5]])
    assert store.even is None


def test_padded_marks_what_is_there() -> None:
    store, lanes = fresh(random.Random(1), [[2, 5]])
    held = store.padded()
    keys, valid, positions, scores = held.keys, held.valid, held.positions, held.scores
    assert valid.sum(-1).tolist() == [[2, 5]]
    assert scores is not None
    for head, lane in enumerate(lanes):
        held = sorted(
            zip(keys[0, head, valid[0, head], 0].tolist(), positions[0, head, valid[0, head]].tolist(), strict=True)
        )
        assert held == lane
        assert torch.equal(scores[0, head, valid[0, head]], keys[0, head, valid[0, head], 0])


def test_bytes_are_those_of_the_buffers() -> None:
    store, _ = fresh(random.Random(2), [[3, 9]])
    tensors = [value for value in vars(store).values() if isinstance(value, Tensor)]
    assert store.nbytes == sum(t.untyped_storage().nbytes() for t in tensors)


@pytest.mark.parametrize("seed", range(4))
def test_selected_tokens_stay_with_their_scores(seed: int) -> None:
    rng = random.Random(seed)
    store, lanes = fresh(rng, [[7, 12], [3, 9]])
    kept = [[torch.tensor(sorted(rng.sample(range(n), rng.randint(1, n)))) for n in (7, 12)],
            [torch.tensor(sorted(rng.sample(range(n), rng.randint(1, n)))) for n in (3, 9)]]  # fmt: skip
    known = store.bookkeeping()
    assert known.scores is not None
    assert known.keys.numel() == 0
    chosen = store.select(kept, known.scores + 1)
    slots = [lane for row in kept for lane in row]
    for index, lane in enumerate(slots):
        assert torch.equal(chosen.lane(index)[0], store.lane(index)[0][lane])
        assert torch.equal(chosen.lane_positions(index), store.lane_positions(index)[lane])
        scores = chosen.lane_of("scores", index)
        assert scores is not None
        assert torch.equal(scores, store.lane(index)[0][lane, 0] + 1)
    assert store.select(kept, None).scores is None
    store.write_scores(known.scores + 2)
    again = store.bookkeeping().scores
    assert again is not None
    assert torch.equal(again[known.valid], (known.scores + 2)[known.valid])
    assert contents(store) == lanes
