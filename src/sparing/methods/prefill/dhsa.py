"""DHSA: chunks of keys as long as the text has them, and their best tokens (Xiong et al. 2025, arXiv:2510.24606).

Ranks: key tokens for each block of query rows, by the chunk that they are in. `dhsa` and `dhsa_cosine` cut the text
where its attention changes; a block of rows is stood for by its mean, and a chunk of n tokens by its mean times
sqrt(n), so that scores of independent keys vary alike whatever their number:

    s[i, c] = mean over all heads of mean(Q_i) · mean(K_c) · sqrt(n_c) / sqrt(D)

Every token has its chunk's score, and every row reads the same number of the best tokens before its block, chunk by
chunk. One set of tokens serves all heads. `dhsa` finds the cuts by predictors that `sparing calibrate --method dhsa`
trains (`methods/heads/boundaries.py`) and that see keys only. `dhsa_cosine` needs no training: it cuts where keys
resemble each other less across a position than on its two sides.

    distance ↔ the least length of a chunk, 8,   window ↔ w = 4,   recent ↔ 64 tokens before a block, always read,
    instruction ↔ the last 64 tokens of the prompt, which begin a chunk

`dhsa_blocks` is the authors' current release: blocks of 32 keys against blocks of 128 rows, mean query times mean key,
every head for itself; the first block and the one before a row's own are always read, as in its variant A.

Cost: 2w - 1 cosines of each key with its neighbours, and N² D / (block · chunk) multiplications per head; dhsa_blocks:
N² D / (block · key_block).

Deviations:
1. There are N / chunk chunks, cut where the score is best: how many there are is left open.
2. "Averaged over heads" is of scores; the legacy code leaves open of what. The factor sqrt(rows) of a block of rows
   changes no order within it and is left out.
3. The first tokens are always read (`sinks`); the paper's chunks have no such rule, and means hide sinks.
4. What a row may not see is taken out before its tokens are chosen; the released code lets blocks of the future take
   part of the budget. The chunk that reaches over a block's first row is scored by its mean, later keys included.
5. The chunk that does not fit into the budget is read in part, from its beginning.
6. dhsa_blocks: rows read equal shares of what they see instead of equal numbers, as other methods here do.
7. Decoded tokens read everything, as in the code; the abstract says otherwise.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparing.core.allocate_blocks import EqualRows
from sparing.core.measured import MeasuredMethod
from sparing.core.method import register
from sparing.core.pattern import Pattern
from sparing.core.prefill import BlockParts, BlockScorer, Chunks, PromptCall, SparsePrefill, choose_blocks
from sparing.errors import ScoresMismatchError, require
from sparing.measures.blocks import pooled
from sparing.measures.boundaries import best_peaks, cosine_drops, key_features, scored

# Entries (query block, token) that are chosen at a time.
ELEMENTS = 2**22


@dataclass(frozen=True)
class Chunked(SparsePrefill):
    """Base of the variants that cut the text.

    Attributes:
        chunk: tokens of a chunk on average (32). distance: tokens of a chunk at least (8).
        instruction: the last tokens of a prompt, which begin a chunk (64); 0 for none.
        sinks: first tokens that every row reads (4). recent: tokens before a row's block that it reads (64).
    """

    chunk: int = 32
    distance: int = 8
    instruction: int = 64
    sinks: int = 4
    recent: int = 64
    chunks: ClassVar[Chunks] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.chunk >= 1, "chunk", self.chunk, "a number of tokens >= 1")
        require(self.distance >= 1, "distance", self.distance, "a number of tokens >= 1")
        for name in ("instruction", "sinks", "recent"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "a number of tokens >= 0")

    def boundaries(self, call: PromptCall) -> Tensor:
        """(N,): scores of the positions as beginnings of a chunk; -inf where there is none."""
        raise NotImplementedError

    def begins(self, call: PromptCall) -> Tensor:
        """(chunks,) int64 ascending: where each chunk begins; the first at 0."""
        scores = self.boundaries(call)
        at = torch.arange(call.tokens, device=scores.device)
        fixed = at[[0] if self.instruction == 0 else [0, max(call.tokens - self.instruction, 0)]]
        is_near = ((at[:, None] - fixed).abs() < self.distance).any(-1)
        number = max(call.tokens // self.chunk - len(fixed), 0)
        best = best_peaks(scores.masked_fill(is_near, -torch.inf), self.distance, number)
        return torch.cat([best, fixed]).unique()

    def pattern(self, call: PromptCall) -> Pattern:
        """See `SparsePrefill.pattern`."""
        begins, grid = self.begins(call), call.grid(self.block)
        choice = TokenChoice(grid, self.sinks, self.recent)
        columns = choice.best(chunk_scores(call, begins, self.block), begins, self.pairs(call))
        columns = columns.expand(call.heads, -1, -1)
        return Pattern(call.tokens, call.start, self.block, grid.blocks, columns, blocks_per_group=1)


def chunk_scores(call: PromptCall, begins: Tensor, size: int) -> Tensor:
    """(nq, chunks) float32: mean over heads of mean query times mean key times the root of the chunk's length."""
    lengths = torch.cat([begins[1:], begins.new_tensor([call.tokens])]) - begins
    chunk_of = torch.arange(len(begins), device=begins.device).repeat_interleave(lengths)
    keys = call.keys.float()
    sums = keys.new_zeros(keys.shape[0], len(begins), keys.shape[2]).index_add_(1, chunk_of, keys)
    queries = pooled(call.query, size, call.start).unflatten(0, (keys.shape[0], -1)).sum(1)
    products = torch.einsum("hid,hcd->ic", queries, sums * lengths[:, None] ** -0.5)
    return products * (call.softmax.scaling / call.heads)


class TokenChoice:
    """Tokens that blocks of rows read besides their own block, equally many each as far as there are any.

    Attributes:
        grid: of the call. sinks, recent: first tokens, and last before the block, that are always read.
    """

    def __init__(self, grid: Pattern, sinks: int, recent: int) -> None:
        self.grid, self.sinks, self.recent = grid, sinks, recent
        device = grid.blocks.device
        numbers = torch.arange(grid.first_block, grid.num_key_blocks, device=device)
        self.before = numbers * grid.size  # tokens before every block, which it may choose from
        ends = (self.before + grid.size).clamp_max(grid.tokens)
        self.rows = ends - self.before.clamp_min(grid.start)
        self.always = self.before.clamp_max(sinks + recent)
        self.own = int((grid.areas() * grid.blocks[0]).sum())

    def counts(self, pairs: int) -> Tensor:
        """(nq,) how many tokens each block of rows reads: as many as a head's budget of pairs has room for."""

        def counts(most: int) -> Tensor:
            return torch.maximum(self.before.clamp_max(most), self.always)

        room = pairs - self.own
        most = max(bisect_right(range(self.grid.tokens), room, key=lambda n: int((counts(n) * self.rows).sum())) - 1, 0)
        found = counts(most)
        more = (self.before > most) & (found == most)  # one more for some of the rows that could read more
        rest = room - int((found * self.rows).sum())
        return found + (more & ((self.rows * more).cumsum(0) <= rest))

    def best(self, scores: Tensor, begins: Tensor, pairs: int) -> Tensor:
        """(1, nq, N) bool: the tokens of the chunks that score best."""
        tokens = torch.arange(self.grid.tokens, device=begins.device)
        chunk_of = torch.bucketize(tokens, begins, right=True) - 1
        counts, columns = self.counts(pairs), torch.zeros(len(scores), len(tokens), dtype=torch.bool).to(begins.device)
        for part in torch.arange(len(scores)).split(max(ELEMENTS // len(tokens), 1)):
            some = slice(int(part[0]), int(part[-1]) + 1)
            before = self.before[some, None]
            forced = (tokens < self.sinks) | (tokens >= before - self.recent)
            low = begins.clamp_min(self.sinks)  # of what each chunk has to choose from
            high = torch.cat([begins[1:], begins.new_tensor([len(tokens)])]).minimum(before - self.recent)
            taken = best_first(scores[some], (high - low).clamp_min(0), (counts - self.always)[some, None])
            is_best = (tokens >= low[chunk_of]) & (tokens - low[chunk_of] < taken[:, chunk_of])
            columns[some] = (forced | is_best) & (tokens < before)
        return columns[None]


def best_first(scores: Tensor, sizes: Tensor, room: Tensor) -> Tensor:
    """(rows, n): how much of each of n things is taken if the best are taken first until (rows, 1) room is full."""
    order = scores.masked_fill(sizes == 0, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    sizes = sizes.gather(-1, order)
    left = (room - (sizes.cumsum(-1) - sizes)).clamp_min(0)
    return torch.zeros_like(sizes).scatter_(-1, order, sizes.minimum(left))


@register(
    "dhsa_cosine",
    family="sparse_prefill",
    unit="kv_token",
    moment="prefill",
    paper="2510.24606",
    summary="tokens of the best chunks; chunks end where neighbouring keys differ",
)
@dataclass(frozen=True)
class DHSACosine(Chunked):
    """Chunks cut where cosines of neighbouring keys drop. See the module.

    Attributes:
        window: keys on either side of a position that are compared (4).
    """

    window: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.window >= 1, "window", self.window, "a number of keys >= 1")

    def boundaries(self, call: PromptCall) -> Tensor:
        """See `Chunked.boundaries`."""
        return cosine_drops(key_features(call.keys, self.window), self.window)


@register(
    "dhsa",
    family="sparse_prefill",
    unit="kv_token",
    moment="prefill",
    paper="2510.24606",
    summary="tokens of the best chunks; a trained predictor says where chunks end",
    training_free=False,
    needs=("boundaries",),
)
@dataclass(frozen=True)
class DHSA(MeasuredMethod, Chunked):
    """Chunks cut where a trained predictor says that attention changes. See the module.

    Attributes:
        scores: a measurement by `boundaries`, whose predictors are used.
    """

    keep: int | float | str = 0.25

    def boundaries(self, call: PromptCall) -> Tensor:
        """See `Chunked.boundaries`.

        Raises:
            ScoresMismatchError: the file holds no predictor for these keys.
        """
        weights = self.measured("boundaries").extras.get("weights", torch.empty(0))
        fits = call.attention_layer < len(weights) and weights.shape[1] == call.keys.shape[0]
        if not fits:
            problem = f"there is no predictor for the {call.keys.shape[0]} KV heads of layer {call.attention_layer}"
            raise ScoresMismatchError(problem, self._fix)
        layer = weights[call.attention_layer].to(call.keys.device)
        return scored(key_features(call.keys, layer.shape[-1] // 2), layer)


@dataclass(frozen=True)
class WideQueries(BlockScorer):
    """Mean query of the block of `rows` rows that a row of blocks is in, times mean key.

    Attributes:
        rows: a multiple of the block.
    """

    rows: int = 128

    def score(self, call: PromptCall, size: int) -> Tensor:
        """See `BlockScorer.score`."""
        require(self.rows % size == 0, "rows", self.rows, f"a multiple of the block, {size}")
        times, first = self.rows // size, call.start // size
        queries = pooled(call.query, self.rows, call.start)
        keys = pooled(call.keys, size)
        grouped = queries.unflatten(0, (keys.shape[0], -1)).flatten(1, 2)
        logits = (grouped @ keys.transpose(-1, -2)).view(call.heads, -1, keys.shape[1]) * call.softmax.scaling
        numbers = torch.arange(first, keys.shape[1], device=keys.device)
        return logits[:, numbers // times - first // times]


@register(
    "dhsa_blocks",
    family="sparse_prefill",
    unit="block",
    moment="prefill",
    paper="2510.24606",
    summary="narrow key blocks whose mean key fits the mean query of a wide block of rows best",
)
@dataclass(frozen=True)
class DHSABlocks(SparsePrefill):
    """The released code's fixed blocks. See the module.

    Attributes:
        key_block: keys of a block (32); it divides `block`, the rows that share a mean query, or is all of it.
    """

    key_block: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = self.key_block >= 16 and self.key_block % 16 == 0 and self.block % self.key_size == 0
        require(fits, "key_block", self.key_block, f"a multiple of 16 that divides the block, {self.block}")

    @property
    def key_size(self) -> int:
        """Keys of a block."""
        return min(self.key_block, self.block)

    def block_parts(self) -> BlockParts:
        """See `SparsePrefill.block_parts`."""
        return BlockParts(WideQueries(self.block), EqualRows(), first=1, recent=1)

    def pattern(self, call: PromptCall) -> Pattern:
        """See `SparsePrefill.pattern`."""
        return choose_blocks(self.block_parts(), call, self, self.key_size)
