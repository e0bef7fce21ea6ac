"""KVzip: what the model looks at when it repeats its own context (Kim et al. 2025, arXiv:2505.23416).

Ranks: kv_token. After the prompt, the prompt itself is read once more, in chunks, behind what is cached, as if the
model were writing it down again. A token matters as much as the most attention that any row of such a replay pays to
it, so the score belongs to the context and not to a question: one compressed context serves many questions.

    s[h, j] = max over replay rows i and the group of  softmax_j( q_i · k_j over [sinks | chunk of j | replay up to i] )
    chunk ↔ m = 2048 tokens,  sinks ↔ 4 first tokens, always kept,  budget: the best of all layers and heads together

Cost: a second forward over the prompt, in which every row attends to all that is cached, and O(n (chunk + sinks) d) for
the scores. The replay is cropped: positions and cache go on as if it had not happened.

Deviations:
1. The replay begins without an instruction, since a method has no tokenizer. `instruction` (before the first chunk) and
   `continuation` (before the others) take the token ids of the paper's "Repeat the previous context exactly." and
   "Repeat the part of the previous context exactly, starting with", chat template included.
2. The `overlap` last tokens of the chunk before stand in front of every later chunk also without an instruction: they
   say where to go on.
3. The first tokens are protected as kvpress does, not the system prompt, whose end a method does not know.
4. Exactly the budget is kept; the authors drop every tie at the threshold.
5. KVzip+ (rows divided by the norm of the hidden state) is not offered: scorers see no hidden states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparing.core.allocate import GlobalTopK
from sparing.core.method import Method, Parts, register
from sparing.core.scorer import KeyValues, Queries, Replay, Scorer
from sparing.errors import require
from sparing.measures.replayed import strongest_among


@dataclass(frozen=True)
class Reconstruction(Scorer):
    """s[h, j] = the most attention that a replay of the prompt pays to key j; 0 for what was not replayed.

    Attributes:
        chunk: tokens replayed at a time. sinks: first tokens, which every chunk may attend to.
        overlap: tokens of the chunk before that stand in front of a later one.
        instruction, continuation: token ids before the first chunk, and before the overlap of the others.
    """

    chunk: int = 2048
    sinks: int = 4
    overlap: int = 8
    instruction: tuple[int, ...] = ()
    continuation: tuple[int, ...] = ()
    replays: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.chunk >= 1, "chunk", self.chunk, "a number of tokens >= 1")
        require(self.sinks >= 0, "sinks", self.sinks, "a number of tokens >= 0")
        require(self.overlap >= 0, "overlap", self.overlap, "a number of tokens >= 0")

    def replay(self, ids: Sequence[int], drafted: Any = None) -> list[Replay]:
        """See `Scorer.replay`."""
        passes = []
        for start in range(0, len(ids), self.chunk):
            end = min(start + self.chunk, len(ids))
            before = (*self.continuation, *ids[max(start - self.overlap, 0) : start]) if start else self.instruction
            passes.append(Replay((*before, *ids[start:end]), start, end))
        return passes

    def observe_replay(self, state: Any, queries: Queries, stored: KeyValues, replay: Replay) -> Tensor:
        """See `Scorer.observe_replay`; the state is the (B, H, N) scores so far."""
        real = stored.positions - stored.pads[:, None, None]
        in_chunk = (real >= replay.start) & (real < replay.end)
        is_new = stored.positions >= queries.positions[0]
        found = strongest_among(queries, stored, in_chunk | (real < self.sinks) | is_new)
        found = found.masked_fill(~in_chunk, 0.0)[..., : stored.keys.shape[2] - len(replay.ids)]
        return found if state is None else torch.maximum(state, found)

    def score(self, state: Any, stored: KeyValues) -> Tensor:
        """See `Scorer.score`."""
        return torch.nn.functional.pad(state, (0, stored.keys.shape[2] - state.shape[-1]))

    def protects(self, tokens_per_head: int) -> tuple[int, int]:
        """See `Scorer.protects`."""
        return (self.sinks, 0)


@register(
    "kvzip",
    paper="2505.23416",
    summary="the tokens that the model looks at when it repeats the prompt; one sequence at a time",
)
@dataclass(frozen=True)
class KVzip(Method):
    """Context reconstruction, with all layers and heads competing.

    Attributes:
        chunk: tokens replayed at a time (2048). sinks: first tokens that are always kept (4).
        overlap: tokens of the chunk before that stand in front of a later one (8).
        instruction, continuation: token ids before the first chunk, and before the overlap of the others.
    """

    chunk: int = 2048
    sinks: int = 4
    overlap: int = 8
    instruction: tuple[int, ...] = ()
    continuation: tuple[int, ...] = ()

    def parts(self) -> Parts:
        """See `Method.parts`."""
        scorer = Reconstruction(self.chunk, self.sinks, self.overlap, self.instruction, self.continuation)
        return Parts(scorer, GlobalTopK())
