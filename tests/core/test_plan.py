"""Plans: accounting, comparison, and files good and bad."""

import pytest
import torch
from safetensors.torch import save_file

from sparing.core.plan import LayerPlan, Plan
from sparing.errors import InputFileError, InvalidInputError, OutputError


def plan(method="snapkv") -> Plan:
    """Two layers, two rows (10 and 6 tokens), two and one KV heads."""
    t = torch.tensor
    first = LayerPlan(1, (10, 6), [[t([0, 1, 2, 9]), t([0, 9])], [t([4, 5]), t([5])]])
    second = LayerPlan(3, (10, 6), [[t([7, 8])], [torch.zeros(0, dtype=torch.int64)]])
    return Plan(method, [first, second])


def test_accounting_by_hand():
    p = plan()
    assert (p.tokens_kept, p.tokens_seen) == (4 + 2 + 2 + 1 + 2 + 0, 2 * 16 + 16)
    assert p.share == 11 / 48
    assert p.layers[0].share() == [0.4, 0.2]
    assert p.layers[0].share(1) == [2 / 6, 1 / 6]
    assert Plan("none", []).share == 1.0


def test_printed():
    text = str(plan())
    assert text.splitlines()[0] == "snapkv: keeps 11 of 48 entries (22.9%)"
    assert "layer   3" in text


def test_overlap_is_jaccard_per_head():
    other = plan("other")
    other.layers[0].kept[0][0] = torch.tensor([1, 2, 3])
    other.layers[1].kept[0][0] = torch.zeros(0, dtype=torch.int64)
    assert plan().overlap(other) == [[2 / 5, 1.0], [0.0]]
    assert plan().overlap(plan()) == [[1.0, 1.0], [1.0]]


def test_overlap_of_other_layers_is_refused():
    with pytest.raises(InvalidInputError, match="a plan of the same layers and KV heads"):
        plan().overlap(Plan("other", plan().layers[:1]))


def test_round_trip(tmp_path):
    path = tmp_path / "plan.safetensors"
    plan().save(path)
    loaded = Plan.load(path)
    assert (loaded.method, loaded.tokens_kept, loaded.tokens_seen) == ("snapkv", 11, 48)
    for mine, theirs in zip(plan().layers, loaded.layers, strict=True):
        assert (mine.layer, mine.seen) == (theirs.layer, theirs.seen)
        for row, same_row in zip(mine.kept, theirs.kept, strict=True):
            assert [h.tolist() for h in row] == [h.tolist() for h in same_row]
            assert all(h.dtype == torch.int64 for h in same_row)


def test_heads_may_share_one_tensor(tmp_path):
    same = torch.tensor([1, 2])
    path = tmp_path / "plan.safetensors"
    Plan("tova", [LayerPlan(0, (4,), [[same, same]])]).save(path)
    assert [h.tolist() for h in Plan.load(path).layers[0].kept[0]] == [[1, 2], [1, 2]]


def test_more_than_ten_heads_and_layers_keep_their_order(tmp_path):
    layers = [LayerPlan(i, (20,), [[torch.tensor([h]) for h in range(12)]]) for i in range(12)]
    path = tmp_path / "plan.safetensors"
    Plan("x", layers).save(path)
    loaded = Plan.load(path)
    assert [p.layer for p in loaded.layers] == list(range(12))
    assert [int(h) for h in loaded.layers[11].kept[0]] == list(range(12))


def write(path, tensors, **metadata):
    save_file(tensors, str(path), metadata=metadata)


GARBAGE = {
    "missing": lambda path: None,
    "a folder": lambda path: path.mkdir(),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not a plan at all, just words"),
    "torn": lambda path: (plan().save(path), path.write_bytes(path.read_bytes()[:-8])),
    "foreign": lambda path: write(path, {"a": torch.zeros(1)}),
    "no method": lambda path: write(path, {"0.seen": torch.tensor([3])}, format="sparing-plan-1"),
    "no rows": lambda path: write(
        path, {"0.seen": torch.tensor([3, 4]), "0.0.0": torch.tensor([1])}, format="sparing-plan-1", method="x"
    ),
    "no number": lambda path: write(path, {"x.seen": torch.tensor([3])}, format="sparing-plan-1", method="x"),
}


@pytest.mark.parametrize("make", GARBAGE.values(), ids=GARBAGE)
def test_garbage_is_refused_by_name(make, tmp_path):
    path = tmp_path / "plan.safetensors"
    make(path)
    with pytest.raises(InputFileError, match=r"plan\.safetensors: (not a|a plan with parts missing)"):
        Plan.load(path)


def test_a_place_that_cannot_be_written(tmp_path):
    with pytest.raises(OutputError, match="cannot be written"):
        plan().save(tmp_path / "no such folder" / "plan.safetensors")
