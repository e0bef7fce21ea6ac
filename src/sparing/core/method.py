"""Methods: recipes of scorer + allocator + moment, and the one registry of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar, get_args

from sparing.core.actions import Action, Drop, Rerotate
from sparing.core.allocate import Allocator, Uniform
from sparing.core.budget import Budget, Keep
from sparing.core.reader import Reader, Watching
from sparing.core.registry import Registry
from sparing.core.scorer import Scorer
from sparing.core.scores import Scores
from sparing.core.token_scores import Unit
from sparing.errors import InvalidInputError, MethodRefusedError, require

if TYPE_CHECKING:
    from sparing.core.cascade import Cascade
    from sparing.core.prefill import SparsePrefill
    from sparing.core.prompt import PromptDropper

Moment = Literal["prefill_end", "chunk_end", "every_step"]
When = Moment | Literal["before_prompt", "prefill"]


@dataclass(frozen=True)
class MethodInfo:
    """What the registry knows of a method: everything that lists, tables and documents show.

    Attributes:
        needs: names of the scorers whose measurements of the model it needs. takes: likewise, but works without them.
        needs_draft: True if it needs a draft model, which text names by a folder or a name on the Hub.
    """

    name: str
    family: str
    unit: Unit
    moment: When
    paper: str
    summary: str
    training_free: bool
    needs: tuple[str, ...]
    takes: tuple[str, ...]
    needs_draft: bool
    recipe: type[Method]

    @property
    def needs_nothing(self) -> bool:
        """True if its name alone makes it: no measurement and no draft model is needed."""
        return not (self.needs or self.needs_draft)


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
        reader: nothing is dropped, and every decoded token reads what this chooses. The scorer is then its eye while
            the prompt is read (see `reading`), and the allocator says how much each head reads.
    """

    scorer: Scorer
    allocator: Allocator
    moment: Moment = "prefill_end"
    period: int | float = 1
    action: Action = field(default_factory=Drop)
    reader: Reader | None = None

    @classmethod
    def reading(cls, reader: Reader, allocator: Allocator | None = None) -> Parts:
        """The parts of a method that drops nothing."""
        return cls(Watching(reader), allocator or Uniform(), reader=reader)

    @property
    def frees(self) -> bool:
        """True if tokens go away, so that memory is freed."""
        return self.reader is None and self.action.drops

    @property
    def follows_by_step(self) -> bool:
        """True if the scorer updates its scores token by token while decoding, instead of scoring again when full."""
        needs_order = self._can_score_again and type(self.action) is not Drop
        return self.moment == "every_step" and self.scorer.follows_decoding and not needs_order

    @property
    def scores_again(self) -> bool:
        """True if the scorer is asked again, while decoding, each time that the cache is full."""
        return self.moment == "every_step" and not self.follows_by_step

    @property
    def _can_score_again(self) -> bool:
        """True if what the scorer knows stays right when tokens are dropped."""
        return self.scorer.state_outlives_eviction or self.scorer.accumulates

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
        if self.reader is not None and (self.moment != "prefill_end" or type(self.action) is not Drop):
            problem = "reads a part of what is stored, so nothing is dropped or folded"
            raise MethodRefusedError(label, problem, 'use moment="prefill_end" and no action')
        if not self.action.drops and self.moment != "prefill_end":
            problem = f"{type(self.action).__name__} frees nothing, so no cache stays at a size"
            raise MethodRefusedError(label, problem, 'use moment="prefill_end"')
        if self.moment == "chunk_end" and not self._can_score_again:
            problem = f"{type(self.scorer).__name__} cannot score a prompt that is dropped in parts"
            raise MethodRefusedError(label, problem, 'use moment="prefill_end"')
        if isinstance(self.action, Rerotate) and self.scorer.needs_rotary:
            problem = f"{type(self.scorer).__name__} turns keys back by their positions, which Rerotate has changed"
            raise MethodRefusedError(label, problem, "use another scorer, or leave keys at their positions")
        if self.moment == "every_step":
            self._check_decoding(label)

    def _check_decoding(self, label: str) -> None:
        fix = 'use moment="prefill_end"'
        if not (self.scorer.follows_decoding or self._can_score_again):
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
        bits: 8 or 4 to hold all but the newest tokens as codes (KIVI, arXiv:2402.02750); None or 16: as the model does.
            Codes take less; how many tokens stay is counted as if they did not, also where `keep` is in bytes.
        prefill: how the prompt is read; None for dense attention.
        prompt: which of the prompt's tokens are read at all; None for every one. `keep` stays a share of all of them.

    Raises:
        InvalidInputError: `keep` is no budget. MethodRefusedError: a combination that is not defined.
    """

    keep: Keep = 0.5
    min_prompt: int = field(default=32, kw_only=True)
    bits: int | None = field(default=None, kw_only=True)
    prefill: SparsePrefill | None = field(default=None, kw_only=True)
    prompt: PromptDropper | None = field(default=None, kw_only=True)

    info: ClassVar[MethodInfo | None] = None

    def __post_init__(self) -> None:
        Budget.parse(self.keep)
        require(self.min_prompt >= 0, "min_prompt", self.min_prompt, "a number of tokens >= 0")
        is_known = self.bits is None or (type(self.bits) is int and self.bits in (16, 8, 4))
        require(is_known, "bits", self.bits, "8 or 4; None or 16 for what the model has")
        reads = self.prefill is None or hasattr(self.prefill, "reads_all")
        require(reads, "prefill", self.prefill, "a method that reads prompts sparsely, e.g. sparing.XAttention(0.25)")
        drops = self.prompt is None or hasattr(self.prompt, "choose")
        require(drops, "prompt", self.prompt, "a method that drops prompt tokens, e.g. sparing.SpecPC(draft=small)")
        parts = self.parts()
        parts.check(self.label)
        if self.is_compact:
            self._check_compact(parts)

    def _check_compact(self, parts: Parts) -> None:
        fix = "leave `bits` out, and hold all channels"
        if parts.reader is not None:
            raise MethodRefusedError(self.label, "reads parts of what is held, which codes do not allow", fix)
        if not parts.action.is_exact and parts.moment != "prefill_end":
            problem = f"{type(parts.action).__name__} changes tokens while decoding; coded again and again they decay"
            raise MethodRefusedError(self.label, problem, f'{fix} or use moment="prefill_end"')

    def parts(self) -> Parts:
        """The scorer, allocator and moment that the fields stand for."""
        raise NotImplementedError

    @property
    def reading(self) -> SparsePrefill | Cascade | None:
        """How the prompt is read; None for dense attention."""
        return None if self.prefill is None else self.prefill.reading

    @property
    def shortening(self) -> PromptDropper | None:
        """What drops tokens of the prompt before it is read; None if all of it is read."""
        return None if self.prompt is None else self.prompt.shortening

    @property
    def measurements(self) -> tuple[Scores, ...]:
        """What the method knows of a model; it works on models of that shape only."""
        return ()

    @property
    def budget(self) -> Budget:
        """`keep`, parsed."""
        return Budget.parse(self.keep)

    @property
    def keeps_all(self) -> bool:
        """True if nothing is dropped and nothing is held in another way than the model's."""
        return self.budget.keeps_all and not self.is_compact

    @property
    def is_compact(self) -> bool:
        """True if all but the newest tokens are held in another way than the model's."""
        return self.code_bits is not None or self.parts().scorer.prunes_channels

    @property
    def code_bits(self) -> int | None:
        """Bits of the codes that all but the newest tokens are held as; None where they are held as the model does."""
        return None if self.bits == 16 else self.bits

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
METHODS: Registry[MethodInfo] = Registry("method")


def register(
    name: str,
    *,
    paper: str,
    summary: str,
    family: str = "kv_cache",
    unit: Unit = "kv_token",
    moment: When = "prefill_end",
    training_free: bool = True,
    needs: tuple[str, ...] = (),
    takes: tuple[str, ...] = (),
    needs_draft: bool = False,
) -> Callable[[type[M]], type[M]]:
    """Register a recipe: the only place where a method is made known.

    Args:
        name: as typed on the command line.
        paper: arXiv number or "-" for a baseline without one.
        summary: one line, what it keeps.
        needs: scorers of heads or layers whose measurements of the model it needs (see `core.measured`).
        takes: those that it uses if it is given them.
        needs_draft: it needs a draft model (see `core.draft`).
    """

    def add(recipe: type[M]) -> type[M]:
        info = MethodInfo(name, family, unit, moment, paper, summary, training_free, needs, takes, needs_draft, recipe)
        recipe.info = METHODS.add(name, info)
        return recipe

    return add


def methods() -> dict[str, MethodInfo]:
    """All registered methods by name."""
    return METHODS.all()
