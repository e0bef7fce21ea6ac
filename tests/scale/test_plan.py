"""The simulation of a sweep, by hand."""

import pytest

from sparing.scale.plan import simulate


def test_one_worker_does_one_after_the_other():
    forecast = simulate([3.0, 1.0, 2.0], workers=1, ready=10.0)
    assert (forecast.tasks, forecast.workers, forecast.seconds, forecast.busy, forecast.idle) == (3, 1, 16.0, 16.0, 0.0)


def test_the_next_task_goes_to_the_first_worker_that_is_free():
    """Worker A: 4, then nothing. Worker B: 1, 2, 3: it ends at 6, when A has been idle for 2 of 12 seconds."""
    forecast = simulate([4.0, 1.0, 2.0, 3.0], workers=2, ready=0.0)
    assert (forecast.seconds, forecast.busy) == (6.0, 10.0)
    assert forecast.idle == pytest.approx(2 / 12)


def test_workers_without_a_task_are_not_paid():
    forecast = simulate([60.0, 60.0], workers=50, ready=30.0)
    assert (forecast.workers, forecast.seconds) == (2, 90.0)
    assert forecast.cost(price=4.0) == pytest.approx(2 * 90 / 3600 * 4)


def test_nothing_to_do_takes_no_time():
    assert simulate([], workers=3, ready=5.0).seconds == 0.0
