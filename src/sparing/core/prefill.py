"""Sparse prefill: the attention of a prompt computes only what a method keeps.

A method sees one attention call at a time, of one sequence without pads (`PromptCall`), and answers with a `Pattern`;
or, where the paper computes something else than a softmax over a set of keys, with the attention itself. Nothing is
dropped: what is stored stays whole, so that any KV method goes with any of these
(`SnapKV(keep=0.25, prefill=XAttention(0.2))`).

Shape legend: Hq query heads, H KV heads, Q query rows, N keys, D head size, S tokens of a block, nq and nk blocks of
rows and keys (see `core.pattern`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from sparing.core.allocate_blocks import BlockAllocator, BlockBudget, EqualRows
from sparing.core.method import Method
from sparing.core.pattern import Partial, Pattern, always_on, blank, causal_pairs
from sparing.core.prompt_method import PromptMethod
from sparing.core.scorer import Rotary, Softmax
from sparing.errors import InvalidInputError, MethodRefusedError, require

Chunks = Literal["any", "blocks", "none"]


@dataclass(frozen=True)
class PromptCall:
    """One attention call of a prompt: the last Q rows of a sequence of N tokens.

    Attributes:
        query: (Hq, Q, D). keys, values: (H, N, D) and (H, N, Dv), normalised and rotated; query head h reads KV head
            h // (Hq / H).
        softmax: how the model turns logits into attention.
        run: computes attention under a pattern, with everything the model does to it but sinks; see `attend`.
        layer, num_layers: which of the sparse layers this is, and how many there are.
        attention_layer: the layer's number among all attention layers, which is how measurements of heads count.
        rotary: the model's rotary embedding; None if there is none, or it cannot be inverted.
        run_alone: as `run`, without log-sum-exps where they cost time; None if there is no such way.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    softmax: Softmax
    run: Callable[[PromptCall, Pattern], Partial]
    layer: int = 0
    num_layers: int = 1
    rotary: Rotary | None = None
    run_alone: Callable[[PromptCall, Pattern], Partial] | None = None
    attention_layer: int = 0

    @property
    def heads(self) -> int:
        """Hq."""
        return int(self.query.shape[0])

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return int(self.query.shape[0] // self.keys.shape[0])

    @property
    def rows(self) -> int:
        """Q."""
        return int(self.query.shape[1])

    @property
    def tokens(self) -> int:
        """N."""
        return int(self.keys.shape[1])

    @property
    def start(self) -> int:
        """Position of the first query row."""
        return self.tokens - self.rows

    def grid(self, size: int) -> Pattern:
        """The pattern in which every block reads itself only, to be filled."""
        return blank(self.heads, self.tokens, self.start, size, self.query.device)

    def attend(self, pattern: Pattern, *, final: bool = False) -> Partial:
        """Attention under a pattern, sinks left out.

        Args:
            final: it is the whole answer, merged with nothing: the log-sum-exp is left out where it costs time.
        """
        if final and self.run_alone is not None and self.softmax.sinks is None:
            return self.run_alone(self, pattern)
        return self.run(self, pattern)


@dataclass(frozen=True)
class Attended:
    """What a method made of a call.

    Attributes:
        part: the attention, sinks left out.
        pattern: what was read, for the accounting; where attention is not that of a set of keys, what it costs.
        zeros: of the numbers that stand for keys, how many are zero, and how many there are; for methods that simulate
            what hardware would save by that.
    """

    part: Partial
    pattern: Pattern
    zeros: tuple[int, int] = (0, 0)


class BlockScorer:
    """Scores blocks of keys for blocks of query rows: higher = keep."""

    def score(self, call: PromptCall, size: int) -> Tensor:
        """(Hq, nq, nk) float32, finite; entries that no row may see are never read.

        `is_mass` says that they are estimates of attention: not negative, and comparable between rows and heads.
        """
        raise NotImplementedError

    is_mass: ClassVar[bool] = False


@dataclass(frozen=True)
class BlockParts:
    """What a block-sparse method is made of.

    Attributes:
        scorer: ranks the blocks. allocator: spreads the budget over rows and heads.
        first: leading blocks that are always on (attention sinks). recent: blocks before a row's own that are.
    """

    scorer: BlockScorer
    allocator: BlockAllocator
    first: int = 1
    recent: int = 0


@dataclass(frozen=True)
class SparsePrefill(PromptMethod):
    """Base of all methods that read a prompt sparsely.

    Attributes:
        keep: density, the share of the (query, key) pairs of dense attention that is computed, in (0, 1]; or (int)
            keys that a row reads on average. Blocks that are always on count, and may exceed it. At 1 all is computed.
        block: tokens of a block.
        dispatch: "auto": dense attention where it would be faster, by a measurement on this machine; "always": the
            pattern, whatever it costs.

    Raises:
        InvalidInputError: a value that is not allowed. MethodRefusedError: bytes as a budget, which nothing here frees.
    """

    keep: int | float | str = 0.25
    block: int = 128
    dispatch: str = field(default="auto", kw_only=True)

    chunks: ClassVar[Chunks] = "blocks"
    """Which chunks of a prompt give what the whole gives: any, those that begin at a block, or none."""
    is_masked_softmax: ClassVar[bool] = True
    """Whether attention is the softmax over what the pattern says, and nothing else."""

    def __post_init__(self) -> None:
        super().__post_init__()
        is_whole = type(self.block) is int and self.block >= 16 and self.block % 16 == 0
        require(is_whole, "block", self.block, "a multiple of 16")
        require(self.dispatch in ("auto", "always"), "dispatch", self.dispatch, '"auto" or "always"')
        if self.budget.kind == "bytes":
            problem = "frees no bytes: it computes less"
            raise MethodRefusedError(self.label, problem, "give a density in (0, 1] or keys per row")
        problem = "says how a prompt is read, not what is stored"
        self._refuse("bits", "prefill", problem=problem, fix="combine them: method(..., prefill=this)")

    def block_parts(self) -> BlockParts:
        """Scorer and allocator, of methods that are made of them."""
        problem = "is not made of a scorer of blocks and an allocator"
        raise MethodRefusedError(self.label, problem, f"use {self.label} as it is")

    def pattern(self, call: PromptCall) -> Pattern:
        """What to read; at most `keep` of it unless more is always on."""
        return choose_blocks(self.block_parts(), call, self)

    def attend(self, call: PromptCall) -> Attended:
        """The attention of a call."""
        pattern = self.pattern(call)
        return Attended(call.attend(pattern, final=True), pattern)

    def pairs(self, call: PromptCall) -> int:
        """The budget: (query, key) pairs that each head may compute on average."""
        if self.budget.kind == "ratio":
            return int(self.budget.amount * causal_pairs(call.rows, call.tokens) + 0.5)
        return int(self.pairs_until(torch.tensor([call.start, call.tokens])).diff())

    def pairs_until(self, ends: Tensor) -> Tensor:
        """The budget of a head for all rows before each of the positions, float64: for methods that only see those."""
        ends = ends.double()
        if self.budget.kind == "ratio":
            return self.budget.amount * causal_pairs(ends, ends)
        full = ends.clamp_max(self.budget.amount)
        return causal_pairs(full, full) + (ends - full) * self.budget.amount

    @property
    def reads_all(self) -> bool:
        """True if attention is dense."""
        return self.budget.keeps_all

    @property
    def reading(self) -> SparsePrefill | None:
        """This."""
        return None if self.reads_all else self


@dataclass(frozen=True)
class BlockSparse(SparsePrefill):
    """Any scorer of blocks with any allocator: the sparse counterpart of `Evict`.

    Attributes:
        scorer, allocator, first, recent: see `BlockParts`.
    """

    scorer: BlockScorer | None = None
    allocator: BlockAllocator | None = None
    first: int = 1
    recent: int = 0

    @property
    def chunks(self) -> Chunks:  # type: ignore[override]
        """Rows that share a budget have to be seen together."""
        return "blocks" if isinstance(self.allocator, EqualRows) else "none"

    def block_parts(self) -> BlockParts:
        """See `SparsePrefill.block_parts`."""
        if self.scorer is None or self.allocator is None:
            raise InvalidInputError("BlockSparse", self.scorer, "a BlockScorer and a BlockAllocator")
        return BlockParts(self.scorer, self.allocator, self.first, self.recent)

    @property
    def label(self) -> str:
        """Scorer+allocator."""
        return f"{type(self.scorer).__name__}+{type(self.allocator).__name__}"


def choose_blocks(parts: BlockParts, call: PromptCall, method: SparsePrefill, size: int | None = None) -> Pattern:
    """The pattern of the best blocks within the method's budget; `size`: of blocks, the method's by default."""
    size = size or method.block
    grid, whole = call.grid(size), blank(1, call.tokens, 0, size, call.query.device)
    forced = always_on(whole, parts.first, parts.recent)
    edges = torch.arange(grid.num_key_blocks + 1, device=forced.device).mul(size).clamp_max(call.tokens)
    areas = whole.areas()
    free = (method.pairs_until(edges).diff() - (forced * areas).sum(-1)) / areas.amax(-1)  # in blocks, of every row
    budget = BlockBudget(
        grid.areas(), grid.reachable(), forced[grid.first_block :].expand_as(grid.blocks), method.pairs(call),
        F.pad(free.cumsum(0), (1, 0)).cpu(),
    )  # fmt: skip
    blocks = parts.allocator.allocate(parts.scorer.score(call, size), budget, is_mass=parts.scorer.is_mass)
    return Pattern(call.tokens, call.start, size, blocks)


def as_said(method: Method) -> Method:
    """The method, reading every prompt as it says: also where dense attention would be faster."""
    if isinstance(method, SparsePrefill):
        return replace(method, dispatch="always")
    return method if method.prefill is None else replace(method, prefill=replace(method.prefill, dispatch="always"))
