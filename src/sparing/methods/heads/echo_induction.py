"""Echo and induction heads, found without any data (RazorAttention, arXiv:2407.15891).

Ranks: head. A block T of random tokens is repeated. In row i, an echo head attends to earlier copies of token i, an
induction head to what followed them:

    echo[h]      = mean over rows i of  sum over earlier copies j of token i of  A[h, i, j]
    induction[h] = mean over rows i of  sum over earlier copies j of token i of  A[h, i, j + 1]
    rows: all of the second and later copies of the block

Cost: one forward over `repeats * block` tokens; O(repeats) sums per row.

Deviations:
1. Blocks of 256 tokens, not 2500, so that small models can read them; `block` sets it.
2. Tokens are drawn from the whole vocabulary (special tokens left out where the tokenizer names them), and without
   repetition within the block where the vocabulary allows: repeats would count as neither echo nor induction.
3. No BOS token in front.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparing.core.head_scorer import HeadScorer, Measured, Run, register_scorer
from sparing.core.lens import Attend, AttentionCall, Lens
from sparing.errors import require
from sparing.measures.attention import row_tiles


@dataclass(frozen=True)
class RepeatedBlock(HeadScorer):
    """What both share.

    Attributes:
        block: tokens of the block. repeats: copies of it, at least 2.
    """

    block: int = 256
    repeats: int = 4

    def __post_init__(self) -> None:
        require(self.block >= 2, "block", self.block, "a number of tokens >= 2")
        require(self.repeats >= 2, "repeats", self.repeats, "a number of copies >= 2")

    def _mass(self, lens: Lens, run: Run, after: int) -> Measured:
        """Mean mass on the tokens `after` places behind the earlier copies of each token."""
        length = self.block * self.repeats
        fits = lens.max_length is None or length <= lens.max_length
        require(fits, "block * repeats", length, f"at most the model's {lens.max_length} positions")
        ids = torch.tensor([draw_block(lens, self.block, run.seed) * self.repeats])
        found = torch.zeros(lens.num_layers, lens.num_heads)

        def watch(call: AttentionCall, attend: Attend) -> Tensor:
            total = torch.zeros(lens.num_heads, device=call.queries.device)
            for rows, attention in row_tiles(call, start=self.block):
                at = torch.arange(ids.shape[1], device=attention.device)[rows, None]
                behind = at - torch.arange(1, self.repeats, device=attention.device) * self.block
                places = (behind + after).clamp_min(0)[None, None].expand(1, lens.num_heads, -1, -1)
                picked = attention.gather(-1, places).masked_fill(behind < 0, 0.0)
                total += picked.sum((0, 2, 3)).float()
            found[call.layer] = (total / (ids.shape[1] - self.block)).cpu()
            return attend(call)

        with torch.no_grad(), lens.hooked(attention=watch):
            lens.forward(ids, last=1)
        return Measured(found, 1)


@register_scorer("echo", family="retrieval", data="none", paper="2407.15891",
                 summary="attention to earlier copies of the same token")  # fmt: skip
@dataclass(frozen=True)
class Echo(RepeatedBlock):
    """Mass on earlier copies of the current token."""

    def measure(self, lens: Lens, run: Run) -> Measured:
        """See `HeadScorer.measure`."""
        return self._mass(lens, run, after=0)


@register_scorer("induction", family="retrieval", data="none", paper="2407.15891",
                 summary="attention to what followed earlier copies of the current token")  # fmt: skip
@dataclass(frozen=True)
class Induction(RepeatedBlock):
    """Mass on the tokens that came after earlier copies of the current token."""

    def measure(self, lens: Lens, run: Run) -> Measured:
        """See `HeadScorer.measure`."""
        return self._mass(lens, run, after=1)


def draw_block(lens: Lens, count: int, seed: int) -> list[int]:
    """Random token ids, all different where the vocabulary allows."""
    special = set(getattr(lens.tokenizer, "all_special_ids", None) or ())
    vocabulary = [i for i in range(lens.vocabulary_size) if i not in special]
    rng = random.Random(f"block/{seed}")
    draw: Callable[..., list[int]] = rng.sample if count <= len(vocabulary) else rng.choices
    return draw(vocabulary, k=count)
