"""DeltaLLM while the prompt is read: far keys as sums of thresholded differences (Qi et al. 2025, arXiv:2507.19608).

A row reads the keys of the last blocks before it as they are, and those further back as what a chain of sparse
differences gives back; both parts are merged by their log-sum-exps. In each block of keys, for each number of theirs,

    r_0 = k_0,   r_j = r_{j-1} + d_j,   d_j = k_j − r_{j-1} where that is at least θ in absolute value, else 0

θ ↔ theta, the window ↔ window. So |r_j − k_j| < θ, and q · k_j costs as many products as d_j has numbers that are not
0: logits of a block are q · k_0 and sums of the rest.

This simulates what hardware that skips zeros would compute. **Here all is computed**: its density is 1, and the report
says what share of the differences is zero. `keep` is the share that is not, of all keys of a layer; θ is the smallest
that leaves no more, so that methods are compared at equal numbers of products.

Cost: beside attention, `block` steps over 16 blocks of keys of each head for each of the 16 values of θ that are tried,
and over all keys for the last one.

Deviations:
1. How the paper weighs accuracy and memory in choosing its thresholds is not known here: there is one θ for a layer,
   and θ, where it is given, is a lower limit.
2. Chains begin again at every block, with a key as it is, so that no logit needs the whole prefix; in
   `methods.kv.deltallm` there is one chain. What keys of a window would have cost counts as if they were differences.
3. The window is in whole blocks, a row's own and those that hold the `window` keys before it (the paper's size is not
   known here). Differences are of keys as cached, rotated.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from sparing.core.method import register
from sparing.core.pattern import Partial, Pattern, always_on, merged
from sparing.core.prefill import Attended, Chunks, PromptCall, SparsePrefill
from sparing.errors import require

TRIES = 16
SAMPLE = 16  # blocks of each head that thresholds are tried on


@register(
    "deltallm_prefill",
    family="sparse_prefill",
    unit="block",
    moment="prefill",
    paper="2507.19608",
    summary="far keys from thresholded differences, simulated; computes everything",
)
@dataclass(frozen=True)
class DeltaLLMPrefill(SparsePrefill):
    """Sparse differences of keys outside a window. See the module.

    Attributes:
        window: newest keys that are read as they are, rounded up to blocks.
        theta: smaller differences are left out, at least; None: as many as `keep` says.
    """

    block: int = 64
    window: int = 128
    theta: float | None = None

    chunks: ClassVar[Chunks] = "none"
    is_masked_softmax: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.window >= 0, "window", self.window, "a number of keys >= 0")
        is_theta = self.theta is None or 0 <= self.theta < float("inf")
        require(is_theta, "theta", self.theta, "a finite number >= 0, or None")

    @property
    def reads_all(self) -> bool:
        """See `SparsePrefill.reads_all`."""
        return super().reads_all and self.theta is None

    def pattern(self, call: PromptCall) -> Pattern:
        """Everything."""
        return call.grid(self.block).dense()

    def attend(self, call: PromptCall) -> Attended:
        """See `SparsePrefill.attend`."""
        grid, everything = call.grid(self.block), self.pattern(call)
        near = -(-self.window // self.block) + 1  # blocks, a row's own among them
        part = call.attend(replace(grid, blocks=always_on(grid, 0, near - 1).expand_as(grid.blocks)))
        keys, skipped = self.differences(call)
        far = self._far(replace(call, keys=keys), near * self.block)
        if far is not None:
            count = far.out.shape[1]
            last = merged(Partial(part.out[:, -count:], part.lse[:, -count:]), far)
            part = Partial(
                torch.cat([part.out[:, :-count], last.out], dim=1), torch.cat([part.lse[:, :-count], last.lse], dim=1)
            )
        return Attended(part, everything, (int(skipped.sum()), skipped.numel()))

    def differences(self, call: PromptCall) -> tuple[Tensor, Tensor]:
        """The keys (H, N, D) that differences give back, and which numbers of the differences are left out."""
        share = self.pairs(call) / call.grid(self.block).all_pairs()
        blocks = F.pad(call.keys, (0, 0, 0, -call.tokens % self.block)).unflatten(1, (-1, self.block))
        theta, most = self._threshold(call, blocks, share), 2 * float(call.keys.abs().max())
        while True:  # what holds for a sample of blocks may need a little more for all of them
            keys, skipped = (x.flatten(1, 2)[:, : call.tokens] for x in chains(blocks, theta))
            if theta > most or skipped.numel() - int(skipped.sum()) <= share * skipped.numel():
                return keys, skipped
            theta *= 1.01

    def _threshold(self, call: PromptCall, blocks: Tensor, share: float) -> float:
        """The smallest θ tried that leaves at most this share of the differences."""

        least = 0.0 if self.theta is None else self.theta
        if share >= 1:
            return least
        some = blocks[:, :: max(blocks.shape[1] // SAMPLE, 1)]
        low, high = least, 2 * float(call.keys.abs().max()) + least + torch.finfo(torch.float32).tiny
        for _ in range(TRIES):
            middle = (low + high) / 2
            skipped = chains(some, middle)[1]
            fits = skipped.numel() - int(skipped.sum()) <= share * skipped.numel()
            low, high = (low, middle) if fits else (middle, high)
        return high

    def _far(self, call: PromptCall, near: int) -> Partial | None:
        """Attention of the last rows to blocks at least `near` tokens before their own; None if none have any."""
        start = max(call.start, near)
        if start >= call.tokens:
            return None
        # Moved up by `near`, each row's own block is the last one that it reads, all of it.
        tokens = -(-(call.tokens - near) // self.block) * self.block
        rows = call.tokens - start
        query = F.pad(call.query[:, -rows:], (0, 0, 0, tokens - (call.tokens - near)))
        moved = replace(call, query=query, keys=call.keys[:, :tokens], values=call.values[:, :tokens])
        numbers = torch.arange(tokens // self.block, device=query.device)
        blocks = (numbers <= numbers[moved.start // self.block :, None]).expand(call.heads, -1, -1)
        part = moved.attend(Pattern(tokens, moved.start, self.block, blocks, is_causal=False))
        return Partial(part.out[:, :rows], part.lse[:, :rows])


def chains(blocks: Tensor, theta: float) -> tuple[Tensor, Tensor]:
    """Of (H, blocks, S, D) keys, those that thresholded differences give back, and which differences are left out."""
    held = blocks[:, :, 0]
    keys, skipped = torch.empty_like(blocks), torch.zeros_like(blocks, dtype=torch.bool)
    keys[:, :, 0] = held
    for slot in range(1, blocks.shape[2]):
        key = blocks[:, :, slot]
        changes = (key - held).abs() >= theta
        held = torch.where(changes, key, held)
        keys[:, :, slot] = held
        skipped[:, :, slot] = ~changes
    return keys, skipped
