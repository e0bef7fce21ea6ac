"""ChunkKV: stretches of text are kept or dropped as a whole (Liu et al. 2025, arXiv:2502.00299).

Ranks: kv_token. The prompt is cut into chunks of c tokens; all tokens of a chunk share the chunk's score, so that what
stays is text and not single words.

    s[h, C] = mean over the tokens j of chunk C of a[h, j],     s[h, j] = s[h, C of j]
    size ↔ c = 10;   a ↔ `scorer`, by default the attention of the last W rows, unpooled;   window ↔ W = 32

`keep` is honoured exactly: the best chunks stay whole, and of the first one that does not fit its first tokens stay.
Cost: as the score's.

Deviations:
1. A mean instead of the paper's sum: the same order for whole chunks, and the last, shorter one is not put behind.
2. Every KV head chooses its own chunks, so that any allocator can be used. kvpress adds the scores of a layer's heads.
3. The chunks are those of the sequence, counted from its first real token, and so stay the same over turns; the mean is
   over the tokens of the chunk that are still there.
4. The paper's reuse of one layer's choice in the next ones is not offered: it saves scoring time, not memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sparing.core.allocate import Uniform
from sparing.core.method import Method, Parts, register
from sparing.core.scorer import KeyValues
from sparing.core.wrapper import Wrapper
from sparing.errors import require
from sparing.methods.kv.snapkv import WindowAttention


@dataclass(frozen=True)
class Chunked(Wrapper):
    """Every token gets the mean score of its chunk.

    Attributes:
        scorer: scores the tokens.
        size: tokens per chunk.
    """

    size: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.size >= 1, "size", self.size, "a number of tokens >= 1")

    def score(self, state: Any, stored: KeyValues) -> Tensor:
        """See `Scorer.score`."""
        own = self.scorer.score(state, stored).masked_fill(~stored.valid, 0.0)
        chunk = stored.true_positions.masked_fill(~stored.valid, 0) // self.size
        shape = (*own.shape[:2], int(chunk.max()) + 1)
        totals = own.new_zeros(shape).scatter_add_(-1, chunk, own)
        counts = own.new_zeros(shape).scatter_add_(-1, chunk, stored.valid.to(own.dtype))
        return (totals / counts.clamp_min(1)).gather(-1, chunk)


@register("chunkkv", paper="2502.00299", summary="whole chunks of text, by what the last rows of the prompt attend to")
@dataclass(frozen=True)
class ChunkKV(Method):
    """Chunks instead of tokens.

    Attributes:
        size: tokens per chunk (10; 20 in kvpress).
        window: rows that vote, always kept themselves (32).
    """

    size: int = 10
    window: int = 32

    def parts(self) -> Parts:
        """See `Method.parts`."""
        return Parts(Chunked(WindowAttention(self.window, kernel_size=1), self.size), Uniform())
