"""LongHeads: every head reads a few chunks, moved together to positions that the model was trained on.

arXiv:2402.10685 (Lu et al. 2024).

Ranks: chunks of L tokens per KV head, for every decoded token anew. Nothing is dropped: it saves reading, not memory.
The paper's aim is length: distances never exceed what is read. A full chunk, of queries Q, keys K and values V,

    u = mean over its rows of  softmax(Q K^T s) V        all tokens of the chunk see each other
    c = softmax(u K'^T s) K'                             K': K rotated to positions 0 .. L-1

is ranked by q · c, q the new token's query before rotation. L ↔ chunk. The first chunk, the last full one and the
unfinished one are always read, then the best. What is read is rotated to positions 0, 1, 2, ... in order, the query to
the last of them.

Cost: L² dot products per query head when a chunk is full; beside the cache one vector per chunk and query head, and the
queries of two chunks; per step one dot product per chunk, and two rotations of what is read.

Deviations:
1. The prompt is read densely, as by all readers here; the authors select for every token beyond the trained length.
2. The authors rank per query head of a model without groups; here the scores of a group are averaged.
3. `keep` is honoured to the token (the authors: 16 chunks). Of a chunk that fits in part, the newest are read; if not
   even the three chunks fit, the unfinished one comes first, then the first.
4. A softcap or learned sinks take part in attention, not in the chunks' representation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from sparing.core.actions import turn
from sparing.core.method import Method, Parts, register
from sparing.core.reader import Choice, Reader, Step, best_blocks, with_ends
from sparing.core.scorer import KeyValues, Queries, Softmax
from sparing.errors import require
from sparing.measures.chunks import chunk_keys, mean_outputs


@dataclass(frozen=True)
class ChunkSelection(Reader):
    """Reads the chunks whose representation answers the query.

    Its state: `chunks` (B, Hq, C, D), of full chunks; `tail` (B, Hq, T, D), the newest queries as rotated by the model,
    and `where` (B, T), their slots.

    Attributes:
        chunk: tokens per chunk.
    """

    chunk: int = 256

    needs_rotary: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.chunk >= 1, "chunk", self.chunk, "a number of tokens >= 1")

    def observe(self, state: Any, queries: Queries, stored: KeyValues) -> Any:
        """See `Reader.observe`."""
        where = queries.positions.expand(queries.states.shape[0], -1)
        if state is None:
            none = queries.states[:, :, :0]
            state = {"chunks": none.float(), "tail": none, "where": where[:, :0]}
        tail = torch.cat([state["tail"], queries.states], dim=2)
        where = torch.cat([state["where"], where], dim=1)
        full = (int(queries.positions[-1]) + 1 - stored.pads) // self.chunk
        done = (int(queries.positions[0]) - stored.pads).clamp_min(0) // self.chunk
        chunks = state["chunks"]
        chunks = F.pad(chunks, (0, 0, 0, max(int(full.max()) - chunks.shape[2], 0)))
        for row, (start, end) in enumerate(zip(done.tolist(), full.tolist(), strict=True)):
            for number in range(start, end):
                chunks[row, :, number] = self._represent(tail[row], where[row], stored, row, number, queries.softmax)
        last = slice(max(tail.shape[2] - 2 * self.chunk, 0), None)  # what a crop may leave unfinished is among them
        return {"chunks": chunks, "tail": tail[:, :, last].clone(), "where": where[:, last].clone()}

    def _represent(
        self, tail: Tensor, where: Tensor, stored: KeyValues, row: int, number: int, softmax: Softmax
    ) -> Tensor:
        """(Hq, D) of one full chunk of one row; of queries that are not known any more, the mean does without."""
        start = int(stored.pads[row]) + number * self.chunk
        part = slice(start, start + self.chunk)
        keys, values = stored.keys[row, :, part].float(), stored.values[row, :, part].float()
        groups = tail.shape[0] // keys.shape[0]
        queries = tail[:, (where >= start) & (where < start + self.chunk)].float()
        if queries.shape[1] == 0:
            return tail.new_zeros(tail.shape[0], keys.shape[-1]).float()
        # Rotated to any common origin: inside a chunk only distances matter.
        moves = torch.full((1, 1, self.chunk), -number * self.chunk, device=keys.device)
        local = keys if stored.rotary is None else turn(keys[None], moves.expand(1, len(keys), -1), stored.rotary)[0]
        keys, values, local = (x.repeat_interleave(groups, dim=0) for x in (keys, values, local))
        mean = mean_outputs(queries, keys, values, softmax.scaling)
        return chunk_keys(mean, local, softmax.scaling)

    def choose(self, state: Any, step: Step) -> tuple[Any, Choice]:
        """See `Reader.choose`."""
        stored, newest = step.stored, step.stored.positions[0, 0, -1:]
        real = torch.ones(step.query.shape[0], 1, dtype=torch.bool, device=step.query.device)
        state = self.observe(state, Queries(step.query[:, :, None], newest, real, step.softmax), stored)
        if step.reads_all:
            return state, Choice(None)
        heads, at = stored.keys.shape[1], (newest - stored.pads)[:, None]
        query = step.query[:, :, None].float()
        plain = query if stored.rotary is None else stored.rotary.unrotate(query, at)
        scores = (plain * state["chunks"]).sum(-1).unflatten(1, (heads, -1)).mean(2)
        choice = best_blocks(with_ends(scores, self.chunk, stored), self.chunk, step)
        return state, self._moved_together(choice, plain, step)

    @staticmethod
    def _moved_together(choice: Choice, plain: Tensor, step: Step) -> Choice:
        """The choice with keys and query at compact positions."""
        stored, slots, valid = step.stored, choice.slots, choice.valid
        assert slots is not None
        assert valid is not None
        if stored.rotary is None:
            return choice
        rows, heads, count = slots.shape
        compact = (valid.long().cumsum(-1) - 1).clamp_min(0)
        moves = compact - (slots - stored.pads[:, None, None])
        lanes = []
        for row in range(rows):
            for head in range(heads):  # one lane's temporaries fit a processor's cache
                keys = stored.keys[row, head].index_select(0, slots[row, head])
                lanes.append(turn(keys[None, None], moves[row, head][None, None], stored.rotary))
        query = stored.rotary.rotate(plain.reshape(rows * heads, -1, 1, plain.shape[-1]), compact[..., -1].view(-1, 1))
        return Choice(
            slots, valid, torch.cat(lanes).view(rows, heads, count, -1), query.view(rows, -1, plain.shape[-1])
        )

    def crop(self, state: Any, tokens: int) -> Any:
        """See `Reader.crop`: chunks that are not full any more are made again when they are."""
        left = state["where"][0] < tokens
        return {**state, "tail": state["tail"][:, :, left], "where": state["where"][:, left]}


@register("longheads", paper="2402.10685", summary="reads a few chunks at compact positions; frees no memory")
@dataclass(frozen=True)
class LongHeads(Method):
    """Chunks per head, in a window of trained positions.

    Attributes:
        chunk: tokens per chunk (256).
    """

    chunk: int = 256

    def parts(self) -> Parts:
        """See `Method.parts`."""
        return Parts.reading(ChunkSelection(self.chunk))
