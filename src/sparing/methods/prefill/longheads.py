"""LongHeads while the prompt is read: chunks chosen by what they are about (Lu et al. 2024, arXiv:2402.10685).

Ranks: chunks of L tokens for blocks of as many rows. A full chunk of queries Q, keys K and values V is stood for by

    u = mean over its rows of  softmax(Q K^T s) V        all tokens of the chunk see each other
    c = softmax(u K'^T s) K'                             K': K rotated to positions 0 .. L-1

and ranked by q · c, q the mean query of the rows before rotation. L ↔ block. The first chunk, the last full one and the
rows' own are always read. (`methods.kv.longheads` does the same for decoded tokens.)

Cost: L dot products and as many products with values per token and query head, 2 L / N of attention.

Deviations:
1. Keys stay at their original positions: it saves computing, and does not lengthen what a model can read. The authors
   move what is read together, and read the first 4096 tokens densely.
2. The rows of a block choose together, by their mean; the authors choose for single tokens or 128 of them.
3. Query heads choose for themselves, as in the authors' model without groups. `keep` is a share of what a row may see,
   the same for all (the authors: 16 chunks).
4. Of chunks read in an earlier turn, the queries are gone: u is the mean of V, as if all tokens were alike to them.
5. A softcap takes part in attention, not in what stands for a chunk. Where the model's rotation cannot be inverted,
   queries and keys are taken as they are. Where values are of another size than keys, keys take their place in u.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from sparing.core.actions import turn
from sparing.core.allocate_blocks import EqualRows
from sparing.core.method import register
from sparing.core.prefill import BlockParts, BlockScorer, Chunks, PromptCall, SparsePrefill
from sparing.measures.blocks import pooled
from sparing.measures.chunks import chunk_keys, mean_outputs

HELD = 2**24  # numbers of attention inside chunks that are held at a time


@dataclass(frozen=True)
class ChunkKeys(BlockScorer):
    """Mean query, turned back, times what stands for a chunk."""

    def score(self, call: PromptCall, size: int) -> Tensor:
        """See `BlockScorer.score`."""
        plain = call.query.float()
        if call.rotary is not None:
            positions = torch.arange(call.start, call.tokens, device=plain.device)
            plain = call.rotary.unrotate(plain[None], positions[None])[0]
        chunks = represented(call, size)
        scores = pooled(plain, size, call.start) @ chunks.mT
        return F.pad(scores, (0, -(-call.tokens // size) - chunks.shape[1]))


def represented(call: PromptCall, size: int) -> Tensor:
    """(Hq, full chunks, D): what stands for every full chunk."""
    full = call.tokens // size
    first = min(-(-call.start // size), full)  # the first chunk whose queries are all there
    said = call.values if call.values.shape[-1] == call.keys.shape[-1] else call.keys
    keys, values = (x[:, : full * size].float().unflatten(1, (full, size))[:, None] for x in (call.keys, said))
    begin = first * size - call.start
    queries = call.query[:, begin : begin + (full - first) * size].float()
    queries = queries.unflatten(0, (len(keys), call.group)).unflatten(2, (full - first, size))
    means = [values[:, :, :first].mean(3).expand(-1, call.group, -1, -1)]
    width = max(HELD // (call.heads * size**2), 1)
    for low in range(first, full, width):
        some = slice(low, low + width)
        mine = queries[:, :, low - first :][:, :, :width]
        means.append(mean_outputs(mine, keys[:, :, some], values[:, :, some], call.softmax.scaling))
    # Turning a chunk's mean output to where its keys are, and back, is turning all of them to where it is.
    mean = torch.cat(means, dim=2)
    mean = _moved(mean, call, size) if said is call.values else mean
    parts = zip(mean.split(width, dim=2), keys.split(width, dim=2), strict=True)
    found = torch.cat([chunk_keys(u, k, call.softmax.scaling) for u, k in parts], dim=2)
    return _moved(found, call, -size).flatten(0, 1)


def _moved(x: Tensor, call: PromptCall, step: int) -> Tensor:
    """(H, G, chunks, D) turned by `step` positions for every chunk before."""
    if call.rotary is None or not x.shape[2]:
        return x
    moves = (torch.arange(x.shape[2], device=x.device) * step).expand(1, call.heads, -1)
    return turn(x.flatten(0, 1)[None], moves, call.rotary)[0].view_as(x)


@register(
    "longheads_prefill",
    family="sparse_prefill",
    unit="block",
    moment="prefill",
    paper="2402.10685",
    summary="chunks that a block's mean query finds by one vector each",
)
@dataclass(frozen=True)
class LongHeadsPrefill(SparsePrefill):
    """Chunk selection per block of rows. See the module.

    Attributes:
        block: tokens of a chunk, and rows that choose together (256).
    """

    block: int = 256

    chunks: ClassVar[Chunks] = "none"

    def block_parts(self) -> BlockParts:
        """See `SparsePrefill.block_parts`."""
        return BlockParts(ChunkKeys(), EqualRows(), first=1, recent=1)
