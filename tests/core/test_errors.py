"""Errors: one family, and messages that hold what, got, allowed and the fix."""

import inspect
import pickle

import pytest

from sparing import errors
from sparing.errors import (
    CacheStateError,
    InputFileError,
    InvalidInputError,
    MethodRefusedError,
    MissingExtraError,
    OutputError,
    ScoresMismatchError,
    SparingError,
    UnknownNameError,
    UnsupportedModelError,
    WorkerLostError,
    require,
)

EXAMPLES = {
    InvalidInputError: InvalidInputError("keep", 7.5, "a ratio", "write 0.75"),
    UnknownNameError: UnknownNameError("method", "snapvk", ["tova", "snapkv"]),
    InputFileError: InputFileError("plan.bin", "empty", "write one with Plan.save"),
    OutputError: OutputError("out", "disk full", "free some space"),
    UnsupportedModelError: UnsupportedModelError("Mamba", "no keys", "run it without sparing"),
    MethodRefusedError: MethodRefusedError("h2o", "needs attention", "use knorm"),
    ScoresMismatchError: ScoresMismatchError("measured on Llama, this is Qwen3", "measure this model"),
    MissingExtraError: MissingExtraError("Ray", "ray"),
    WorkerLostError: WorkerLostError("item 3", 3),
    CacheStateError: CacheStateError("nothing there", "generate first"),
}


def test_one_family_drawn_in_the_docstring():
    family = {c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, SparingError)}
    assert family == set(EXAMPLES) | {SparingError}
    assert all(c.__name__ in errors.__doc__ for c in family)
    assert issubclass(InvalidInputError, ValueError)
    assert issubclass(UnknownNameError, InvalidInputError)


@pytest.mark.parametrize("kind", EXAMPLES, ids=lambda c: c.__name__)
def test_messages_are_one_line_with_the_fix_last(kind):
    error = EXAMPLES[kind]
    assert "\n" not in str(error)
    assert error.fix
    assert str(error).endswith(f"; {error.fix}")


@pytest.mark.parametrize("kind", EXAMPLES, ids=lambda c: c.__name__)
def test_errors_travel_between_processes_whole(kind):
    error = EXAMPLES[kind]
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is kind
    assert str(back) == str(error)
    assert vars(back) == vars(error)


def test_what_got_and_allowed():
    assert str(EXAMPLES[InvalidInputError]) == "keep: got 7.5, allowed is a ratio; write 0.75"
    assert str(InvalidInputError("keep", "x", "a ratio")) == "keep: got 'x', allowed is a ratio"


def test_near_names_are_suggested_and_all_are_listed():
    expected = "unknown method: got 'snapvk', allowed is one of snapkv, tova; did you mean snapkv?"
    assert str(EXAMPLES[UnknownNameError]) == expected
    assert UnknownNameError("method", "qqq", ["snapkv"]).fix == ""


def test_require():
    require(True, "x", 1, "anything")
    with pytest.raises(InvalidInputError, match="x: got nan, allowed is a number >= 0; try 1"):
        require(float("nan") >= 0, "x", float("nan"), "a number >= 0", "try 1")
