"""Methods: recipes of scorer + allocator + moment, and the one registry of them."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal, TypeVar, get_args

from sparing.core.actions import Action, Drop
from sparing.core.allocate import ALLOCATORS, Allocator, Uniform
from sparing.core.budget import Budget, Keep
from sparing.core.reader import Reader
from sparing.core.recipe_text import build, parse_call
from sparing.core.scorer import Scorer
from sparing.core.token_scores import Unit
from sparing.errors import InvalidInputError, MethodRefusedError, UnknownNameError, require

Moment = Literal["prefill_end", "chunk_end", "every_step"]


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
            "chunk_end": after every chunk of a prompt as well, so that no long prompt is ever held whole.
            "every_step": also while decoding, so that the cache stays at its size.
        period: with "every_step", how many tokens are dropped at once: a number, or a share of the budget in (0, 1).
            A cache never exceeds its size; larger periods let it fall below by so many and drop less often.
        action: what becomes of tokens that are not kept.
        reader: nothing is dropped, and every decoded token reads what this chooses; scorer and allocator then only
            say how much.
    """

    scorer: Scorer
    allocator: Allocator
    moment: Moment = "prefill_end"
    period: int | float = 1
    action: Action = field(default_factory=Drop)
    reader: Reader | None = None

    @property
    def follows_by_step(self) -> bool:
        """True if the scorer updates its scores token by token while decoding, instead of scoring again when full."""
        can_score_again = self.scorer.state_outlives_eviction and type(self.action) is not Drop
        return self.moment == "every_step" and self.scorer.follows_decoding and not can_score_again

    def check(self, label: str) -> None:
        """Refuse what is not defined.

        Raises:
            InvalidInputError: unknown moment or period. MethodRefusedError: the scorer cannot do this.
        """
        moments = get_args(Moment)
        require(self.moment in moments, "moment", self.moment, " or ".join(f'"{name}"' for name in moments))
        is_share = isinstance(self.period, float) and 0 < self.period < 1
        is_count = isinstance(self.period, int) and not isinstance(self.period, bool) and self.period >= 1
        require(is_share or is_count, "period", self.period, "a whole number >= 1, or a share in (0, 1)")
        if self.moment == "chunk_end" and not (self.scorer.state_outlives_eviction or self.scorer.accumulates):
            problem = f"{type(self.scorer).__name__} cannot score a prompt that is dropped in parts"
            raise MethodRefusedError(label, problem, 'use moment="prefill_end"')
        if self.moment == "every_step":
            self._check_decoding(label)

    def _check_decoding(self, label: str) -> None:
        fix = 'use moment="prefill_end"'
        if not (self.scorer.follows_decoding or self.scorer.state_outlives_eviction):
            raise MethodRefusedError(label, f"{type(self.scorer).__name__} cannot follow decoding", fix)
        if self.follows_by_step and not isinstance(self.allocator, Uniform):
            problem = "following every token is defined for equal budgets of all heads"
            raise MethodRefusedError(label, problem, f"{fix} or the uniform allocator")
        if type(self.action) is not Drop and self.follows_by_step:
            problem = f"{type(self.action).__name__} needs tokens in their order, but single ones are replaced here"
            raise MethodRefusedError(label, problem, fix)


@dataclass(frozen=True)
class Method:
    """Base of all methods. A published method is a subclass whose fields are its paper's parameters.

    Attributes:
        keep: how much stays: a ratio in (0, 1], tokens per KV head (int), or bytes ("64MiB").
        min_prompt: a shorter prompt loses nothing, whatever the ratio. (A number of tokens or bytes is kept to always.)

    Raises:
        InvalidInputError: `keep` is no budget. MethodRefusedError: a combination that is not defined.
    """

    keep: Keep = 0.5
    min_prompt: int = field(default=32, kw_only=True)

    info: ClassVar[MethodInfo | None] = None

    def __post_init__(self) -> None:
        Budget.parse(self.keep)
        require(self.min_prompt >= 0, "min_prompt", self.min_prompt, "a number of tokens >= 0")
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
        moment, period, action: see `Parts`.
    """

    scorer: Scorer | None = None
    allocator: Allocator = field(default_factory=Uniform)
    moment: Moment = "prefill_end"
    period: int | float = 1
    action: Action = field(default_factory=Drop)

    def parts(self) -> Parts:
        """See `Method.parts`."""
        if self.scorer is None:
            raise InvalidInputError("Evict.scorer", None, "a Scorer")
        return Parts(self.scorer, self.allocator, self.moment, self.period, self.action)

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
