"""What several checks need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from sparing.core.budget import Keep
from sparing.core.method import Method


class MethodFactory(Protocol):
    """Makes the method under test with a given budget: a recipe's class, or any function with this signature."""

    def __call__(self, *, keep: Keep) -> Method:
        """The method, keeping that much."""
        ...


def least_held(method: Method, limit: int) -> int:
    """What a head with room for `limit` tokens is brought down to when decoding has filled it."""
    parts = method.parts()
    if parts.moment != "every_step":
        return limit
    dropped = max(int(parts.period * limit), 1) if isinstance(parts.period, float) else parts.period
    return max(limit - dropped + 1, 1)


def assert_raises(errors: type[BaseException], act: Callable[[], Any], what: str) -> BaseException:
    """Assert that `act()` raises one of ours, and return it."""
    try:
        act()
    except errors as error:
        return error
    except Exception as error:
        raise AssertionError(f"{what}: raised {type(error).__name__} ({error}) instead of {errors.__name__}") from error
    raise AssertionError(f"{what}: nothing was raised, {errors.__name__} was expected")


def assert_close(got: Tensor, wanted: Tensor, tolerance: float, what: str) -> None:
    """Assert that two tensors agree to an absolute tolerance, and say by how much they do not."""
    assert got.shape == wanted.shape, f"{what}: shape {tuple(got.shape)} instead of {tuple(wanted.shape)}"
    assert bool(torch.isfinite(got).all()), f"{what}: not finite"
    difference = float((got.double() - wanted.double()).abs().max()) if got.numel() else 0.0
    assert difference <= tolerance, f"{what}: differs by {difference:.3g}, allowed is {tolerance:.3g}"


def assert_same_kept(got: list[list[Tensor]], wanted: list[list[Tensor]], what: str) -> None:
    """Assert that the same positions were kept, [row][kv_head]."""
    assert len(got) == len(wanted), f"{what}: {len(got)} rows instead of {len(wanted)}"
    for row, (mine, theirs) in enumerate(zip(got, wanted, strict=True)):
        assert len(mine) == len(theirs), f"{what}: row {row} has {len(mine)} heads instead of {len(theirs)}"
        for head, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            assert a.tolist() == b.tolist(), f"{what}: row {row}, KV head {head} keeps {a.tolist()}, not {b.tolist()}"
