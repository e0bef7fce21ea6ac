"""The mean over samples, its standard error, the stop rule, and the registry of scorers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch

from sparing.core.head_scorer import HeadScorer, MeanScorer, Run, RunningMean, StopRule, parse_scorer, scorers
from sparing.errors import InvalidInputError, UnknownNameError

ROWS = torch.tensor([[1.0, 0.0], [3.0, 0.0], [8.0, 3.0]])


@dataclass(frozen=True)
class Given(MeanScorer):
    """The samples are the scores."""

    def observe(self, lens, batch: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.stack(list(batch))


def test_mean_and_standard_error_worked_by_hand():
    found = Given().measure(None, Run(ROWS, batch_size=2))
    assert found.values.tolist() == [4.0, 1.0]
    # deviations -3 -1 4: 26 / 2 / 3; -1 -1 2: 6 / 2 / 3
    assert torch.allclose(found.standard_error, torch.tensor([26 / 6, 1.0]).sqrt())
    assert found.n == 3


def test_one_sample_has_no_standard_error():
    assert Given().measure(None, Run(ROWS[:1])).standard_error is None


def test_the_batch_size_changes_nothing():
    rows = torch.randn(11, 3, 4, generator=torch.Generator().manual_seed(0))
    whole = Given().measure(None, Run(rows, batch_size=11))
    for size in (1, 2, 4):
        found = Given().measure(None, Run(rows, batch_size=size))
        assert torch.equal(found.values, whole.values)
        assert torch.equal(found.standard_error, whole.standard_error)


def test_samples_full_of_nan_do_not_count_and_are_said():
    rows = torch.cat([ROWS, torch.full((2, 2), math.nan)])
    found = Given().measure(None, Run(rows))
    assert found.values.tolist() == [4.0, 1.0]
    assert found.n == 3
    assert found.notes == ("2 of 5 samples were not counted (see the scorer)",)


def test_nothing_that_counts_is_an_error():
    with pytest.raises(InvalidInputError, match="at least one counts"):
        Given().measure(None, Run(torch.full((2, 2), math.nan)))


def test_it_stops_once_the_top_has_been_the_same_for_so_long():
    # The best unit is 0, then 1 from the second sample on: unchanged for 3 after the fifth.
    rows = torch.tensor([[1.0, 0.0]] + [[0.0, 9.0]] * 9)
    mean = RunningMean(StopRule(top=1, patience=3))
    settled = []
    for row in rows:
        mean.add(row)
        settled.append(mean.is_settled)
    assert settled.index(True) == 4
    found = Given().measure(None, Run(rows, batch_size=1, stop=StopRule(1, 3)))
    assert found.n == 5
    assert found.notes == ("stopped after 5 samples: the top 1 had not changed for 3",)


def test_without_patience_it_never_stops():
    assert Given().measure(None, Run(torch.ones(40, 2), batch_size=1)).n == 40


def test_time_that_has_passed_ends_it_with_what_there_is():
    found = Given().measure(None, Run(ROWS, batch_size=1, max_seconds=1e-9))
    assert found.n == 1
    assert "had passed" in found.notes[0]


def test_progress_is_told():
    told = []
    Given().measure(None, Run(ROWS, batch_size=2, progress=lambda *what: told.append(what)))
    assert told == [(2, 3, "2 counted"), (3, 3, "3 counted")]


def test_every_scorer_has_a_line_and_is_built_by_name():
    known = scorers()
    assert "sink_mass" in known
    for name, info in known.items():
        assert isinstance(parse_scorer(name), HeadScorer)
        assert info.summary
        assert info.scorer.__doc__


def test_names_and_fields_that_do_not_exist_are_refused():
    with pytest.raises(UnknownNameError, match="sink_mass"):
        parse_scorer("sink_mas")
    with pytest.raises(UnknownNameError, match="field of sink_mass"):
        parse_scorer("sink_mass(window=3)")
    with pytest.raises(InvalidInputError, match=r"name\(field=value\)"):
        parse_scorer("sink mass")
