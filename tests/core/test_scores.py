"""Scores: ranking, agreement, and the file."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sparing.core.scores import Agreement, ModelIdentity, Scores, agree, count_of
from sparing.errors import InputFileError, InvalidInputError, OutputError, ScoresMismatchError

MODEL = ModelIdentity("mine", "LlamaForCausalLM", 2, 4, 2, 8, "abc")


def scores(values, **more) -> Scores:
    return Scores(torch.tensor(values), ("layer", "head"), "retrieval", MODEL, **more)


HEADS = scores([[0.1, 0.9, 0.1, 0.0], [0.5, 0.2, 0.9, 0.3]])


def test_the_ranking_is_best_first_and_breaks_ties_by_lower_index():
    assert HEADS.ranked() == [(0, 1), (1, 2), (1, 0), (1, 3), (1, 1), (0, 0), (0, 2), (0, 3)]
    assert HEADS.top(2) == [(0, 1), (1, 2)]


def test_units_without_a_value_are_never_chosen():
    holed = scores([[math.nan, 1.0, 0.0, math.nan], [0.5, -1.0, math.nan, 2.0]])
    assert holed.ranked() == [(1, 3), (0, 1), (1, 0), (0, 2), (1, 1)]


@pytest.mark.parametrize(("k", "total", "count"), [(3, 8, 3), (9, 8, 8), (0.05, 16, 1), (0.1, 30, 3), (1.0, 7, 7)])
def test_shares_are_rounded_up(k, total, count):
    assert count_of(k, total) == count


@pytest.mark.parametrize("k", [0, -1, 0.0, 1.5, True, "3", math.nan])
def test_a_count_that_is_none_is_refused(k):
    with pytest.raises(InvalidInputError, match="a share in"):
        count_of(k, 10)


def test_query_heads_are_reduced_to_the_kv_heads_that_they_read():
    assert HEADS.per_kv_head().values.tolist() == torch.tensor([[0.9, 0.1], [0.5, 0.9]]).tolist()
    assert torch.allclose(HEADS.per_kv_head("mean").values, torch.tensor([[0.5, 0.05], [0.35, 0.6]]))
    assert HEADS.per_kv_head().axes == ("layer", "kv_head")
    with pytest.raises(InvalidInputError, match="median"):
        HEADS.per_kv_head("median")
    with pytest.raises(ScoresMismatchError, match="layer × kv_head"):
        HEADS.per_kv_head().per_kv_head()


def test_a_file_gives_back_what_was_saved(tmp_path):
    whole = replace(
        HEADS, parameters={"window": 3, "site": "head"}, data={"kind": "needle", "samples": 5}, n=5,
        standard_error=torch.full((2, 4), 0.25), labels={"layer": ("first", "läst ⟨s⟩")},
        extras={"loss": torch.arange(3.0)}, notes=("stopped early",), environment={"torch": "2"},
    )  # fmt: skip
    loaded = Scores.load(whole.save(tmp_path / "new" / "heads.safetensors"), MODEL)
    for name in ("axes", "scorer", "model", "parameters", "data", "n", "labels", "notes", "environment"):
        assert getattr(loaded, name) == getattr(whole, name), name
    assert torch.equal(loaded.values, whole.values)
    assert torch.equal(loaded.standard_error, whole.standard_error)
    assert torch.equal(loaded.extras["loss"], whole.extras["loss"])


def test_the_metadata_can_be_read_without_us(tmp_path):
    with safe_open(HEADS.save(tmp_path / "h.safetensors"), framework="pt") as file:
        metadata = {key: json.loads(value) for key, value in file.metadata().items()}
    assert metadata["scorer"] == "retrieval"
    assert metadata["axes"] == ["layer", "head"]
    assert metadata["model"]["num_kv_heads"] == 2


def test_scores_of_a_model_of_another_shape_are_refused_and_of_other_weights_are_not(tmp_path):
    path = HEADS.save(tmp_path / "h.safetensors")
    Scores.load(path, replace(MODEL, fingerprint="other", name="fine-tuned"))
    for change in ({"num_heads": 8}, {"architecture": "Qwen3ForCausalLM"}, {"num_layers": 3}, {"num_kv_heads": 4}):
        with pytest.raises(ScoresMismatchError, match="measured on LlamaForCausalLM, 2 attention layers, 4 query"):
            Scores.load(path, replace(MODEL, **change))


def test_files_that_hold_no_scores_are_refused(tmp_path):
    with pytest.raises(InputFileError, match="cannot be read as scores"):
        Scores.load(tmp_path / "missing.safetensors")
    (tmp_path / "text").write_text("no tensors at all")
    with pytest.raises(InputFileError, match="cannot be read as scores"):
        Scores.load(tmp_path / "text")
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(InputFileError, match="holds no scores"):
        Scores.load(tmp_path / "model.safetensors")


def test_a_file_that_cannot_be_written_leaves_the_old_one_and_no_scraps(tmp_path, monkeypatch):
    path = HEADS.save(tmp_path / "h.safetensors")
    before = path.read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sparing.core.scores.save_file", full)
    with pytest.raises(OutputError, match="No space"):
        scores([[1.0, 2, 3, 4], [1, 2, 3, 4]]).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_agreement_with_itself_and_with_its_reverse():
    assert agree(HEADS, HEADS, 3) == Agreement(pytest.approx(1.0), pytest.approx(1.0), 1.0, 3, 8)
    reverse = agree(HEADS, replace(HEADS, values=-HEADS.values), 3)
    assert reverse.rank_correlation == pytest.approx(-1.0)
    assert reverse.top_overlap == 0.0


def test_agreement_worked_by_hand():
    # ranks 1 2 3 4 against 2 1 4 3: ρ = 1 - 6·4 / (4·15) = 0.6; the top 2 {3, 2} against {2, 3}
    one, other = (Scores(torch.tensor(v), ("layer",), "x", MODEL) for v in ([1.0, 2, 3, 4], [2.0, 1, 4, 3]))
    found = agree(one, other, 0.5)
    assert found.rank_correlation == pytest.approx(0.6)
    assert (found.top_overlap, found.k) == (1.0, 2)
    assert agree(one, other, 1).top_overlap == 0.0
    assert str(found) == "Pearson r = 0.600, rank correlation 0.600, 100% of the top 2 shared"


def test_equal_values_share_their_mean_rank():
    # ranks (1.5, 1.5, 3) against (1, 2, 3): cov = 1.5, norms sqrt(1.5), sqrt(2)
    one, other = (Scores(torch.tensor(v), ("layer",), "x", MODEL) for v in ([0.0, 0, 1], [0.0, 1, 2]))
    assert agree(one, other, 1).rank_correlation == pytest.approx(1.5 / math.sqrt(1.5 * 2))


def test_only_units_with_both_values_are_compared():
    one, other = (
        Scores(torch.tensor(v), ("layer",), "x", MODEL) for v in ([1.0, math.nan, 3, 9], [2.0, 8, 5, math.nan])
    )
    assert agree(one, other, 1) == Agreement(pytest.approx(1.0), pytest.approx(1.0), 1.0, 1, 2)


def test_measurements_of_different_things_are_not_compared():
    with pytest.raises(ScoresMismatchError, match="layer × head"):
        agree(HEADS, HEADS.per_kv_head())
    with pytest.raises(ScoresMismatchError, match="units"):
        agree(HEADS, replace(HEADS, values=torch.zeros(3, 4)))
    with pytest.raises(ScoresMismatchError, match="fewer than two"):
        agree(HEADS, replace(HEADS, values=torch.full((2, 4), math.nan)))
