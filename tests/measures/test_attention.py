"""Tiled attention rows and column sums against dense float64 softmax, and proof that no map is ever held."""

import dataclasses

import pytest
import torch
from oracles import attention_error, build, dense_attention, random_case
from torch.utils._python_dispatch import TorchDispatchMode

from sparing.core.scorer import Softmax
from sparing.measures import attention
from sparing.measures.attention import attention_mass, column_mass, window_rows

SOFTMAXES = {
    "plain": Softmax(8**-0.5),
    "scaled": Softmax(0.11),
    "softcap": Softmax(8**-0.5, softcap=1.3),
    "sinks": Softmax(8**-0.5, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0])),
    "both": Softmax(8**-0.5, softcap=2.0, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0])),
}


def dense(case) -> torch.Tensor:
    """(B, Hq, N) float64: the sum over the rows that are no pads."""
    rows = torch.tensor(dense_attention(case.queries, case.stored), dtype=torch.float64)
    return (rows * case.queries.valid[:, None, :, None]).sum(2)


def assert_equals_dense(case):
    torch.testing.assert_close(
        column_mass(case.queries, case.stored).double(), dense(case), atol=attention_error(case, 13), rtol=0
    )


@pytest.fixture(params=[(128, 2**24), (1, 2**24), (5, 2**24), (128, 200)], ids=["default", "1", "5", "elements"])
def tile(request, monkeypatch):
    """Tile heights: 128 rows, 1 row, 5 rows, and one row because of the limit on elements."""
    monkeypatch.setattr(attention, "ROWS_PER_TILE", request.param[0])
    monkeypatch.setattr(attention, "ELEMENTS_PER_TILE", request.param[1])


@pytest.mark.parametrize("softmax", SOFTMAXES.values(), ids=SOFTMAXES)
def test_column_mass_equals_dense(softmax, tile):
    assert_equals_dense(random_case(seed=40, softmax=softmax))


def test_column_mass_of_a_chunk_in_the_middle(tile):
    """Rows 4 to 8 of 13, all keys stored: the later ones are in every row's future."""
    case = random_case(seed=41)
    queries, _ = list(case.chunks([4, 5, 4]))[1]
    middle = dataclasses.replace(case, queries=queries)
    assert_equals_dense(middle)
    assert float(column_mass(queries, case.stored)[..., 9:].abs().max()) == 0.0


def test_ragged_lanes_and_unsorted_positions(tile):
    """As after an eviction: lanes of different lengths, positions of each in an order of their own."""
    case = random_case(seed=42)
    generator = torch.Generator().manual_seed(0)
    positions = torch.stack([torch.randperm(13, generator=generator) for _ in range(6)]).view(3, 2, 13)
    lengths = torch.tensor([[13, 4], [9, 1], [6, 11]])
    valid = (torch.arange(13) < lengths[..., None]) & (positions >= case.stored.pads[:, None, None])
    assert_equals_dense(
        dataclasses.replace(case, stored=dataclasses.replace(case.stored, valid=valid, positions=positions))
    )


@pytest.mark.parametrize("group", [1, 4])
def test_other_groupings(group):
    assert_equals_dense(random_case(seed=43, group=group))


def test_attention_mass_is_the_mean_over_the_real_rows():
    case = random_case(seed=44)
    expected = dense(case) / torch.tensor([13, 10, 6])[:, None, None]
    mass = attention_mass(case.queries, case.stored)
    torch.testing.assert_close(mass.double(), expected, atol=attention_error(case), rtol=0)
    torch.testing.assert_close(mass.sum(-1), torch.ones(3, 4), atol=1e-5, rtol=0)


def test_sinks_take_their_share():
    """Equal logits 0 and a sink of 0: row i of n = 4 gives each key 1/(i + 2)."""
    softmax = Softmax(1.0, sinks=torch.zeros(1))
    case = build(torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2), softmax=softmax)
    expected = torch.tensor([1 / 2 + 1 / 3 + 1 / 4 + 1 / 5, 1 / 3 + 1 / 4 + 1 / 5, 1 / 4 + 1 / 5, 1 / 5])
    torch.testing.assert_close(column_mass(case.queries, case.stored)[0, 0], expected)


def test_rows_that_see_nothing_are_zero():
    """A lane without a single valid key gives 0, not nan."""
    case = random_case(seed=45)
    stored = dataclasses.replace(case.stored, valid=torch.zeros_like(case.stored.valid))
    assert float(column_mass(case.queries, stored).abs().max()) == 0.0


def test_moving_all_keys_changes_nothing():
    """A vector added to every key adds the same to all logits of a row."""
    case = random_case(seed=46)
    moved = dataclasses.replace(case, stored=dataclasses.replace(case.stored, keys=case.stored.keys + 2.0))
    error = attention_error(case, 13) + attention_error(moved, 13)
    torch.testing.assert_close(
        column_mass(case.queries, case.stored), column_mass(moved.queries, moved.stored), atol=error, rtol=0
    )


def test_a_nan_in_a_real_query_is_not_hidden():
    case = random_case(seed=47)
    case.queries.states[0, 0, 5] = float("nan")
    assert bool(column_mass(case.queries, case.stored)[0, 0].isnan().any())


class LargestTensor(TorchDispatchMode):
    """Notes the most elements that any result of any operation has."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(item, torch.Tensor):
                self.largest = max(self.largest, item.numel())
        return result


def largest(work) -> int:
    with LargestTensor() as mode:
        work()
    return mode.largest


def test_the_map_is_never_held(monkeypatch):
    """600 tokens and tiles of 8 rows: nothing larger than Hq x 8 x N, or the keys themselves."""
    monkeypatch.setattr(attention, "ROWS_PER_TILE", 8)
    keys = torch.randn(1, 1, 600, 4, generator=torch.Generator().manual_seed(48))
    case = build(keys.repeat(1, 2, 1, 1), keys)
    assert largest(lambda: column_mass(case.queries, case.stored)) <= 2 * 8 * 600
    assert largest(lambda: attention_mass(case.queries, case.stored)) <= 2 * 8 * 600
    assert largest(lambda: keys[0, 0] @ keys[0, 0].T) == 600 * 600  # the meter sees a map when there is one


def test_the_limit_on_elements_narrows_the_tiles(monkeypatch):
    monkeypatch.setattr(attention, "ELEMENTS_PER_TILE", 3 * 2 * 600)
    keys = torch.randn(1, 1, 600, 4, generator=torch.Generator().manual_seed(49))
    case = build(keys.repeat(1, 2, 1, 1), keys)
    assert largest(lambda: column_mass(case.queries, case.stored)) <= 3 * 2 * 600


@pytest.mark.parametrize("window", [1, 4, 7, 20])
@pytest.mark.parametrize("sizes", [[13], [1] * 13, [2, 9, 2], [12, 1]], ids=str)
def test_window_rows_are_the_last_rows_in_any_chunks(window, sizes):
    case = random_case(seed=50)
    state = None
    for queries, _ in case.chunks(sizes):
        state = window_rows(state, queries, window)
    last = slice(max(13 - window, 0), 13)
    assert torch.equal(state.states, case.queries.states[:, :, last])
    assert torch.equal(state.positions, case.queries.positions[last])
    assert torch.equal(state.valid, case.queries.valid[:, last])


def test_window_rows_do_not_keep_the_prompt_alive():
    state = window_rows(None, random_case(seed=51).queries, 2)
    assert state.states.untyped_storage().nbytes() == state.states.numel() * 4


def test_tiles_of_pads_only(monkeypatch):
    """All rows padded to a multiple: the first tile sees nothing at all."""
    monkeypatch.setattr(attention, "ROWS_PER_TILE", 2)
    case = random_case(seed=52)
    pads = torch.tensor([4, 5, 9])
    valid = torch.arange(13) >= pads[:, None]
    stored = dataclasses.replace(case.stored, pads=pads, valid=valid[:, None].expand(3, 2, 13))
    assert_equals_dense(
        dataclasses.replace(case, stored=stored, queries=dataclasses.replace(case.queries, valid=valid))
    )


def test_rows_that_are_not_valid_do_not_count():
    """Wherever they are: here row 6 of 13 in every sequence."""
    case = random_case(seed=53)
    valid = case.queries.valid.clone()
    valid[:, 6] = False
    assert_equals_dense(dataclasses.replace(case, queries=dataclasses.replace(case.queries, valid=valid)))
