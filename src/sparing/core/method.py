"""Methods: recipes of scorer + allocator + moment, and the one registry of them."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal, TypeVar

from sparing.core.allocate import ALLOCATORS, Allocator, Uniform
from sparing.core.budget import Budget, Keep
from sparing.core.recipe_text import build, parse_call
from sparing.core.scorer import Scorer
from sparing.core.token_scores import Unit
from sparing.errors import InvalidInputError, MethodRefusedError, UnknownNameError

Moment = Literal["prefill_end", "every_step"]


@dataclass(frozen=True)
class MethodInfo:
    """What the registry knows of a method: everything that lists, tables and documents show."""

    name: str
    family: str
    unit: Unit
    moment: Moment
    paper: str
    summary: str
    training_free: bool
    recipe: type[Method]


@dataclass(frozen=True)
class Parts:
    """What a method is made of.

    Attributes:
        scorer: ranks the tokens.
        allocator: spreads the budget over layers and heads.
        moment: "prefill_end": once, after the prompt, and after every later turn; what is decoded stays.
            "every_step": also after every decoded token, so that the cache stays at its size.
    """

    scorer: Scorer
    allocator: Allocator
    moment: Moment = "prefill_end"

    def check(self, label: str) -> None:
        """Refuse what is not defined.

        Raises:
            InvalidInputError: unknown moment. MethodRefusedError: the scorer cannot do this.
        """
        if self.moment not in ("prefill_end", "every_step"):
            raise InvalidInputError("moment", self.moment, '"prefill_end" or "every_step"')
        if self.moment == "prefill_end":
            return
        fix = 'use moment="prefill_end"'
        if not self.scorer.follows_decoding:
            raise MethodRefusedError(label, f"{type(self.scorer).__name__} cannot follow decoding", fix)
        if not isinstance(self.allocator, Uniform):
            problem = "evicting at every step is defined for equal budgets of all heads"
            raise MethodRefusedError(label, problem, f"{fix} or the uniform allocator")


@dataclass(frozen=True)
class Method:
    """Base of all methods. A published method is a subclass whose fields are its paper's parameters.

    Attributes:
        keep: how much stays: a ratio in (0, 1], tokens per KV head (int), or bytes ("64MiB").

    Raises:
        InvalidInputError: `keep` is no budget. MethodRefusedError: a combination that is not defined.
    """

    keep: Keep = 0.5

    info: ClassVar[MethodInfo | None] = None

    def __post_init__(self) -> None:
        Budget.parse(self.keep)
        self.parts().check(self.label)

    def parts(self) -> Parts:
        """The scorer, allocator and moment that the fields stand for."""
        raise NotImplementedError

    @property
    def budget(self) -> Budget:
        """`keep`, parsed."""
        return Budget.parse(self.keep)

    @property
    def label(self) -> str:
        """The method's registered name."""
        return self.info.name if self.info is not None else type(self).__name__


@dataclass(frozen=True)
class Evict(Method):
    """Drop the KV tokens that score lowest: any scorer with any allocator.

    Attributes:
        scorer: ranks the tokens.
        allocator: spreads the budget over layers and heads.
        moment: see `Parts`.
    """

    scorer: Scorer | None = None
    allocator: Allocator = field(default_factory=Uniform)
    moment: Moment = "prefill_end"

    def parts(self) -> Parts:
        """See `Method.parts`."""
        if self.scorer is None:
            raise InvalidInputError("Evict.scorer", None, "a Scorer")
        return Parts(self.scorer, self.allocator, self.moment)

    @property
    def label(self) -> str:
        """Scorer+allocator."""
        return f"{type(self.scorer).__name__}+{type(self.allocator).__name__}"


M = TypeVar("M", bound=Method)
_REGISTRY: dict[str, MethodInfo] = {}


def register(
    name: str,
    *,
    paper: str,
    summary: str,
    family: str = "kv_cache",
    unit: Unit = "kv_token",
    moment: Moment = "prefill_end",
    training_free: bool = True,
) -> Callable[[type[M]], type[M]]:
    """Register a recipe: the only place where a method is made known.

    Args:
        name: as typed on the command line.
        paper: arXiv number or "-" for a baseline without one.
        summary: one line, what it keeps.
    """

    def add(recipe: type[M]) -> type[M]:
        assert name not in _REGISTRY, f"two methods named {name}"
        info = MethodInfo(name, family, unit, moment, paper, summary, training_free, recipe)
        recipe.info = info
        _REGISTRY[name] = info
        return recipe

    return add


def methods() -> dict[str, MethodInfo]:
    """All registered methods by name; imports the `methods` package on first use."""
    import sparing.methods

    for module in pkgutil.walk_packages(sparing.methods.__path__, "sparing.methods."):
        importlib.import_module(module.name)
    return dict(sorted(_REGISTRY.items()))


def parse_method(text: str, keep: Keep = 0.5) -> Method:
    """Build a method from text.

    Grammar: `name`, `name(field=value,...)`, or `scorer+allocator` with the scorer of any registered method and
    any allocator (uniform, pyramid, adaptive, global), each with fields in brackets:
    `snapkv`, `snapkv(window=16)`, `keydiff+adaptive(floor=0.1)`. The last form evicts at the prompt's end. A `keep`
    among the method's fields comes before the argument. Fields that are no number, word or truth value (a scorer,
    a tuple) can be set in Python only.

    Raises:
        UnknownNameError: no such method or allocator.
        InvalidInputError: text that does not follow the grammar, or a value that the field does not take.
    """
    head, plus, tail = text.partition("+")
    name, fields = parse_call(head, "method")
    known = methods()
    if name not in known:
        raise UnknownNameError("method", name, known)
    recipe = build(known[name].recipe, {"keep": keep} | fields, name)
    if not plus:
        return recipe
    allocator_name, allocator_fields = parse_call(tail, "method")
    if allocator_name not in ALLOCATORS:
        raise UnknownNameError("allocator", allocator_name, ALLOCATORS)
    allocator = build(ALLOCATORS[allocator_name], allocator_fields, allocator_name)
    return Evict(keep=recipe.keep, scorer=recipe.parts().scorer, allocator=allocator)


def split_methods(text: str) -> list[str]:
    """Split a list of methods at the commas that are outside brackets."""
    return [part.strip() for part in re.split(r",(?![^(]*\))", text) if part.strip()]
