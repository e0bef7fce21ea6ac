"""Block top-k: key blocks whose mean key has the largest product with the mean query (MInference, arXiv:2407.02490).

Score of key block j for query block i: mean(Q_i) · mean(K_j) / sqrt(D). Every row of blocks reads the same share of
what lies before it, `keep`; the paper reads the best 100 blocks of 64 tokens in every row.

Cost: nq * nk * D per head, 1 / block² of attention.

Deviations:
1. The first block and a row's own block are always read (the paper forces neither; The Sparse Frontier does).
2. The budget is a share of what a row may see instead of 100 blocks, so that densities can be compared.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparing.core.allocate_blocks import EqualRows
from sparing.core.method import register
from sparing.core.prefill import BlockParts, BlockScorer, PromptCall, SparsePrefill
from sparing.measures.blocks import pooled_logits


@dataclass(frozen=True)
class PooledLogits(BlockScorer):
    """Mean query times mean key."""

    def score(self, call: PromptCall, size: int) -> Tensor:
        """See `BlockScorer.score`."""
        return pooled_logits(call, size)


@register(
    "block_top_k",
    family="sparse_prefill",
    unit="block",
    moment="prefill",
    paper="2407.02490",
    summary="key blocks whose mean key fits a block's mean query best",
)
@dataclass(frozen=True)
class BlockTopK(SparsePrefill):
    """MInference's block-sparse pattern. See the module."""

    block: int = 64

    def block_parts(self) -> BlockParts:
        """See `SparsePrefill.block_parts`."""
        return BlockParts(PooledLogits(), EqualRows())
