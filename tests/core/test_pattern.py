"""Patterns: what is read, counted pair by pair, and how parts are merged."""

import pytest
import torch

from sparing.core.pattern import Partial, Pattern, merged
from sparing.errors import InvalidInputError


def pattern(tokens=50, start=0, size=16, share=0.4, groups=None, heads=3, seed=0, **more):
    g = torch.Generator().manual_seed(seed)
    blocks = -(-tokens // size)
    on = torch.rand(heads, blocks - start // size, blocks, generator=g) < share
    columns = None
    if groups is not None:
        number = (blocks - 1) // groups - start // size // groups + 1
        columns = torch.rand(heads, number, tokens, generator=g) < 0.2
    return Pattern(tokens, start, size, on, columns, groups, **more)


def by_hand(p, head, row, key):
    """What a row reads, from the definition alone."""
    if p.is_causal and key > row:
        return False
    if p.rule is not None and not bool(p.rule(torch.tensor(row), torch.tensor(key))):
        return False
    i, j = row // p.size, key // p.size
    if i == j or bool(p.blocks[head, i - p.first_block, j]):
        return True
    if p.columns is None or key >= i * p.size:
        return False
    group = 0 if p.blocks_per_group is None else i // p.blocks_per_group - p.first_block // p.blocks_per_group
    return bool(p.columns[head, group, key])


CASES = {
    "blocks": {},
    "columns": {"groups": 100},
    "columns by groups": {"groups": 2, "tokens": 90},
    "later rows": {"start": 37, "tokens": 90, "groups": 2},
    "last row": {"start": 49},
    "both directions": {"is_causal": False},
    "rule": {"rule": lambda row, key: row - key < 20},
}


@pytest.mark.parametrize("case", CASES)
def test_rows_read_what_the_definition_says(case):
    p = pattern(**CASES[case])
    rows = torch.arange(p.start, p.tokens)
    total = []
    for head in range(p.heads):
        wanted = torch.tensor([[by_hand(p, head, row, key) for key in range(p.tokens)] for row in rows.tolist()])
        assert torch.equal(p.may_read(head, rows), wanted)
        total.append(int(wanted.sum()))
    assert p.pairs().tolist() == total
    everything = p.rows * p.tokens if not p.is_causal else int((torch.arange(p.start, p.tokens) + 1).sum())
    assert p.all_pairs() == everything
    assert torch.equal(p.density(), torch.tensor(total).double() / everything)


def test_a_row_always_reads_itself_and_never_its_future():
    off = Pattern(40, 0, 16, torch.zeros(1, 3, 3, dtype=torch.bool))
    assert off.may_read(0, torch.arange(40)).diagonal().all()
    everything = Pattern(40, 0, 16, torch.ones(1, 3, 3, dtype=torch.bool))
    assert not everything.may_read(0, torch.arange(40)).triu(1).any()
    assert everything.density().tolist() == [1.0]


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"tokens": 40, "start": 40, "size": 16, "blocks": torch.ones(1, 1, 3).bool()}, "start"),
        ({"tokens": 40, "start": 0, "size": 16, "blocks": torch.ones(1, 2, 3).bool()}, "blocks"),
        ({"tokens": 40, "start": 0, "size": 16, "blocks": torch.ones(1, 3, 3).bool(),
          "columns": torch.ones(1, 2, 40).bool()}, "columns"),
    ],
)  # fmt: skip
def test_wrong_shapes_are_refused(fields, what):
    with pytest.raises(InvalidInputError, match=what):
        Pattern(**fields)


def test_merged_parts_are_the_softmax_over_both():
    g = torch.Generator().manual_seed(0)
    logits, values = torch.randn(2, 5, 12, generator=g).double() * 20, torch.randn(2, 12, 4, generator=g).double()

    def part(keys):
        mine = logits[..., keys]
        return Partial(mine.softmax(-1) @ values[:, keys], mine.logsumexp(-1))

    both = merged(part(slice(0, 3)), part(slice(3, 12)))
    torch.testing.assert_close(both.out, part(slice(0, 12)).out, atol=1e-13, rtol=0)
    torch.testing.assert_close(both.lse, logits.logsumexp(-1), atol=1e-13, rtol=0)
