"""Rankers of documents: how one is written and registered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from sparing.core.lens import Lens
from sparing.core.ranking_prompt import PromptText
from sparing.core.recipe_text import build, parse_call
from sparing.core.registry import Registry
from sparing.core.scores import Scores
from sparing.errors import InvalidInputError, MethodRefusedError


@dataclass(frozen=True)
class RankerInfo:
    """What the registry knows of a ranker."""

    name: str
    paper: str
    summary: str
    ranker: type[Ranker]


class Ranker:
    """Base of all rankers: a frozen dataclass whose fields are its paper's parameters."""

    info: ClassVar[RankerInfo]

    def score(self, lens: Lens, text: PromptText, queries: Sequence[str], documents: Sequence[str]) -> Tensor:
        """(queries, documents) float64 on the CPU; higher = answers the query better.

        Args:
            documents: the best first, if a first-stage ranking is known.

        Raises:
            InvalidInputError: the prompt is longer than the model's positions.
            MethodRefusedError: what the model says is not finite.
        """
        raise NotImplementedError


def require_fits(lens: Lens, tokens: int, fix: str) -> None:
    """Refuse a prompt of more tokens than the model has positions.

    Raises:
        InvalidInputError: it is too long.
    """
    if lens.max_length is not None and tokens > lens.max_length:
        allowed = f"at most the model's {lens.max_length} positions"
        raise InvalidInputError("documents and query", f"a prompt of {tokens} tokens", allowed, fix)


def require_finite(ranker: Ranker, values: Tensor) -> Tensor:
    """The values, if all of them are numbers.

    Raises:
        MethodRefusedError: some are not.
    """
    if not bool(values.isfinite().all()):
        problem = "the model's attention or logits are not finite in this precision"
        raise MethodRefusedError(ranker.info.name, problem, "load the model in float32 or bfloat16")
    return values


R = TypeVar("R", bound=Ranker)
RANKERS: Registry[RankerInfo] = Registry("ranker")


def register_ranker(name: str, *, paper: str, summary: str) -> Callable[[type[R]], type[R]]:
    """Register a ranker: the only place where one is made known.

    Args:
        name: as typed on the command line. paper: arXiv number or "-". summary: one line, what it ranks by.
    """

    def add(ranker: type[R]) -> type[R]:
        ranker.info = RANKERS.add(name, RankerInfo(name, paper, summary, ranker))
        return ranker

    return add


def rankers() -> dict[str, RankerInfo]:
    """All registered rankers by name."""
    return RANKERS.all()


def parse_ranker(text: str) -> Ranker:
    """Build a ranker from `name` or `name(field=value,...)`; its `scores` are a file, as in `qrhead(scores=FILE)`.

    Raises:
        UnknownNameError: no such ranker or field. InvalidInputError: a value that a field does not take.
        InputFileError: a file of scores cannot be read.
    """
    name, given = parse_call(text, "ranker")
    recipe: Any = RANKERS.find(name).ranker
    values: dict[str, Any] = dict(given)
    if "scores" in given and "scores" in {field.name for field in fields(recipe)}:
        values["scores"] = Scores.load(given["scores"])
    ranker: Ranker = build(recipe, values, name)
    return ranker
