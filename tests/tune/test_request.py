"""What can be asked for, and what breaks it."""

from __future__ import annotations

import pytest

from sparing.compare.cells import Contestant
from sparing.core.budget import parse_bytes
from sparing.errors import InvalidInputError
from sparing.tasks import Interval
from sparing.tune.request import Request, parse_seconds, parse_share
from sparing.tune.standing import Standing


def standing(loss=0.0, share=0.2, bytes_kept=100, decode_s=0.01, prefill_s=1.0):
    interval = Interval(loss, loss - 0.1, loss + 0.1, 8)
    return Standing(
        Contestant("snapkv", 0.2), interval, (loss, "task"), 1.0, 1.0, share, bytes_kept, decode_s, prefill_s, []
    )


def test_text_as_people_write_it():
    assert (parse_share("1%"), parse_share(" 25 % "), parse_share("0.25")) == (0.01, 0.25, 0.25)
    assert (parse_seconds("30ms"), parse_seconds("1.5 s")) == (pytest.approx(0.03), 1.5)
    assert parse_bytes("2GiB") == 2 * 2**30


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (parse_share, "much"),
        (parse_share, "%"),
        (parse_seconds, "30"),
        (parse_seconds, "-1s"),
        (parse_bytes, "2 parsecs"),
    ],
)
def test_text_that_is_none(parse, text):
    with pytest.raises(InvalidInputError, match="allowed is"):
        parse(text)


@pytest.mark.parametrize(
    "limits",
    [{}, {"memory": 0.0}, {"memory": 1.5}, {"memory": float("nan")}, {"max_loss": 1.0}, {"max_loss": -0.1},
     {"bytes": 0}, {"latency": 0.0}, {"first_token": -1.0}],
)  # fmt: skip
def test_limits_that_cannot_be(limits):
    with pytest.raises(InvalidInputError):
        Request(**limits)


def test_each_limit_is_broken_alone_and_met_exactly():
    fine = standing()
    assert Request(0.2, 100, 0.01, 1.0, 0.0).broken(fine) == []
    for limits in ({"memory": 0.19}, {"bytes": 99}, {"latency": 0.009}, {"first_token": 0.9}):
        assert len(Request(**limits).broken(fine)) == 1
    assert "loses 5.0%, more than 1.0%" in Request(max_loss=0.01).broken(standing(loss=0.05))[0]
    assert Request(latency=0.001).broken(standing(decode_s=None)) == [], "nothing was decoded"


def test_a_request_reads_like_a_sentence():
    assert str(Request(memory=0.25, max_loss=0.01)) == "at most 25 % of the cache's bytes, a loss of at most 1 %"
    assert Request(latency=0.1).minds_time_only
    assert not Request(latency=0.1, memory=0.5).minds_time_only
