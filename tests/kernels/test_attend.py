"""Attention over ragged lanes against dense attention with the dropped keys at minus infinity, in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from sparing.core.scorer import Softmax
from sparing.kernels import attend as attend_module
from sparing.kernels.attend import attend, attend_with_rows
from sparing.kernels.ragged import RaggedStore
from sparing.kernels.reference import dense_with_dropped_keys

HEADS, GROUPS, DIM, TOKENS = 2, 2, 8, 20
EVEN = [[6, 6], [6, 6]]
UNEVEN = [[1, 9], [4, 13]]


def case(lengths: list[list[int]], new: int, seed: int = 0) -> tuple[Tensor, RaggedStore, Tensor, Tensor, Tensor]:
    """Queries, a store that kept `lengths` of the old tokens and appended `new`, and the dense keys, values, keep."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows = len(lengths)
    keys, values = draw(rows, HEADS, TOKENS + new, DIM), draw(rows, HEADS, TOKENS + new, DIM)
    kept = [[torch.randperm(TOKENS, generator=generator)[:n].sort().values for n in per_head] for per_head in lengths]
    positions = torch.arange(TOKENS).expand(rows, HEADS, -1)
    store = RaggedStore.pack(kept, keys[:, :, :TOKENS], values[:, :, :TOKENS], positions, None)
    poison(store)
    store.append(keys[:, :, TOKENS:], values[:, :, TOKENS:], TOKENS)
    keep = torch.zeros(rows, HEADS, TOKENS + new, dtype=torch.bool)
    keep[:, :, TOKENS:] = True
    for row, head in itertools.product(range(rows), range(HEADS)):
        keep[row, head, kept[row][head]] = True
    return draw(rows, HEADS * GROUPS, new, DIM), store, keys, values, keep


def poison(store: RaggedStore) -> None:
    """Fill the slack with NaN: what is not stored must never be read."""
    empty = torch.ones(store.keys.shape[0], dtype=torch.bool)
    for start, length in store.spans:
        empty[start : start + length] = False
    store.keys[empty] = store.values[empty] = torch.nan


@pytest.mark.parametrize("lengths", [EVEN, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("new", [1, 2, 7])
@pytest.mark.parametrize("extras", [{}, {"softcap": 3.0}, {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])}])
def test_attend_equals_the_reference(lengths: list[list[int]], new: int, extras: dict[str, object]) -> None:
    query, store, keys, values, keep = case(lengths, new)
    softmax = Softmax(DIM**-0.5, **extras)  # type: ignore[arg-type]
    expected = dense_with_dropped_keys(query, keys, values, keep, DIM**-0.5, **extras)  # type: ignore[arg-type]
    # With a softcap or sinks the probabilities are float32: n terms of relative error 2^-24 around values of size ~3.
    tolerance = 1e-12 if not extras else 3 * (TOKENS + new) * 2**-24
    assert torch.allclose(attend(query, store, softmax), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("lengths", [EVEN, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("new", [1, 5])
def test_rows_are_the_probabilities_behind_the_output(lengths: list[list[int]], new: int) -> None:
    query, store, keys, values, keep = case(lengths, new)
    out, rows = attend_with_rows(query, store, Softmax(DIM**-0.5))
    expected = dense_with_dropped_keys(query, keys, values, keep, DIM**-0.5)
    assert torch.allclose(out, expected, atol=3 * (TOKENS + new) * 2**-24, rtol=0)
    assert rows.shape[:4] == (len(lengths), HEADS, GROUPS, new)
    assert torch.allclose(rows.sum(-1), torch.ones(()), atol=1e-6)
    for (row, head), length in zip(itertools.product(range(len(lengths)), range(HEADS)), store.lengths, strict=True):
        assert not rows[row, head, :, :, int(length) :].any()


@pytest.mark.parametrize("lengths", [EVEN, UNEVEN], ids=["even", "uneven"])
def test_a_long_turn_in_tiles_equals_one_call(lengths: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    query, store, *_ = case(lengths, new=11)
    whole = attend(query, store, Softmax(DIM**-0.5))
    monkeypatch.setattr(attend_module, "ROWS", 4)
    assert torch.allclose(attend(query, store, Softmax(DIM**-0.5)), whole, atol=1e-12, rtol=0)


def test_a_wrong_slot_is_noticed() -> None:
    query, store, keys, values, keep = case(UNEVEN, new=1)
    keep[1, 1] = keep[1, 1].roll(1)
    expected = dense_with_dropped_keys(query, keys, values, keep, DIM**-0.5)
    assert not torch.allclose(attend(query, store, Softmax(DIM**-0.5)), expected, atol=1e-6)
