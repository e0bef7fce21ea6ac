"""Budgets of pairs: never exceeded, used up, spread as each allocator says."""

import pytest
import torch
from torch.nn import functional as F

from sparing.core.allocate_blocks import AllRows, BlockBudget, EqualRows, TopMass, as_mass, mass_of_better
from sparing.core.pattern import Pattern
from sparing.errors import InvalidInputError

ALLOCATORS = [EqualRows(), AllRows(), TopMass()]


def budget(tokens=160, start=0, heads=3, share=0.5, first=1):
    blocks = -(-tokens // 16)
    grid = Pattern(tokens, start, 16, torch.zeros(heads, blocks - start // 16, blocks, dtype=torch.bool))
    forced = grid.blocks | ((torch.arange(blocks) < first) & grid.reachable())
    whole = Pattern(tokens, 0, 16, torch.zeros(1, blocks, blocks, dtype=torch.bool))
    edges = torch.arange(blocks + 1).mul(16).clamp_max(tokens).double()
    taken = ((torch.arange(blocks) < first) | torch.eye(blocks, dtype=torch.bool)) * whole.areas()
    free = (share * (edges * (edges + 1) / 2).diff() - taken.sum(-1)) / whole.areas().amax(-1)
    return BlockBudget(
        grid.areas(), grid.reachable(), forced, int(share * grid.all_pairs()), F.pad(free.cumsum(0), (1, 0))
    )


def scores(b, seed=0):
    return torch.randn(b.forced.shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("share", [0.05, 0.3, 0.55, 0.9, 1.0])
@pytest.mark.parametrize(("tokens", "start"), [(160, 0), (150, 0), (150, 70)])
@pytest.mark.parametrize("allocator", ALLOCATORS, ids=lambda a: type(a).__name__)
def test_the_budget_is_used_up_and_never_exceeded(allocator, tokens, start, share):
    b = budget(tokens, start, share=share)
    on = allocator.allocate(scores(b), b, is_mass=False)
    assert not bool((on & ~b.reachable).any())
    assert bool((on | ~b.forced).all())
    spent, forced = int((on * b.areas).sum()), int((b.forced * b.areas).sum())
    total = 3 * b.pairs
    assert spent <= max(total, forced)
    if not bool(on[:, b.reachable].all()):
        # Less than a block of each head is left, or nothing could be chosen.
        assert total - spent < 3 * 256 or spent == forced


def test_equal_rows_give_every_row_its_share_and_its_best():
    b = budget(tokens=640, share=0.5)
    values = scores(b)
    on = EqualRows().allocate(values, b, is_mass=False)
    read = (on * b.areas).sum(-1) / b.areas.sum(-1)
    assert float((read[:, 8:] - 0.5).abs().max()) < 1.5 * 16 / (9 * 16)
    for head in range(3):
        for row in range(40):
            free = b.free[head, row]
            chosen = on[head, row] & free
            if chosen.any() and (free & ~chosen).any():
                assert values[head, row][chosen].min() >= values[head, row][free & ~chosen].max()


def test_all_rows_take_the_best_wherever_they_are():
    b = budget(share=0.4)
    mass = as_mass(scores(b).exp(), b.reachable, True)
    on = AllRows().allocate(scores(b).exp(), b, is_mass=True)
    full = b.free & (b.areas == 256)
    assert mass[on & full].min() >= mass[full & ~on].max()


def test_top_mass_by_hand():
    """One head, one row of four blocks of mass .5, .3, .15, .05: the second crosses .6, and is taken."""
    areas = torch.full((1, 4), 256)
    b = BlockBudget(areas, areas > 0, torch.zeros(1, 1, 4, dtype=torch.bool), 4 * 256)
    mass = torch.tensor([[[0.15, 0.5, 0.05, 0.3]]])
    assert torch.allclose(mass_of_better(mass, b.forced), torch.tensor([[[0.8, 0.0, 0.95, 0.5]]]))
    chosen = {m: TopMass(m).allocate(mass, b, is_mass=True)[0, 0].tolist() for m in (0.4, 0.6, 0.81, 1.0)}
    assert chosen[0.4] == [False, True, False, False]
    assert chosen[0.6] == [False, True, False, True]
    assert chosen[0.81] == [True, True, False, True]
    assert chosen[1.0] == [True, True, True, True]
    tight = BlockBudget(areas, areas > 0, b.forced, 2 * 256)
    assert TopMass(1.0).allocate(mass, tight, is_mass=True)[0, 0].tolist() == [False, True, False, True]


def test_forced_blocks_count_toward_the_mass():
    areas = torch.full((1, 3), 256)
    forced = torch.tensor([[[True, False, False]]])
    b = BlockBudget(areas, areas > 0, forced, 3 * 256)
    on = TopMass(0.5).allocate(torch.tensor([[[0.6, 0.3, 0.1]]]), b, is_mass=True)
    assert on[0, 0].tolist() == [True, False, False]


def test_top_mass_gives_the_flat_head_more():
    """At one budget, a head whose mass is spread out reads more than one that is peaked."""
    b = budget(tokens=640, heads=2, share=0.4)
    peaked = torch.zeros(40, 40)
    peaked[:, 1] = 1.0
    on = TopMass().allocate(torch.stack([peaked + 1e-6, torch.ones(40, 40)]), b, is_mass=True)
    assert int(on[1].sum()) > 2 * int(on[0].sum())


@pytest.mark.parametrize("mass", [0.0, -1.0, 1.5])
def test_shares_that_are_none_are_refused(mass):
    with pytest.raises(InvalidInputError, match=r"TopMass\.mass"):
        TopMass(mass)
