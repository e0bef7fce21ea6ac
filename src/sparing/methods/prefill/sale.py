"""SALE: blocks in which a key weighs enough, by logits of a few bits (Ji et al. 2025, arXiv:2505.24179).

Ranks: key block, per query head and row of blocks. Sinks and a local window are attended exactly, which gives the
log-sum-exp L_i of every row over them; other logits are estimated from queries and keys of 4 bits,

    weight of block J for rows I = max over i in I, j in J of exp(s~_ij − L_i),     read if larger than tau_h
    s~_ij = scaling · (Q4(q_i − q̄) · Q4(k_j − k̄) + q̄ · (k_j − k̄) + q_i · k̄),   q̄, k̄ means over the tokens of a head
    Q4(x) = round(x · 7 / max|x|) · max|x| / 7 of a token

exp(L) is the paper's l · e^m. tau ↔ tau_h; local ↔ 128 tokens; first ↔ the sink block; estimate_bits ↔ 4.

Cost: attention over sinks and window, and 1 / stride of dense q · k.

Deviations:
1. Blocks are `block` x `block` (64); the paper's are 64 rows x 32 keys.
2. CPUs lack products of 4 bits, so codes are multiplied as floats, which costs what exact products cost. To save time
   every `stride`-th row (8) stands for its neighbours in "any row of the block"; stride=1 is the paper's rule.
3. tau=None without measured thresholds, the default, is the smallest threshold that `keep` allows: blocks are ranked by
   weight over all rows and heads of a layer. With thresholds, `keep` is a ceiling, and weights are ranked relative to
   their head's.
4. Thresholds per head are optional: `sparing calibrate --method sale` measures them (see `methods/heads/sale.py`).
   There is no switch to dense attention below 1024 tokens.
5. The whole prompt shares one budget and one mean, so it must be read at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparing.core.allocate_blocks import BlockBudget, best_within
from sparing.core.method import register
from sparing.core.pattern import Pattern, always_on
from sparing.core.prefill import Chunks, PromptCall, SparsePrefill
from sparing.core.scores import Scores
from sparing.errors import require

# Logits that are estimated at a time.
ELEMENTS_PER_TILE = 1 << 22

EXACT = 16

# Smaller measured thresholds mean a head that reads all.
DENSE = 1e-4


@register(
    "sale",
    family="sparse_prefill",
    unit="block",
    moment="prefill",
    paper="2505.24179",
    takes=("sale",),
    summary="blocks in which a key weighs enough beside sinks and a local window, by 4-bit logits",
)
@dataclass(frozen=True)
class Sale(SparsePrefill):
    """Blocks by the largest weight in them. See the module.

    Attributes:
        first: leading blocks, and local: tokens before a row's block (in whole blocks), that are always read.
        tau: weight that a block must exceed (0.008 where the paper's calibration begins; 0: read all); None: by `keep`.
        estimate_bits: of the codes (4); 16 for exact logits.
        stride: one of so many rows is estimated (8).
        scores: thresholds per head, as `sparing.calibrate(model, "sale", tokenizer)` measures them, instead of tau.
    """

    block: int = 64
    first: int = 1
    local: int = 128
    tau: float | None = None
    estimate_bits: int = 4
    stride: int = 8
    scores: Scores | tuple[Scores, ...] | None = None

    chunks: ClassVar[Chunks] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.first >= 0, "first", self.first, "a number of blocks >= 0")
        require(self.local >= 0, "local", self.local, "a number of tokens >= 0")
        require(self.tau is None or self.tau >= 0, "tau", self.tau, "a weight >= 0, or None")
        bits = self.estimate_bits
        require(2 <= bits <= 8 or bits == EXACT, "estimate_bits", bits, f"2 to 8, or {EXACT} for exact logits")
        self._check_scores()
        divides = self.stride >= 1 and self.block % self.stride == 0
        require(divides, "stride", self.stride, f"a divisor of the block, {self.block}")

    def _check_scores(self) -> None:
        if self.measurements:
            require(self.tau is None, "tau", self.tau, "None where thresholds are measured")
            is_one = len(self.measurements) == 1 and isinstance(self.measurements[0], Scores)
            require(is_one, "scores", self.scores, "one measurement by `sale`")
            self.measurements[0].require_axes("layer", "head")

    @property
    def reads_all(self) -> bool:
        """See `SparsePrefill.reads_all`."""
        return super().reads_all and self.tau is None and not self.measurements

    @property
    def measurements(self) -> tuple[Scores, ...]:
        """See `Method.measurements`."""
        if self.scores is None:
            return ()
        return self.scores if isinstance(self.scores, tuple) else (self.scores,)

    def pattern(self, call: PromptCall) -> Pattern:
        """See `SparsePrefill.pattern`."""
        grid = call.grid(self.block)
        forced = always_on(grid, self.first, -(-self.local // self.block)).expand_as(grid.blocks)
        exact = Pattern(call.tokens, call.start, self.block, forced)
        weights = self.log_weights(call, exact, call.attend(exact).lse)
        budget = BlockBudget(grid.areas(), grid.reachable(), forced, self.pairs(call))
        wanted, tau = None, self._thresholds(call)
        if tau is not None:
            wanted = budget.free & (weights > tau.log()[:, None, None])
            # A head that reads all comes first, its blocks in their own order.
            weights = weights - tau.clamp_min(1e-30).log()[:, None, None]
        return Pattern(call.tokens, call.start, self.block, forced | best_within(weights, budget, wanted))

    def _thresholds(self, call: PromptCall) -> Tensor | None:
        """(Hq,) float32."""
        if not self.measurements:
            return None if self.tau is None else torch.full((call.heads,), self.tau, device=call.query.device)
        measured = self.measurements[0].values[call.attention_layer].to(call.query.device)
        tau = (-measured).exp2()
        return tau.masked_fill(tau <= DENSE, 0.0)

    def log_weights(self, call: PromptCall, exact: Pattern, lse: Tensor) -> Tensor:
        """(Hq, nq, nk) float32: the log of every block's largest weight; -inf where blocks are read anyway or never.

        Args:
            exact: the blocks that are read anyway, all heads alike. lse: (Hq, Q) over these.
        """
        rows = self._rows(call, exact)
        logits = _Logits(call, rows, self.estimate_bits)
        weights = torch.full(exact.blocks.shape, -torch.inf, device=lse.device)
        free = exact.reachable() & ~exact.blocks[0]
        height = max(ELEMENTS_PER_TILE // (call.heads * rows.shape[1] * call.tokens), 1)
        for begin in range(0, len(rows), height):
            some = slice(begin, min(begin + height, len(rows)))
            end = int((free[some].any(0) * torch.arange(1, free.shape[1] + 1, device=free.device)).max())
            if end:
                found = logits.largest(some, end, self.block) - lse[:, rows[some], None].float()
                weights[:, some, :end] = found.amax(2)
        return weights.masked_fill_(~free, -torch.inf)

    def _rows(self, call: PromptCall, exact: Pattern) -> Tensor:
        """(nq, block / stride) query rows that stand for their blocks; blocks cut short repeat their first or last."""
        inside = torch.arange(self.stride - 1, self.block, self.stride, device=call.query.device)
        edges = torch.arange(exact.first_block, exact.num_key_blocks, device=call.query.device) * self.block
        return (edges[:, None] + inside).clamp(call.start, call.tokens - 1) - call.start


class _Logits:
    """Logits of some rows (nq, r), exact or from few bits."""

    def __init__(self, call: PromptCall, rows: Tensor, bits: int) -> None:
        self.softmax, self.shape = call.softmax, rows.shape
        keys = call.keys.float()
        queries = call.query.float().unflatten(0, (len(keys), call.group))
        some = queries[:, :, rows.flatten()]
        self.of_rows = self.of_keys = None
        if bits != EXACT:
            middle, centre = keys.mean(1, keepdim=True), queries.mean(2, keepdim=True)
            keys = keys - middle
            self.of_rows = (some @ middle[:, None].transpose(-1, -2)) * call.softmax.scaling  # (H, G, rows, 1)
            self.of_keys = (centre @ keys[:, None].transpose(-1, -2)) * call.softmax.scaling  # (H, G, 1, N)
            keys, some = coded(keys, bits), coded(some - centre, bits)
        self.queries = some.unflatten(2, self.shape) * call.softmax.scaling
        self.keys = keys.transpose(-1, -2).contiguous()

    def largest(self, some: slice, blocks: int, size: int) -> Tensor:
        """(Hq, nq, r, blocks): the largest logits in the first blocks of keys, of the rows of some blocks."""
        states, stop = self.queries[:, :, some], blocks * size
        logits = (states.flatten(1, 3) @ self.keys[..., :stop]).view(*states.shape[:2], -1, stop)
        if self.of_keys is not None:
            logits.add_(self.of_keys[..., :stop])
        found = logits.unflatten(-1, (blocks, size)).amax(-1).unflatten(2, states.shape[2:4])
        if self.of_rows is not None:
            found = found + self.of_rows.unflatten(2, self.shape)[:, :, some]
        return self.softmax.capped(found.flatten(0, 1))


def coded(x: Tensor, bits: int) -> Tensor:
    """(..., D) rounded to 2^bits - 1 values, from -largest to largest of each row."""
    most = 2 ** (bits - 1) - 1
    step = x.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny) / most
    return (x / step).round_().mul_(step)
